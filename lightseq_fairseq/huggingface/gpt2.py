"""Layers of Hugging Face's GPT-2 as ours: pre-LN, causal; its linear maps hold their weights the other way round."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.models.gpt2 import modeling_gpt2
from transformers.pytorch_utils import Conv1D

from lightseq_fairseq.huggingface.caching_attention import CachingAttention
from lightseq_fairseq.huggingface.checks import (
    ACTIVATIONS,
    activation_problems,
    agreed,
    agreement_problems,
    type_problems,
)
from lightseq_fairseq.huggingface.packed_layer import SelfAttentionLayer
from lightseq_fairseq.layers.decoder import TransformerDecoderLayer
from lightseq_fairseq.layers.linear import forked_linear


class _Linear(NamedTuple):
    """A Conv1D, weight (in, out), as our layers read a linear map."""

    weight: Tensor
    """(out, in)"""
    bias: Tensor


def _linear(conv: Any) -> _Linear:
    return _Linear(conv.weight.t(), conv.bias)


class GPT2Attention(CachingAttention, modeling_gpt2.GPT2Attention):
    """GPT2Attention's modules under our computation."""

    original = modeling_gpt2.GPT2Attention

    def project_uncached(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C) -> (N, 3, H, D) by the one map there is, and ``x``."""
        qkv, x = forked_linear(x, *_linear(self.c_attn))
        return qkv.view(-1, 3, self.num_heads, self.head_dim), x

    @property
    def out_proj(self) -> Any:
        """``c_proj`` as a map of ours: weight (C, C), bias (C,)."""
        return _linear(self.c_proj)

    @property
    def dropout(self) -> Any:
        """Probability, of attention weights."""
        return self.attn_dropout.p


class GPT2Block(SelfAttentionLayer, TransformerDecoderLayer, modeling_gpt2.GPT2Block):
    """GPT2Block's modules under our computation."""

    original = modeling_gpt2.GPT2Block
    argument_names = ("past_key_values", "attention_mask", "encoder_hidden_states", "encoder_attention_mask")
    causal = True
    normalize_before = True

    @classmethod
    def problems(cls, layer: Any) -> list[str]:
        """Why ``layer``, Hugging Face's, cannot be replaced."""
        wrong = type_problems(layer, Conv1D, "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        wrong += type_problems(layer, nn.LayerNorm, "ln_1", "ln_2")
        wrong += activation_problems(layer.attn.config.activation_function)
        if hasattr(layer, "crossattention"):
            wrong.append("cross-attention (add_cross_attention; BART has layers with it)")
        return wrong + agreement_problems(layer.attn.resid_dropout.p, layer.mlp.dropout.p)

    @property
    def self_attn(self) -> Any:
        """``attn`` under fairseq's name."""
        return self.attn

    @property
    def self_attn_layer_norm(self) -> Any:
        """``ln_1`` under fairseq's name."""
        return self.ln_1

    @property
    def final_layer_norm(self) -> Any:
        """``ln_2`` under fairseq's name."""
        return self.ln_2

    @property
    def fc1(self) -> Any:
        """``mlp.c_fc`` as a map of ours: weight (F, C), bias (F,)."""
        return _linear(self.mlp.c_fc)

    @property
    def fc2(self) -> Any:
        """``mlp.c_proj`` as a map of ours: weight (C, F), bias (C,)."""
        return _linear(self.mlp.c_proj)

    @property
    def activation(self) -> str:
        """fairseq's name of the feed-forward's activation."""
        return ACTIVATIONS[self.attn.config.activation_function]

    @property
    def dropout(self) -> float:
        """Probability, in front of both residuals; ValueError where Hugging Face's two have come to differ."""
        layer: Any = self
        return agreed(layer.attn.resid_dropout.p, layer.mlp.dropout.p)


CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    modeling_gpt2.GPT2Block: GPT2Block, modeling_gpt2.GPT2Attention: GPT2Attention}
"""Hugging Face's classes and those that take their place."""
