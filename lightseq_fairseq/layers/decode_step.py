"""One decoding step of all beams with fixed shapes and no host in it, so that a CUDA graph can hold it.

A decoder without encoder continues texts: their keys and values, which all beams of a sentence share, lie where those
of sources do. The weights are those of an :class:`IncrementalDecoder`. Few rows take six ``decode_linear`` and two
attentions a layer, few sentences three and the two of ``decode_block``; see layers/sublayers.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightseq_fairseq.config import TransformerConfig
from lightseq_fairseq.layers.incremental import IncrementalDecoder
from lightseq_fairseq.layers.sublayers import InferenceNorm, Stream, Sublayers
from lightseq_fairseq.ops import decode_block, decode_memory_attention
from lightseq_fairseq.ops.beam_step import TILE
from lightseq_fairseq.ops.decode_attention import (
    HEAD_DIM_STEP,
    MAX_HEAD_DIM,
    decode_cross_attention,
    decode_self_attention,
)
from lightseq_fairseq.ops.decode_head_map import decode_head_map
from lightseq_fairseq.ops.decode_linear import MAX_ELEMENTS, MAX_ELEMENTS_AHEAD, serves
from lightseq_fairseq.ops.linear import InferenceLinear, linear_to_logits


def fits(config: TransformerConfig) -> bool:
    """Whether :class:`DecodeStep` can be built of such a model."""
    head_dim = config.decoder_embed_dim // config.decoder_attention_heads
    return (head_dim % HEAD_DIM_STEP == 0 and head_dim <= MAX_HEAD_DIM and config.decoder_layers > 0
            and not config.cross_self_attention and config.no_cross_attention != config.has_encoder)


_MANY_TOKENS = 1024
"""Source tokens from which each layer's keys and values are a product of their own, written where they belong; fewer
are one product for all layers and a copy. Measured at 4 096 and 38 400 (H200), where that saves time, not between."""
_MUCH_TO_FETCH = 32 * 2**20
"""Bytes of a layer's keys and values from which cross-attention is helped by a query map that lets it begin early."""


@dataclass
class DecodeBuffers:
    """Memory of one batch of B sentences with K beams, T steps at most, N source tokens at most; L layers."""

    cache: Tensor
    """(L, 2, B, H, T * K, D): see ops/decode_attention.py."""
    source: Tensor
    """(L, N, 2, H, D): keys and values of cross-attention, or of the texts that are continued; or (1, N, K), the
    encoder's output, which all layers read as it is."""
    cu_seqlens: Tensor
    """(B + 1,) or (B, 2) int32, see ops/decode_attention.py."""
    ancestors: Tensor
    """(B, K, T) uint8."""
    steps: Tensor
    """(B,) int32: of each sentence so far."""
    x: Tensor
    """(B * K, E): embeddings of the newest tokens, see ops/beam_step.py."""
    first_rows: Tensor
    """(B * K,) int64: row of the position table that belongs to the first step, where each text has its own."""

    @property
    def beam(self) -> int:
        """K."""
        return self.ancestors.size(1)

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """First source token of each sentence and the end of its last, (B,) each."""
        if self.cu_seqlens.dim() == 2:
            return self.cu_seqlens[:, 0], self.cu_seqlens[:, 1]
        return self.cu_seqlens[:-1], self.cu_seqlens[1:]


class _MemoryAttention:
    """Cross-attention of a layer over the encoder's output as it is: see ops/decode_memory_attention.py."""

    def __init__(self, layer: Any, weight: Tensor, bias: Tensor) -> None:
        """``weight`` (2C, K) and ``bias`` (2C,) make keys and values."""
        maps = weight.view(2, layer.heads, layer.head_dim, -1)
        self.keys, self.values = maps[0], maps[1].transpose(1, 2)  # (H, D, K), (H, K, D)
        out, value_bias = layer.cross_out, bias.view(2, -1)[1].float()
        self.out = InferenceLinear(out.weight, (out.bias.float() + out.weight.float() @ value_bias).to(out.bias.dtype))

    def __call__(self, q: Tensor, memory: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Queries (B, C) over memory (N, K) -> context (B, C), for ``out``."""
        heads, dim, _ = self.keys.shape
        context = q.new_empty(q.size(0), heads, dim)
        mapped = decode_memory_attention.decode_memory_attention(decode_head_map(q, self.keys), memory, cu_seqlens)
        torch.bmm(mapped.transpose(0, 1), self.values, out=context.transpose(0, 1))
        return context.flatten(1)


class DecodeStep:
    """``decoder`` with fixed shapes; later changes of its weights are not seen."""

    def __init__(self, decoder: IncrementalDecoder) -> None:
        self.config, self.layers, self.cross_kv = decoder.config, decoder.layers, decoder.cross_kv
        self.decoder = decoder.decoder
        self.columns = -(-self.config.tgt_vocab_size // TILE) * TILE
        self.output, self.output_bias = _padded(decoder.output, self.columns)
        self.device, self.dtype = self.output.device, self.output.dtype
        project, last = self.decoder.project_out_dim, self.decoder.layer_norm
        self.project_out = None if project is None else InferenceLinear(project.weight)
        self.last_norm = None if last is None else InferenceNorm(last)
        positions = self.decoder.embed_positions
        self.positions = None if positions is None else positions.upto(self.config.max_target_positions, self.output)
        self.first_position = self.config.first_position
        self.sublayers = Sublayers(self.config.decoder_normalize_before)
        self.embeddings, self.embed_scale = self.decoder.embed_tokens.weight, self.decoder.embed_scale
        self.memory_attentions: list[_MemoryAttention] = []

    @property
    def input_positions(self) -> Tensor | None:
        """The position table where it is added to the embedding at once: not behind a projection, nor where sentences
        begin at positions of their own."""
        return self.positions if self.decoder.project_in_dim is None and self.config.has_encoder else None

    def buffers(self, batch: int, beam: int, steps_at_most: int, source_tokens: int, cu_seqlens: Tensor,
                steps: Tensor) -> DecodeBuffers:
        """New memory; ``cu_seqlens`` and ``steps`` are the caller's."""
        layer, layers = self.layers[0], len(self.layers)
        new_zeros, source_shape = self.output.new_zeros, self.source_shape(beam, source_tokens)
        if len(source_shape) == 3 and not self.memory_attentions:
            maps = (part.chunk(layers) for part in (self.cross_kv.weight, self.cross_kv.bias))
            self.memory_attentions = [_MemoryAttention(*own) for own in zip(self.layers, *maps, strict=True)]
        return DecodeBuffers(
            new_zeros(layers, 2, batch, layer.heads, steps_at_most * beam, layer.head_dim),
            new_zeros(source_shape), cu_seqlens,
            new_zeros(batch, beam, steps_at_most, dtype=torch.uint8), steps,
            new_zeros(batch * beam, self.config.input_dim), new_zeros(batch * beam, dtype=torch.int64))

    def source_shape(self, beam: int, tokens: int) -> tuple[int, ...]:
        """Of DecodeBuffers.source."""
        layer = self.layers[0]
        if self.cross_kv is not None and beam == 1:
            width = self.cross_kv.weight.size(1)
            if decode_memory_attention.serves(tokens, width, layer.heads, self.dtype, self.device):
                return 1, tokens, width
        return len(self.layers), tokens, 2, layer.heads, layer.head_dim

    def start(self, source: Tensor, buffers: DecodeBuffers) -> None:
        """Keys and values of every layer from the encoder's packed output (M, K), M <= N, and the first input.

        Without encoder ``source`` (M, E + 2 * L * C) is what was read of the texts: token embeddings without positions,
        keys and values.
        """
        heads, dim, tokens = self.layers[0].heads, self.layers[0].head_dim, source.size(0)
        if self.cross_kv is None:
            width = self.config.input_dim
            joint = source[:, width:].reshape(-1, len(self.layers), 2, heads, dim)
            buffers.source[:, :tokens].copy_(joint.transpose(0, 1))
            begin, end = buffers.bounds
            newest = source[:, :width].index_select(0, (end.long() - 1).clamp(min=0)).unsqueeze(1)  # (B, 1, E)
            buffers.x.view(-1, buffers.beam, width).copy_(newest.expand(-1, buffers.beam, -1))
            rows = self.first_position + (end - begin - 1).clamp(min=0)
            buffers.first_rows.view(-1, buffers.beam).copy_(rows.unsqueeze(1).expand(-1, buffers.beam))
            return
        if buffers.source.dim() == 3:
            buffers.source[0, :tokens].copy_(source)
        elif source.is_cuda and tokens >= _MANY_TOKENS and self.cross_kv.bias is not None:
            parts = (part.chunk(len(self.layers)) for part in (self.cross_kv.weight, self.cross_kv.bias))
            for layer, weight, bias in zip(buffers.source, *parts, strict=True):
                torch.addmm(bias, source, weight.t(), out=layer[:tokens].view(tokens, -1))
        else:
            joint = self.cross_kv(source).view(-1, len(self.layers), 2, heads, dim)
            buffers.source[:, :tokens].copy_(joint.transpose(0, 1))
        first = self.embeddings[self.config.start].float() * self.embed_scale
        if self.input_positions is not None:
            first = first + self.input_positions[self.first_position].float()
        buffers.x.copy_(first.expand_as(buffers.x))

    def __call__(self, buffers: DecodeBuffers) -> Tensor:
        """Logits (B * K, V') of what follows; columns past the vocabulary mean nothing."""
        pre = self.config.decoder_normalize_before
        rows = buffers.x.size(0)
        stream = Stream(self._embed(buffers), self.layers[0].self_norm if pre else None)
        for index, layer in enumerate(self.layers):
            qkv = self.sublayers.read(stream, layer.qkv).view(rows, 3, layer.heads, layer.head_dim)
            stream = self._attend_to_past(layer, stream, qkv, buffers, index)
            if layer.cross_q is not None:
                stream = self._attend_to_source(layer, stream, buffers, index)
            hidden = self.sublayers.read(stream, layer.fc1)
            last = index + 1 == len(self.layers)
            next_norm = self.last_norm if last else self.layers[index + 1].self_norm
            stream = self.sublayers.join(hidden, layer.fc2, stream, next_norm if pre else layer.final_norm)
        if not pre and self.last_norm is not None:  # a second norm, as fairseq has it
            stream = Stream(stream.normed, self.last_norm)
        if self.project_out is not None:
            stream = Stream(self.sublayers.read(stream, self.project_out), None)
        x = stream.normed
        if x.dtype != torch.bfloat16 and serves(x, self.output):
            return self.sublayers.linear(x, self.output, self.output_bias, "linear")
        return linear_to_logits(x, self.output, self.output_bias)

    def _attend_to_past(self, layer: Any, stream: Stream, qkv: Tensor, buffers: DecodeBuffers, index: int) -> Stream:
        """The stream behind self-attention of qkv (R, 3, H, D), in one launch where that is served."""
        pre, past = self.config.decoder_normalize_before, (buffers.cache[index], buffers.ancestors, buffers.steps)
        following = layer.final_norm if layer.cross_q is None else layer.cross_norm
        norm, old = following if pre else layer.self_norm, None if pre else stream.norm
        if layer.cross_q is None or not decode_block.serves(stream.sum, layer.heads, layer.head_dim, buffers.beam,
                                                            buffers.ancestors.size(2)):
            before = (buffers.source[index], buffers.cu_seqlens) if layer.cross_q is None else (None, None)
            return self.sublayers.join(decode_self_attention(qkv, *past, *before), layer.out, stream, norm)
        residual, normed = stream.sum, dict[str, Any]()
        if old is not None and stream.moments is not None:
            normed = dict(moments=stream.moments, gain=old.weight, shift=old.bias, eps=old.eps)
        elif old is not None:
            residual = stream.normed
        total, moments = decode_block.decode_self_block(qkv, *past, layer.out.weight, layer.out.bias, residual,
                                                        collect=True, **normed)
        return Stream(total, norm, moments)

    def _attend_to_source(self, layer: Any, stream: Stream, buffers: DecodeBuffers, index: int) -> Stream:
        """The stream behind cross-attention, in one launch where that is served."""
        pre = self.config.decoder_normalize_before
        norm, old = layer.final_norm if pre else layer.cross_norm, stream.norm
        if buffers.source.dim() == 3:
            attend = self.memory_attentions[index]
            context = attend(self.sublayers.read(stream, layer.cross_q), buffers.source[0], buffers.cu_seqlens)
            return self.sublayers.join(context, attend.out, stream, norm)
        source = buffers.source[index]
        if old is None or stream.moments is None or not decode_block.serves(stream.sum, layer.heads, layer.head_dim,
                                                                            buffers.beam):
            much = source.numel() * source.itemsize >= _MUCH_TO_FETCH
            q = self.sublayers.read(stream, layer.cross_q, MAX_ELEMENTS_AHEAD if much else MAX_ELEMENTS)
            context = decode_cross_attention(q, source, buffers.cu_seqlens, buffers.beam)
            return self.sublayers.join(context, layer.cross_out, stream, norm)
        folded, out = self.sublayers.fold(layer.cross_q, old), layer.cross_out
        total, moments = decode_block.decode_cross_block(
            stream.sum, stream.moments, folded.weight, folded.bias, folded.sums, source, buffers.cu_seqlens,
            buffers.beam, out.weight, out.bias, gain=None if pre else old.weight, shift=None if pre else old.bias,
            eps=old.eps, collect=True)
        return Stream(total, norm, moments)

    def _embed(self, buffers: DecodeBuffers) -> Tensor:
        """(B * K, C)."""
        x = buffers.x
        if self.decoder.project_in_dim is not None:
            x = self.decoder.project_in_dim(x)
        if self.positions is not None and self.input_positions is None:
            steps = buffers.steps if buffers.beam == 1 else buffers.steps.repeat_interleave(buffers.beam,
                                                                                            output_size=x.size(0))
            rows = steps + (self.first_position if self.config.has_encoder else buffers.first_rows)
            x = x + F.embedding(rows, self.positions)
        norm = self.decoder.layernorm_embedding
        return x if norm is None else norm(x)


def _padded(output: InferenceLinear, columns: int) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with rows of 0 behind, ``columns`` in all."""
    missing = columns - output.weight.size(0)
    if missing == 0:
        return output.weight, output.bias
    weight = torch.cat((output.weight, output.weight.new_zeros(missing, output.weight.size(1))))
    return weight, None if output.bias is None else torch.cat((output.bias, output.bias.new_zeros(missing)))
