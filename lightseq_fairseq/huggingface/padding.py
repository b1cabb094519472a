"""What Hugging Face's attention masks say, as the layout of packed tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightseq_fairseq.layers import Packing


def padding_of(mask: Any, batch: int, queries: int, keys: int, causal: bool,
               device: torch.device) -> Packing | None:
    """The keys that ``mask`` leaves, as the packing of (batch, keys) slots; None for a mask that is not padding.

    ``mask`` is None, (B, S), or as attention takes it, (B or 1, 1, T, S), bool or added to scores. ``causal``: it also
    hides what lies ahead.
    """
    if mask is None:
        return Packing.full(batch, keys, device)
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        return Packing.of(mask.ne(0), 0) if mask.shape == (batch, keys) else None
    if mask.dim() != 4 or mask.size(0) not in (1, batch) or tuple(mask.shape[1:]) != (1, queries, keys):
        return None
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return None
    seen = mask if mask.dtype == torch.bool else mask == 0
    real = seen[:, 0, -1].expand(batch, keys)  # the last query sees every key that anyone sees
    agrees = None
    if causal or mask.dtype != torch.bool or mask.stride(2) != 0:
        expected = real[:, None]
        if causal:
            expected = expected & torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril()
        same = seen[:, 0] == expected
        if mask.dtype != torch.bool:
            same &= seen[:, 0] | (mask[:, 0] <= torch.finfo(mask.dtype).min / 2)
        agrees = same.all()
    packing = Packing.of(real, 0)
    return packing if agrees is None or bool(agrees) else None
