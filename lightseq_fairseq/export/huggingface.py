"""From a Hugging Face model folder (config.json, weights, tokenizer files) to a ModelFile; needs no transformers.

A family is a table of tensor names and a function that reads its configuration. Every tensor is used, or named among
those that are dropped; what a configuration asks for and the layers cannot do is refused by name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightseq_fairseq.config import ConfigError, TransformerConfig
from lightseq_fairseq.export.checkpoint import ExportError
from lightseq_fairseq.export.fairseq import complete_tensors
from lightseq_fairseq.model_file import ModelFile, ModelFileError

ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_accurate", "gelu_pytorch_tanh": "gelu_accurate",
               "gelu_fast": "gelu_accurate", "swish": "swish", "silu": "swish", "tanh": "tanh", "linear": "linear"}
"""Hugging Face's names, fairseq's names."""

NEVER = -30000.0
"""The output bias of a type that exists for padding alone: exp() of it is 0, and fp16 can hold it."""

Config = Mapping[str, Any]
Tensors = dict[str, Tensor]
Names = tuple[tuple[str, str | None], ...]

_BERT_LAYER = r"(?:\w+\.)?encoder\.layer\.(\d+)\."
BERT_NAMES: Names = (
    (r"(?:\w+\.)?embeddings\.word_embeddings\.weight",         r"encoder.embed_tokens.weight"),
    (r"(?:\w+\.)?embeddings\.position_embeddings\.weight",     r"encoder.embed_positions.weight"),
    (r"(?:\w+\.)?embeddings\.token_type_embeddings\.weight",   r"encoder.embed_token_types.weight"),
    (r"(?:\w+\.)?embeddings\.LayerNorm\.(\w+)",                r"encoder.layernorm_embedding.\1"),
    (_BERT_LAYER + r"attention\.self\.query\.(\w+)",           r"encoder.layers.\1.self_attn.q_proj.\2"),
    (_BERT_LAYER + r"attention\.self\.key\.(\w+)",             r"encoder.layers.\1.self_attn.k_proj.\2"),
    (_BERT_LAYER + r"attention\.self\.value\.(\w+)",           r"encoder.layers.\1.self_attn.v_proj.\2"),
    (_BERT_LAYER + r"attention\.output\.dense\.(\w+)",         r"encoder.layers.\1.self_attn.out_proj.\2"),
    (_BERT_LAYER + r"attention\.output\.LayerNorm\.(\w+)",     r"encoder.layers.\1.self_attn_layer_norm.\2"),
    (_BERT_LAYER + r"intermediate\.dense\.(\w+)",              r"encoder.layers.\1.fc1.\2"),
    (_BERT_LAYER + r"output\.dense\.(\w+)",                    r"encoder.layers.\1.fc2.\2"),
    (_BERT_LAYER + r"output\.LayerNorm\.(\w+)",                r"encoder.layers.\1.final_layer_norm.\2"),
    (r"(?:\w+\.)?pooler\.dense\.(\w+)",                        r"encoder.pooler.\1"),
    (r"(?:\w+\.)?embeddings\.(position|token_type)_ids",       None),  # buffers of older versions
    (r"(cls|lm_head|classifier|qa_outputs)\..+",               None),  # heads of training tasks
)

BART_NAMES: Names = (
    (r"(?:model\.)?shared\.weight",                            r"encoder.embed_tokens.weight"),
    (r"lm_head\.weight",                                       r"decoder.output_projection.weight"),
    (r"final_logits_bias",                                     r"decoder.output_projection.bias"),
    (r"(?:model\.)?(en|de)coder\.embed_positions\.weights",    None),  # sinusoids are computed again
    (r"(?:model\.)?((?:en|de)coder\..+)",                      r"\1"),
    (r"classification_head\..+",                               None),
    (r"qa_outputs\..+",                                        None),
)

_GPT2_LAYER = r"(?:transformer\.)?h\.(\d+)\."
GPT2_NAMES: Names = (
    (r"(?:transformer\.)?wte\.weight",                         r"decoder.embed_tokens.weight"),
    (r"(?:transformer\.)?wpe\.weight",                         r"decoder.embed_positions.weight"),
    (_GPT2_LAYER + r"ln_1\.(\w+)",                             r"decoder.layers.\1.self_attn_layer_norm.\2"),
    (_GPT2_LAYER + r"attn\.c_attn\.(\w+)",                     r"decoder.layers.\1.self_attn.{}_proj.\2"),  # q, k, v
    (_GPT2_LAYER + r"attn\.c_proj\.(\w+)",                     r"decoder.layers.\1.self_attn.out_proj.\2"),
    (_GPT2_LAYER + r"ln_2\.(\w+)",                             r"decoder.layers.\1.final_layer_norm.\2"),
    (_GPT2_LAYER + r"mlp\.c_fc\.(\w+)",                        r"decoder.layers.\1.fc1.\2"),
    (_GPT2_LAYER + r"mlp\.c_proj\.(\w+)",                      r"decoder.layers.\1.fc2.\2"),
    (r"(?:transformer\.)?ln_f\.(\w+)",                         r"decoder.layer_norm.\1"),
    (r"lm_head\.weight",                                       r"decoder.output_projection.weight"),
    (_GPT2_LAYER + r"attn\.(bias|masked_bias)",                None),  # causal masks of older versions
    (r"(multiple_choice_head|score)\..+",                      None),
)
"""Name in a folder, name in the file; None is dropped. The first pattern that matches the whole name decides, and a
name that none matches is unexpected."""


@dataclass(frozen=True)
class Family:
    """One kind of model."""

    names: Names
    config: Callable[[Config, Tensors], TransformerConfig]
    """From config.json and the renamed tensors, which it may complete."""
    refused: tuple[tuple[str, Any, str], ...] = ()
    """(key of config.json, the value that can be done, what another value asks for)."""
    transposed: str = r"(?!)"
    """Names of weights that are stored as (in, out)."""


@dataclass(frozen=True)
class HuggingFaceModel:
    """What a folder held."""

    model: ModelFile
    dropped: tuple[str, ...]
    """Tensors that have no place in the model file: heads of training tasks, buffers, tables computed again."""


def from_huggingface(folder: str | os.PathLike[str]) -> HuggingFaceModel:
    """The model of a folder that ``save_pretrained`` wrote or the hub holds, in fp32.

    Families: those of :data:`FAMILIES`. ExportError names what is missing, left over, unsupported or contradictory.
    """
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(f"{folder}: expected a folder with config.json and weights, as save_pretrained writes it "
                          f"({error.strerror or error}); a model of the hub must be downloaded first") from error
    except ValueError as error:
        raise ExportError(f"{folder}/config.json: not JSON ({error})") from error
    return _converted(str(folder), config, lambda: _read_weights(Path(folder)))


def from_torch(model: Any) -> HuggingFaceModel:
    """As :func:`from_huggingface`, of a model of transformers in memory, whose weights are copied."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict") or not hasattr(model, "state_dict"):
        raise ExportError(f"expected a model of transformers, got {type(model).__name__}")
    return _converted(type(model).__name__, config.to_dict(), lambda: {
        name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in model.state_dict().items()})


def _converted(folder: str, config: Config, weights: Callable[[], Tensors]) -> HuggingFaceModel:
    """``folder`` names the model in messages."""
    kind = config.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        reason = REFUSED.get(str(kind))
        raise ExportError(f"{folder}: models of type {kind!r} cannot be exported" + (f" ({reason})" if reason else "")
                          + f"; supported are {', '.join(FAMILIES)}")
    wrong = [f"{key}={config[key]!r} ({what})" for key, allowed, what in family.refused
             if config.get(key, allowed) != allowed]
    if wrong:
        raise ExportError(f"{folder}: {', '.join(wrong)} cannot be exported")
    try:
        tensors, dropped = _rename(weights(), family)
        described = family.config(config, tensors)
        return HuggingFaceModel(ModelFile(described, complete_tensors(described, tensors)), tuple(dropped))
    except KeyError as error:
        raise ExportError(f"{folder}: {error.args[0]} is missing") from error
    except (ConfigError, ModelFileError) as error:
        raise ExportError(f"{folder}: {error}") from error


def copy_tokenizer(folder: str | os.PathLike[str], model_path: str | os.PathLike[str]) -> Path | None:
    """Copy the folder's tokenizer files into ``<model file without suffix>.tokenizer`` beside the model file.

    ``transformers.AutoTokenizer.from_pretrained`` reads that folder. None if the folder has no such files. ExportError
    where they cannot be copied.
    """
    found = [path for name in TOKENIZER_FILES if (path := Path(folder) / name).is_file()]
    if not found:
        return None
    target = Path(model_path).with_suffix(".tokenizer")
    try:
        target.mkdir(exist_ok=True)
        for path in [*found, Path(folder) / "config.json", Path(folder) / "generation_config.json"]:
            if path.is_file():
                shutil.copyfile(path, target / path.name)
    except OSError as error:
        raise ExportError(f"{target}: tokenizer files cannot be copied there ({error.strerror or error})") from error
    return target


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "vocab.txt", "merges.txt", "target_vocab.json", "source.spm", "target.spm",
                   "sentencepiece.bpe.model", "spiece.model", "tokenizer.model", "bpe.codes", "dict.txt")


def _read_weights(folder: Path) -> Tensors:
    """Every tensor of the folder's weight files, whole or in shards."""
    for name, read in (("model.safetensors", _read_safetensors), ("pytorch_model.bin", _read_pickle)):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return read(folder / name)
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return {key: tensor for shard in shards for key, tensor in read(folder / Path(shard).name).items()}
    raise ExportError(f"{folder}: expected model.safetensors or pytorch_model.bin, whole or in shards, got neither")


def _read_safetensors(path: Path) -> Tensors:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ExportError(f"{path}: reading it needs the package safetensors; pip install "
                          "'lightseq-fairseq[huggingface]'") from None
    try:
        return dict(load_file(path))
    except Exception as error:  # safetensors reports a damaged file by its own class, a missing one by OSError
        raise ExportError(f"{path}: cannot be read ({error}); copy it again") from error


def _read_pickle(path: Path) -> Tensors:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ExportError(f"{path}: torch cannot load it safely ({str(error).splitlines()[0]})") from error
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _rename(tensors: Tensors, family: Family) -> tuple[Tensors, list[str]]:
    """Tensors in fp32 under their names in the file, joint projections split; and the names that were dropped."""
    renamed: Tensors = {}
    dropped, unexpected = [], []

    def put(name: str, tensor: Tensor, source: str) -> None:
        if name in renamed and not torch.equal(renamed[name], tensor):
            raise ExportError(f"{source} differs from another tensor that is {name} too")
        renamed[name] = tensor

    for name, tensor in tensors.items():
        modern = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
        match, replacement = next(((match, replacement) for pattern, replacement in family.names
                                   if (match := re.fullmatch(pattern, modern))), (None, None))
        if match is None:
            unexpected.append(name)
            continue
        if replacement is None:
            dropped.append(name)
            continue
        target, value = match.expand(replacement), tensor.float()
        if re.fullmatch(family.transposed, name):
            value = value.t()
        if "{}" in target:
            for key, part in zip("qkv", value.chunk(3), strict=True):
                put(target.format(key), part, name)
        else:
            put(target, value, name)
    if unexpected:
        raise ExportError(f"unexpected tensors {', '.join(unexpected[:12])}"
                          + (f" and {len(unexpected) - 12} more" if len(unexpected) > 12 else ""))
    return renamed, dropped


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ExportError(f"activation {name!r} cannot be exported; supported are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _first(*ids: int | None) -> int:
    """The first id that there is, else 0."""
    return next((token for token in ids if token is not None), 0)


def _bert(config: Config, tensors: Tensors) -> TransformerConfig:
    """BERT counts positions from row 0, RoBERTa from pad + 1 as fairseq does."""
    pad = _first(config.get("pad_token_id"))
    offset = None if config["model_type"] in ROBERTAS else 0
    vocab, width = tensors["encoder.embed_tokens.weight"].shape
    rows = tensors["encoder.embed_positions.weight"].size(0)
    return TransformerConfig(
        stacks="encoder", src_vocab_size=vocab, tgt_vocab_size=vocab,
        encoder_layers=config["num_hidden_layers"], encoder_embed_dim=width,
        encoder_ffn_embed_dim=config["intermediate_size"], encoder_attention_heads=config["num_attention_heads"],
        activation_fn=_activation(config["hidden_act"]), layernorm_embedding=True, no_scale_embedding=True,
        encoder_positions="learned", position_offset=offset,
        max_source_positions=rows - (pad + 1 if offset is None else offset),
        type_vocab_size=config.get("type_vocab_size") or 0, pooler="encoder.pooler.weight" in tensors,
        layer_norm_eps=config.get("layer_norm_eps", 1e-12), pad=pad, bos=_first(config.get("bos_token_id"), pad),
        eos=_first(config.get("eos_token_id"), pad), unk=_first(config.get("unk_token_id"), pad))


def _bart(config: Config, tensors: Tensors) -> TransformerConfig:
    """BART, mBART, Marian and M2M100 differ in norms and positions alone."""
    kind, positions = config["model_type"], config["max_position_embeddings"]
    pre = kind in ("mbart", "m2m_100")
    if kind == "marian":  # sinusoids of their own kind, which are not always among the weights
        for side in ("encoder", "decoder"):
            tensors.setdefault(f"{side}.embed_positions.weight", _marian_positions(positions, config["d_model"]))
    tied = config.get("tie_word_embeddings", True)
    shared = tied and config.get("share_encoder_decoder_embeddings", True)
    source = tensors["encoder.embed_tokens.weight"]
    bias = tensors.get("decoder.output_projection.bias")
    if bias is not None:
        tensors["decoder.output_projection.bias"] = bias = bias.flatten()
        if not bias.any():
            del tensors["decoder.output_projection.bias"]
    target = source if shared else tensors["decoder.embed_tokens.weight"]
    pad, eos = _first(config.get("pad_token_id"), 1), _integer(config.get("eos_token_id"), 2)
    placed = {"bart": "learned", "mbart": "learned", "marian": "learned", "m2m_100": "sinusoidal"}[kind]
    return TransformerConfig(
        src_vocab_size=source.size(0), tgt_vocab_size=target.size(0),
        encoder_layers=config["encoder_layers"], encoder_embed_dim=config["d_model"],
        encoder_ffn_embed_dim=config["encoder_ffn_dim"], encoder_attention_heads=config["encoder_attention_heads"],
        decoder_layers=config["decoder_layers"], decoder_embed_dim=config["d_model"],
        decoder_ffn_embed_dim=config["decoder_ffn_dim"], decoder_attention_heads=config["decoder_attention_heads"],
        activation_fn=_activation(config["activation_function"]),
        encoder_normalize_before=pre, decoder_normalize_before=pre, layernorm_embedding=kind in ("bart", "mbart"),
        encoder_positions=placed, decoder_positions=placed,
        max_source_positions=positions, max_target_positions=positions,
        position_offset={"marian": 0, "m2m_100": None}.get(kind, None if pad == 1 else 2),
        no_scale_embedding=not config.get("scale_embedding", False),
        share_all_embeddings=shared, share_decoder_input_output_embed=tied,
        output_bias="decoder.output_projection.bias" in tensors,
        bos=_first(config.get("bos_token_id"), eos), pad=pad, eos=eos, unk=_first(config.get("unk_token_id"), pad),
        decoder_start=_first(config.get("decoder_start_token_id"), eos))


def _integer(value: Any, default: int) -> int:
    """A token id; the first of several."""
    if isinstance(value, list):
        value = value[0] if value else None
    return default if value is None else int(value)


def _marian_positions(rows: int, width: int) -> Tensor:
    """(rows, width) fp32: sines in front of cosines of position / 10000 ** (2 i / width), from position 0 on."""
    angles = torch.arange(rows, dtype=torch.float64)[:, None] / 10000 ** (
        torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.cat((angles.sin(), angles.cos()[:, :width // 2]), 1).float()


def _gpt2(config: Config, tensors: Tensors) -> TransformerConfig:
    """GPT-2 has no padding, so a type is put behind its vocabulary that is never said (see :data:`NEVER`)."""
    eos = _integer(config.get("eos_token_id"), 0)
    pad, tied = config.get("pad_token_id"), config.get("tie_word_embeddings", True)
    vocab, width = tensors["decoder.embed_tokens.weight"].shape
    if tied:
        tensors.pop("decoder.output_projection.weight", None)
    missing = pad is None or pad in (eos, config.get("bos_token_id")) or not 0 <= pad < vocab
    pad = vocab if pad is None or missing else int(pad)
    if missing:
        vocab += 1
        for name in ("decoder.embed_tokens.weight", "decoder.output_projection.weight"):
            if name in tensors:
                tensors[name] = torch.cat((tensors[name], torch.zeros(1, width)))
        tensors["decoder.output_projection.bias"] = torch.zeros(vocab).index_fill_(0, torch.tensor([pad]), NEVER)
    return TransformerConfig(
        stacks="decoder", no_cross_attention=True, src_vocab_size=vocab, tgt_vocab_size=vocab,
        decoder_layers=config["n_layer"], decoder_embed_dim=width,
        decoder_ffn_embed_dim=config.get("n_inner") or 4 * width, decoder_attention_heads=config["n_head"],
        activation_fn=_activation(config["activation_function"]), decoder_normalize_before=True,
        decoder_positions="learned", position_offset=0,
        max_target_positions=tensors["decoder.embed_positions.weight"].size(0), no_scale_embedding=True,
        share_decoder_input_output_embed=tied, output_bias=missing,
        layer_norm_eps=config.get("layer_norm_epsilon", 1e-5), bos=_integer(config.get("bos_token_id"), eos), pad=pad,
        eos=eos, unk=_first(config.get("unk_token_id"), pad))


ROBERTAS = ("roberta", "camembert", "xlm-roberta")

_NO_DECODER = (("is_decoder", False, "a BERT that decodes"), ("add_cross_attention", False, "cross-attention"),
               ("position_embedding_type", "absolute", "relative positions"))
_NORMS = (("normalize_before", False, "pre-LN"), ("add_final_layer_norm", False, "a norm behind the last layer"),
          ("static_position_embeddings", False, "sinusoidal positions"),
          ("normalize_embedding", True, "embeddings without a norm"))

FAMILIES = {
    "bert": Family(BERT_NAMES, _bert, _NO_DECODER),
    **{name: Family(BERT_NAMES, _bert, _NO_DECODER) for name in ROBERTAS},
    "bart": Family(BART_NAMES, _bart, _NORMS),
    "mbart": Family(BART_NAMES, _bart),
    "marian": Family(BART_NAMES, _bart),
    "m2m_100": Family(BART_NAMES, _bart),
    "gpt2": Family(GPT2_NAMES, _gpt2, (
        ("add_cross_attention", False, "cross-attention"),
        ("scale_attn_weights", True, "unscaled scores"),
        ("scale_attn_by_inverse_layer_idx", False, "scores scaled by the layer's number"),
    ), transposed=r".+\.(c_attn|c_proj|c_fc)\.weight"),
}
"""By ``model_type`` of config.json; NLLB's is m2m_100."""

REFUSED = {
    "t5": "relative position biases and norms without mean", "mt5": "relative position biases and norms without mean",
    "nllb-moe": "mixtures of experts", "distilbert": "tensor names of its own; export the BERT it was made from",
    "llama": "rotary positions", "gpt_neox": "rotary positions", "opt": "positions of its own",
}
"""Types that are asked for and not done, and why."""
