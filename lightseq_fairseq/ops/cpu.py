"""The compiled CPU operators of generation, ``lightseq_cpu``, in fp32.

    encode               embedded sources through a whole encoder: see CompiledEncoder in layers/compiled.py
    decoder_step         one token of every beam through a whole decoder: see CompiledDecoder there
    quantize_rows        x (N, I) -> 128 + x / scale as bytes (N, I), and the scale of each row (N, 1): see linear.py
    log_softmax_         table (B, R, V) -= log sum exp(table) of each row
    best_continuations   table (B, R, V), scores (B, R) or None -> the ``count`` largest of table + scores of each
                         sentence, best first, earlier first among equals: values, tokens and rows, (B, count) each

Plain PyTorch does the same without them (layers/inference.py, layers/incremental.py, generator/search.py); that is
their reference. ``lanes`` is the width of the instruction set to use, 0 for the widest this machine has.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightseq_fairseq.ops import _extension

PANEL = 32
"""Columns of a weight that lie together in memory."""


def compiled_operators() -> Any | None:
    """The operators, ``torch.ops.lightseq_cpu``; None where they can't be had, which is said once."""
    return torch.ops.lightseq_cpu if _extension.cpu_loaded() else None


def pack_linear(weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Weight (O, I) as panels (O / PANEL, I, PANEL) and bias (O,), both flat; zeros fill the last panel."""
    padding = -weight.size(0) % PANEL
    bias = weight.new_zeros(weight.size(0)) if bias is None else bias
    panels = F.pad(weight, (0, 0, 0, padding)).view(-1, PANEL, weight.size(1)).transpose(1, 2)
    return [panels.flatten(), F.pad(bias, (0, padding))]
