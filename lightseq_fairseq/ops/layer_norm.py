"""layer_norm: y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension (Ba et al. 2016).

    x       (..., C)  fp32, fp16, bf16 or fp64
    weight  (C,)      bias (C,)
    y       as x; mean and variance are taken in fp32 (fp64 for fp64), the variance is the biased one
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of ``x`` (..., C); see the head of this file."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)
