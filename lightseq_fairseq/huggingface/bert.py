"""Layers of Hugging Face's BERT and RoBERTa, XLM-RoBERTa and CamemBERT as ours: post-LN, without cross-attention."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.bert import modeling_bert
from transformers.models.camembert import modeling_camembert
from transformers.models.roberta import modeling_roberta
from transformers.models.xlm_roberta import modeling_xlm_roberta

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

_LINEAR = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
           "intermediate.dense", "output.dense")


class _Attention(CachingAttention):
    """Our attention over the modules of BertAttention: ``self`` with q, k and v, ``output`` with the projection."""

    @property
    def _inner(self) -> Any:
        return self._modules["self"]

    @property
    def layer_idx(self) -> int:
        return self._inner.layer_idx

    @property
    def q_proj(self) -> nn.Linear:
        return self._inner.query

    @property
    def k_proj(self) -> nn.Linear:
        return self._inner.key

    @property
    def v_proj(self) -> nn.Linear:
        return self._inner.value

    @property
    def out_proj(self) -> Any:
        return self.output.dense

    @property
    def num_heads(self) -> int:
        return self._inner.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self._inner.attention_head_size

    @property
    def scaling(self) -> float:
        return self._inner.scaling

    @property
    def dropout(self) -> float:
        return self._inner.dropout.p


class BertAttention(_Attention, modeling_bert.BertAttention):
    """BertAttention's modules under our computation."""

    original = modeling_bert.BertAttention


class RobertaAttention(_Attention, modeling_roberta.RobertaAttention):
    """RobertaAttention's modules under our computation."""

    original = modeling_roberta.RobertaAttention


class XLMRobertaAttention(_Attention, modeling_xlm_roberta.XLMRobertaAttention):
    """XLMRobertaAttention's modules under our computation."""

    original = modeling_xlm_roberta.XLMRobertaAttention


class CamembertAttention(_Attention, modeling_camembert.CamembertAttention):
    """CamembertAttention's modules under our computation."""

    original = modeling_camembert.CamembertAttention


class _Layer(SelfAttentionLayer, TransformerDecoderLayer):
    """Our layer over the modules of BertLayer."""

    argument_names = ("attention_mask", "encoder_hidden_states", "encoder_attention_mask", "past_key_values")
    normalize_before = False

    @classmethod
    def problems(cls, layer: Any) -> list[str]:
        """Why ``layer``, Hugging Face's, cannot be replaced."""
        config = layer.attention.self.config
        wrong = type_problems(layer, nn.Linear, *_LINEAR)
        wrong += type_problems(layer, nn.LayerNorm, "attention.output.LayerNorm", "output.LayerNorm")
        wrong += activation_problems(config.hidden_act)
        if layer.add_cross_attention:
            wrong.append("cross-attention (add_cross_attention; BART has layers with it)")
        if getattr(config, "position_embedding_type", "absolute") not in (None, "absolute"):
            wrong.append(f"position_embedding_type {config.position_embedding_type!r} (only absolute positions)")
        inner = layer.attention.self
        if inner.all_head_size != layer.attention.output.dense.out_features:
            wrong.append(f"{inner.num_attention_heads} heads of {inner.attention_head_size}, which is less than the "
                         "width: pruned heads")
        if layer.chunk_size_feed_forward:
            wrong.append(f"chunk_size_feed_forward {layer.chunk_size_feed_forward} (set it to 0)")
        return wrong + agreement_problems(layer.attention.output.dropout.p, layer.output.dropout.p)

    @property
    def causal(self) -> Any:
        return self.is_decoder

    @property
    def self_attn(self) -> Any:
        return self.attention

    @property
    def self_attn_layer_norm(self) -> Any:
        return self.attention.output.LayerNorm

    @property
    def final_layer_norm(self) -> Any:
        return self.output.LayerNorm

    @property
    def fc1(self) -> Any:
        return self.intermediate.dense

    @property
    def fc2(self) -> Any:
        return self.output.dense

    @property
    def activation(self) -> str:
        return ACTIVATIONS[self.attention.self.config.hidden_act]

    @property
    def dropout(self) -> float:
        layer: Any = self
        return agreed(layer.attention.output.dropout.p, layer.output.dropout.p)


class BertLayer(_Layer, modeling_bert.BertLayer):
    """BertLayer's modules under our computation."""

    original = modeling_bert.BertLayer


class RobertaLayer(_Layer, modeling_roberta.RobertaLayer):
    """RobertaLayer's modules under our computation."""

    original = modeling_roberta.RobertaLayer


class XLMRobertaLayer(_Layer, modeling_xlm_roberta.XLMRobertaLayer):
    """XLMRobertaLayer's modules under our computation."""

    original = modeling_xlm_roberta.XLMRobertaLayer


class CamembertLayer(_Layer, modeling_camembert.CamembertLayer):
    """CamembertLayer's modules under our computation."""

    original = modeling_camembert.CamembertLayer


CLASSES: dict[type[nn.Module], type[nn.Module]] = {ours.original: ours for ours in (
    BertAttention, BertLayer, RobertaAttention, RobertaLayer, XLMRobertaAttention, XLMRobertaLayer, CamembertAttention,
    CamembertLayer)}
"""Hugging Face's classes and those that take their place."""
