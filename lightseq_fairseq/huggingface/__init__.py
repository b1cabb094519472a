"""Hugging Face models on our operators: ``model, report = accelerate(model)``, and ``restore(model)``.

Needs transformers 5 (``pip install 'lightseq-fairseq[huggingface]'``).
"""

from __future__ import annotations

from lightseq_fairseq.huggingface.acceleration import Report, accelerate, restore

__all__ = ["Report", "accelerate", "restore"]
