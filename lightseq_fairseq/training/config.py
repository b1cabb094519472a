"""What LightSeq's layers are told: frozen dataclasses with its field names, and its presets.

Sizes are in elements, probabilities in [0, 1]. Three fields mean less here than in LightSeq, which allocates all memory
ahead: ``max_batch_tokens`` is a limit that training insists on, None being none; ``local_rank`` is the GPU on which the
module is created, -1 for torch's default device; ``fp16`` computes in fp16 whatever type the parameters have, and
without it the parameters' own type or autocast's decides.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

from lightseq_fairseq.config import TransformerConfig

ACTIVATIONS = {"relu": "relu", "gelu": "gelu_accurate"}
"""LightSeq's name, fairseq's name: LightSeq's gelu is the tanh form."""

_BASE = {"hidden_size": 512, "intermediate_size": 2048, "nhead": 8, "attn_prob_dropout_ratio": 0.0,
         "activation_dropout_ratio": 0.0, "hidden_dropout_ratio": 0.1, "pre_layer_norm": True, "activation_fn": "relu"}
_DROPPING = {"attn_prob_dropout_ratio": 0.1, "activation_dropout_ratio": 0.1}
_BIG = {"hidden_size": 1024, "intermediate_size": 4096, "nhead": 16, **_DROPPING}
_BERT = {"pre_layer_norm": False, "activation_fn": "gelu"}
PRESETS: dict[str, dict[str, Any]] = {
    "transformer-base": _BASE,
    "transformer-big": _BASE | _BIG,
    "bert-base": _BASE | _DROPPING | _BERT | {"hidden_size": 768, "intermediate_size": 3072, "nhead": 12},
    "bert-big": _BASE | _BIG | _BERT,
}
"""By LightSeq's names; what else is given to ``get_config`` goes before them."""


def check(owner: str, *conditions: tuple[bool, str]) -> None:
    """ValueError gathering the words of every condition that fails."""
    wrong = [words for holds, words in conditions if not holds]
    if wrong:
        raise ValueError(f"{owner}: " + "; ".join(wrong))


@dataclass(frozen=True, kw_only=True)
class _Config:
    max_batch_tokens: int | None = None
    fp16: bool = False
    local_rank: int = -1

    def __post_init__(self) -> None:
        limits, sizes, ratios = ("max_batch_tokens", "max_seq_len"), (
            "hidden_size", "intermediate_size", "nhead", "nlayer", "vocab_size", "embedding_dim", "num_encoder_layer",
            "num_decoder_layer"), (
            "attn_prob_dropout_ratio", "activation_dropout_ratio", "hidden_dropout_ratio", "dropout", "epsilon")
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        check(type(self).__name__,
              *((values[name] >= 1, f"{name} must be at least 1, got {values[name]}")
                for name in limits + sizes if values.get(name) is not None),
              *((0 <= values[name] <= 1, f"{name} must lie in [0, 1], got {values[name]}")
                for name in ratios if name in values),
              ("nhead" not in values or values["nhead"] < 1 or values["hidden_size"] % values["nhead"] == 0,
               f"hidden_size must be a multiple of nhead, got {values.get('hidden_size')} and {values.get('nhead')}"),
              (values.get("activation_fn", "relu") in ACTIVATIONS,
               f"activation_fn must be one of {', '.join(ACTIVATIONS)}, got {values.get('activation_fn')!r}"),
              ("vocab_size" not in values or 0 <= values["padding_idx"] < values["vocab_size"],
               f"padding_idx must lie in the vocabulary of {values.get('vocab_size')} types, got "
               f"{values.get('padding_idx')}"))


@dataclass(frozen=True, kw_only=True)
class EncoderLayerConfig(_Config):
    """One encoder layer."""

    max_seq_len: int
    """Longest sentence, in tokens."""
    hidden_size: int
    intermediate_size: int
    nhead: int
    attn_prob_dropout_ratio: float
    activation_dropout_ratio: float
    hidden_dropout_ratio: float
    """In front of each residual, and behind the embedding."""
    pre_layer_norm: bool
    activation_fn: str = "relu"
    """relu or gelu."""


@dataclass(frozen=True, kw_only=True)
class DecoderLayerConfig(EncoderLayerConfig):
    """One decoder layer."""

    nlayer: int = 1
    """Layers of the stack, of which LightSeq's layer 0 holds the cross-attention's keys and values. Here each layer
    holds its own, and the number only checks what initial weights are given."""
    has_cross_attn: bool = True


@dataclass(frozen=True, kw_only=True)
class TransformerModelConfig(EncoderLayerConfig):
    """A whole encoder-decoder model."""

    vocab_size: int
    padding_idx: int
    num_encoder_layer: int
    num_decoder_layer: int


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig(_Config):
    """Token and position embedding."""

    vocab_size: int
    embedding_dim: int
    max_seq_len: int
    padding_idx: int
    dropout: float
    trainable_pos: bool = False
    """A parameter (max_seq_len, C) instead of sinusoids."""
    no_scale_embedding: bool = False
    """False multiplies token embeddings by sqrt(embedding_dim)."""
    layernorm_embedding: bool = False
    need_offset: bool = False
    """Two unused rows in front of the trainable positions, as BART's tables have them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("EmbeddingConfig", (self.trainable_pos or not self.need_offset,
                                  "need_offset is for trainable_pos; sinusoids start with the first token"))


@dataclass(frozen=True, kw_only=True)
class CrossEntropyConfig(_Config):
    """Label-smoothed cross entropy; ``fp16`` changes nothing, logits of any type being summed in fp32."""

    padding_idx: int
    epsilon: float
    """Probability that smoothing takes from the target."""


C = TypeVar("C", bound=_Config)


def build(kind: type[C], model: str | None, values: dict[str, Any]) -> C:
    """``kind`` of the preset ``model`` and what ``values`` say otherwise.

    TypeError for a field that is missing or unknown, ValueError for an unknown preset or a value out of range.
    """
    if model is not None:
        if model not in PRESETS:
            raise ValueError(f"model must be one of {', '.join(PRESETS)}, got {model!r}")
        values = PRESETS[model] | values
    return kind(**values)


def layer_config(config: EncoderLayerConfig) -> TransformerConfig:
    """The same layer, encoder's and decoder's, in the words of :mod:`lightseq_fairseq.layers`."""
    return TransformerConfig(
        src_vocab_size=1, tgt_vocab_size=1,  # a layer knows no vocabulary
        encoder_embed_dim=config.hidden_size, decoder_embed_dim=config.hidden_size,
        encoder_ffn_embed_dim=config.intermediate_size, decoder_ffn_embed_dim=config.intermediate_size,
        encoder_attention_heads=config.nhead, decoder_attention_heads=config.nhead,
        activation_fn=ACTIVATIONS[config.activation_fn],
        encoder_normalize_before=config.pre_layer_norm, decoder_normalize_before=config.pre_layer_norm,
        no_cross_attention=isinstance(config, DecoderLayerConfig) and not config.has_cross_attn,
        dropout=config.hidden_dropout_ratio, attention_dropout=config.attn_prob_dropout_ratio,
        activation_dropout=config.activation_dropout_ratio)
