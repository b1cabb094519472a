"""embedding: y_i = dropout(scale * weight[token_i] + position_weight[row_i], p).

    tokens           (N,) int64
    weight           (V, C)           row ``padding_idx`` receives no gradient, as torch's own embedding has it
    position_weight  (P, C) or None   learned (a parameter) or sinusoidal (a constant), position_rows (N,) int64
    y                (N, C) in the dtype of ``weight``; computed in fp32 (fp64 for fp64)
    seed             (1,) int64, or None where p is 0
    dweight          (V, C)           row v: scale * sum of dout_i * mask_i over the i with token_i = v, summed in fp32
                                      in the order of i; rows nobody used are 0. dposition_weight likewise, unscaled

Saved for backward: the indices and the seed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightseq_fairseq.ops import _extension
from lightseq_fairseq.ops._dropout import dropout, seed_checks
from lightseq_fairseq.ops._library import accumulate_dtype, check, register, register_autograd, shape


def _forward(tokens: Tensor, weight: Tensor, scale: float, padding_idx: int, position_rows: Tensor | None,
             position_weight: Tensor | None, p: float, seed: Tensor | None) -> Tensor:
    """(N,), (V, C) -> y (N, C)."""
    wide = accumulate_dtype(weight.dtype)
    y = F.embedding(tokens, weight).to(wide)
    y = y if scale == 1 else y * scale
    if position_rows is not None and position_weight is not None:
        y = y + F.embedding(position_rows, position_weight).to(wide)
    return dropout(y, p, seed).to(weight.dtype)


def _backward(dout: Tensor, indices: Tensor, table_rows: int, padding_idx: int, scale: float, p: float,
              seed: Tensor | None) -> Tensor:
    """(N, C), (N,) -> the gradient (table_rows, C) of the table that ``indices`` point into."""
    dy = dropout(dout.to(accumulate_dtype(dout.dtype)), p, seed)
    dtable = dy.new_zeros(table_rows, dy.size(-1)).index_add_(0, indices, dy, alpha=scale)
    if padding_idx >= 0:
        dtable[padding_idx] = 0
    return dtable.to(dout.dtype)


_embedding = register(
    "embedding(Tensor tokens, Tensor weight, float scale, int padding_idx, Tensor? position_rows,"
    " Tensor? position_weight, float p, Tensor? seed) -> Tensor", _forward,
    lambda tokens, weight, *rest: weight.new_empty(tokens.size(0), weight.size(1)))
_embedding_backward = register(
    "embedding_backward(Tensor dout, Tensor indices, int table_rows, int padding_idx, float scale, float p,"
    " Tensor? seed) -> Tensor", _backward,
    lambda dout, indices, table_rows, *rest: dout.new_empty(table_rows, dout.size(1)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, weight, ctx.scale, ctx.padding_idx, position_rows, position_weight, ctx.p, seed = inputs
    ctx.table_rows = weight.size(0)
    ctx.position_table_rows = None if position_weight is None else position_weight.size(0)
    ctx.save_for_backward(tokens, position_rows, seed)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    tokens, position_rows, seed = ctx.saved_tensors
    dout, dweight, dposition_weight = dout.contiguous(), None, None
    if ctx.needs_input_grad[1]:
        dweight = _embedding_backward(dout, tokens, ctx.table_rows, ctx.padding_idx, ctx.scale, ctx.p, seed)
    if ctx.needs_input_grad[5]:
        dposition_weight = _embedding_backward(dout, position_rows, ctx.position_table_rows, -1, 1.0, ctx.p, seed)
    return None, dweight, None, None, None, dposition_weight, None, None


register_autograd("embedding", _differentiate, _setup_context)


def embedding(tokens: Tensor, weight: Tensor, scale: float, padding_idx: int, position_rows: Tensor | None = None,
              position_weight: Tensor | None = None, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """Scaled token embedding plus position embedding, then dropout, (N, C); see the head of this file.

    ``padding_idx`` is -1 where there is none; ``p`` is 0 outside training. Raises ValueError for shapes or dtypes that
    do not fit.
    """
    check("embedding",
          (tokens.dim() == 1 and tokens.dtype == torch.int64,
           lambda: f"tokens must be (N,) int64, got {shape(tokens)} {tokens.dtype}"),
          (weight.dim() == 2, lambda: f"weight must have shape (V, C), got {shape(weight)}"),
          (-1 <= padding_idx < weight.size(0),
           lambda: f"padding_idx must be a row of weight or -1, got {padding_idx} of {weight.size(0)} rows"),
          ((position_rows is None) == (position_weight is None),
           lambda: "position_rows and position_weight must be given together, got one of them"),
          (position_rows is None or (position_rows.shape == tokens.shape and position_rows.dtype == torch.int64),
           lambda: f"position_rows must be {shape(tokens)} int64, got {shape(position_rows)} {position_rows.dtype}"),
          (position_weight is None or position_weight.shape[1:] == weight.shape[1:],
           lambda: f"position_weight must have shape (P, {weight.size(-1)}), got {shape(position_weight)}"),
          *seed_checks(p, seed, weight))
    if weight.is_cuda:
        _extension.loaded()
    if position_rows is not None and position_weight is not None:
        position_rows, position_weight = position_rows.contiguous(), position_weight.to(weight.dtype).contiguous()
    return _embedding(tokens.contiguous(), weight.contiguous(), scale, padding_idx, position_rows, position_weight, p,
                      seed)
