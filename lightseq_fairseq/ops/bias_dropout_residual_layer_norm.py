"""bias_dropout_residual_layer_norm: sum = residual + dropout(x + bias, p), y = layer_norm(sum).

The end of a sublayer and the norm that follows it. A post-LN layer goes on with y alone, a pre-LN layer with both.

    x, residual        (N, C)  of one dtype
    sum, y             (N, C)  as x; y is the norm of sum as rounded to that dtype
    bias               (C,)    of the last GEMM, which leaves it out
    weight, norm_bias  (C,)    of the norm; the three parameters all fp32 or all of the dtype of x
    mean, rstd         (N,)    of sum, in fp32 (fp64 for fp64), without gradient
    seed               (1,) int64, or None where p is 0
    dresidual          (N, C)  dsum + the norm's gradient (ops/layer_norm.py);  dx (N, C) dresidual * mask
    dbias              (C,)    sum over rows of dx;  dweight, dnorm_bias (C,) as in the norm

Saved for backward: sum, weight, mean, rstd and the seed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightseq_fairseq.ops import _extension
from lightseq_fairseq.ops._dropout import dropout, seed_checks, vector_check
from lightseq_fairseq.ops._library import accumulate_dtype, check, register, register_autograd, shape
from lightseq_fairseq.ops.layer_norm import norm_backward, norm_forward, row_statistics


def _forward(x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, norm_bias: Tensor, eps: float, p: float,
             seed: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> sum (N, C), y (N, C), mean (N,), rstd (N,)."""
    wide = accumulate_dtype(x.dtype)
    total = (residual.to(wide) + dropout(x.to(wide) + bias.to(wide), p, seed)).to(x.dtype)
    return total, *norm_forward(total, weight, norm_bias, eps)


def _backward(dsum: Tensor | None, dy: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, p: float,
              seed: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> dresidual (N, C), dx (N, C), empty where p is 0 as it is dresidual then, dbias, dweight, dnorm_bias (C,)."""
    dresidual, dweight, dnorm_bias = norm_backward(dy, total, weight, mean, rstd)
    if dsum is not None:
        dresidual = dresidual + dsum
    dx = dropout(dresidual, p, seed)
    return (dresidual.to(dy.dtype), dx.to(dy.dtype) if p > 0 else dy.new_empty(0), dx.sum(0).to(weight.dtype), dweight,
            dnorm_bias)


_bias_dropout_residual_layer_norm = register(
    "bias_dropout_residual_layer_norm(Tensor x, Tensor bias, Tensor residual, Tensor weight, Tensor norm_bias,"
    " float eps, float p, Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor)", _forward,
    lambda x, *rest: (torch.empty_like(x), torch.empty_like(x), *row_statistics(x)))
_bias_dropout_residual_layer_norm_backward = register(
    "bias_dropout_residual_layer_norm_backward(Tensor? dsum, Tensor dy, Tensor sum, Tensor weight, Tensor mean,"
    " Tensor rstd, float p, Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _backward,
    lambda dsum, dy, total, weight, mean, rstd, p, seed: (
        torch.empty_like(dy), torch.empty_like(dy) if p > 0 else dy.new_empty(0),
        *(torch.empty_like(weight) for _ in range(3))))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, weight, _, _, ctx.p, seed = inputs
    total, _, mean, rstd = output
    ctx.save_for_backward(total, weight, mean, rstd, seed)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # a sum that nothing else uses has no gradient, and costs none


def _differentiate(ctx: Any, dsum: Tensor | None, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    total, weight, mean, rstd, seed = ctx.saved_tensors
    dsum = None if dsum is None else dsum.contiguous()
    dy = torch.zeros_like(total) if dy is None else dy.contiguous()
    dresidual, dx, dbias, dweight, dnorm_bias = _bias_dropout_residual_layer_norm_backward(
        dsum, dy, total, weight, mean, rstd, ctx.p, seed)
    return dx if ctx.p > 0 else dresidual, dbias, dresidual, dweight, dnorm_bias, None, None, None


register_autograd("bias_dropout_residual_layer_norm", _differentiate, _setup_context)


def bias_dropout_residual_layer_norm(x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, norm_bias: Tensor,
                                     eps: float, p: float = 0.0, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``sum`` = ``residual + dropout(x + bias)`` and its layer norm, both (N, C); see the head of this file.

    ``p`` is 0 outside training. ``x`` and ``residual`` of two dtypes meet in the wider. Raises ValueError for shapes or
    dtypes that do not fit.
    """
    dtype = torch.promote_types(x.dtype, residual.dtype)
    x, residual = x.to(dtype), residual.to(dtype)
    columns, dtypes = x.size(-1), (bias.dtype, weight.dtype, norm_bias.dtype)
    check("bias_dropout_residual_layer_norm",
          (x.dim() == 2, lambda: f"x must have shape (N, C), got {shape(x)}"),
          (residual.shape == x.shape, lambda: f"residual must have shape {shape(x)}, got {shape(residual)}"),
          vector_check("bias", bias, columns, x),
          vector_check("weight", weight, columns, x),
          vector_check("norm_bias", norm_bias, columns, x),
          (len(set(dtypes)) == 1, lambda: f"bias, weight and norm_bias must agree in dtype, got {dtypes}"),
          *seed_checks(p, seed, x))
    if x.is_cuda:
        _extension.loaded()
    return _bias_dropout_residual_layer_norm(x.contiguous(), bias.contiguous(), residual.contiguous(),
                                             weight.contiguous(), norm_bias.contiguous(), eps, p, seed)[:2]
