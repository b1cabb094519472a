"""dropout_residual: y = residual + dropout(x, p), the end of every sublayer.

    x, residual, y  (..., C)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def dropout_residual(x: Tensor, residual: Tensor, p: float = 0.0) -> Tensor:
    """Add ``x`` to the residual stream, dropping elements of ``x`` with probability ``p`` (0 outside training)."""
    return residual + (F.dropout(x, p) if p > 0 else x)
