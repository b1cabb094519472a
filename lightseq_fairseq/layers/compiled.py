"""Encoding in one compiled call and decoding in one a step, on the CPU.

What the layers of ``inference.py`` and ``incremental.py`` do in dozens of calls of PyTorch, ``lightseq_cpu::encode``
and ``decoder_step`` do in one, without a barrier: each thread takes its share of the sentences through all layers.
Every thread reads all weights, so with large models few threads go this way.

Shapes: B live sentences of B0 that began, K beams, C width, L layers, H heads of D, V types, N source tokens, T steps
that there is room for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightseq_fairseq.layers.decoder import TransformerDecoder, TransformerDecoderLayer
from lightseq_fairseq.layers.encoder import TransformerEncoder, TransformerEncoderLayer
from lightseq_fairseq.layers.inference import scaled_query
from lightseq_fairseq.layers.packing import Packing
from lightseq_fairseq.layers.residual import LayerNorm
from lightseq_fairseq.ops import InferenceLinear
from lightseq_fairseq.ops.cpu import compiled_operators, pack_linear

_FEW_THREADS = 4
_MOST_BYTES = 32 << 20
"""More threads than these serve models of more weights than these by the GEMMs of PyTorch, which all threads share.
Measured on one Zen 4 core, milliseconds a step of the base model with 4, 32 and 128 rows: 7, 32, 129 beside 12, 39,
152; weights come from memory at all three."""
_FIRST_CAPACITY = 32
"""Steps a cache has room for at first; it doubles when full."""


class CompiledEncoder:
    """``encoder`` as it is now; later changes of its weights are not seen."""

    @torch.no_grad()
    def __init__(self, encoder: TransformerEncoder, lanes: int = 0) -> None:
        """``lanes`` is the widest instruction set to use, in floats; 0 for what this machine has."""
        operators = compiled_operators()
        assert operators is not None
        self._encode, self.lanes = operators.encode.default, lanes
        config, self.encoder = encoder.config, encoder
        layers: list[TransformerEncoderLayer] = list(encoder.layers)  # type: ignore[arg-type]
        pieces = [piece for layer in layers for piece in (*_self_attention(layer), *_feed_forward(layer))]
        self.packed, self.eps = torch.cat([*pieces, *_norm(encoder.layer_norm)]), config.layer_norm_eps
        self.shape = torch.tensor([config.encoder_ffn_embed_dim, config.encoder_attention_heads, len(layers),
                                   config.encoder_normalize_before, encoder.layer_norm is not None])

    @staticmethod
    def serves(encoder: TransformerEncoder, int8: bool = False) -> bool:
        """Whether the operator knows this kind of encoder, is there, and is the better way, than 8 bits if allowed."""
        config = encoder.config
        return _fits(encoder, config.encoder_embed_dim, config.encoder_ffn_embed_dim, config.encoder_attention_heads,
                     int8)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, packing: Packing, token_types: Tensor | None = None) -> Tensor:
        """Packed ``tokens`` (N,) int64, and their types where the model has some -> (N, C)."""
        x = self.encoder.embed(tokens, packing.positions, packing.width, token_types=token_types).contiguous()
        self._encode(self.packed, self.shape, self.eps, x, packing.cu_seqlens, self.lanes)
        return x


class CompiledDecoder:
    """``decoder`` as it is now; later changes of its weights are not seen."""

    @torch.no_grad()
    def __init__(self, decoder: TransformerDecoder, lanes: int = 0) -> None:
        """``lanes`` as :class:`CompiledEncoder` has it."""
        operators = compiled_operators()
        assert operators is not None
        self._step, self.lanes = operators.decoder_step.default, lanes
        config = decoder.config
        self.positions, weight = decoder.embed_positions, decoder.embed_tokens.weight
        self.embeddings = weight if decoder.embed_scale == 1.0 else weight * decoder.embed_scale
        layers: list[TransformerDecoderLayer] = list(decoder.layers)  # type: ignore[arg-type]
        projection = decoder.output_projection
        self.types, self.eps = projection.out_features, config.layer_norm_eps
        self.num_layers, self.heads = len(layers), config.decoder_attention_heads
        cross = [layer.encoder_attn for layer in layers if layer.encoder_attn is not None]
        self.cross_kv = InferenceLinear(
            torch.cat([p.weight for a in cross for p in (a.k_proj, a.v_proj)]),
            torch.cat([p.bias for a in cross for p in (a.k_proj, a.v_proj)])) if cross else None
        pieces = _norm(decoder.layernorm_embedding)
        for layer in layers:
            pieces += [*_self_attention(layer), *_cross_attention(layer), *_feed_forward(layer)]
        pieces += [*_norm(decoder.layer_norm), *pack_linear(projection.weight, projection.bias)]
        self.packed = torch.cat(pieces)
        self.shape = torch.tensor([
            config.decoder_ffn_embed_dim, config.decoder_attention_heads, len(layers), self.types,
            config.decoder_normalize_before, decoder.layernorm_embedding is not None, decoder.layer_norm is not None,
            self.cross_kv is not None])

    @staticmethod
    def serves(decoder: TransformerDecoder, int8: bool = False) -> bool:
        """Whether the operator knows this kind of decoder, is there, and is the better way, than 8 bits if allowed."""
        config = decoder.config
        return (not config.cross_self_attention and decoder.project_in_dim is None and decoder.project_out_dim is None
                and _fits(decoder, config.decoder_embed_dim, config.decoder_ffn_embed_dim,
                          config.decoder_attention_heads, int8))

    def start(self, source: Tensor | None, packing: Packing | None, batch: int, beam: int) -> CompiledState:
        """The state before the first token of ``batch`` sentences; ``source`` (M, K) is the encoder's packed output."""
        return CompiledState(self, source, packing, batch, beam)

    def next_logits(self, state: CompiledState, tokens: Tensor, need_attention: bool = False) -> Tensor:
        """The newest token of each beam, (B, K') int64, K' = 1 at the first step -> (B, K', V).

        With ``need_attention`` the last layer's attention is left in ``state.attention``.
        """
        state.advance(tokens.size(1), need_attention)
        position = None
        if self.positions is not None:
            table = self.positions.upto(state.steps, self.embeddings)
            position = table[self.positions.offset + state.steps - 1]
        parents, state.parents = state.parents, None
        logits: Tensor = self._step(
            self.packed, self.shape, self.eps, self.embeddings, position, tokens.contiguous(), parents, state.live,
            state.cache, state.paths, state.sources, state.starts, state.lengths, state.attention,
            state.steps - 1, self.lanes)
        return logits


def _norm(norm: torch.nn.Module | None) -> list[Tensor]:
    if norm is None:
        return []
    assert isinstance(norm, LayerNorm)
    return [norm.weight, norm.bias]


def _self_attention(layer: TransformerEncoderLayer | TransformerDecoderLayer) -> list[Tensor]:
    """What the operators read of a layer's self-attention, in their order; likewise below."""
    attention = layer.self_attn
    query, query_bias = scaled_query(attention)
    return [*_norm(layer.self_attn_layer_norm),
            *pack_linear(torch.cat((query, attention.k_proj.weight, attention.v_proj.weight)),
                         torch.cat((query_bias, attention.k_proj.bias, attention.v_proj.bias))),
            *pack_linear(attention.out_proj.weight, attention.out_proj.bias)]


def _cross_attention(layer: TransformerDecoderLayer) -> list[Tensor]:
    attention = layer.encoder_attn
    if attention is None:
        return []
    return [*_norm(layer.encoder_attn_layer_norm), *pack_linear(*scaled_query(attention)),
            *pack_linear(attention.out_proj.weight, attention.out_proj.bias)]


def _feed_forward(layer: TransformerEncoderLayer | TransformerDecoderLayer) -> list[Tensor]:
    return [*_norm(layer.final_layer_norm), *pack_linear(layer.fc1.weight, layer.fc1.bias),
            *pack_linear(layer.fc2.weight, layer.fc2.bias)]


def _fits(stack: TransformerEncoder | TransformerDecoder, width: int, inner: int, heads: int, int8: bool) -> bool:
    """Whether the operators know this stack's kind and sizes, are there, and are the better way."""
    weight = stack.embed_tokens.weight
    return (weight.device.type == "cpu" and weight.dtype == torch.float32 and stack.config.activation_fn == "relu"
            and width % 16 == inner % 16 == width // heads % 16 == 0 and len(stack.layers) > 0
            and ((torch.get_num_threads() <= _FEW_THREADS and not int8)
                 or 4 * sum(parameter.numel() for parameter in stack.parameters()) <= _MOST_BYTES)
            and compiled_operators() is not None)


class CompiledState:
    """Keys, values and ancestry of one batch; sentences that leave stay in the cache until it grows.

    ``cache`` (B0, L, H, T, K, 2, D) holds key and value of each token fed; ``paths`` (B0, T, K) int32 says which of
    the K slots of each step lies in the history of beam k; ``sources`` (L, H, N, 2, D) are the sources' own.
    """

    def __init__(self, model: CompiledDecoder, source: Tensor | None, packing: Packing | None, batch: int,
                 beam: int) -> None:
        self.model, self.beam, self.steps = model, beam, 0
        self.live = torch.arange(batch)
        self.attention: Tensor | None = None  # (B, K', S)
        self.parents: Tensor | None = None
        self.sources = self.starts = self.lengths = None
        self.width = 0
        heads, head_dim = model.heads, model.embeddings.size(1) // model.heads
        if source is not None and packing is not None and model.cross_kv is not None:
            projected = model.cross_kv(source).view(-1, model.num_layers, 2, heads, head_dim)
            self.sources = projected.permute(1, 3, 0, 2, 4).contiguous()
            self.starts, self.lengths = packing.cu_seqlens[:-1], packing.cu_seqlens.diff()
            self.width = packing.width
        self.cache = torch.empty(batch, model.num_layers, heads, _FIRST_CAPACITY, beam, 2, head_dim)
        self.paths = torch.empty(batch, _FIRST_CAPACITY, beam, dtype=torch.int32)

    def advance(self, fed: int, need_attention: bool) -> None:
        """Make room for one more token of ``fed`` beams."""
        if self.steps == self.paths.size(1):
            self._grow()
        self.steps += 1
        self.attention = None
        if need_attention and self.sources is not None:
            self.attention = torch.zeros(self.live.numel(), fed, self.width)

    def _grow(self) -> None:
        """Twice the steps, for the live sentences alone."""
        used, live = self.steps, self.live
        _, layers, heads, _, *rest = self.cache.shape
        cache = self.cache.new_empty(live.numel(), layers, heads, 2 * used, *rest)
        paths = self.paths.new_empty(live.numel(), 2 * used, self.beam)
        for new, old in enumerate(live.tolist()):
            cache[new, :, :, :used], paths[new, :used] = self.cache[old], self.paths[old]
        if self.starts is not None and self.lengths is not None:
            self.starts, self.lengths = self.starts[live], self.lengths[live]
        self.cache, self.paths, self.live = cache, paths, torch.arange(live.numel())

    def reorder(self, parents: Tensor) -> None:
        """Beam k of sentence b continues its beam ``parents[b, k]``, (B, K) int64; done as the next step begins."""
        self.parents = parents.contiguous()

    def keep(self, sentences: Tensor) -> None:
        """Only these sentences go on, (B',) int64."""
        self.live = self.live[sentences]
        if self.parents is not None:
            self.parents = self.parents[sentences]
