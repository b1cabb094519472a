"""Small models of every kind, with random weights."""

from __future__ import annotations

from typing import Any

import torch

from lightseq_fairseq.config import TransformerConfig
from lightseq_fairseq.model_file import ModelFile
from lightseq_fairseq.model_file.spec import tensor_shapes, tied_tensors

SIZES: dict[str, Any] = dict(
    src_vocab_size=11, tgt_vocab_size=13, encoder_layers=2, decoder_layers=3, encoder_embed_dim=12,
    decoder_embed_dim=12, encoder_ffn_embed_dim=20, decoder_ffn_embed_dim=20, encoder_attention_heads=3,
    decoder_attention_heads=3, max_source_positions=9, max_target_positions=7)
PRE: dict[str, Any] = dict(encoder_normalize_before=True, decoder_normalize_before=True)
TIED: dict[str, Any] = dict(share_decoder_input_output_embed=True)
LEARNED: dict[str, Any] = dict(encoder_positions="learned", decoder_positions="learned")
ENCODER: dict[str, Any] = dict(stacks="encoder", tgt_vocab_size=11, layernorm_embedding=True)
DECODER: dict[str, Any] = dict(stacks="decoder", src_vocab_size=13, no_cross_attention=True)
ONE_VOCABULARY: dict[str, Any] = dict(tgt_vocab_size=11, share_all_embeddings=True)


def small_config(**changes: Any) -> TransformerConfig:
    return TransformerConfig(**(SIZES | changes))


FOR_LIGHTSEQ = {
    "pre-LN": small_config(**PRE, **TIED),
    "one vocabulary": small_config(**PRE, **ONE_VOCABULARY),
    "embedding norm": small_config(**TIED, layernorm_embedding=True),
    "learned positions": small_config(**PRE, **TIED, **LEARNED),
    "one learned side": small_config(**PRE, **TIED, encoder_positions="learned"),
    "no positions": small_config(**PRE, **TIED, encoder_positions="none", decoder_positions="none"),
    "unscaled": small_config(**PRE, **TIED, no_scale_embedding=True),
    "output bias": small_config(**PRE, **TIED, output_bias=True),
    "gelu": small_config(**PRE, **TIED, activation_fn="gelu_accurate"),
    "other special tokens": small_config(**PRE, **TIED, bos=5, pad=0, eos=9, unk=2, decoder_start=5),
    "no encoder layer": small_config(**PRE, **TIED, encoder_layers=0),
    "other epsilon": small_config(**PRE, **TIED, layer_norm_eps=1e-6),
}
"""What LightSeq's format can express."""

NOT_FOR_LIGHTSEQ = {
    "post-LN": small_config(**TIED),
    "pre-LN and embedding norm": small_config(**PRE, **TIED, layernorm_embedding=True),
    "no final norm": small_config(**PRE, **TIED, no_decoder_final_norm=True),
    "mixed norms": small_config(**TIED, encoder_normalize_before=True),
    "untied": small_config(**PRE),
    "untied with bias": small_config(**PRE, output_bias=True),
    "swish": small_config(**PRE, **TIED, activation_fn="swish"),
    "widths": small_config(encoder_embed_dim=18, encoder_ffn_embed_dim=7, encoder_attention_heads=2),
    "inner dims": small_config(decoder_input_dim=8, decoder_output_dim=6, **LEARNED),
    "tied inner dims": small_config(decoder_input_dim=8, decoder_output_dim=8, **TIED),
    "cross+self-attention": small_config(**PRE, **TIED, cross_self_attention=True, no_cross_attention=True),
    "no decoder layer": small_config(**PRE, **TIED, decoder_layers=0),
    "eos is 0": small_config(**PRE, **TIED, eos=0, bos=2),
    "positions from row 0": small_config(**PRE, **LEARNED, position_offset=0),
    "an encoder": small_config(**ENCODER),
    "an encoder with token types and a pooler": small_config(**ENCODER, type_vocab_size=3, pooler=True, **LEARNED),
    "a decoder": small_config(**DECODER, **PRE, **TIED),
    "a decoder of other widths": small_config(**DECODER, decoder_input_dim=8, decoder_output_dim=6, output_bias=True),
}

CONFIGS = FOR_LIGHTSEQ | NOT_FOR_LIGHTSEQ


def random_model(config: TransformerConfig, seed: int = 1) -> ModelFile:
    """Every tensor normal(0, 1), padding rows and all."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in tensor_shapes(config).items()}
    tensors |= {alias: tensors[name] for alias, name in tied_tensors(config).items()}
    return ModelFile(config, tensors, tuple(f"süß{i}" for i in range(config.src_vocab_size)),
                     tuple(f"t{i}" for i in range(config.tgt_vocab_size)), "en", "de")
