"""layer_norm: y = (x - mean) * rstd * weight + bias, rstd = 1 / sqrt(var + eps), over the last dimension.

Ba et al. 2016 (arXiv:1607.06450).

    x, y        (N, C)  fp32, fp16, bf16 or fp64 (the public function: (..., C))
    weight      (C,)    bias (C,), both fp32 or both of the dtype of x
    mean, rstd  (N,)    of x, in fp32 (fp64 for fp64); var is the biased variance
    dx          (N, C)  rstd * (g - mean(g) - xhat * mean(g * xhat)), g = dout * weight, xhat = (x - mean) * rstd
    dweight     (C,)    sum over rows of dout * xhat;  dbias (C,) of dout

Saved for backward: x, weight, mean and rstd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightseq_fairseq.ops import _extension
from lightseq_fairseq.ops._dropout import vector_check
from lightseq_fairseq.ops._library import accumulate_dtype, check, register, register_autograd


def norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(N, C), (C,), (C,) -> y (N, C), mean (N,), rstd (N,)."""
    wide = accumulate_dtype(x.dtype)
    y, mean, rstd = torch.native_layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
    return y.to(x.dtype), mean.squeeze(-1), rstd.squeeze(-1)


def norm_backward(dout: Tensor, x: Tensor, weight: Tensor, mean: Tensor,
                       rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, C), (N, C), (C,), (N,), (N,) -> dx (N, C) not yet rounded, dweight (C,), dbias (C,)."""
    wide = mean.dtype
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dout.to(wide), x.to(wide), weight.shape, mean.unsqueeze(-1), rstd.unsqueeze(-1), weight.to(wide),
        weight.to(wide), [True, True, True])  # the last tensor only stands for a bias
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)


def _backward(dout: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = norm_backward(dout, x, weight, mean, rstd)
    return dx.to(x.dtype), dweight, dbias


def row_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes of mean and rstd."""
    wide = accumulate_dtype(x.dtype)
    return x.new_empty(x.shape[:1], dtype=wide), x.new_empty(x.shape[:1], dtype=wide)


_layer_norm = register(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)", norm_forward,
    lambda x, *rest: (torch.empty_like(x), *row_statistics(x)))
_layer_norm_backward = register(
    "layer_norm_backward(Tensor dout, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)",
    _backward, lambda dout, x, weight, *rest: (torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _differentiate(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *_layer_norm_backward(dout.contiguous(), *ctx.saved_tensors), None


register_autograd("layer_norm", _differentiate, _setup_context)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of ``x`` (..., C); see the head of this file.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    columns = x.size(-1)
    check("layer_norm", vector_check("weight", weight, columns, x), vector_check("bias", bias, columns, x),
          (weight.dtype == bias.dtype, lambda: f"weight and bias must agree, got {weight.dtype} and {bias.dtype}"))
    if x.is_cuda:
        _extension.loaded()
    rows = x.reshape(-1, columns).contiguous()  # (..., C) -> (N, C)
    return _layer_norm(rows, weight.contiguous(), bias.contiguous(), eps)[0].view(x.shape)
