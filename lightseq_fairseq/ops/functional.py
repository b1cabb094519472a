"""The blocks of a Transformer as functions, of the names and meaning of EET's operators (NetEase-FuXi/EET, csrc/op).

    multi_head_attention          an encoder's: every token sees every other
    masked_multi_head_attention   a decoder's: tokens see what is in front of them; with a cache, step by step
    cross_multi_head_attention    a decoder's over an encoder's output
    ffn, embedding, layernorm

B rows of T columns, C hidden size, H heads of D, E = H * D (usually C), S memory columns, I inner size, V types.
Weights are torch's (out, in), EET's transposed; all tensors of one call have one floating-point dtype. With f the
block, ``pre_layernorm`` and ``add_residual`` choose, as in EET:

                       add_residual            without
    pre_layernorm      x + f(norm(x))          f(norm(x))
    else               norm(x + f(x))          f(x)

Prompts of unequal length are padded on the left: ``pre_padding_len`` (B,) integers count the columns of padding in
front of each row. Padding is neither computed nor seen, and comes out as 0. Everything can be differentiated but what
goes through a cache. Head sizes may be any up to 256 on CUDA; multiples of 8 are faster. On the CPU the scores of a
whole prompt, (B, H, T, T), exist at one time. ValueError names what does not fit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightseq_fairseq.ops._library import check, shape
from lightseq_fairseq.ops.activation import ACTIVATION_FUNCTIONS
from lightseq_fairseq.ops.attention import cross_attention, self_attention
from lightseq_fairseq.ops.bias_activation_dropout import bias_activation_dropout
from lightseq_fairseq.ops.bias_dropout_residual import bias_dropout_residual
from lightseq_fairseq.ops.bias_dropout_residual_layer_norm import bias_dropout_residual_layer_norm
from lightseq_fairseq.ops.decode_attention import HEAD_DIM_STEP, MAX_HEAD_DIM, decode_self_attention
from lightseq_fairseq.ops.embedding import embedding as token_embedding
from lightseq_fairseq.ops.layer_norm import layer_norm

ACTIVATIONS = {name: name for name in ACTIVATION_FUNCTIONS} | {
    "gelu_new": "gelu_accurate", "gelu_pytorch_tanh": "gelu_accurate", "silu": "swish"}
"""fairseq's names and Hugging Face's -> fairseq's; ``quick_gelu``, x * sigmoid(1.702 x), goes its own way."""


class KeyValueCache:
    """Keys and values of one layer's self-attention, for ``batch`` rows of at most ``max_seq_len`` columns.

    Rows hold their tokens alone, without the padding in front of them: ``tokens`` (2, B, H, max_seq_len, D), of which
    the first ``lengths`` (B,) int32 of a row are there. ``columns`` counts those seen so far, padding included.
    """

    def __init__(self, batch: int, num_heads: int, head_dim: int, max_seq_len: int, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu") -> None:
        self.tokens = torch.zeros(2, batch, num_heads, max_seq_len, head_dim, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.columns, self.ragged = 0, False

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on as what row ``rows[i]`` was, (B',) int64: beams that follow a parent, rows that have ended."""
        self.tokens, self.lengths = self.tokens.index_select(1, rows), self.lengths.index_select(0, rows)

    def append(self, keys_values: Tensor, layout: _Layout) -> None:
        """Packed (N, 2, H, D) behind what is there."""
        counts = layout.cu_seqlens.diff()
        row = torch.repeat_interleave(counts.long(), output_size=keys_values.size(0))
        place = torch.arange(keys_values.size(0), device=row.device) - layout.cu_seqlens[row] + self.lengths[row]
        self.by_token[row, place] = keys_values
        self.lengths = self.lengths + counts
        self.columns += layout.width
        self.ragged = self.ragged or layout.rows is not None

    @property
    def by_token(self) -> Tensor:
        """(B, max_seq_len, 2, H, D)."""
        return self.tokens.permute(1, 3, 0, 2, 4)

    def packed(self) -> tuple[Tensor, Tensor]:
        """All tokens (M, 2, H, D) row by row, and where each row begins (B + 1,)."""
        seen = self.by_token[:, :self.columns]
        if not self.ragged:
            return seen.flatten(0, 1), _starts(self.lengths)
        real = torch.arange(self.columns, device=seen.device) < self.lengths[:, None]
        return seen[real], _starts(self.lengths)


class MemoryCache:
    """What a layer's cross-attention makes of the encoder's output, filled by the first call and read by the others."""

    def __init__(self) -> None:
        self.keys_values: Tensor | None = None  # packed (M, 2, H, D)
        self.layout: _Layout | None = None


class _Layout(NamedTuple):
    """Which columns of (B, T) hold tokens."""

    rows: Tensor | None
    """(N,) their numbers b * T + t; None where all do."""
    cu_seqlens: Tensor
    """(B + 1,) int32 where each row's tokens begin when packed."""
    batch: int
    width: int

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (N, C)."""
        flat = x.reshape(-1, x.size(-1))
        return flat if self.rows is None else flat.index_select(0, self.rows)

    def unpack(self, x: Tensor) -> Tensor:
        """(N, C) -> (B, T, C), 0 where there is padding."""
        if self.rows is not None:
            x = x.new_zeros(self.batch * self.width, x.size(-1)).index_copy(0, self.rows, x)
        return x.view(self.batch, self.width, -1)


def _starts(lengths: Tensor) -> Tensor:
    """(B,) -> (B + 1,) int32."""
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _layout(op: str, x: Tensor, pre_padding_len: Tensor | None = None, length_per_sample: Tensor | None = None,
            padding_mask: Tensor | None = None) -> _Layout:
    """Of ``x`` (B, T, C); tokens are where nothing says that there is padding."""
    batch, width = x.shape[:2]
    for name, given, expected in (("pre_padding_len", pre_padding_len, (batch,)),
                                  ("length_per_sample", length_per_sample, (batch,)),
                                  ("padding_mask", padding_mask, (batch, width))):
        check(op, (given is None or given.shape == expected,
                   lambda n=name, g=given, e=expected: f"{n} must have shape {e}, got {shape(g)}"))  # type: ignore[misc]
    if pre_padding_len is None and length_per_sample is None and padding_mask is None:
        lengths = torch.full((batch,), width, device=x.device)
        return _Layout(None, _starts(lengths), batch, width)
    column = torch.arange(width, device=x.device)
    real = torch.ones(batch, width, dtype=torch.bool, device=x.device)
    first = torch.zeros((), dtype=torch.int64, device=x.device) if pre_padding_len is None else pre_padding_len[:, None]
    real &= column >= first
    if length_per_sample is not None:
        real &= column < first + length_per_sample[:, None]
    if padding_mask is not None:
        real &= padding_mask.eq(0)
    rows = real.flatten().nonzero().squeeze(1)
    return _Layout(rows if rows.numel() < batch * width else None, _starts(real.sum(1)), batch, width)


class _Block(NamedTuple):
    """What is around a block's function."""

    op: str
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    pre_layernorm: bool
    add_residual: bool
    eps: float

    def enter(self, x: Tensor) -> Tensor:
        """The function's input, (N, C)."""
        if (self.pre_layernorm or self.add_residual) and (self.norm_weight is None or self.norm_bias is None):
            if self.pre_layernorm or not self.add_residual:
                raise ValueError(f"{self.op}: pre_layernorm needs layernorm_weight and layernorm_bias, got None")
            raise ValueError(f"{self.op}: a residual without pre_layernorm ends in a norm, which needs "
                             "layernorm_weight and layernorm_bias, got None")
        if not self.pre_layernorm:
            return x
        assert self.norm_weight is not None and self.norm_bias is not None
        return layer_norm(x, self.norm_weight, self.norm_bias, self.eps)

    def leave(self, y: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """From the last GEMM's (N, C), without its bias, and the block's input."""
        if not self.add_residual:
            return y if bias is None else y + bias
        bias = y.new_zeros(y.size(-1)) if bias is None else bias
        if self.pre_layernorm:
            return bias_dropout_residual(y, bias, x)
        assert self.norm_weight is not None and self.norm_bias is not None
        return bias_dropout_residual_layer_norm(y, bias, x, self.norm_weight, self.norm_bias, self.eps)[1]


def _projections(op: str, x: Tensor, num_heads: int, **weights: tuple[Tensor, int]) -> int:
    """D, after a look at the shapes of ``weights``: name -> (tensor (parts * E, in), parts)."""
    (first, parts), *_ = weights.values()
    inner, rest = divmod(first.size(0), parts)
    check(op, (x.dim() == 3, lambda: f"input must have shape (B, T, C), got {shape(x)}"),
          (num_heads > 0 and rest == 0 and inner % max(num_heads, 1) == 0,
           lambda: f"weights of {first.size(0)} rows do not hold {parts} projections of {num_heads} heads"),
          *((weight.dim() == 2 and weight.size(0) == count * inner,
             lambda n=name, w=weight, c=count: f"{n} must have {c * inner} rows, got {shape(w)}")
            for name, (weight, count) in weights.items()))
    return inner // num_heads


def _output(op: str, weight: Tensor, inner: int, x: Tensor) -> None:
    check(op, (weight.shape == (x.size(-1), inner),
               lambda: f"output_weight must have shape {(x.size(-1), inner)}, got {shape(weight)}"))


def _input(op: str, name: str, weight: Tensor, x: Tensor) -> None:
    check(op, (weight.size(1) == x.size(-1),
               lambda: f"{name} must have {x.size(-1)} columns, got {shape(weight)}"))


def multi_head_attention(input: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, output_weight: Tensor,
                         output_bias: Tensor | None, layernorm_weight: Tensor | None = None,
                         layernorm_bias: Tensor | None = None, *, num_heads: int, padding_mask: Tensor | None = None,
                         pre_padding_len: Tensor | None = None, need_sequence_mask: bool = False,
                         pre_layernorm: bool = False, add_residual: bool = True, layernorm_eps: float = 1e-5) -> Tensor:
    """Self-attention block of ``input`` (B, T, C) -> (B, T, C).

    ``qkv_weight`` (3E, C) and ``qkv_bias`` (3E,) hold queries, keys and values in this order, ``output_weight`` is
    (C, E). ``padding_mask`` (B, T) is not 0 where there is padding. ``need_sequence_mask`` hides later tokens.
    """
    op = "multi_head_attention"
    dim = _projections(op, input, num_heads, qkv_weight=(qkv_weight, 3))
    _input(op, "qkv_weight", qkv_weight, input)
    _output(op, output_weight, num_heads * dim, input)
    block = _Block(op, layernorm_weight, layernorm_bias, pre_layernorm, add_residual, layernorm_eps)
    layout = _layout(op, input, pre_padding_len, padding_mask=padding_mask)
    x = layout.pack(input)
    qkv = F.linear(block.enter(x), qkv_weight, qkv_bias).view(-1, 3, num_heads, dim)
    context = self_attention(qkv, layout.cu_seqlens, layout.width, need_sequence_mask)
    return layout.unpack(block.leave(F.linear(context.flatten(1), output_weight), output_bias, x))


def masked_multi_head_attention(input: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, output_weight: Tensor,
                                output_bias: Tensor | None, layernorm_weight: Tensor | None = None,
                                layernorm_bias: Tensor | None = None, *, num_heads: int,
                                pre_padding_len: Tensor | None = None, cache: KeyValueCache | None = None,
                                reorder_state: Tensor | None = None, pre_layernorm: bool = False,
                                add_residual: bool = True, layernorm_eps: float = 1e-5) -> Tensor:
    """Causal self-attention block of ``input`` (B, T, C) -> (B, T, C); weights as :func:`multi_head_attention`.

    With ``cache`` the first call reads the prompts, padded on the left by ``pre_padding_len``, and every later one the
    columns that follow, usually one, whose rows see all that the cache holds of them. The padding of the prompts is
    remembered. ``reorder_state`` (B,) int64 says which row of the last call each row continues; rows may repeat, as
    beams of one parent do, and may leave. (EET reads and writes through that index, so that two beams of one parent
    overwrite each other; here rows part.)
    """
    op = "masked_multi_head_attention"
    if cache is None:
        check(op, (reorder_state is None, lambda: "reorder_state goes with a cache"))
        return multi_head_attention(
            input, qkv_weight, qkv_bias, output_weight, output_bias, layernorm_weight, layernorm_bias,
            num_heads=num_heads, pre_padding_len=pre_padding_len, need_sequence_mask=True, pre_layernorm=pre_layernorm,
            add_residual=add_residual, layernorm_eps=layernorm_eps)
    dim = _projections(op, input, num_heads, qkv_weight=(qkv_weight, 3))
    _input(op, "qkv_weight", qkv_weight, input)
    _output(op, output_weight, num_heads * dim, input)
    if reorder_state is not None:
        cache.reorder(reorder_state)
    expected, room = (2, input.size(0), num_heads, dim), cache.tokens.size(3)
    found = (*cache.tokens.shape[:3], cache.tokens.size(4))
    check(op, (found == expected, lambda: f"the cache must be for (2, B, H, D) = {expected}, got {found}"),
          (cache.tokens.dtype == input.dtype,
           lambda: f"the cache must be {input.dtype} as input is, got {cache.tokens.dtype}"),
          (cache.columns + input.size(1) <= room,
           lambda: f"the cache has room for {room} columns, got {cache.columns} and {input.size(1)} more"),
          (pre_padding_len is None or cache.columns == 0,
           lambda: "pre_padding_len goes with the first call; the cache remembers it"))
    block = _Block(op, layernorm_weight, layernorm_bias, pre_layernorm, add_residual, layernorm_eps)
    with torch.no_grad():
        layout = _layout(op, input, pre_padding_len)
        x = layout.pack(input)
        qkv = F.linear(block.enter(x), qkv_weight, qkv_bias).view(-1, 3, num_heads, dim)
        if cache.columns == 0:
            context = self_attention(qkv, layout.cu_seqlens, layout.width, causal=True).flatten(1)
            cache.append(qkv[:, 1:], layout)
        elif _is_one_step(input, dim):
            context = _step(qkv, cache)
        else:
            cache.append(qkv[:, 1:], layout)
            keys_values, starts = cache.packed()
            context = cross_attention(qkv[:, 0], keys_values, layout.cu_seqlens, starts, layout.width, cache.columns,
                                      causal=True).flatten(1)
        return layout.unpack(block.leave(F.linear(context, output_weight), output_bias, x))


def _is_one_step(input: Tensor, dim: int) -> bool:
    """Whether one kernel writes the cache and attends to it; on the CPU that is no gain."""
    return input.is_cuda and input.size(1) == 1 and dim % HEAD_DIM_STEP == 0 and dim <= MAX_HEAD_DIM


def _step(qkv: Tensor, cache: KeyValueCache) -> Tensor:
    """One column (B, 3, H, D), each row behind its own tokens -> (B, E)."""
    batch, _, _, dim = qkv.shape
    qkv = torch.cat((qkv[:, :1] * dim**-0.5, qkv[:, 1:]), 1)
    own = torch.zeros(batch, 1, cache.tokens.size(3), dtype=torch.uint8, device=qkv.device)
    context = decode_self_attention(qkv, cache.tokens, own, cache.lengths)
    cache.lengths, cache.columns = cache.lengths + 1, cache.columns + 1
    return context


def cross_multi_head_attention(input: Tensor, memory: Tensor | None, q_weight: Tensor, q_bias: Tensor | None,
                               kv_weight: Tensor, kv_bias: Tensor | None, output_weight: Tensor,
                               output_bias: Tensor | None, layernorm_weight: Tensor | None = None,
                               layernorm_bias: Tensor | None = None, *, num_heads: int,
                               pre_padding_len: Tensor | None = None, length_per_sample: Tensor | None = None,
                               cache: MemoryCache | None = None, pre_layernorm: bool = False,
                               add_residual: bool = True, layernorm_eps: float = 1e-5) -> Tensor:
    """Cross-attention block of ``input`` (R, T, C) over ``memory`` (B, S, K) -> (R, T, C).

    ``q_weight`` is (E, C), ``kv_weight`` (2E, K) holds keys and values in this order, ``output_weight`` is (C, E). Of
    each sentence of the memory the ``length_per_sample`` (B,) columns behind the first ``pre_padding_len`` (B,) are
    tokens, all where None. R is B or a multiple of it, the hypotheses of a sentence being adjacent rows. With ``cache``
    the memory is projected by the first call and not looked at by later ones, which may pass None.
    """
    op = "cross_multi_head_attention"
    dim = _projections(op, input, num_heads, q_weight=(q_weight, 1), kv_weight=(kv_weight, 2))
    _input(op, "q_weight", q_weight, input)
    _output(op, output_weight, num_heads * dim, input)
    block = _Block(op, layernorm_weight, layernorm_bias, pre_layernorm, add_residual, layernorm_eps)
    cache = MemoryCache() if cache is None else cache
    if cache.keys_values is None or cache.layout is None:
        if memory is None:
            raise ValueError(f"{op}: memory must be given to the first call, got None")
        _input(op, "kv_weight", kv_weight, memory)
        cache.layout = _layout(op, memory, pre_padding_len, length_per_sample)
        cache.keys_values = F.linear(cache.layout.pack(memory), kv_weight, kv_bias).view(-1, 2, num_heads, dim)
    layout, (rows, columns, _) = cache.layout, input.shape
    check(op, (rows % max(layout.batch, 1) == 0,
               lambda: f"{rows} rows of input do not fit {layout.batch} sentences of memory"))
    x = input.reshape(-1, input.size(-1))
    q = F.linear(block.enter(x), q_weight, q_bias).view(-1, num_heads, dim)
    width = rows // max(layout.batch, 1) * columns  # what reads one sentence
    starts = torch.arange(layout.batch + 1, dtype=torch.int32, device=q.device) * width
    context = cross_attention(q, cache.keys_values, starts, layout.cu_seqlens, width, layout.width)
    return block.leave(F.linear(context.flatten(1), output_weight), output_bias, x).view(input.shape)


def ffn(input: Tensor, intermediate_weight: Tensor, intermediate_bias: Tensor | None, output_weight: Tensor,
        output_bias: Tensor | None, layernorm_weight: Tensor | None = None, layernorm_bias: Tensor | None = None, *,
        activation_fn: str = "gelu", pre_layernorm: bool = False, add_residual: bool = True,
        layernorm_eps: float = 1e-5) -> Tensor:
    """Feed-forward block of ``input`` (..., C) -> (..., C); weights (I, C) and (C, I).

    ``activation_fn`` is a name of :data:`ACTIVATIONS` or ``quick_gelu``; ``gelu`` is the erf form.
    """
    op, inner = "ffn", intermediate_weight.size(0)
    check(op, (activation_fn in ACTIVATIONS or activation_fn == "quick_gelu",
               lambda: f"activation_fn must be one of {', '.join([*ACTIVATIONS, 'quick_gelu'])}, got "
                       f"{activation_fn!r}"),
          (intermediate_weight.shape == (inner, input.size(-1)) and output_weight.shape == (input.size(-1), inner),
           lambda: f"weights must be (I, {input.size(-1)}) and ({input.size(-1)}, I), got "
                   f"{shape(intermediate_weight)} and {shape(output_weight)}"))
    block = _Block(op, layernorm_weight, layernorm_bias, pre_layernorm, add_residual, layernorm_eps)
    x = input.reshape(-1, input.size(-1))
    h = F.linear(block.enter(x), intermediate_weight)
    bias = h.new_zeros(inner) if intermediate_bias is None else intermediate_bias
    if activation_fn == "quick_gelu":
        h = h + bias
        h = h * torch.sigmoid(1.702 * h)
    else:
        h = bias_activation_dropout(h, bias, ACTIVATIONS[activation_fn])
    return block.leave(F.linear(h, output_weight), output_bias, x).view(input.shape)


def embedding(input_ids: Tensor, weight: Tensor, position_weight: Tensor | None = None,
              token_type_weight: Tensor | None = None, layernorm_weight: Tensor | None = None,
              layernorm_bias: Tensor | None = None, *, position_ids: Tensor | None = None,
              token_type_ids: Tensor | None = None, pre_padding_len: Tensor | None = None, step: int = 0,
              position_offset: int = 0, padding_idx: int | None = None, no_scale_embedding: bool = True,
              layernorm_eps: float = 1e-5) -> Tensor:
    """Sum of token, position and token type embedding, normalised if norm weights are given; (B, T) -> (B, T, C).

    ``weight`` (V, C) is multiplied by sqrt(C) unless ``no_scale_embedding``; its row ``padding_idx`` gets no gradient.
    ``position_ids`` are (B, T) or (1, T) rows of ``position_weight`` (P, C); where None, column t has the row ``step +
    t - pre_padding_len + position_offset``, not below the offset (pad + 1 in fairseq's models). ``token_type_ids``
    likewise are rows of ``token_type_weight``, 0 where None.
    """
    op = "embedding"
    check(op, (input_ids.dim() == 2, lambda: f"input_ids must have shape (B, T), got {shape(input_ids)}"),
          (position_weight is not None or position_ids is None, lambda: "position_ids need position_weight"),
          (token_type_weight is not None or token_type_ids is None, lambda: "token_type_ids need token_type_weight"),
          ((layernorm_weight is None) == (layernorm_bias is None),
           lambda: "layernorm_weight and layernorm_bias must be given together"),
          (position_ids is None or (pre_padding_len is None and step == 0 and position_offset == 0),
           lambda: "position_ids stand for themselves: leave out pre_padding_len, step and position_offset"))
    size = input_ids.shape
    if position_weight is not None:
        if position_ids is None:
            position_ids = torch.arange(step, step + size[1], device=input_ids.device)
            if pre_padding_len is not None:
                check(op, (pre_padding_len.shape == size[:1],
                           lambda: f"pre_padding_len must have shape {tuple(size[:1])}, got {shape(pre_padding_len)}"))
                position_ids = (position_ids - pre_padding_len[:, None]).clamp(min=0)
            position_ids = position_ids + position_offset
        position_ids = position_ids.expand(size).reshape(-1)
    x = token_embedding(input_ids.reshape(-1), weight, 1.0 if no_scale_embedding else weight.size(1) ** 0.5,
                        -1 if padding_idx is None else padding_idx, position_ids, position_weight)
    if token_type_weight is not None:
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids.expand(size)
        x = x + F.embedding(types.reshape(-1), token_type_weight)
    if layernorm_weight is not None and layernorm_bias is not None:
        x = layer_norm(x, layernorm_weight, layernorm_bias, layernorm_eps)
    return x.view(*size, -1)


def layernorm(input: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer norm over the last dimension of ``input`` (..., C), of any size; ``weight`` and ``bias`` are (C,)."""
    return layer_norm(input, weight, bias, eps)
