"""column_sum_: the gradient of a bias, out = sum over rows of x, or out += it.

    x    (N, C)  fp32, fp16 or bf16; summed in fp32 (fp64 for fp64) in a fixed order and rounded once
    out  (C,)    in the dtype of x, written
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightseq_fairseq.ops import _extension
from lightseq_fairseq.ops._library import accumulate_dtype, check, register, shape


def _sum(out: Tensor, x: Tensor, add: bool) -> None:
    total = x.sum(0, dtype=accumulate_dtype(x.dtype))
    out.copy_(out + total if add else total)


_column_sum = register("column_sum_(Tensor(a!) out, Tensor x, bool add) -> ()", _sum, None)


@torch.no_grad()
def column_sum_(out: Tensor, x: Tensor, add: bool = False) -> None:
    """Write or, with ``add``, add the sum of ``x`` (N, C) over its rows to ``out`` (C,)."""
    check("column_sum_",
          (x.dim() == 2, lambda: f"x must have shape (N, C), got {shape(x)}"),
          (out.shape == x.shape[1:], lambda: f"out must have shape {shape(x)[1:]}, got {shape(out)}"),
          (out.dtype == x.dtype, lambda: f"out must be {x.dtype} as x is, got {out.dtype}"))
    if x.is_cuda:
        _extension.loaded()
    _column_sum(out, x.contiguous(), add)
