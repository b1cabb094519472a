"""Layers of Hugging Face's BART, mBART, Marian and M2M100 as ours: fairseq's own, under fairseq's names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.bart import modeling_bart
from transformers.models.m2m_100 import modeling_m2m_100
from transformers.models.marian import modeling_marian
from transformers.models.mbart import modeling_mbart

from lightseq_fairseq.huggingface.caching_attention import CachingAttention
from lightseq_fairseq.huggingface.checks import ACTIVATIONS, activation_problems, type_problems
from lightseq_fairseq.huggingface.packed_layer import PackedLayer, SelfAttentionLayer
from lightseq_fairseq.layers.decoder import TransformerDecoderLayer

_LINEAR = tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")) + ("fc1", "fc2")
_CROSS = tuple(f"encoder_attn.{name}_proj" for name in ("q", "k", "v", "out"))


class _Layer(PackedLayer, TransformerDecoderLayer):
    """Our layer over the modules of BartEncoderLayer or BartDecoderLayer, or of one that is copied from it."""

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


class _EncoderLayer(SelfAttentionLayer, _Layer):
    argument_names = ("attention_mask",)
    causal = False

    def compute(self, x: Tensor, *args: Any) -> Tensor:
        """As every layer does, and as Hugging Face's: infinities of fp16 become large numbers."""
        y = super().compute(x, *args)
        if y.dtype == torch.float16:  # as Hugging Face's layer does, but without asking the device first
            bound = torch.finfo(y.dtype).max - 1000
            y = y.clamp(-bound, bound)
        return y


class _DecoderLayer(_Layer):
    argument_names = ("attention_mask", "encoder_hidden_states", "encoder_attention_mask", "past_key_values")
    causal = True

    @classmethod
    def problems(cls, layer: Any) -> list[str]:
        """As the encoder's, and of cross-attention."""
        return (super().problems(layer) + type_problems(layer, nn.Linear, *_CROSS)
                + type_problems(layer, nn.LayerNorm, "encoder_attn_layer_norm"))


class BartAttention(CachingAttention, modeling_bart.BartAttention):
    """BartAttention's modules under our computation."""

    original = modeling_bart.BartAttention


class BartEncoderLayer(_EncoderLayer, modeling_bart.BartEncoderLayer):
    """BartEncoderLayer's modules under our computation."""

    original = modeling_bart.BartEncoderLayer


class BartDecoderLayer(_DecoderLayer, modeling_bart.BartDecoderLayer):
    """BartDecoderLayer's modules under our computation."""

    original = modeling_bart.BartDecoderLayer


class MBartAttention(CachingAttention, modeling_mbart.MBartAttention):
    """MBartAttention's modules under our computation."""

    original = modeling_mbart.MBartAttention


class MBartEncoderLayer(_EncoderLayer, modeling_mbart.MBartEncoderLayer):
    """MBartEncoderLayer's modules under our computation."""

    original = modeling_mbart.MBartEncoderLayer
    normalize_before = True


class MBartDecoderLayer(_DecoderLayer, modeling_mbart.MBartDecoderLayer):
    """MBartDecoderLayer's modules under our computation."""

    original = modeling_mbart.MBartDecoderLayer
    normalize_before = True


class MarianAttention(CachingAttention, modeling_marian.MarianAttention):
    """MarianAttention's modules under our computation."""

    original = modeling_marian.MarianAttention


class MarianEncoderLayer(_EncoderLayer, modeling_marian.MarianEncoderLayer):
    """MarianEncoderLayer's modules under our computation."""

    original = modeling_marian.MarianEncoderLayer


class MarianDecoderLayer(_DecoderLayer, modeling_marian.MarianDecoderLayer):
    """MarianDecoderLayer's modules under our computation."""

    original = modeling_marian.MarianDecoderLayer


class M2M100Attention(CachingAttention, modeling_m2m_100.M2M100Attention):
    """M2M100Attention's modules under our computation."""

    original = modeling_m2m_100.M2M100Attention


class M2M100EncoderLayer(_EncoderLayer, modeling_m2m_100.M2M100EncoderLayer):
    """M2M100EncoderLayer's modules under our computation."""

    original = modeling_m2m_100.M2M100EncoderLayer
    normalize_before = True


class M2M100DecoderLayer(_DecoderLayer, modeling_m2m_100.M2M100DecoderLayer):
    """M2M100DecoderLayer's modules under our computation."""

    original = modeling_m2m_100.M2M100DecoderLayer
    normalize_before = True


CLASSES: dict[type[nn.Module], type[nn.Module]] = {ours.original: ours for ours in (
    BartAttention, BartEncoderLayer, BartDecoderLayer, MBartAttention, MBartEncoderLayer, MBartDecoderLayer,
    MarianAttention, MarianEncoderLayer, MarianDecoderLayer, M2M100Attention, M2M100EncoderLayer, M2M100DecoderLayer)}
"""Hugging Face's classes and those that take their place."""
