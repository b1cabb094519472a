"""What an exported model is: its configuration, its tensors by fairseq's names, its vocabularies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightseq_fairseq.config import TransformerConfig

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class ModelFileError(ValueError):
    """A model file that cannot be read or written, and why."""


@dataclass(frozen=True)
class ModelFile:
    """An exported model in memory."""

    config: TransformerConfig
    tensors: dict[str, Tensor]
    """All of :func:`tensor_shapes` and :func:`tied_tensors`; tied names refer to one tensor."""
    src_symbols: tuple[str, ...] | None = None
    """The source dictionary in index order, special symbols included; None when unknown. A model of one stack has one
    dictionary, which both names refer to."""
    tgt_symbols: tuple[str, ...] | None = None
    source_lang: str | None = None
    target_lang: str | None = None
    decoding: dict[str, Any] = field(default_factory=dict)
    """What a file made by LightSeq suggests: beam_size, length_penalty, sampling_method...; otherwise empty."""


def tensor_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes in fairseq's ``state_dict`` order; a tied tensor stands once, under its first name."""
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, dim: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (dim,)

    def linear(name: str, in_features: int, out_features: int) -> None:
        shapes[f"{name}.weight"] = (out_features, in_features)
        shapes[f"{name}.bias"] = (out_features,)

    def attention(name: str, dim: int, source_dim: int) -> None:
        for projection, in_features in (("k", source_dim), ("v", source_dim), ("q", dim), ("out", dim)):
            linear(f"{name}.{projection}_proj", in_features, dim)

    def embedding(side: str, vocab: int, width: int, dim: int, positions: str, max_positions: int) -> None:
        if not (side == "decoder" and config.share_all_embeddings):
            shapes[f"{side}.embed_tokens.weight"] = (vocab, width)
        if width != dim:
            shapes[f"{side}.project_in_dim.weight"] = (dim, width)
        if positions == "learned":
            shapes[f"{side}.embed_positions.weight"] = (max_positions + config.first_position, dim)
        if side == "encoder" and config.type_vocab_size:
            shapes["encoder.embed_token_types.weight"] = (config.type_vocab_size, dim)
        if config.layernorm_embedding:
            norm(f"{side}.layernorm_embedding", dim)

    def encoder(dim: int) -> None:
        embedding("encoder", config.src_vocab_size, dim, dim, config.encoder_positions, config.max_source_positions)
        for i in range(config.encoder_layers):
            attention(f"encoder.layers.{i}.self_attn", dim, dim)
            norm(f"encoder.layers.{i}.self_attn_layer_norm", dim)
            linear(f"encoder.layers.{i}.fc1", dim, config.encoder_ffn_embed_dim)
            linear(f"encoder.layers.{i}.fc2", config.encoder_ffn_embed_dim, dim)
            norm(f"encoder.layers.{i}.final_layer_norm", dim)
        if config.encoder_normalize_before:
            norm("encoder.layer_norm", dim)
        if config.pooler:
            linear("encoder.pooler", dim, dim)

    def decoder(dim: int, source_dim: int) -> None:
        embedding("decoder", config.tgt_vocab_size, config.input_dim, dim, config.decoder_positions,
                  config.max_target_positions)
        for i in range(config.decoder_layers):
            attention(f"decoder.layers.{i}.self_attn", dim, dim)
            norm(f"decoder.layers.{i}.self_attn_layer_norm", dim)
            if not config.no_cross_attention:
                attention(f"decoder.layers.{i}.encoder_attn", dim, source_dim)
                norm(f"decoder.layers.{i}.encoder_attn_layer_norm", dim)
            linear(f"decoder.layers.{i}.fc1", dim, config.decoder_ffn_embed_dim)
            linear(f"decoder.layers.{i}.fc2", config.decoder_ffn_embed_dim, dim)
            norm(f"decoder.layers.{i}.final_layer_norm", dim)
        if config.decoder_normalize_before and not config.no_decoder_final_norm:
            norm("decoder.layer_norm", dim)
        if config.output_dim != dim:
            shapes["decoder.project_out_dim.weight"] = (config.output_dim, dim)
        if not config.tied_output:
            shapes["decoder.output_projection.weight"] = (config.tgt_vocab_size, config.output_dim)
        if config.output_bias:
            shapes["decoder.output_projection.bias"] = (config.tgt_vocab_size,)

    if config.has_encoder:
        encoder(config.encoder_embed_dim)
    if config.has_decoder:
        decoder(config.decoder_embed_dim, config.encoder_embed_dim)
    return shapes


def tied_tensors(config: TransformerConfig) -> dict[str, str]:
    """Further names in ``state_dict`` and the tensor that each of them is."""
    ties = {}
    if config.share_all_embeddings:
        ties["decoder.embed_tokens.weight"] = "encoder.embed_tokens.weight"
    if config.has_decoder and config.tied_output:
        ties["decoder.output_projection.weight"] = ties.get("decoder.embed_tokens.weight",
                                                            "decoder.embed_tokens.weight")
    return ties


def differences(expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]) -> list[str]:
    """Every array that is missing, unexpected or of another shape."""
    missing = [f"{name} is missing, expected shape {shape}" for name, shape in expected.items() if name not in found]
    unexpected = [f"{name} is unexpected" for name in found if name not in expected]
    misshapen = [f"{name} must have shape {expected[name]}, got {tuple(shape)}"
                 for name, shape in found.items() if name in expected and tuple(shape) != expected[name]]
    return missing + unexpected + misshapen


def config_problems(config: TransformerConfig) -> list[str]:
    """What TransformerConfig lets pass but no trained model has."""
    problems = []
    for name, vocab in (("pad", min(config.src_vocab_size, config.tgt_vocab_size)), ("eos", config.tgt_vocab_size),
                        ("bos", config.tgt_vocab_size), ("unk", config.tgt_vocab_size),
                        ("start", config.tgt_vocab_size)):
        token = getattr(config, name)
        if not 0 <= token < vocab:
            problems.append(f"{name} must lie in the vocabulary of {vocab} types, got {token}")
    if not (config.layer_norm_eps > 0 and math.isfinite(config.layer_norm_eps)):
        problems.append(f"layer_norm_eps must be positive, got {config.layer_norm_eps}")
    return problems


def symbol_problems(config: TransformerConfig, src_symbols: Sequence[str] | None,
                    tgt_symbols: Sequence[str] | None) -> list[str]:
    """Dictionaries that do not fit the embeddings."""
    problems = []
    for side, symbols, vocab in (("source", src_symbols, config.src_vocab_size),
                                 ("target", tgt_symbols, config.tgt_vocab_size)):
        if symbols is None:
            continue
        if len(symbols) != vocab:
            problems.append(f"the {side} dictionary must have {vocab} types, got {len(symbols)}")
        if any("\n" in symbol for symbol in symbols):
            problems.append(f"the {side} dictionary has a symbol with a line break")
    return problems


def validate(model: ModelFile) -> None:
    """ModelFileError that names everything in which ``model`` contradicts its own configuration.

    Names of tied tensors may be left out.
    """
    config, tensors = model.config, model.tensors
    problems = config_problems(config) + symbol_problems(config, model.src_symbols, model.tgt_symbols)
    expected = tensor_shapes(config)
    expected |= {alias: expected[name] for alias, name in tied_tensors(config).items() if alias in tensors}
    problems += differences(expected, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    problems += [f"{name} must be a floating-point tensor, got {tensor.dtype}"
                 for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if not problems:
        problems = [f"{alias} differs from {name}, which the configuration ties it to"
                    for alias, name in tied_tensors(config).items()
                    if alias in tensors and not same_tensor(tensors[alias], tensors[name])]
    raise_all(problems)


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold the same values."""
    return (a.data_ptr() == b.data_ptr() and a.stride() == b.stride()) or torch.equal(a, b)


def raise_all(problems: Sequence[str], limit: int = 12) -> None:
    """One ModelFileError for all ``problems``, if there are any."""
    if problems:
        shown = list(problems[:limit])
        if len(problems) > limit:
            shown.append(f"and {len(problems) - limit} more")
        raise ModelFileError("; ".join(shown))
