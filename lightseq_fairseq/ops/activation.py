"""Activations by fairseq's names: ``gelu`` and ``gelu_accurate`` are the erf form and the tanh form of Hendrycks &
Gimpel 2016 (arXiv:1606.08415), ``relu_squared`` is So et al. 2021 (arXiv:2109.08668)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightseq_fairseq.ops._library import accumulate_dtype


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x.to(accumulate_dtype(x.dtype))).type_as(x)


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
