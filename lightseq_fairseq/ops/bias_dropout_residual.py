"""bias_dropout_residual: y = residual + dropout(x + bias, p), the end of a sublayer that no norm follows.

    x, residual, y  (N, C)  of one dtype; computed in fp32 (fp64 for fp64)
    bias            (C,)    of the last GEMM, which leaves it out; fp32 or the dtype of x
    seed            (1,) int64, or None where p is 0
    dresidual       (N, C)  dout itself;  dx (N, C) dout * mask, dout itself where p is 0;  dbias (C,) its sum over rows

Saved for backward: the seed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightseq_fairseq.ops import _extension
from lightseq_fairseq.ops._dropout import dropout, seed_checks, vector_check
from lightseq_fairseq.ops._library import accumulate_dtype, check, register, register_autograd, shape


def _forward(x: Tensor, bias: Tensor, residual: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """(N, C), (C,), (N, C) -> y (N, C)."""
    wide = accumulate_dtype(x.dtype)
    return (residual.to(wide) + dropout(x.to(wide) + bias.to(wide), p, seed)).to(x.dtype)


def _backward(dout: Tensor, bias: Tensor, p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """(N, C), (C,) for its dtype -> dx (N, C), empty where p is 0, and dbias (C,)."""
    dx = dropout(dout.to(accumulate_dtype(dout.dtype)), p, seed)
    return dx.to(dout.dtype) if p > 0 else dout.new_empty(0), dx.sum(0).to(bias.dtype)


_bias_dropout_residual = register(
    "bias_dropout_residual(Tensor x, Tensor bias, Tensor residual, float p, Tensor? seed) -> Tensor",
    _forward, lambda x, *rest: torch.empty_like(x))
_bias_dropout_residual_backward = register(
    "bias_dropout_residual_backward(Tensor dout, Tensor bias, float p, Tensor? seed) -> (Tensor, Tensor)", _backward,
    lambda dout, bias, p, seed: (torch.empty_like(dout) if p > 0 else dout.new_empty(0), torch.empty_like(bias)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, _, ctx.p, seed = inputs
    ctx.save_for_backward(bias, seed)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    bias, seed = ctx.saved_tensors
    dx, dbias = _bias_dropout_residual_backward(dout.contiguous(), bias, ctx.p, seed)
    return dx if ctx.p > 0 else dout, dbias, dout, None, None


register_autograd("bias_dropout_residual", _differentiate, _setup_context)


def bias_dropout_residual(x: Tensor, bias: Tensor, residual: Tensor, p: float = 0.0,
                          seed: Tensor | None = None) -> Tensor:
    """``residual + dropout(x + bias)`` of ``x`` (N, C), ``bias`` (C,), ``residual`` (N, C); see the head of this file.

    ``p`` is 0 outside training. ``x`` and ``residual`` of two dtypes meet in the wider. Raises ValueError for shapes or
    dtypes that do not fit.
    """
    dtype = torch.promote_types(x.dtype, residual.dtype)
    x, residual = x.to(dtype), residual.to(dtype)
    check("bias_dropout_residual",
          (x.dim() == 2, lambda: f"x must have shape (N, C), got {shape(x)}"),
          (residual.shape == x.shape, lambda: f"residual must have shape {shape(x)}, got {shape(residual)}"),
          vector_check("bias", bias, x.size(-1), x),
          *seed_checks(p, seed, x))
    if x.is_cuda:
        _extension.loaded()
    return _bias_dropout_residual(x.contiguous(), bias.contiguous(), residual.contiguous(), p, seed)
