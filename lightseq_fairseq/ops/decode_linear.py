"""decode_linear: out = act(norm(x) weight^T + bias) + residual, for the few rows of a decoding step.

    x         (R, I)       norm(x) is layer_norm(x) where norm_weight (I,) and norm_bias (I,) are given, else x
    weight    (O, I)       bias (O,) or None
    residual  (R, O)       or None
    out       (R, O)       computed in fp32
    normed    (R, I)       norm(x) in the dtype of x, for the residual of a post-LN layer; empty unless asked for

A layer of a decoder is eight launches this way: six of these, two of attention. Weights do not change while others run,
so a launch fetches its own before the one ahead of it has ended. The kernel takes 16-bit types and sizes that are
multiples of 16 (I, up to 4096) and 8 (O); for anything else :func:`serves` says no, and the reference answers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightseq_fairseq.ops import _extension
from lightseq_fairseq.ops._library import accumulate_dtype, check, register, shape
from lightseq_fairseq.ops.activation import ACTIVATION_FUNCTIONS
from lightseq_fairseq.ops.layer_norm import norm_forward

MAX_ROWS = 64
"""Rows up to which the kernel is faster than torch's GEMM and an operator beside it (H200, 512 columns)."""
MAX_OUTER = 8192
"""Outputs up to which it is: with 4 rows and 28 672 outputs it takes 12.5 us, torch's GEMM 6.5 and a norm 1.6."""


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None,
             norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, keep: bool) -> tuple[Tensor, Tensor]:
    """(R, I), (O, I) -> out (R, O), normed (R, I) or empty."""
    if norm_weight is not None and norm_bias is not None:
        x = norm_forward(x, norm_weight, norm_bias, eps)[0]
    wide = accumulate_dtype(x.dtype)
    out = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    out = ACTIVATION_FUNCTIONS[activation](out)
    out = out if residual is None else out + residual
    return out.to(x.dtype), x.clone() if keep else x.new_empty(0)


_decode_linear = register(
    "decode_linear(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? residual, Tensor? norm_weight,"
    " Tensor? norm_bias, float eps, bool keep) -> (Tensor, Tensor)", _forward,
    lambda x, weight, bias, activation, residual, norm_weight, norm_bias, eps, keep: (
        x.new_empty(x.size(0), weight.size(0)), torch.empty_like(x) if keep else x.new_empty(0)))


def decode_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "linear",
                  residual: Tensor | None = None, norm_weight: Tensor | None = None, norm_bias: Tensor | None = None,
                  eps: float = 1e-5, keep: bool = False) -> tuple[Tensor, Tensor]:
    """``out`` (R, O), and with ``keep`` ``normed`` (R, I); see the head of this file.

    Raises ValueError for shapes, dtypes or names that do not fit.
    """
    rows, inner = x.shape
    outer = weight.size(0)
    vectors = {"bias": (bias, outer), "norm_weight": (norm_weight, inner), "norm_bias": (norm_bias, inner)}
    check("decode_linear",
          (weight.shape == (outer, inner), lambda: f"weight must have {inner} columns, got {shape(weight)}"),
          (weight.dtype == x.dtype, lambda: f"weight must be {x.dtype} as x is, got {weight.dtype}"),
          *((vector is None or (vector.shape == (size,) and vector.dtype == x.dtype),
             lambda n=name, v=vector, s=size: f"{n} must be ({s},) in {x.dtype}, got {shape(v)} in {v.dtype}")
            for name, (vector, size) in vectors.items()),
          ((norm_weight is None) == (norm_bias is None), lambda: "norm_weight and norm_bias must be given together"),
          (residual is None or (residual.shape == (rows, outer) and residual.dtype == x.dtype),
           lambda: f"residual must be ({rows}, {outer}) in {x.dtype}, got {shape(residual)}"),  # type: ignore[arg-type]
          (activation in ACTIVATION_FUNCTIONS,
           lambda: f"activation must be one of {', '.join(ACTIVATION_FUNCTIONS)}, got {activation!r}"))
    if x.is_cuda and not (_extension.loaded() and _compiled(x, weight)):
        return _forward(x, weight, bias, activation, residual, norm_weight, norm_bias, eps, keep)
    if residual is not None:
        residual = residual.contiguous()
    return _decode_linear(x.contiguous(), weight.contiguous(), bias, activation, residual, norm_weight, norm_bias, eps,
                          keep)


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`decode_linear` is the way to go for these, and not torch's GEMM."""
    return (x.size(0) <= MAX_ROWS and weight.size(0) <= MAX_OUTER
            and (not x.is_cuda or (_extension.loaded() and _compiled(x, weight))))


def _compiled(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes them."""
    outer, inner = weight.shape
    return (x.dtype in (torch.float16, torch.bfloat16) and outer % 8 == 0 and split(inner) > 0
            and torch.cuda.get_device_capability(x.device) >= (9, 0))


def split(inner: int) -> int:
    """Blocks that share a row of ``inner`` columns, at most 512 each; 0 where none of 1, 2, 4 and 8 serves."""
    return next((parts for parts in (1, 2, 4, 8) if inner % (16 * parts) == 0 and inner // parts <= 512), 0)
