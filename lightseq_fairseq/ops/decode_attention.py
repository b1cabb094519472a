"""Attention of one decoding step: the newest token of every beam over its own past, and over its source.

    context = softmax(q k^T) v        with the factor D ** -0.5 already in q; computed in fp32

B sentences of K beams, R = B * K rows (row b * K + k), H heads of size D.

decode_self_attention: keys and values are written once and never move; a table says whose they are.

    qkv        (R, 3, H, D)
    cache      (2, B, H, T * K, D)  keys, values; slot p * K + j is what beam j was fed at step p. Those of qkv are
                                    written to the slots of this step
    ancestors  (B, K, T) uint8      the beam j whose slot of step p belongs to the history of beam k, p < step
    steps      (B,) int32           steps of each sentence before this one, less than T
    before     (N, 2, H, D)         or None: keys and values that come first in the past of all beams of a sentence, of
                                    the text that it continues; cu_seqlens as below. The last token of each text is left
                                    out, since that is what the first step is fed
    context    (R, H * D)

decode_cross_attention: all beams of a sentence read the same keys and values.

    q            (R, H * D)
    keys_values  (N, 2, H, D)       of source tokens, those of a sentence one after the other; N may exceed their number
    cu_seqlens   (B + 1,) int32     first source token of each sentence, and the end of the last; or, where there is
                                    room between sentences, (B, 2): first token and end of each
    context      (R, H * D)         0 for a sentence without tokens
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightseq_fairseq.ops import _extension
from lightseq_fairseq.ops._library import accumulate_dtype, check, register, shape

HEAD_DIM_STEP, MAX_HEAD_DIM = 8, 256
"""Head sizes are multiples of the one up to the other."""


def _self_attention(qkv: Tensor, cache: Tensor, ancestors: Tensor, steps: Tensor, before: Tensor | None = None,
                    cu_seqlens: Tensor | None = None) -> Tensor:
    rows, _, heads, dim = qkv.shape
    batch, beam, most = ancestors.shape
    wide = accumulate_dtype(qkv.dtype)
    beams = torch.arange(beam, device=qkv.device).view(1, beam).expand(batch, -1)
    own = steps.long().view(batch, 1) * beam + beams  # (B, K) slots
    parts = qkv.view(batch, beam, 3, heads, dim)
    index = own.view(1, batch, 1, beam, 1).expand(2, -1, heads, -1, dim)
    cache.scatter_(3, index, parts[:, :, 1:].permute(2, 0, 3, 1, 4))
    slots = torch.arange(most, device=qkv.device) * beam + ancestors.long()  # (B, K, T)
    past = torch.arange(most, device=qkv.device) < steps.view(batch, 1, 1)
    slots = torch.cat((slots.where(past, own.unsqueeze(2)), own.unsqueeze(2)), 2)  # past the end once more its own
    seen = torch.cat((past.expand(-1, beam, -1), torch.ones_like(past[..., :1]).expand(-1, beam, -1)), 2)
    index = slots[:, None, :, :, None].expand(-1, heads, -1, -1, dim)  # (B, H, K, T + 1, D)
    keys, values = (part.unsqueeze(2).expand(-1, -1, beam, -1, -1).gather(3, index).to(wide) for part in cache)
    if before is not None and cu_seqlens is not None:
        texts, there = _texts(before, cu_seqlens)
        seen = torch.cat((there.unsqueeze(1).expand(-1, beam, -1), seen), 2)
        keys, values = (torch.cat((text.to(wide).unsqueeze(2).expand(-1, -1, beam, -1, -1), own), 3)
                        for text, own in zip(texts, (keys, values), strict=True))
    scores = torch.einsum("bkhd,bhktd->bhkt", parts[:, :, 0].to(wide), keys)
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhkt,bhktd->bkhd", weights, values).reshape(rows, heads * dim).to(qkv.dtype)


def _texts(before: Tensor, cu_seqlens: Tensor) -> tuple[list[Tensor], Tensor]:
    """Keys and values (B, H, S, D) each, of all texts without their last tokens, and where they are, (B, S)."""
    bounds = cu_seqlens if cu_seqlens.dim() == 2 else cu_seqlens.unfold(0, 2, 1)
    first, lengths = bounds[:, :1].long(), (bounds[:, 1:] - bounds[:, :1] - 1).clamp(min=0)
    places = torch.arange(int(lengths.max()), device=before.device)
    there = places < lengths
    rows = torch.where(there, first + places, 0)
    return [part[rows].transpose(1, 2).where(there[:, None, :, None], 0) for part in before.unbind(1)], there


def _cross_attention(q: Tensor, keys_values: Tensor, cu_seqlens: Tensor, beam: int) -> Tensor:
    _, _, heads, dim = keys_values.shape
    wide = accumulate_dtype(q.dtype)
    context = torch.zeros_like(q)
    bounds = cu_seqlens if cu_seqlens.dim() == 2 else cu_seqlens.unfold(0, 2, 1)
    for b, (first, last) in enumerate(bounds.tolist()):
        if last > first:
            own = slice(b * beam, (b + 1) * beam)
            keys, values = keys_values[first:last].to(wide).unbind(1)  # (S, H, D) each
            scores = torch.einsum("khd,shd->hks", q[own].view(beam, heads, dim).to(wide), keys)
            context[own] = torch.einsum("hks,shd->khd", scores.softmax(-1), values).flatten(1).to(q.dtype)
    return context


_decode_self_attention = register(
    "decode_self_attention(Tensor qkv, Tensor(a!) cache, Tensor ancestors, Tensor steps, Tensor? before=None,"
    " Tensor? cu_seqlens=None) -> Tensor", _self_attention,
    lambda qkv, *rest: qkv.new_empty(qkv.size(0), qkv.size(2) * qkv.size(3)))
_decode_cross_attention = register(
    "decode_cross_attention(Tensor q, Tensor keys_values, Tensor cu_seqlens, int beam) -> Tensor", _cross_attention,
    lambda q, *rest: torch.empty_like(q))


def decode_self_attention(qkv: Tensor, cache: Tensor, ancestors: Tensor, steps: Tensor, before: Tensor | None = None,
                          cu_seqlens: Tensor | None = None) -> Tensor:
    """One step over each beam's own past, (R, H * D); see the head of this file.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    rows, _, heads, dim = qkv.shape
    batch, beam, most = ancestors.shape
    expected = (2, batch, heads, most * beam, dim)
    check("decode_self_attention", _head_dim(dim),
          (rows == batch * beam, lambda: f"qkv must have {batch} * {beam} rows, got {rows}"),
          (cache.shape == expected, lambda: f"cache must have shape {expected}, got {shape(cache)}"),
          (cache.dtype == qkv.dtype, lambda: f"cache must be {qkv.dtype} as qkv is, got {cache.dtype}"),
          (ancestors.dtype == torch.uint8, lambda: f"ancestors must be uint8, got {ancestors.dtype}"),
          (steps.shape == (batch,) and steps.dtype == torch.int32,
           lambda: f"steps must be ({batch},) int32, got {shape(steps)} {steps.dtype}"),
          ((before is None) == (cu_seqlens is None), lambda: "before and cu_seqlens need each other"),
          (before is None or (before.shape[1:] == (2, heads, dim) and before.dtype == qkv.dtype
                              and before.is_contiguous()),
           lambda: f"before must be (N, 2, {heads}, {dim}) {qkv.dtype}, contiguous, got {shape(before)}"),
          (cu_seqlens is None or (cu_seqlens.shape in ((batch + 1,), (batch, 2)) and cu_seqlens.dtype == torch.int32
                                  and cu_seqlens.is_contiguous()),
           lambda: f"cu_seqlens must be ({batch + 1},) or ({batch}, 2) int32, contiguous, got {shape(cu_seqlens)}"))
    if qkv.is_cuda:
        _extension.loaded()
    return _decode_self_attention(qkv.contiguous(), cache, ancestors, steps, before, cu_seqlens)


def decode_cross_attention(q: Tensor, keys_values: Tensor, cu_seqlens: Tensor, beam: int) -> Tensor:
    """One step of every beam over its source, (R, H * D); see the head of this file.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    _, _, heads, dim = keys_values.shape
    apart = cu_seqlens.dim() == 2
    expected = ((cu_seqlens.size(0) if apart else cu_seqlens.numel() - 1) * beam, heads * dim)
    check("decode_cross_attention", _head_dim(dim),
          (q.shape == expected, lambda: f"q must have shape {expected}, got {shape(q)}"),
          (q.dtype == keys_values.dtype, lambda: f"q must be {keys_values.dtype} as the keys are, got {q.dtype}"),
          (not apart or (cu_seqlens.size(1) == 2 and cu_seqlens.is_contiguous()),
           lambda: f"cu_seqlens must be (B + 1,) or (B, 2), contiguous, got {shape(cu_seqlens)}"),
          (cu_seqlens.dtype == torch.int32, lambda: f"cu_seqlens must be int32, got {cu_seqlens.dtype}"))
    if q.is_cuda:
        _extension.loaded()
    return _decode_cross_attention(q.contiguous(), keys_values, cu_seqlens, beam)


def _head_dim(dim: int) -> tuple[bool, Callable[[], str]]:
    return (dim % HEAD_DIM_STEP == 0 and dim <= MAX_HEAD_DIM,
            lambda: f"the head size must be a multiple of {HEAD_DIM_STEP} up to {MAX_HEAD_DIM}, got {dim}")
