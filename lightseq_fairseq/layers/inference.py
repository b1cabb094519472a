"""Packed texts through layers with their weights fixed and fused: the encoder, and what a decoder is given to continue.

q, k and v are one GEMM, with the factor D ** -0.5 of the scores folded into q; bias and activation are part of the
GEMMs where :class:`InferenceLinear` can have it so. Elsewhere a sublayer ends in one operator that adds bias and
residual and makes the norm that follows. Shapes: N tokens, C width, H heads of D.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightseq_fairseq import ops
from lightseq_fairseq.layers.attention import MultiheadAttention
from lightseq_fairseq.layers.decoder import TransformerDecoderLayer
from lightseq_fairseq.layers.encoder import TransformerEncoder, TransformerEncoderLayer
from lightseq_fairseq.layers.packing import Packing
from lightseq_fairseq.layers.sublayers import InferenceNorm, Stream, Sublayers
from lightseq_fairseq.ops import InferenceLinear
from lightseq_fairseq.ops.decode_linear import serves


def scaled_query(attention: MultiheadAttention) -> tuple[Tensor, Tensor]:
    """Query weight and bias times D ** -0.5."""
    scale = attention.head_dim**-0.5
    return attention.q_proj.weight * scale, attention.q_proj.bias * scale


def fused_qkv(attention: MultiheadAttention, int8: bool = False) -> InferenceLinear:
    """(N, C) -> (N, 3C): scaled q, k, v of self-attention."""
    q, q_bias = scaled_query(attention)
    return InferenceLinear(torch.cat((q, attention.k_proj.weight, attention.v_proj.weight)),
                           torch.cat((q_bias, attention.k_proj.bias, attention.v_proj.bias)), int8=int8)


class InferenceLayer:
    """The self-attention and the feed-forward of an encoder's or a decoder's layer."""

    def __init__(self, layer: TransformerEncoderLayer | TransformerDecoderLayer, int8: bool = False) -> None:
        """``int8``: see :class:`InferenceLinear`."""
        attention = layer.self_attn
        self.heads, self.head_dim, self.width = attention.num_heads, attention.head_dim, attention.embed_dim
        self.normalize_before = layer.normalize_before
        self.qkv = fused_qkv(attention, int8)
        self.out = InferenceLinear(attention.out_proj.weight, attention.out_proj.bias, int8=int8)
        self.self_norm = InferenceNorm(layer.self_attn_layer_norm)
        self.fc1 = InferenceLinear(layer.fc1.weight, layer.fc1.bias, layer.activation, int8)
        self.fc2 = InferenceLinear(layer.fc2.weight, layer.fc2.bias, int8=int8)
        self.final_norm = InferenceNorm(layer.final_layer_norm)

    def read(self, x: Tensor, y: Tensor, packing: Packing, causal: bool,
             following: InferenceNorm | None) -> tuple[Tensor, Tensor, Tensor]:
        """Packed texts without cross-attention: residual stream and normalised input, (N, C) each.

        ``following`` is the norm behind a pre-LN layer. Returns the same two for the layer that follows, and this one's
        q, k and v, (N, 3, H, D).
        """
        pre = self.normalize_before
        qkv = self.qkv(y).view(-1, 3, self.heads, self.head_dim)
        context = ops.self_attention(qkv, packing.cu_seqlens, packing.width, causal, scale=1.0).flatten(1)
        x, y = _join(context, self.out, x if pre else y, self.final_norm if pre else self.self_norm)
        x, y = _join(self.fc1(y), self.fc2, x if pre else y, following if pre else self.final_norm)
        return x, y, qkv


def _join(x: Tensor, linear: InferenceLinear, residual: Tensor, norm: InferenceNorm | None) -> tuple[Tensor, Tensor]:
    """``residual`` (N, C) plus ``linear`` of ``x`` (N, I); and its norm, (N, C) each."""
    if linear.prepacked or linear.int8 is not None or linear.bias is None:
        total = linear.add(x, residual)
        return total, total if norm is None else norm(total)
    x = F.linear(x, linear.weight)
    if norm is None:
        total = ops.bias_dropout_residual(x, linear.bias, residual)
        return total, total
    return ops.bias_dropout_residual_layer_norm(x, linear.bias, residual, norm.weight, norm.bias, norm.eps)


def read_layers(layers: Sequence[InferenceLayer], x: Tensor, packing: Packing, causal: bool,
                last_norm: InferenceNorm | None, keys_values: list[Tensor] | None = None,
                sublayers: Sublayers | None = None) -> Tensor:
    """Packed embeddings (N, C) through all ``layers`` and the norm behind them -> (N, C).

    ``keys_values`` collects keys and values of each layer, (N, 2, H, D). With ``sublayers`` few rows take them.
    """
    if not layers:
        return x if last_norm is None else last_norm(x)
    if sublayers is not None and keys_values is None and serves(x, layers[0].fc1.weight):
        return _read_few(layers, x, packing, causal, last_norm, sublayers)
    pre = layers[0].normalize_before
    y = layers[0].self_norm(x) if pre else x
    for index, layer in enumerate(layers):
        following = layers[index + 1].self_norm if index + 1 < len(layers) else last_norm
        x, y, qkv = layer.read(x, y, packing, causal, following)
        if keys_values is not None:
            keys_values.append(qkv[:, 1:])
    return y if pre or last_norm is None else last_norm(y)


def _read_few(layers: Sequence[InferenceLayer], x: Tensor, packing: Packing, causal: bool,
              last_norm: InferenceNorm | None, sublayers: Sublayers) -> Tensor:
    """As :func:`read_layers`, a sublayer being two launches and its attention."""
    pre = sublayers.normalize_before
    stream = Stream(x, layers[0].self_norm if pre else None)
    for index, layer in enumerate(layers):
        following = layers[index + 1].self_norm if index + 1 < len(layers) else last_norm
        qkv = sublayers.read(stream, layer.qkv).view(-1, 3, layer.heads, layer.head_dim)
        context = ops.self_attention(qkv, packing.cu_seqlens, packing.width, causal, scale=1.0).flatten(1)
        stream = sublayers.join(context, layer.out, stream, layer.final_norm if pre else layer.self_norm)
        hidden = sublayers.read(stream, layer.fc1)
        stream = sublayers.join(hidden, layer.fc2, stream, following if pre else layer.final_norm)
    return stream.normed if pre or last_norm is None else last_norm(stream.normed)


class InferenceEncoder:
    """``encoder`` as it is now; later changes of its weights are not seen."""

    @torch.no_grad()
    def __init__(self, encoder: TransformerEncoder, int8: bool = False) -> None:
        """``int8``: see :class:`InferenceLinear`."""
        self.encoder = encoder
        self.layers = [InferenceLayer(layer, int8) for layer in encoder.layers]  # type: ignore[arg-type]
        self.last_norm = None if encoder.layer_norm is None else InferenceNorm(encoder.layer_norm)
        on_gpu = self.layers and self.layers[0].self_norm.weight.is_cuda
        self.sublayers = Sublayers(self.layers[0].normalize_before) if on_gpu else None

    @torch.no_grad()
    def __call__(self, tokens: Tensor, packing: Packing, token_types: Tensor | None = None) -> Tensor:
        """Packed ``tokens`` (N,) int64, and their types where the model has some -> (N, C)."""
        x = self.encoder.embed(tokens, packing.positions, packing.width, token_types=token_types)
        return read_layers(self.layers, x, packing, False, self.last_norm, sublayers=self.sublayers)
