"""Attention of a decoding step and the linear maps around it in one launch, for small batches.

decode_self_block:

    context  = decode_self_attention(qkv, cache, ancestors, steps, before, cu_seqlens)     see decode_attention
    out      = context weight^T + bias + residual

decode_cross_block, with the residual x:

    q        = norm(x) query_weight^T + query_bias          as decode_linear has it: the norm's gain is in the weights
    context  = decode_cross_attention(q, keys_values, cu_seqlens, beam)
    out      = context weight^T + bias + x

where the residual is normalised if ``gain`` and ``shift`` (E,) are given. R = B * K rows, E = H * D:

    x, residual, out  (R, E)
    moments           (R, E / 16, 2) fp32: of the residual; those of ``out`` come back if asked for
    query_weight      (E, E), query_bias (E,), sums (E,) fp32: see decode_linear.Folded
    weight            (E, E), bias (E,)

A launch waits for all of the one ahead of it; here only the heads of a sentence wait for one another. Weights are read
once for each sentence, which is why large batches are better served by the operators that these stand for:
:func:`serves` says when.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightseq_fairseq.ops import _extension
from lightseq_fairseq.ops._library import check, register, shape
from lightseq_fairseq.ops.decode_attention import decode_cross_attention, decode_self_attention
from lightseq_fairseq.ops.decode_linear import MOMENT_COLUMNS, decode_linear

HEAD_DIMS = (32, 64)
LEAST_HEADS, MAX_HEADS = 4, 8
"""Heads are the blocks of a cluster, of which there may be 8."""
MAX_BEAM = 5
MAX_BLOCKS = 32
"""Sentences times heads: with more, an H200 is faster with the operators that these stand for."""
MAX_STEPS = 256
"""Of a past; longer ones keep more threads busy than a block of these has."""


def _self_block(qkv: Tensor, cache: Tensor, ancestors: Tensor, steps: Tensor, before: Tensor | None,
                cu_seqlens: Tensor | None, weight: Tensor, bias: Tensor, residual: Tensor, moments: Tensor | None,
                gain: Tensor | None, shift: Tensor | None, eps: float, collect: bool) -> tuple[Tensor, Tensor]:
    context = decode_self_attention(qkv, cache, ancestors, steps, before, cu_seqlens)
    return decode_linear(context, weight, bias, moments=moments, residual=residual, gain=gain, shift=shift, eps=eps,
                         collect=collect)


def _cross_block(x: Tensor, moments: Tensor, query_weight: Tensor, query_bias: Tensor, sums: Tensor,
                 keys_values: Tensor, cu_seqlens: Tensor, beam: int, weight: Tensor, bias: Tensor, gain: Tensor | None,
                 shift: Tensor | None, eps: float, collect: bool) -> tuple[Tensor, Tensor]:
    q, _ = decode_linear(x, query_weight, query_bias, sums=sums, moments=moments, eps=eps)
    context = decode_cross_attention(q, keys_values, cu_seqlens, beam)
    return decode_linear(context, weight, bias, moments=None if gain is None else moments, residual=x, gain=gain,
                         shift=shift, eps=eps, collect=collect)


def _shapes(residual: Tensor, collect: bool) -> tuple[Tensor, Tensor]:
    tiles = (residual.size(0), residual.size(1) // MOMENT_COLUMNS, 2) if collect else (0,)
    return torch.empty_like(residual), residual.new_empty(tiles, dtype=torch.float32)


_decode_self_block = register(
    "decode_self_block(Tensor qkv, Tensor(a!) cache, Tensor ancestors, Tensor steps, Tensor? before,"
    " Tensor? cu_seqlens, Tensor weight, Tensor bias, Tensor residual, Tensor? moments, Tensor? gain, Tensor? shift,"
    " float eps, bool collect) -> (Tensor, Tensor)", _self_block,
    lambda *arguments: _shapes(arguments[8], arguments[-1]))
_decode_cross_block = register(
    "decode_cross_block(Tensor x, Tensor moments, Tensor query_weight, Tensor query_bias, Tensor sums,"
    " Tensor keys_values, Tensor cu_seqlens, int beam, Tensor weight, Tensor bias, Tensor? gain, Tensor? shift,"
    " float eps, bool collect) -> (Tensor, Tensor)", _cross_block,
    lambda *arguments: _shapes(arguments[0], arguments[-1]))


def decode_self_block(qkv: Tensor, cache: Tensor, ancestors: Tensor, steps: Tensor, weight: Tensor, bias: Tensor,
                      residual: Tensor, *, before: Tensor | None = None, cu_seqlens: Tensor | None = None,
                      moments: Tensor | None = None, gain: Tensor | None = None, shift: Tensor | None = None,
                      eps: float = 1e-5, collect: bool = False) -> tuple[Tensor, Tensor]:
    """``out`` (R, E), and with ``collect`` its moments (R, E / 16, 2); see the head of this file.

    Raises ValueError for shapes or dtypes that do not fit, or that :func:`serves` does not serve.
    """
    rows, _, heads, dim = qkv.shape
    batch, beam, most = ancestors.shape
    width, kind = heads * dim, qkv.dtype
    _check("decode_self_block", {
        "residual": (residual, (rows, width), kind), "weight": (weight, (width, width), kind),
        "bias": (bias, (width,), kind), "gain": (gain, (width,), kind), "shift": (shift, (width,), kind),
        "moments": (moments, (rows, width // MOMENT_COLUMNS, 2), torch.float32),
        "cache": (cache, (2, batch, heads, most * beam, dim), kind), "ancestors": (ancestors, (batch, beam, most),
                                                                                    torch.uint8),
        "steps": (steps, (batch,), torch.int32)}, residual, heads, dim, beam, most)
    check("decode_self_block",
          (rows == batch * beam, lambda: f"qkv must have {batch} * {beam} rows, got {rows}"),
          ((gain is None) == (shift is None) == (moments is None),
           lambda: "gain, shift and moments must be given together"),
          ((before is None) == (cu_seqlens is None), lambda: "before and cu_seqlens need each other"),
          (before is None or (before.shape[1:] == (2, heads, dim) and before.dtype == kind and before.is_contiguous()),
           lambda: f"before must be (N, 2, {heads}, {dim}) {kind}, contiguous, got {shape(before)}"))
    return _decode_self_block(qkv.contiguous(), cache, ancestors, steps, before, cu_seqlens, weight, bias, residual,
                              moments, gain, shift, eps, collect)


def decode_cross_block(x: Tensor, moments: Tensor, query_weight: Tensor, query_bias: Tensor, sums: Tensor,
                       keys_values: Tensor, cu_seqlens: Tensor, beam: int, weight: Tensor, bias: Tensor, *,
                       gain: Tensor | None = None, shift: Tensor | None = None, eps: float = 1e-5,
                       collect: bool = False) -> tuple[Tensor, Tensor]:
    """``out`` (R, E), and with ``collect`` its moments (R, E / 16, 2); see the head of this file.

    Raises ValueError for shapes or dtypes that do not fit, or that :func:`serves` does not serve.
    """
    rows, width = x.shape
    kind = x.dtype
    _, _, heads, dim = keys_values.shape
    sentences = cu_seqlens.size(0) - (cu_seqlens.dim() == 1)
    _check("decode_cross_block", {
        "moments": (moments, (rows, width // MOMENT_COLUMNS, 2), torch.float32),
        "query_weight": (query_weight, (width, width), kind), "query_bias": (query_bias, (width,), kind),
        "sums": (sums, (width,), torch.float32), "weight": (weight, (width, width), kind),
        "bias": (bias, (width,), kind), "gain": (gain, (width,), kind), "shift": (shift, (width,), kind),
        "keys_values": (keys_values, (keys_values.size(0), 2, heads, dim), kind),
        "cu_seqlens": (cu_seqlens, (rows // beam, 2) if cu_seqlens.dim() == 2 else (rows // beam + 1,), torch.int32)},
        x, heads, dim, beam)
    check("decode_cross_block", ((gain is None) == (shift is None), lambda: "gain and shift must be given together"),
          (rows == sentences * beam, lambda: f"x must have {sentences} * {beam} rows, got {rows}"))
    return _decode_cross_block(x.contiguous(), moments, query_weight, query_bias, sums, keys_values, cu_seqlens, beam,
                               weight, bias, gain, shift, eps, collect)


def _check(name: str, tables: dict[str, tuple[Tensor | None, tuple[int, ...], torch.dtype]], residual: Tensor,
           heads: int, dim: int, beam: int, steps: int = 0) -> None:
    check(name,
          *((t is None or (t.shape == size and t.dtype == dtype and t.is_contiguous()),
             lambda n=n, t=t, s=size, d=dtype: f"{n} must be {s} {d}, contiguous, got {shape(t)} {t.dtype}")
            for n, (t, size, dtype) in tables.items()),
          (serves(residual, heads, dim, beam, steps),
           lambda: f"{LEAST_HEADS} to {MAX_HEADS} heads of size {' or '.join(map(str, HEAD_DIMS))}, at most {MAX_BEAM} "
                   f"beams, {MAX_STEPS} steps and {MAX_BLOCKS} heads of all sentences are served, in 16 bits on a GPU, "
                   f"got {heads} of size {dim}, {beam} beams, {steps} steps and {residual.size(0)} rows of "
                   f"{residual.dtype}"))


def serves(residual: Tensor, heads: int, dim: int, beam: int, steps: int = 0) -> bool:
    """Whether these are the way to go, with ``residual`` (R, E) and at most ``steps`` of a past, and not the operators
    that they stand for."""
    return (dim in HEAD_DIMS and LEAST_HEADS <= heads <= MAX_HEADS and beam <= MAX_BEAM and steps <= MAX_STEPS
            and residual.size(1) == heads * dim and residual.size(0) // beam * heads <= MAX_BLOCKS
            and (not residual.is_cuda or (_extension.loaded() and residual.dtype in (torch.float16, torch.bfloat16)
                                          and torch.cuda.get_device_capability(residual.device) >= (9, 0))))
