"""One decoding step of all beams with fixed shapes and no host in it, so that a CUDA graph can hold it.

A decoder without encoder continues texts: their keys and values, which all beams of a sentence share, lie where those
of sources do. The weights are those of an :class:`IncrementalDecoder`. Few rows take six ``decode_linear`` and two
attentions a layer, few sentences three and the two of ``decode_block``: between sublayers travel the sum in
front of the norm and its moments, and whoever reads it normalises. Many go through torch's GEMMs, and a sublayer ends
in one operator that adds bias and residual and normalises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightseq_fairseq import ops
from lightseq_fairseq.config import TransformerConfig
from lightseq_fairseq.layers.incremental import IncrementalDecoder
from lightseq_fairseq.layers.inference import InferenceNorm
from lightseq_fairseq.ops import decode_block
from lightseq_fairseq.ops.activation import ACTIVATION_FUNCTIONS
from lightseq_fairseq.ops.beam_step import TILE
from lightseq_fairseq.ops.decode_attention import (
    HEAD_DIM_STEP,
    MAX_HEAD_DIM,
    decode_cross_attention,
    decode_self_attention,
)
from lightseq_fairseq.ops.decode_linear import MAX_NORMED, Folded, decode_linear, fold, serves
from lightseq_fairseq.ops.linear import InferenceLinear, linear_to_logits


def fits(config: TransformerConfig) -> bool:
    """Whether :class:`DecodeStep` can be built of such a model."""
    head_dim = config.decoder_embed_dim // config.decoder_attention_heads
    return (head_dim % HEAD_DIM_STEP == 0 and head_dim <= MAX_HEAD_DIM and config.decoder_layers > 0
            and not config.cross_self_attention and config.no_cross_attention != config.has_encoder)


_MANY_TOKENS = 1024
"""Source tokens from which a product for each layer, written where it belongs, takes less than one for all, which few
fill the GPU with, and a copy."""


@dataclass
class DecodeBuffers:
    """Memory of one batch of B sentences with K beams, T steps at most, N source tokens at most; L layers."""

    cache: Tensor
    """(L, 2, B, H, T * K, D): see ops/decode_attention.py."""
    source: Tensor
    """(L, N, 2, H, D): keys and values of cross-attention, or of the texts that are continued."""
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


@dataclass
class _Stream:
    """What travels between sublayers: a sum and the norm that is still to be applied to it, None if there is none."""

    sum: Tensor
    norm: InferenceNorm | None
    moments: Tensor | None = None
    """Of the sum, see ops/decode_linear.py, if whoever made it has left them."""
    normed: Tensor | None = None
    """norm(sum), once somebody has made it."""


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
        self._folded: dict[int, Folded] = {}
        self.embeddings, self.embed_scale = self.decoder.embed_tokens.weight, self.decoder.embed_scale

    @property
    def input_positions(self) -> Tensor | None:
        """The position table where it is added to the embedding at once: not behind a projection, nor where sentences
        begin at positions of their own."""
        return self.positions if self.decoder.project_in_dim is None and self.config.has_encoder else None

    def buffers(self, batch: int, beam: int, steps_at_most: int, source_tokens: int, cu_seqlens: Tensor,
                steps: Tensor) -> DecodeBuffers:
        """New memory; ``cu_seqlens`` and ``steps`` are the caller's."""
        layer, layers = self.layers[0], len(self.layers)
        new_zeros = self.output.new_zeros
        return DecodeBuffers(
            new_zeros(layers, 2, batch, layer.heads, steps_at_most * beam, layer.head_dim),
            new_zeros(layers, source_tokens, 2, layer.heads, layer.head_dim), cu_seqlens,
            new_zeros(batch, beam, steps_at_most, dtype=torch.uint8), steps,
            new_zeros(batch * beam, self.config.input_dim), new_zeros(batch * beam, dtype=torch.int64))

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
        if source.is_cuda and tokens >= _MANY_TOKENS and self.cross_kv.bias is not None:
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
        stream = _Stream(self._embed(buffers), self.layers[0].self_norm if pre else None)
        for index, layer in enumerate(self.layers):
            qkv = self._read(stream, layer.qkv).view(rows, 3, layer.heads, layer.head_dim)
            stream = self._attend_to_past(layer, stream, qkv, buffers, index)
            if layer.cross_q is not None:
                stream = self._attend_to_source(layer, stream, buffers.source[index], buffers)
            hidden = self._read(stream, layer.fc1)
            last = index + 1 == len(self.layers)
            next_norm = self.last_norm if last else self.layers[index + 1].self_norm
            stream = self._join(hidden, layer.fc2, stream, next_norm if pre else layer.final_norm)
        if not pre and self.last_norm is not None:  # a second norm, as fairseq has it
            stream = _Stream(_normed(stream), self.last_norm)
        if self.project_out is not None:
            stream = _Stream(self._read(stream, self.project_out), None)
        x = _normed(stream)
        if x.dtype != torch.bfloat16 and serves(x, self.output):
            return self._linear(x, self.output, self.output_bias, "linear")
        return linear_to_logits(x, self.output, self.output_bias)

    def _attend_to_past(self, layer: Any, stream: _Stream, qkv: Tensor, buffers: DecodeBuffers, index: int) -> _Stream:
        """The stream behind self-attention of qkv (R, 3, H, D), in one launch where that is served."""
        pre, past = self.config.decoder_normalize_before, (buffers.cache[index], buffers.ancestors, buffers.steps)
        following = layer.final_norm if layer.cross_q is None else layer.cross_norm
        norm, old = following if pre else layer.self_norm, None if pre else stream.norm
        if layer.cross_q is None or not decode_block.serves(stream.sum, layer.heads, layer.head_dim, buffers.beam,
                                                            buffers.ancestors.size(2)):
            before = (buffers.source[index], buffers.cu_seqlens) if layer.cross_q is None else (None, None)
            return self._join(decode_self_attention(qkv, *past, *before), layer.out, stream, norm)
        residual, normed = stream.sum, {}
        if old is not None and stream.moments is not None:
            normed = dict(moments=stream.moments, gain=old.weight, shift=old.bias, eps=old.eps)
        elif old is not None:
            residual = _normed(stream)
        total, moments = decode_block.decode_self_block(qkv, *past, layer.out.weight, layer.out.bias, residual,
                                                        collect=True, **normed)
        return _Stream(total, norm, moments)

    def _attend_to_source(self, layer: Any, stream: _Stream, source: Tensor, buffers: DecodeBuffers) -> _Stream:
        """The stream behind cross-attention over keys and values (N, 2, H, D), in one launch where that is served."""
        pre = self.config.decoder_normalize_before
        norm, old = layer.final_norm if pre else layer.cross_norm, stream.norm
        if old is None or stream.moments is None or not decode_block.serves(stream.sum, layer.heads, layer.head_dim,
                                                                            buffers.beam):
            q = self._read(stream, layer.cross_q)
            context = decode_cross_attention(q, source, buffers.cu_seqlens, buffers.beam)
            return self._join(context, layer.cross_out, stream, norm)
        folded, out = self._fold(layer.cross_q, old), layer.cross_out
        total, moments = decode_block.decode_cross_block(
            stream.sum, stream.moments, folded.weight, folded.bias, folded.sums, source, buffers.cu_seqlens,
            buffers.beam, out.weight, out.bias, gain=None if pre else old.weight, shift=None if pre else old.bias,
            eps=old.eps, collect=True)
        return _Stream(total, norm, moments)

    def _fold(self, linear: InferenceLinear, norm: InferenceNorm) -> Folded:
        """``linear`` behind ``norm``, which is always the same for one map."""
        if id(linear) not in self._folded:
            self._folded[id(linear)] = fold(linear.weight, linear.bias, norm.weight, norm.bias)
        return self._folded[id(linear)]

    def _read(self, stream: _Stream, linear: InferenceLinear) -> Tensor:
        """The stream, normalised, through a linear map with its activation."""
        norm = stream.norm
        if norm is None or stream.moments is None or not serves(stream.sum, linear.weight):
            return self._linear(_normed(stream), linear.weight, linear.bias, linear.activation_name)
        folded = self._fold(linear, norm)
        return decode_linear(stream.sum, folded.weight, folded.bias, linear.activation_name, sums=folded.sums,
                             moments=stream.moments, eps=norm.eps)[0]

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        if serves(x, weight):
            return decode_linear(x, weight, bias, activation)[0]
        if activation == "relu" and bias is not None:  # which the GEMM does on its way out
            return torch._addmm_activation(bias, x, weight.t())
        return ACTIVATION_FUNCTIONS[activation](F.linear(x, weight, bias))

    def _join(self, x: Tensor, linear: InferenceLinear, stream: _Stream, norm: InferenceNorm | None) -> _Stream:
        """The sum of ``linear`` of ``x`` and the residual, to be normalised by ``norm``."""
        pre = self.config.decoder_normalize_before
        bias = linear.bias
        assert bias is not None
        if serves(x, linear.weight):
            collect = norm is not None and stream.sum.size(1) <= MAX_NORMED
            if pre or stream.moments is None or stream.norm is None:
                residual = stream.sum if pre else _normed(stream)
                out, moments = decode_linear(x, linear.weight, bias, residual=residual, collect=collect)
            else:
                old = stream.norm
                out, moments = decode_linear(x, linear.weight, bias, moments=stream.moments, residual=stream.sum,
                                             gain=old.weight, shift=old.bias, eps=old.eps, collect=collect)
            return _Stream(out, norm, moments if collect else None)
        y, residual = F.linear(x, linear.weight), stream.sum if pre else _normed(stream)
        if norm is None:
            return _Stream(ops.bias_dropout_residual(y, bias, residual), None)
        total, normed = ops.bias_dropout_residual_layer_norm(y, bias, residual, norm.weight, norm.bias, norm.eps)
        return _Stream(total, norm, None, normed)

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


def _normed(stream: _Stream) -> Tensor:
    """norm(sum), made here if nobody has yet."""
    if stream.norm is None:
        return stream.sum
    if stream.normed is None:
        norm = stream.norm
        stream.normed = ops.layer_norm(stream.sum, norm.weight, norm.bias, norm.eps)
    return stream.normed


def _padded(output: InferenceLinear, columns: int) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with rows of 0 behind, ``columns`` in all."""
    missing = columns - output.weight.size(0)
    if missing == 0:
        return output.weight, output.bias
    weight = torch.cat((output.weight, output.weight.new_zeros(missing, output.weight.size(1))))
    return weight, None if output.bias is None else torch.cat((output.bias, output.bias.new_zeros(missing)))
