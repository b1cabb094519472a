"""activation_dropout: y = dropout(act(x), p).

    x  (..., I)  output of the first feed-forward projection, bias included
    y  as x      kept elements are scaled by 1 / (1 - p)

The activations are fairseq's, by fairseq's names; ``gelu`` and ``gelu_accurate`` are the erf form and the
tanh form of Hendrycks & Gimpel 2016 (arXiv:1606.08415), ``relu_squared`` is So et al. 2021 (arXiv:2109.08668).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x.float()).type_as(x)


def _gelu_accurate(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "gelu": _gelu,
    "gelu_accurate": _gelu_accurate,
    "gelu_fast": _gelu_accurate,  # fairseq's old name for the tanh form
    "swish": F.silu,
    "tanh": torch.tanh,
    "linear": _identity,
}


def activation_dropout(x: Tensor, activation: str, p: float = 0.0) -> Tensor:
    """Activation by fairseq name, then dropout with probability ``p`` (0 outside training)."""
    y = ACTIVATION_FUNCTIONS[activation](x)
    return F.dropout(y, p) if p > 0 else y
