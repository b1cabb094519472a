"""attention: o = dropout(softmax(q k^T * scale)) v, sentence by sentence over packed tokens (Vaswani et al. 2017).

    q, o           (Nq, H, D)    tokens of all sentences one after the other, no padding between them
    k, v           (Nk, H, D)
    cu_seqlens_q   (B + 1,) int32 or int64: sentence b owns rows cu_seqlens_q[b]:cu_seqlens_q[b+1] of q; _k likewise
    max_len_q/_k   an upper bound of the lengths
    scale          D ** -0.5 unless given
    seed           (1,) int64 on the same device, of which the dropout mask is a function

``causal`` aligns the last query with the last key: query i of a sentence sees keys j <= i + (len_k - len_q), so
that keys in front of the queries (an encoder's, or a cache's) are seen by all. A query that sees no key gets 0, and
so do rows behind the last sentence.

The op takes its operands in parts, as projections make them, and returns their gradients in the same parts:
[q, k, v], [q, kv (Nk, 2, H, D)] or [qkv (N, 3, H, D)]; only D need be contiguous. With p the softmax and m the mask, 0
or 1 / (1 - dropout_p), and each product taken in its sentence:

    dv = (m p)^T do,   ds = p (m do v^T - rowsum(do o)),   dq = scale ds k,   dk = scale ds^T q

Saved for backward: the parts, o and lse (H, Nq), the log of the sum of exp(scaled scores) of each row, +inf where no
key is seen; fp32 (fp64 for fp64). The reference pads each sentence to ``max_len`` and masks; padded queries are
dropped again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightseq_fairseq.ops import _extension
from lightseq_fairseq.ops._library import accumulate_dtype, check, register, register_autograd, shape


def _forward(parts: Sequence[Tensor], cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_len_q: int, max_len_k: int,
             causal: bool, dropout_p: float, scale: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """-> out (Nq, H, D), lse (H, Nq)."""
    queries, keys = _sides(parts, cu_seqlens_q, cu_seqlens_k, max_len_q, max_len_k)
    q, k, v = _pad_parts(parts, queries, keys)
    weights, lse = _softmax(q, k, queries, keys, causal, scale)
    out = (weights * _dropout_factors(weights, dropout_p, seed)) @ v
    return (queries.unpad(out.transpose(1, 2)).to(parts[0].dtype),
            queries.unpad(lse.transpose(1, 2)).t().contiguous())


def _backward(dout: Tensor, parts: Sequence[Tensor], out: Tensor, lse: Tensor, cu_seqlens_q: Tensor,
              cu_seqlens_k: Tensor, max_len_q: int, max_len_k: int, causal: bool, dropout_p: float, scale: float,
              seed: Tensor | None) -> list[Tensor]:
    """dout (Nq, H, D) -> the gradients of the parts."""
    queries, keys = _sides(parts, cu_seqlens_q, cu_seqlens_k, max_len_q, max_len_k)
    q, k, v = _pad_parts(parts, queries, keys)
    weights, _ = _softmax(q, k, queries, keys, causal, scale)
    factors = _dropout_factors(weights, dropout_p, seed)
    dout_padded = queries.pad(dout, empty=0.0).transpose(1, 2)
    dweights = dout_padded @ v.transpose(2, 3) * factors
    dscores = weights * (dweights - (dweights * weights).sum(-1, keepdim=True)) * scale
    dq, dk = dscores @ k, dscores.transpose(2, 3) @ q
    dv = (weights * factors).transpose(2, 3) @ dout_padded
    dq, dk, dv = (grad.transpose(1, 2) for grad in (dq, dk, dv))  # (B, H, T, D) -> (B, T, H, D)
    if len(parts) == 3:
        grads = [queries.unpad(dq), keys.unpad(dk), keys.unpad(dv)]
    elif len(parts) == 2:
        grads = [queries.unpad(dq), keys.unpad(torch.stack((dk, dv), 2))]
    else:
        grads = [queries.unpad(torch.stack((dq, dk, dv), 2))]
    return [grad.to(dout.dtype) for grad in grads]


class _Slots:
    """One side's packed rows (N, ...) as slots (B, max_len, ...) and back."""

    def __init__(self, cu_seqlens: Tensor, max_len: int, count: int) -> None:
        self.max_len, self.count, self.lengths = max_len, count, cu_seqlens.diff()
        self.batch = self.lengths.numel()
        self.real: Tensor | None = None  # (B, max_len), None when all are
        if count != self.batch * max_len or int(cu_seqlens[-1]) != count:
            places = torch.arange(max_len, device=cu_seqlens.device)
            self.real = places < self.lengths[:, None]
            self.rows = torch.where(self.real, cu_seqlens[:-1, None] + places, 0).flatten()

    def pad(self, x: Tensor, empty: float | None = None) -> Tensor:
        """(N, ...) -> (B, max_len, ...) in the accumulator's type; slots without a token hold ``empty``, or row 0."""
        if self.real is not None:
            x = x.index_select(0, self.rows) if self.count else x.new_zeros(self.rows.numel(), *x.shape[1:])
            if empty is not None:
                x[~self.real.flatten()] = empty
        return x.to(accumulate_dtype(x.dtype)).view(self.batch, self.max_len, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        """(B, max_len, ...) -> (N, ...); 0 in rows behind the last sentence."""
        x = x.flatten(0, 1)
        if self.real is not None:
            x = x.index_select(0, self.real.flatten().nonzero().squeeze(1))
        return x if len(x) == self.count else torch.cat((x, x.new_zeros(self.count - len(x), *x.shape[1:])))


def _sides(parts: Sequence[Tensor], cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_len_q: int,
           max_len_k: int) -> tuple[_Slots, _Slots]:
    return _Slots(cu_seqlens_q, max_len_q, parts[0].size(0)), _Slots(cu_seqlens_k, max_len_k, parts[-1].size(0))


def _pad_parts(parts: Sequence[Tensor], queries: _Slots, keys: _Slots) -> list[Tensor]:
    """The parts as padded q, k and v, each (B, H, max_len, D)."""
    padded = [keys.pad(part) if index else queries.pad(part) for index, part in enumerate(parts)]
    last = padded.pop()
    return [x.transpose(1, 2) for x in (*padded, *(last.unbind(2) if last.dim() == 5 else [last]))]


def _softmax(q: Tensor, k: Tensor, queries: _Slots, keys: _Slots, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Of padded q and k: probabilities (B, H, Tq, Tk), 0 where nothing may be seen, and lse (B, H, Tq)."""
    scores = (q @ k.transpose(2, 3)).mul_(scale)
    if keys.real is not None:
        scores.masked_fill_(~keys.real[:, None, None], float("-inf"))
    if causal:
        ahead = (keys.lengths - queries.lengths)[:, None, None]
        rows, columns = (torch.arange(side.max_len, device=q.device) for side in (queries, keys))
        scores.masked_fill_((columns > rows[:, None] + ahead)[:, None], float("-inf"))
    lse = scores.logsumexp(-1)
    lse = lse.where(lse != float("-inf"), float("inf"))
    return scores.sub_(lse.unsqueeze(-1)).exp_(), lse


def _dropout_factors(weights: Tensor, p: float, seed: Tensor | None) -> Tensor | float:
    """0 for what the draw of ``seed`` drops, 1 / (1 - p) for the rest; the reference's own draw, not CUDA's."""
    if p == 0:
        return 1.0
    assert seed is not None
    generator = torch.Generator(weights.device).manual_seed(int(seed))
    kept = torch.rand(weights.shape, generator=generator, device=weights.device) >= p
    return kept.to(weights.dtype).mul_(1 / (1 - p) if p < 1 else 0.0)


def _shapes(parts: Sequence[Tensor], cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_len_q: int, max_len_k: int,
            causal: bool, dropout_p: float, scale: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    first = parts[0]
    count, heads, dim = first.size(0), first.size(-2), first.size(-1)
    return (first.new_empty(count, heads, dim),
            first.new_empty(heads, count, dtype=accumulate_dtype(first.dtype)))


_attention = register(
    "attention(Tensor[] parts, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_len_q, int max_len_k, bool causal,"
    " float dropout_p, float scale, Tensor? seed) -> (Tensor, Tensor)", _forward, _shapes)
_attention_backward = register(
    "attention_backward(Tensor dout, Tensor[] parts, Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
    " int max_len_q, int max_len_k, bool causal, float dropout_p, float scale, Tensor? seed) -> Tensor[]",
    _backward, lambda dout, parts, *rest: [part.new_empty(part.shape) for part in parts])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    parts, cu_seqlens_q, cu_seqlens_k, *ctx.constants, seed = inputs
    ctx.save_for_backward(cu_seqlens_q, cu_seqlens_k, seed, *output, *parts)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for lse


def _differentiate(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
    cu_seqlens_q, cu_seqlens_k, seed, out, lse, *parts = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout.contiguous()
    grads = _attention_backward(dout, parts, out, lse, cu_seqlens_q, cu_seqlens_k, *ctx.constants, seed)
    return grads, None, None, None, None, None, None, None, None


register_autograd("attention", _differentiate, _setup_context)


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_len_q: int,
              max_len_k: int, causal: bool = False, dropout_p: float = 0.0, scale: float | None = None,
              seed: Tensor | None = None) -> Tensor:
    """Multi-head attention of packed sentences, (Nq, H, D); see the head of this file.

    Without ``seed`` a mask is drawn from torch's generator. Raises ValueError for shapes or types that do not fit.
    """
    return _attend([q, k, v], cu_seqlens_q, cu_seqlens_k, max_len_q, max_len_k, causal, dropout_p, scale, seed)


def self_attention(qkv: Tensor, cu_seqlens: Tensor, max_len: int, causal: bool = False, dropout_p: float = 0.0,
                   scale: float | None = None, seed: Tensor | None = None) -> Tensor:
    """:func:`attention` of one fused projection (N, 3, H, D), whose gradient is one tensor too."""
    return _attend([qkv], cu_seqlens, cu_seqlens, max_len, max_len, causal, dropout_p, scale, seed)


def cross_attention(q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_len_q: int, max_len_k: int,
                    causal: bool = False, dropout_p: float = 0.0, scale: float | None = None,
                    seed: Tensor | None = None) -> Tensor:
    """:func:`attention` of queries (Nq, H, D) over a fused projection (Nk, 2, H, D) of keys and values."""
    return _attend([q, kv], cu_seqlens_q, cu_seqlens_k, max_len_q, max_len_k, causal, dropout_p, scale, seed)


def attention_weights(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_len_q: int,
                      max_len_k: int, causal: bool = False) -> Tensor:
    """The softmax of :func:`attention` itself, (B, H, max_len_q, max_len_k) in fp32; rows of padding are arbitrary."""
    queries, keys = _sides([q, k], cu_seqlens_q, cu_seqlens_k, max_len_q, max_len_k)
    q, k = _pad_parts([q, k], queries, keys)
    return _softmax(q, k, queries, keys, causal, q.size(-1) ** -0.5)[0].float()


_FORMS = {1: ([3], "(N, 3, H, D)"), 2: ([0, 2], "(Nq, H, D) and (Nk, 2, H, D)"),
          3: ([0, 0, 0], "(Nq, H, D), (Nk, H, D) and (Nk, H, D)")}
"""By the number of parts: slices that each holds, 0 for a part that is one operand; and both in words."""


def _attend(parts: list[Tensor], cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_len_q: int, max_len_k: int,
            causal: bool, dropout_p: float, scale: float | None, seed: Tensor | None) -> Tensor:
    q, device = parts[0], parts[0].device
    check("attention",
          ([part.size(1) if part.dim() == 4 else 0 for part in parts] == _FORMS[len(parts)][0]
           and len({part.shape[-2:] for part in parts}) == 1 and len({part.size(0) for part in parts[1:]}) <= 1,
           lambda: f"operands must have shapes {_FORMS[len(parts)][1]} with the same H and D, got "
                   + " and ".join(str(shape(part)) for part in parts)),
          (all(part.dtype == q.dtype and part.is_floating_point() for part in parts),
           lambda: f"operands must be of one floating-point type, got {[part.dtype for part in parts]}"),
          (cu_seqlens_q.dim() == 1 and cu_seqlens_q.shape == cu_seqlens_k.shape and cu_seqlens_q.numel() > 0,
           lambda: f"cu_seqlens must both have shape (B + 1,), got {shape(cu_seqlens_q)} and {shape(cu_seqlens_k)}"),
          (0 <= dropout_p <= 1, lambda: f"dropout_p must lie in [0, 1], got {dropout_p}"),
          (seed is None or (seed.dtype == torch.int64 and seed.numel() == 1 and seed.device == device),
           lambda: f"seed must be one int64 on {device}, got {seed}"))
    if q.is_cuda:
        _extension.loaded()
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.to(torch.int32), cu_seqlens_k.to(torch.int32)
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = torch.randint(2 ** 62, (1,), device=device)
    parts = [part if part.stride(-1) == 1 else part.contiguous() for part in parts]
    out: Tensor = _attention(parts, cu_seqlens_q, cu_seqlens_k, max_len_q, max_len_k, causal, float(dropout_p),
                             float(q.size(-1) ** -0.5 if scale is None else scale), seed)[0]
    return out
