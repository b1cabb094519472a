"""attention: o = dropout(softmax(q k^T * scale)) v, sentence by sentence over packed tokens (Vaswani et al. 2017).

    q, o           (Nq, H, D)    tokens of all sentences one after the other, no padding between them
    k, v           (Nk, H, D)
    cu_seqlens_q   (B + 1,) int32 or int64: sentence b owns rows cu_seqlens_q[b]:cu_seqlens_q[b+1] of q; _k likewise
    max_len_q/_k   an upper bound of the lengths
    scale          D ** -0.5 unless given

``causal`` aligns the last query with the last key: query i of a sentence sees keys j <= i + (len_k - len_q), so
that keys in front of the queries (an encoder's, or a cache's) are seen by all.
The reference pads each sentence to ``max_len`` and masks; padded queries are dropped again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_len_q: int,
              max_len_k: int, causal: bool = False, dropout_p: float = 0.0, scale: float | None = None) -> Tensor:
    """Multi-head attention of packed sentences, (Nq, H, D); see the head of this file."""
    q_rows, q_valid = _padded_rows(cu_seqlens_q, max_len_q, q.size(0))
    k_rows, k_valid = _padded_rows(cu_seqlens_k, max_len_k, k.size(0))
    mask = _attention_mask(cu_seqlens_q, cu_seqlens_k, max_len_q, max_len_k, k_valid, causal)
    out = F.scaled_dot_product_attention(
        _pad_heads(q, q_rows, max_len_q), _pad_heads(k, k_rows, max_len_k), _pad_heads(v, k_rows, max_len_k),
        attn_mask=mask, dropout_p=dropout_p, scale=scale)
    out = out.transpose(1, 2).flatten(0, 1)  # (B, H, Tq, D) -> (B * Tq, H, D)
    return out if q_valid is None else out[q_valid.flatten()]


def attention_weights(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_len_q: int,
                      max_len_k: int, causal: bool = False) -> Tensor:
    """The softmax of :func:`attention` itself, (B, H, max_len_q, max_len_k) in fp32; rows of padding are arbitrary."""
    q_rows, _ = _padded_rows(cu_seqlens_q, max_len_q, q.size(0))
    k_rows, k_valid = _padded_rows(cu_seqlens_k, max_len_k, k.size(0))
    scores = _pad_heads(q, q_rows, max_len_q) @ _pad_heads(k, k_rows, max_len_k).transpose(2, 3)
    scores = scores.float() * q.size(-1) ** -0.5
    mask = _attention_mask(cu_seqlens_q, cu_seqlens_k, max_len_q, max_len_k, k_valid, causal)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1)


def _padded_rows(cu_seqlens: Tensor, max_len: int, count: int) -> tuple[Tensor | None, Tensor | None]:
    """For each slot of (B, max_len) the packed row that fills it, and whether it is real; (None, None) if all are."""
    starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
    if count == starts.numel() * max_len:
        return None, None
    slots = torch.arange(max_len, device=cu_seqlens.device)
    valid = slots < lengths[:, None]
    return torch.where(valid, starts[:, None] + slots, 0), valid


def _pad_heads(x: Tensor, rows: Tensor | None, max_len: int) -> Tensor:
    """(N, H, D) -> (B, H, max_len, D); slots without a token repeat row 0, which keeps them finite."""
    padded = x.view(-1, max_len, *x.shape[1:]) if rows is None else x[rows]
    return padded.transpose(1, 2)


def _attention_mask(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_len_q: int, max_len_k: int,
                    k_valid: Tensor | None, causal: bool) -> Tensor | None:
    """True where a query may look, broadcastable to (B, H, max_len_q, max_len_k)."""
    mask = None if k_valid is None else k_valid[:, None, None, :]
    if not causal:
        return mask
    ahead = (cu_seqlens_k.diff() - cu_seqlens_q.diff())[:, None, None]
    rows = torch.arange(max_len_q, device=cu_seqlens_q.device)[:, None]
    columns = torch.arange(max_len_k, device=cu_seqlens_q.device)
    triangle = (columns <= rows + ahead)[:, None]  # (B, 1, Tq, Tk)
    return triangle if mask is None else triangle & mask
