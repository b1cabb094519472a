"""Layers of Hugging Face's BART as ours: fairseq's own, post-LN and under fairseq's names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.bart import modeling_bart

from lightseq_fairseq.huggingface.caching_attention import CachingAttention
from lightseq_fairseq.huggingface.checks import ACTIVATIONS, activation_problems, type_problems
from lightseq_fairseq.huggingface.packed_layer import PackedLayer, SelfAttentionLayer
from lightseq_fairseq.layers.decoder import TransformerDecoderLayer

_LINEAR = tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")) + ("fc1", "fc2")
_CROSS = tuple(f"encoder_attn.{name}_proj" for name in ("q", "k", "v", "out"))


class BartAttention(CachingAttention, modeling_bart.BartAttention):
    """BartAttention's modules under our computation."""

    original = modeling_bart.BartAttention


class _Layer(PackedLayer, TransformerDecoderLayer):
    """Our layer over the modules of BartEncoderLayer or BartDecoderLayer."""

    normalize_before = False

    @classmethod
    def problems(cls, layer: Any) -> list[str]:
        """Why ``layer``, Hugging Face's, cannot be replaced."""
        norms = ("self_attn_layer_norm", "final_layer_norm")
        return (type_problems(layer, nn.Linear, *_LINEAR) + type_problems(layer, nn.LayerNorm, *norms)
                + activation_problems(layer.self_attn.config.activation_function))

    @property
    def activation(self) -> str:
        return ACTIVATIONS[self.self_attn.config.activation_function]


class BartEncoderLayer(SelfAttentionLayer, _Layer, modeling_bart.BartEncoderLayer):
    """BartEncoderLayer's modules under our computation."""

    original = modeling_bart.BartEncoderLayer
    argument_names = ("attention_mask",)
    causal = False

    def compute(self, x: Tensor, *args: Any) -> Tensor:
        """As every layer does, and as Hugging Face's: infinities of fp16 become large numbers."""
        y = super().compute(x, *args)
        if y.dtype == torch.float16:  # as Hugging Face's layer does, but without asking the device first
            bound = torch.finfo(y.dtype).max - 1000
            y = y.clamp(-bound, bound)
        return y


class BartDecoderLayer(_Layer, modeling_bart.BartDecoderLayer):
    """BartDecoderLayer's modules under our computation."""

    original = modeling_bart.BartDecoderLayer
    argument_names = ("attention_mask", "encoder_hidden_states", "encoder_attention_mask", "past_key_values")
    causal = True

    @classmethod
    def problems(cls, layer: Any) -> list[str]:
        """As the encoder's, and of cross-attention."""
        return (super().problems(layer) + type_problems(layer, nn.Linear, *_CROSS)
                + type_problems(layer, nn.LayerNorm, "encoder_attn_layer_norm"))


CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    modeling_bart.BartEncoderLayer: BartEncoderLayer, modeling_bart.BartDecoderLayer: BartDecoderLayer,
    modeling_bart.BartAttention: BartAttention}
"""Hugging Face's classes and those that take their place."""
