"""bias_activation_dropout: y = dropout(act(x + bias), p), between the two GEMMs of a feed-forward sublayer.

    x, y     (N, I)  y has the dtype of x; computed in fp32 (fp64 for fp64)
    bias     (I,)    of the first GEMM, which leaves it out; fp32 or the dtype of x
    seed     (1,) int64, or None where p is 0
    dx       (N, I)  dout * mask * act'(x + bias);  dbias (I,) its sum over rows

The activations are fairseq's by fairseq's names (ops/activation.py). Saved for backward: y for relu and linear, whose
slope it tells, x for the others; the mask is drawn again from the seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightseq_fairseq.ops import _extension
from lightseq_fairseq.ops._dropout import dropout, scale, seed_checks, vector_check
from lightseq_fairseq.ops._library import accumulate_dtype, check, register, register_autograd, shape
from lightseq_fairseq.ops.activation import ACTIVATION_FUNCTIONS

_aten = torch.ops.aten
_DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # d, x + bias -> d * act'(x + bias)
    "relu_squared": lambda d, z: 2 * d * z.relu(),
    "gelu": lambda d, z: _aten.gelu_backward(d, z),
    "gelu_accurate": lambda d, z: _aten.gelu_backward(d, z, approximate="tanh"),
    "gelu_fast": lambda d, z: _aten.gelu_backward(d, z, approximate="tanh"),
    "swish": lambda d, z: _aten.silu_backward(d, z),
    "tanh": lambda d, z: d * (1 - z.tanh().square()),
}
SAVES_OUTPUT = frozenset(ACTIVATION_FUNCTIONS) - frozenset(_DERIVATIVES)
"""relu and linear: backward needs y, which the next GEMM keeps anyway, and not x."""


def _forward(x: Tensor, bias: Tensor, activation: str, p: float, seed: Tensor | None) -> Tensor:
    """(N, I), (I,) -> y (N, I)."""
    wide = accumulate_dtype(x.dtype)
    return dropout(ACTIVATION_FUNCTIONS[activation](x.to(wide) + bias.to(wide)), p, seed).to(x.dtype)


def _backward(dout: Tensor, saved: Tensor, bias: Tensor, activation: str, p: float,
              seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """(N, I), (N, I), (I,) -> dx (N, I), dbias (I,)."""
    wide = accumulate_dtype(dout.dtype)
    if activation == "relu":
        dx = dout.to(wide) * (saved > 0) * scale(p)
    else:
        dx = dropout(dout.to(wide), p, seed)
        if activation in _DERIVATIVES:
            dx = _DERIVATIVES[activation](dx, saved.to(wide) + bias.to(wide))
    return dx.to(dout.dtype, copy=dx is dout), dx.sum(0).to(bias.dtype)


_bias_activation_dropout = register(
    "bias_activation_dropout(Tensor x, Tensor bias, str activation, float p, Tensor? seed) -> Tensor",
    _forward, lambda x, *rest: torch.empty_like(x))
_bias_activation_dropout_backward = register(
    "bias_activation_dropout_backward(Tensor dout, Tensor saved, Tensor bias, str activation, float p, Tensor? seed)"
    " -> (Tensor, Tensor)", _backward,
    lambda dout, saved, bias, *rest: (torch.empty_like(dout), torch.empty_like(bias)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.activation, ctx.p, seed = inputs
    ctx.save_for_backward(output if ctx.activation in SAVES_OUTPUT else x, bias, seed)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    saved, bias, seed = ctx.saved_tensors
    dx, dbias = _bias_activation_dropout_backward(dout.contiguous(), saved, bias, ctx.activation, ctx.p, seed)
    return dx, dbias, None, None, None


register_autograd("bias_activation_dropout", _differentiate, _setup_context)


def bias_activation_dropout(x: Tensor, bias: Tensor, activation: str, p: float = 0.0,
                            seed: Tensor | None = None) -> Tensor:
    """``dropout(act(x + bias))`` of ``x`` (N, I) and ``bias`` (I,); see the head of this file.

    ``p`` is 0 outside training. Raises ValueError for shapes, dtypes or names that do not fit.
    """
    check("bias_activation_dropout",
          (x.dim() == 2, lambda: f"x must have shape (N, I), got {shape(x)}"),
          vector_check("bias", bias, x.size(-1), x),
          (activation in ACTIVATION_FUNCTIONS,
           lambda: f"activation must be one of {', '.join(ACTIVATION_FUNCTIONS)}, got {activation!r}"),
          *seed_checks(p, seed, x))
    if x.is_cuda:
        _extension.loaded()
    return _bias_activation_dropout(x.contiguous(), bias.contiguous(), activation, p, seed)
