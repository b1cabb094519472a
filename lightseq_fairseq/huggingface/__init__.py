"""Hugging Face models on our operators: ``model, report = accelerate(model)``, and ``restore(model)``.

Needs transformers 5.17 or later (``pip install 'lightseq-fairseq[huggingface]'``).
"""

from __future__ import annotations

import importlib.metadata

OLDEST = (5, 17)
"""The first version of transformers whose layers are known here."""


def _check_version() -> None:
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    numbers = version.split(".")
    if not all(number.isdigit() for number in numbers[:2]) or tuple(map(int, numbers[:2])) < OLDEST:
        raise ImportError(f"lightseq_fairseq.huggingface needs transformers {OLDEST[0]}.{OLDEST[1]} or later, found "
                          f"{version}: pip install 'lightseq-fairseq[huggingface]'")


_check_version()

from lightseq_fairseq.huggingface.acceleration import Report, accelerate, restore  # noqa: E402

__all__ = ["Report", "accelerate", "restore"]
