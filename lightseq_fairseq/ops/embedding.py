"""embedding: y_i = scale * weight[token_i] + position_weight[row_i].

    tokens           (N,) int64
    weight           (V, C)           row ``padding_idx`` receives no gradient, as torch's own embedding has it
    position_weight  (P, C) or None   learned (a parameter) or sinusoidal (a constant), position_rows (N,) int64
    y                (N, C) in the dtype of ``weight``
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def embedding(tokens: Tensor, weight: Tensor, scale: float, padding_idx: int,
              position_rows: Tensor | None = None, position_weight: Tensor | None = None) -> Tensor:
    """Scaled token embedding plus position embedding; see the head of this file."""
    y = F.embedding(tokens, weight, padding_idx)
    if scale != 1.0:
        y = y * scale
    if position_weight is not None:
        assert position_rows is not None
        y = y + F.embedding(position_rows, position_weight).type_as(y)
    return y
