"""The encoder with its weights fixed and fused, and the pieces that decoding shares with it.

q, k and v are one GEMM, with the factor D ** -0.5 of the scores folded into q; bias and activation are part of
the GEMMs where :class:`InferenceLinear` can have it so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightseq_fairseq import ops
from lightseq_fairseq.layers.attention import MultiheadAttention
from lightseq_fairseq.layers.encoder import TransformerEncoder, TransformerEncoderLayer
from lightseq_fairseq.layers.packing import Packing
from lightseq_fairseq.layers.residual import LayerNorm
from lightseq_fairseq.ops import InferenceLinear


class InferenceNorm:
    """A layer norm without the module call around it: a decoding step has dozens."""

    def __init__(self, norm: LayerNorm) -> None:
        self.shape, self.weight, self.bias, self.eps = list(norm.weight.shape), norm.weight, norm.bias, norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        return torch.native_layer_norm(x, self.shape, self.weight, self.bias, self.eps)[0]


def scaled_query(attention: MultiheadAttention) -> tuple[Tensor, Tensor]:
    """Query weight and bias times D ** -0.5."""
    scale = attention.head_dim**-0.5
    return attention.q_proj.weight * scale, attention.q_proj.bias * scale


def fused_qkv(attention: MultiheadAttention) -> InferenceLinear:
    """(N, C) -> (N, 3C): scaled q, k, v of self-attention."""
    q, q_bias = scaled_query(attention)
    return InferenceLinear(torch.cat((q, attention.k_proj.weight, attention.v_proj.weight)),
                           torch.cat((q_bias, attention.k_proj.bias, attention.v_proj.bias)))


class _EncoderLayer:
    def __init__(self, layer: TransformerEncoderLayer) -> None:
        attention = layer.self_attn
        self.heads, self.head_dim = attention.num_heads, attention.head_dim
        self.normalize_before = layer.normalize_before
        self.qkv, self.out = fused_qkv(attention), InferenceLinear(attention.out_proj.weight, attention.out_proj.bias)
        self.self_norm = InferenceNorm(layer.self_attn_layer_norm)
        self.fc1 = InferenceLinear(layer.fc1.weight, layer.fc1.bias, layer.activation)
        self.fc2 = InferenceLinear(layer.fc2.weight, layer.fc2.bias)
        self.final_norm = InferenceNorm(layer.final_layer_norm)

    def __call__(self, x: Tensor, packing: Packing) -> Tensor:
        """(N, C) -> (N, C)."""
        pre = self.normalize_before
        qkv = self.qkv(self.self_norm(x) if pre else x).view(-1, 3, self.heads, self.head_dim)
        context = ops.attention(*qkv.unbind(1), packing.cu_seqlens, packing.cu_seqlens, packing.width, packing.width,
                                scale=1.0)
        x = self.out.add(context.flatten(1), x)
        x = x if pre else self.self_norm(x)
        x = self.fc2.add(self.fc1(self.final_norm(x) if pre else x), x)
        return x if pre else self.final_norm(x)


class InferenceEncoder:
    """``encoder`` as it is now; later changes of its weights are not seen."""

    @torch.no_grad()
    def __init__(self, encoder: TransformerEncoder) -> None:
        self.encoder = encoder
        self.layers = [_EncoderLayer(layer) for layer in encoder.layers]  # type: ignore[arg-type]

    @torch.no_grad()
    def __call__(self, tokens: Tensor, packing: Packing, token_types: Tensor | None = None) -> Tensor:
        """Packed ``tokens`` (N,) int64, and their types where the model has some -> (N, C)."""
        x = self.encoder.embed(tokens, packing.positions, packing.width, token_types=token_types)
        for layer in self.layers:
            x = layer(x, packing)
        return x if self.encoder.layer_norm is None else self.encoder.layer_norm(x)
