"""What a model is: its stacks, sizes, norm placement, positions, tying and special tokens.

One frozen value serves the layers, the model file and the generator; an
architecture (Transformer, BERT, BART, GPT-2) is a value of it, never a subclass.
Names are fairseq's; what training adds (dropout, layerdrop) is never exported.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

ACTIVATIONS = ("relu", "relu_squared", "gelu", "gelu_accurate", "gelu_fast", "swish", "tanh", "linear")
POSITIONS = ("sinusoidal", "learned", "none")
STACKS = ("encoder-decoder", "encoder", "decoder")


class ConfigError(ValueError):
    """A model description that contradicts itself or asks for what is not built."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A Transformer (Vaswani et al. 2017, arXiv:1706.03762): encoder and decoder, or one of them.

    An encoder alone (BERT, RoBERTa) turns tokens into vectors; a decoder alone, without cross-attention (GPT-2,
    fairseq's ``transformer_lm``), continues a text. Fields of the stack that is absent mean nothing, and both
    vocabulary sizes are then one number.

    Sizes are in elements; ``*_positions`` limits count tokens, pads excluded.
    """

    src_vocab_size: int
    """Rows of ``encoder.embed_tokens.weight``."""
    tgt_vocab_size: int
    """Rows of ``decoder.embed_tokens.weight`` and of the output projection."""
    stacks: str = "encoder-decoder"
    """One of :data:`STACKS`."""

    encoder_layers: int = 6
    encoder_embed_dim: int = 512
    encoder_ffn_embed_dim: int = 2048
    encoder_attention_heads: int = 8
    decoder_layers: int = 6
    decoder_embed_dim: int = 512
    decoder_ffn_embed_dim: int = 2048
    decoder_attention_heads: int = 8
    decoder_input_dim: int | None = None
    """Width of the target embedding; a linear map follows where it is not ``decoder_embed_dim``."""
    decoder_output_dim: int | None = None
    """Width in front of the output projection; a linear map precedes where it is not ``decoder_embed_dim``."""

    activation_fn: str = "relu"
    """One of :data:`ACTIVATIONS` (fairseq's names)."""
    encoder_normalize_before: bool = False
    """Pre-LN when true; a final ``encoder.layer_norm`` then exists, as in fairseq."""
    decoder_normalize_before: bool = False
    no_decoder_final_norm: bool = False
    """Pre-LN decoder without ``decoder.layer_norm``."""
    layernorm_embedding: bool = False
    encoder_positions: str = "sinusoidal"
    decoder_positions: str = "sinusoidal"
    max_source_positions: int = 1024
    max_target_positions: int = 1024
    position_offset: int | None = None
    """Row of a position table that belongs to the first token; ``pad + 1`` where None, as fairseq has it."""
    type_vocab_size: int = 0
    """Rows of ``encoder.embed_token_types.weight``, which tell the sentences of a pair apart; 0 for none."""
    pooler: bool = False
    """``encoder.pooler``: tanh of a linear map of the first token's output, BERT's (Devlin et al. 2019)."""
    no_scale_embedding: bool = False
    """False multiplies token embeddings by sqrt(embed_dim)."""
    share_decoder_input_output_embed: bool = False
    share_all_embeddings: bool = False
    cross_self_attention: bool = False
    no_cross_attention: bool = False
    output_bias: bool = False
    """A bias over the target vocabulary (LightSeq's ``shared_bias``, BART's ``final_logits_bias``)."""
    layer_norm_eps: float = 1e-5

    bos: int = 0
    pad: int = 1
    eos: int = 2
    unk: int = 3
    decoder_start: int | None = None
    """First decoder input; ``eos`` where None, as fairseq's translation task has it."""

    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    encoder_layerdrop: float = 0.0
    decoder_layerdrop: float = 0.0

    def __post_init__(self) -> None:
        wrong = []
        for name in ("src_vocab_size", "tgt_vocab_size", "encoder_embed_dim", "encoder_ffn_embed_dim",
                     "encoder_attention_heads", "decoder_embed_dim", "decoder_ffn_embed_dim",
                     "decoder_attention_heads", "max_source_positions", "max_target_positions"):
            if getattr(self, name) < 1:
                wrong.append(f"{name} must be at least 1, got {getattr(self, name)}")
        for side in ("encoder", "decoder"):
            dim, heads = getattr(self, f"{side}_embed_dim"), getattr(self, f"{side}_attention_heads")
            if heads >= 1 and dim % heads:
                wrong.append(f"{side}_embed_dim must be a multiple of {side}_attention_heads, got {dim} and {heads}")
            if getattr(self, f"{side}_positions") not in POSITIONS:
                wrong.append(f"{side}_positions must be one of {POSITIONS}, got {getattr(self, f'{side}_positions')!r}")
            if getattr(self, f"{side}_layers") < 0:
                wrong.append(f"{side}_layers must not be negative, got {getattr(self, f'{side}_layers')}")
        if self.stacks not in STACKS:
            wrong.append(f"stacks must be one of {STACKS}, got {self.stacks!r}")
        elif self.stacks != "encoder-decoder":
            wrong += self._problems_of_one_stack()
        if self.position_offset is not None and self.position_offset < 0:
            wrong.append(f"position_offset must not be negative, got {self.position_offset}")
        if self.type_vocab_size < 0:
            wrong.append(f"type_vocab_size must not be negative, got {self.type_vocab_size}")
        if self.activation_fn not in ACTIVATIONS:
            wrong.append(f"activation_fn must be one of {ACTIVATIONS}, got {self.activation_fn!r}")
        if self.share_all_embeddings and self.src_vocab_size != self.tgt_vocab_size:
            wrong.append("share_all_embeddings needs one vocabulary, got "
                         f"{self.src_vocab_size} source and {self.tgt_vocab_size} target types")
        if self.share_all_embeddings and self.encoder_embed_dim != self.input_dim:
            wrong.append("share_all_embeddings needs encoder and decoder embeddings of one width, got "
                         f"{self.encoder_embed_dim} and {self.input_dim}")
        tied = self.share_all_embeddings or self.share_decoder_input_output_embed
        if tied and self.input_dim != self.output_dim:
            wrong.append("a tied output projection needs decoder_input_dim == decoder_output_dim, got "
                         f"{self.input_dim} and {self.output_dim}")
        if wrong:
            raise ConfigError("TransformerConfig: " + "; ".join(wrong))

    def _problems_of_one_stack(self) -> list[str]:
        """What a model without encoder, or without decoder, cannot be."""
        wrong = []
        if self.src_vocab_size != self.tgt_vocab_size:
            wrong.append(f"a model of stacks {self.stacks!r} has one vocabulary, got {self.src_vocab_size} source and "
                         f"{self.tgt_vocab_size} target types")
        if self.share_all_embeddings or self.cross_self_attention:
            wrong.append(f"share_all_embeddings and cross_self_attention need two stacks, got {self.stacks!r}")
        if self.stacks == "decoder" and not self.no_cross_attention:
            wrong.append("a decoder alone needs no_cross_attention")
        if self.stacks == "decoder" and (self.type_vocab_size or self.pooler):
            wrong.append("type_vocab_size and pooler belong to an encoder")
        return wrong

    @property
    def has_encoder(self) -> bool:
        """Whether there is an encoder."""
        return self.stacks != "decoder"

    @property
    def has_decoder(self) -> bool:
        """Whether there is a decoder."""
        return self.stacks != "encoder"

    @property
    def first_position(self) -> int:
        """Row of a position table that belongs to the first token."""
        return self.pad + 1 if self.position_offset is None else self.position_offset

    @property
    def input_dim(self) -> int:
        """Width of the target embedding."""
        return self.decoder_embed_dim if self.decoder_input_dim is None else self.decoder_input_dim

    @property
    def output_dim(self) -> int:
        """Width in front of the output projection."""
        return self.decoder_embed_dim if self.decoder_output_dim is None else self.decoder_output_dim

    @property
    def tied_output(self) -> bool:
        """Whether the output projection is the target embedding."""
        return self.share_decoder_input_output_embed or self.share_all_embeddings

    @property
    def start(self) -> int:
        """First decoder input."""
        return self.eos if self.decoder_start is None else self.decoder_start


TRAINING_FIELDS = ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop")


def exported_fields(config: TransformerConfig) -> dict[str, Any]:
    """The fields that describe the trained model, by name; those of training alone are left out."""
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in TRAINING_FIELDS}
