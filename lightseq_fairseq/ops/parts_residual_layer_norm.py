"""parts_residual_layer_norm: sum = residual + bias + parts[0] + parts[1] + ..., y = layer_norm(sum).

The end of a sublayer whose product was made in parts, each from some of its columns, so that more of the GPU works on
it. For inference: it has no backward.

    parts           (S, N, C) fp32 (fp64 for fp64)
    bias            (C,)      fp32 or the dtype of residual
    residual        (N, C)
    weight          (C,)      norm_bias (C,), of the norm: both fp32 or both of the dtype of residual
    sum, y          (N, C)    of the dtype of residual; y is the norm of sum as it is rounded
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightseq_fairseq.ops import _extension
from lightseq_fairseq.ops._dropout import vector_check
from lightseq_fairseq.ops._library import accumulate_dtype, check, register, shape
from lightseq_fairseq.ops.layer_norm import norm_forward


def _forward(parts: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, norm_bias: Tensor,
             eps: float) -> tuple[Tensor, Tensor]:
    wide = accumulate_dtype(residual.dtype)
    total = (residual.to(wide) + bias.to(wide) + parts.sum(0)).to(residual.dtype)
    return total, norm_forward(total, weight, norm_bias, eps)[0]


_parts_residual_layer_norm = register(
    "parts_residual_layer_norm(Tensor parts, Tensor bias, Tensor residual, Tensor weight, Tensor norm_bias, float eps)"
    " -> (Tensor, Tensor)", _forward,
    lambda parts, bias, residual, *rest: (torch.empty_like(residual), torch.empty_like(residual)))


def parts_residual_layer_norm(parts: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, norm_bias: Tensor,
                              eps: float) -> tuple[Tensor, Tensor]:
    """``sum`` and ``y``, (N, C) each; see the head of this file.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    columns, wide = residual.size(-1), accumulate_dtype(residual.dtype)
    check("parts_residual_layer_norm",
          (parts.dim() == 3 and parts.shape[1:] == residual.shape and parts.dtype == wide,
           lambda: f"parts must be (S, {residual.size(0)}, {columns}) {wide}, got {shape(parts)} {parts.dtype}"),
          *(vector_check(name, vector, columns, residual)
            for name, vector in (("bias", bias), ("weight", weight), ("norm_bias", norm_bias))),
          (weight.dtype == norm_bias.dtype,
           lambda: f"weight and norm_bias must agree, got {weight.dtype} and {norm_bias.dtype}"))
    if residual.is_cuda:
        _extension.loaded()
    return _parts_residual_layer_norm(parts.contiguous(), bias.contiguous(), residual.contiguous(), weight.contiguous(),
                                      norm_bias.contiguous(), eps)
