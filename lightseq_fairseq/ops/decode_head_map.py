"""Linear maps of a decoding step, one for each head: out[:, h] = x[:, h] weight[h].

    x       (R, H * D)     few rows
    weight  (H, D, O)
    out     (R, H, O)      computed in fp32, in the dtype of x

What turns queries into those that :func:`decode_memory_attention` asks memory with. Behind a product of torch's that
could not begin before the product has ended.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightseq_fairseq.ops import _extension
from lightseq_fairseq.ops._library import check, register, shape

_HEAD_DIM, _OUTER_STEP = 64, 64
"""What the kernel takes: D, and multiples of the latter for O."""


def _forward(x: Tensor, weight: Tensor) -> Tensor:
    heads, dim, outer = weight.shape
    out = x.new_empty(x.size(0), heads, outer)
    torch.bmm(x.view(-1, heads, dim).transpose(0, 1), weight, out=out.transpose(0, 1))
    return out


_decode_head_map = register(
    "decode_head_map(Tensor x, Tensor weight) -> Tensor", _forward,
    lambda x, weight: x.new_empty(x.size(0), weight.size(0), weight.size(2)))


def decode_head_map(x: Tensor, weight: Tensor) -> Tensor:
    """``out``; see the head of this file. Without a kernel for these shapes and dtypes it is a product of torch's.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    check("decode_head_map",
          (weight.dim() == 3, lambda: f"weight must be (H, D, O), got {shape(weight)}"),
          (weight.dim() != 3 or x.shape[1:] == (weight.size(0) * weight.size(1),),
           lambda: f"x must be (R, {weight.size(0) * weight.size(1)}), got {shape(x)}"),
          (x.dtype == weight.dtype, lambda: f"weight must be {x.dtype} as x is, got {weight.dtype}"))
    x, weight = x.contiguous(), weight.contiguous()
    if x.is_cuda and not (_extension.loaded() and _compiled(weight)):
        return _forward(x, weight)
    return _decode_head_map(x, weight)


def _compiled(weight: Tensor) -> bool:
    return (weight.dtype in (torch.float16, torch.bfloat16) and weight.size(1) == _HEAD_DIM
            and weight.size(2) % _OUTER_STEP == 0)
