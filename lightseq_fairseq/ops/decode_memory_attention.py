"""Attention of one decoding step over rows that are keys and values at once, the same for all heads.

    context = softmax(q memory^T) memory        per head; computed in fp32, the probabilities in the dtype of memory

Cross-attention is this where its maps of keys and values are applied to the query and to the context instead of to
the encoder's output (the "absorption" of DeepSeek-V2, arXiv 2405.04434, section 2.1.2). With E = memory, of head h

    scores   q_h (E K_h^T + 1 k_h^T)^T   = (q_h K_h) E^T + const      the constant, of k_h, does not change a softmax
    context  weights (E V_h^T + 1 v_h^T) = (weights E) V_h^T + v_h^T  since weights sum to 1

so that a token costs 2C bytes a layer instead of 4C, which all layers share, and products per head of each query.

B sentences, G heads of one beam (or of several: any queries of the sentence), C columns.

    q           (B, G, C)         with all factors in it
    memory      (N, C)            the encoder's output; tokens of a sentence lie one after the other
    cu_seqlens  (B + 1,) or (B, 2) int32, as in decode_attention.py
    context     (B, G, C)         0 for a sentence without tokens
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lightseq_fairseq.ops import _extension
from lightseq_fairseq.ops._library import accumulate_dtype, check, register, shape

WIDTHS, MAX_HEADS = (512, 768, 1024), 16
"""Columns that are compiled, and heads of a sentence that are computed together."""
LEAST_BYTES = 64 * 2**20
"""Of memory, from which the bytes that are saved pay for the two products around it: with 300 tokens of 1024 columns a
sentence, 64 sentences (38 MiB) take 9 % longer so, 128 (75 MiB) took 3 % less before decode_head_map, which took off
1.6 % more (BART-large as a whole, H200)."""


def _attention(q: Tensor, memory: Tensor, cu_seqlens: Tensor) -> Tensor:
    wide = accumulate_dtype(q.dtype)
    context = torch.zeros_like(q)
    bounds = cu_seqlens if cu_seqlens.dim() == 2 else cu_seqlens.unfold(0, 2, 1)
    for b, (first, last) in enumerate(bounds.tolist()):
        if last > first:
            rows = memory[first:last].to(wide)
            weights = (q[b].to(wide) @ rows.t()).softmax(-1)
            context[b] = (weights @ rows).to(q.dtype)
    return context


def _nowhere(like: Tensor) -> bool:
    return False


_decode_memory_attention = register(
    "decode_memory_attention(Tensor q, Tensor memory, Tensor cu_seqlens) -> Tensor", _attention,
    lambda q, *rest: torch.empty_like(q))
_decode_memory_attention_serves = register(
    "decode_memory_attention_serves(Tensor like) -> bool", _nowhere, _nowhere)


def decode_memory_attention(q: Tensor, memory: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``context`` (B, G, C); see the head of this file.

    Raises ValueError for shapes or dtypes that do not fit, or on a GPU that :func:`serves` does not serve.
    """
    apart = cu_seqlens.dim() == 2
    expected = (cu_seqlens.size(0) if apart else cu_seqlens.numel() - 1, q.size(1), memory.size(1))
    check("decode_memory_attention",
          (q.shape == expected, lambda: f"q must have shape {expected}, got {shape(q)}"),
          (q.dtype == memory.dtype, lambda: f"q must be {memory.dtype} as memory is, got {q.dtype}"),
          (memory.is_contiguous(), lambda: "memory must be contiguous"),
          (not apart or (cu_seqlens.size(1) == 2 and cu_seqlens.is_contiguous()),
           lambda: f"cu_seqlens must be (B + 1,) or (B, 2), contiguous, got {shape(cu_seqlens)}"),
          (cu_seqlens.dtype == torch.int32, lambda: f"cu_seqlens must be int32, got {cu_seqlens.dtype}"),
          (not memory.is_cuda or _compiled(memory.size(1), memory.dtype, memory.device),
           lambda: f"memory of {', '.join(map(str, WIDTHS))} columns in 16 bits is served, on a GPU of compute "
                   f"capability 9.0 by a build for 9.0a, got {memory.size(1)} of {memory.dtype}"))
    return _decode_memory_attention(q.contiguous(), memory, cu_seqlens)


def serves(tokens: int, width: int, heads: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether cross-attention of one beam over room for (tokens, width) of memory is the faster for being done so."""
    return (device.type == "cuda" and heads <= MAX_HEADS and tokens * width * dtype.itemsize >= LEAST_BYTES
            and _compiled(width, dtype, device))


def _compiled(width: int, dtype: torch.dtype, device: torch.device) -> bool:
    return width in WIDTHS and dtype in (torch.float16, torch.bfloat16) and _has_kernel(device)


@functools.cache
def _has_kernel(device: torch.device) -> bool:
    """Not where a build is for 9.0 and not for 9.0a, nor on later GPUs; it depends on what the driver has chosen."""
    return _extension.loaded() and _decode_memory_attention_serves(torch.empty(0, device=device))
