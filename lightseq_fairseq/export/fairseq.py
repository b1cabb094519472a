"""From fairseq's checkpoints, stock ``transformer*``, ``transformer_lm*`` and ``roberta*`` or ours of these names, to a
ModelFile; needs no fairseq."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightseq_fairseq.config import ConfigError, TransformerConfig
from lightseq_fairseq.export.checkpoint import ExportError, load_checkpoint, plain
from lightseq_fairseq.export.dictionary import DATA_ADVICE, SPECIAL, load_symbols, merge_symbols
from lightseq_fairseq.model_file import ModelFile, ModelFileError
from lightseq_fairseq.model_file.spec import differences, raise_all, same_tensor, tensor_shapes, tied_tensors

SENTENCE_ENCODER = r"(en|de)coder\.sentence_encoder\."
"""What RoBERTa's names begin with, which then are those of an encoder."""

NAMES = (
    (r"(en|de)coder\.lm_head\..+|classification_heads\..+",               None),  # RoBERTa's heads
    (r"encoder\.emb_layer_norm\.(\w+)",                                   r"encoder.layernorm_embedding.\1"),
    (r"(en|de)coder\.version",                                            None),  # read by arguments()
    (r"(en|de)coder\.embed_positions\.(_float_tensor|weights)",           None),  # sinusoids are computed again
    (r"decoder\.embed_out",                                               r"decoder.output_projection.weight"),
    (r"((en|de)coder\.layers\.\d+)\.layer_norms\.0\.(\w+)",               r"\1.self_attn_layer_norm.\3"),
    (r"(encoder\.layers\.\d+)\.layer_norms\.1\.(\w+)",                    r"\1.final_layer_norm.\2"),
    (r"(decoder\.layers\.\d+)\.layer_norms\.1\.(\w+)",                    r"\1.encoder_attn_layer_norm.\2"),
    (r"(decoder\.layers\.\d+)\.layer_norms\.2\.(\w+)",                    r"\1.final_layer_norm.\2"),
    (r"((en|de)coder\.layers\.\d+\.\w+_attn)\.in_proj_(weight|bias)",     r"\1.{}_proj.\3"),  # q, k and v in one
    (r"encoder\.layers\.\d+\.(in_proj|out_proj|fc1|fc2)_(weight|bias)",   None),  # copies of fairseq 0.12.2, unused
    (r"((en|de)coder\..+)",                                               r"\1"),
)
"""Name in a checkpoint, name in the file; None is dropped. The first pattern that matches the whole name decides, and
a name that none matches is unexpected. All but the last are names of older fairseq versions."""

REFUSED = {
    "adaptive_input": "adaptive input embeddings",
    "adaptive_softmax_cutoff": "the adaptive softmax",
    "quant_noise_pq": "product quantization",
    "quant_noise_scalar": "scalar quantization",
    "char_inputs": "character inputs",
    "character_embeddings": "character inputs",
    "base_layers": "BASE layers",
    "encoder_xformers_att_config": "xFormers attention",
    "decoder_xformers_att_config": "xFormers attention",
    "scale_attn": "NormFormer's scales", "scale_heads": "NormFormer's scales",
    "scale_fc": "NormFormer's scales", "scale_resids": "NormFormer's scales",
}
"""Options that change what a model computes and that the exported model has no word for."""


def from_checkpoints(paths: Sequence[str | os.PathLike[str]], data_bin: str | os.PathLike[str] | None = None,
                     average: bool = False, source_lang: str | None = None, target_lang: str | None = None,
                     progress: Callable[[Sequence[Any]], Iterable[Any]] = iter) -> ModelFile:
    """The model of one checkpoint, or with ``average`` the mean of several of one training, in fp32.

    The dictionaries come from ``data_bin``, or from the folder that the checkpoint was trained on. ``progress`` wraps
    the paths while they are read. ExportError names what is missing, left over, unsupported or contradictory.
    """
    if len(paths) != 1 and not average:
        raise ExportError(f"expected one checkpoint, or several with --average, got {len(paths)}; an ensemble is "
                          "exported one by one")
    if not paths:
        raise ExportError("expected at least one checkpoint to average, got none")
    args: dict[str, Any] = {}
    total: dict[str, Tensor] = {}
    for path in progress(paths):
        state = load_checkpoint(path)
        tensors = rename(state["model"])
        if not total:
            args = arguments(state, path)
            total = {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
            continue
        wrong = differences(_shapes(total), _shapes(tensors))
        if wrong:
            raise ExportError(f"{path}: cannot be averaged with {paths[0]}: {wrong[0]}")
        for name, tensor in tensors.items():
            total[name] += tensor.float()
    if len(paths) > 1:
        total = {name: tensor.div_(len(paths)) for name, tensor in total.items()}
    try:
        return _model(args, total, data_bin, source_lang, target_lang)
    except ConfigError as error:
        raise ExportError(f"{paths[0]}: {error}") from error
    except ModelFileError as error:
        raise ExportError(f"{paths[0]}: {error}") from error


def _model(args: Mapping[str, Any], tensors: dict[str, Tensor], data_bin: str | os.PathLike[str] | None,
           source_lang: str | None, target_lang: str | None) -> ModelFile:
    """The model of a checkpoint's arguments and renamed tensors, its dictionaries found and compared."""
    config = config_from_args(args, tensors)
    complete = complete_tensors(config, tensors)
    folder = data_bin or _data_folder(args)
    if config.stacks != "encoder-decoder":
        symbols = _dictionary(folder)
        if not config.has_decoder and len(symbols) == config.src_vocab_size - 1:
            symbols = (*symbols, "<mask>")  # which fairseq's task adds
        if len(symbols) != config.src_vocab_size:
            raise ExportError(f"expected a dictionary of {config.src_vocab_size} types, got {len(symbols)}; "
                              + DATA_ADVICE)
        return ModelFile(config, complete, symbols, symbols)
    source_lang, target_lang = _languages(folder, source_lang or args.get("source_lang"),
                                          target_lang or args.get("target_lang"))
    source, target = _dictionaries(folder, source_lang, target_lang)
    if args.get("merge_src_tgt_embed"):
        source = target = merge_symbols(source, target)
    for side, found, rows in (("source", source, config.src_vocab_size), ("target", target, config.tgt_vocab_size)):
        if len(found) != rows:
            raise ExportError(f"expected a {side} dictionary of {rows} types, got {len(found)}; {DATA_ADVICE}")
    return ModelFile(config, complete, source, target, source_lang, target_lang)


def arguments(state: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """Model and task arguments of a checkpoint by fairseq's flat names; ExportError where it has none."""
    if state.get("args") is not None:  # fairseq before 0.10
        args = plain(state["args"])
    elif state.get("cfg") is not None:
        cfg = plain(state["cfg"])
        model = cfg.get("model") or {}
        args = {**(cfg.get("task") or {}), **{key: value for key, value in model.items() if value is not None}}
    else:
        raise ExportError(f"{path}: expected the arguments of the training ('cfg' or 'args'), got none")
    for group in ("encoder", "decoder", "quant_noise"):  # a dataclass configuration nests them
        nested = args.pop(group, None)
        if isinstance(nested, dict):
            args |= {f"{group}_{key}": value for key, value in nested.items()}
    version = state["model"].get("decoder.version", torch.ones(1))
    if version.flatten()[:1].le(2).any() and "decoder.layer_norm.weight" not in state["model"]:
        args["no_decoder_final_norm"] = True  # fairseq before 0.6 had no norm behind the last layer
    return {key: value for key, value in args.items() if not (isinstance(value, str) and value.startswith("${"))}


def config_from_args(args: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TransformerConfig:
    """TransformerConfig from fairseq's arguments, with fairseq's defaults for those that an old checkpoint lacks.

    Vocabulary sizes and the width of the target embedding are the tensors' own.
    """
    arch = args.get("_name") or args.get("arch") or "unknown"
    alone = "decoder.embed_tokens.weight" in tensors and not any(name.startswith("encoder.") for name in tensors)
    roberta = re.fullmatch(r".*roberta.*|(ls_)?xlm", arch) and "encoder.embed_tokens.weight" in tensors
    if not (alone or roberta or {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"} <= tensors.keys()):
        raise ExportError(f"expected a Transformer with a decoder, got architecture {arch!r} without encoder and "
                          "decoder embeddings; transformer*, transformer_lm*, bart*, mbart* and roberta* are "
                          "supported, and ours of these names")
    refused = {reason: name for name, reason in REFUSED.items() if args.get(name)}
    if refused:
        options = ", ".join(f"{reason} (--{name.replace('_', '-')})" for reason, name in refused.items())
        raise ExportError(f"models with {options} cannot be exported; generate with fairseq itself")

    def get(name: str, default: Any) -> Any:
        return default if args.get(name) is None else args[name]

    def layers(side: str) -> int:
        kept = args.get(f"{side}_layers_to_keep")
        return len(kept.split(",")) if kept else get(f"{side}_layers", 6)

    def positions(side: str) -> str:
        if args.get("no_token_positional_embeddings"):
            return "none"
        return "learned" if args.get(f"{side}_learned_pos") else "sinusoidal"

    if roberta:
        return _roberta(args, tensors)
    width = get("encoder_embed_dim", 512)
    decoder_width = get("decoder_embed_dim", width)
    input_width = tensors["decoder.embed_tokens.weight"].size(1)  # whatever --decoder-input-dim says
    output_width = int(get("decoder_output_dim", decoder_width))
    inner, limit = get("encoder_ffn_embed_dim", 2048), get("max_positions", 1024)
    common: dict[str, Any] = dict(
        activation_fn=str(get("activation_fn", "relu")),
        decoder_normalize_before=bool(args.get("decoder_normalize_before")),
        no_decoder_final_norm=bool(args.get("no_decoder_final_norm")),
        layernorm_embedding=bool(args.get("layernorm_embedding")), decoder_positions=positions("decoder"),
        no_scale_embedding=bool(args.get("no_scale_embedding")),
        share_decoder_input_output_embed=bool(args.get("share_decoder_input_output_embed")),
        output_bias="decoder.output_projection.bias" in tensors,
        bos=SPECIAL.index("<s>"), pad=SPECIAL.index("<pad>"), eos=SPECIAL.index("</s>"), unk=SPECIAL.index("<unk>"))
    if alone:
        vocab, limit = tensors["decoder.embed_tokens.weight"].size(0), get("tokens_per_sample", 1024)
        return TransformerConfig(
            stacks="decoder", no_cross_attention=True, src_vocab_size=vocab, tgt_vocab_size=vocab,
            decoder_layers=layers("decoder"), decoder_embed_dim=decoder_width,
            decoder_ffn_embed_dim=get("decoder_ffn_embed_dim", 2048),
            decoder_attention_heads=get("decoder_attention_heads", 8),
            decoder_input_dim=None if input_width == decoder_width else input_width,
            decoder_output_dim=None if output_width == decoder_width else output_width,
            max_target_positions=get("max_target_positions", limit), **common)
    return TransformerConfig(
        src_vocab_size=tensors["encoder.embed_tokens.weight"].size(0),
        tgt_vocab_size=tensors["decoder.embed_tokens.weight"].size(0),
        encoder_layers=layers("encoder"), encoder_embed_dim=width, encoder_ffn_embed_dim=inner,
        encoder_attention_heads=get("encoder_attention_heads", 8),
        decoder_layers=layers("decoder"), decoder_embed_dim=decoder_width,
        decoder_ffn_embed_dim=get("decoder_ffn_embed_dim", inner),
        decoder_attention_heads=get("decoder_attention_heads", 8),
        decoder_input_dim=None if input_width == decoder_width else input_width,
        decoder_output_dim=None if output_width == decoder_width else output_width,
        encoder_normalize_before=bool(args.get("encoder_normalize_before")), encoder_positions=positions("encoder"),
        max_source_positions=get("max_source_positions", limit),
        max_target_positions=get("max_target_positions", limit),
        share_all_embeddings=bool(args.get("share_all_embeddings") or args.get("merge_src_tgt_embed")),
        cross_self_attention=bool(args.get("cross_self_attention")),
        no_cross_attention=bool(args.get("no_cross_attention")), **common)


def _roberta(args: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TransformerConfig:
    """RoBERTa's configuration, its sizes being the tensors' own as far as they tell."""
    (vocab, width), pad = tensors["encoder.embed_tokens.weight"].shape, SPECIAL.index("<pad>")
    layers = {name.split(".")[2] for name in tensors if name.startswith("encoder.layers.")}
    positions = tensors.get("encoder.embed_positions.weight")
    if positions is None or not layers:
        raise ExportError("expected a RoBERTa of learned positions and one layer at least")
    return TransformerConfig(
        stacks="encoder", src_vocab_size=vocab, tgt_vocab_size=vocab, encoder_layers=len(layers),
        encoder_embed_dim=width, encoder_ffn_embed_dim=tensors["encoder.layers.0.fc1.bias"].numel(),
        encoder_attention_heads=args.get("encoder_attention_heads") or 12,
        activation_fn=str(args.get("activation_fn") or "gelu"),
        encoder_normalize_before="encoder.layer_norm.weight" in tensors,
        layernorm_embedding="encoder.layernorm_embedding.weight" in tensors,
        no_scale_embedding=bool(args.get("no_scale_embedding", True)), encoder_positions="learned",
        max_source_positions=positions.size(0) - pad - 1,
        bos=SPECIAL.index("<s>"), pad=pad, eos=SPECIAL.index("</s>"), unk=SPECIAL.index("<unk>"))


def rename(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors under their names in the file, joint projections split; RoBERTa's heads have none."""
    renamed: dict[str, Tensor] = {}
    for original, tensor in tensors.items():
        name = re.sub(SENTENCE_ENCODER, "encoder.", original)
        if name.endswith(".para"):
            raise ExportError(f"{name} is packed by LightSeq itself; export such a checkpoint with export_ls_encoder "
                              "and its siblings in lightseq_fairseq.export")
        target: str | None = name
        for pattern, replacement in NAMES:
            match = re.fullmatch(pattern, name)
            if match:
                target = None if replacement is None else match.expand(replacement)
                break
        if target is None:
            continue
        if "{}" in target:
            for key, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[target.format(key)] = part
        else:
            renamed[target] = tensor
    return renamed


def complete_tensors(config: TransformerConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` checked against ``config``, in order, with tied names as one tensor."""
    expected, ties = tensor_shapes(config), tied_tensors(config)
    found = _shapes(tensors)
    raise_all(differences(expected | {alias: expected[name] for alias, name in ties.items() if alias in found}, found))
    raise_all([f"{alias} and {name} differ, which the arguments say are one tensor" for alias, name in ties.items()
               if alias in tensors and not same_tensor(tensors[alias], tensors[name])])
    complete = {name: tensors[name].contiguous() for name in expected}
    return complete | {alias: complete[name] for alias, name in ties.items()}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _data_folder(args: Mapping[str, Any]) -> str:
    """The first folder of the data that the model was trained on."""
    data = args.get("data")
    if isinstance(data, list):
        data = data[0] if data else None
    if not data:
        raise ExportError(f"the checkpoint does not say where its dictionaries are; {DATA_ADVICE}")
    return str(data).split(os.pathsep)[0]


def _dictionary(folder: str | os.PathLike[str]) -> tuple[str, ...]:
    """A language model's symbols, from dict.txt in ``folder``."""
    if not (Path(folder) / "dict.txt").is_file():
        raise ExportError(f"expected dict.txt in {folder}, got no such file; {DATA_ADVICE}")
    return load_symbols(Path(folder) / "dict.txt")


def _languages(folder: str | os.PathLike[str], source_lang: str | None, target_lang: str | None) -> tuple[str, str]:
    """Those that are given; what is not, by the names of the data in ``folder``, as fairseq's translation task infers
    it without a word in the checkpoint."""
    if source_lang and target_lang:
        return source_lang, target_lang
    names = os.listdir(folder) if Path(folder).is_dir() else []
    found = {match.groups() for name in names if (match := re.fullmatch(r"[^.]+\.([^.-]+)-([^.-]+)\..+", name))}
    pairs = sorted((source, target) for source, target in found
                   if source_lang in (None, source) and target_lang in (None, target))
    if len(pairs) != 1:
        held = ", ".join("-".join(pair) for pair in pairs) or "no such data"
        raise ExportError("the checkpoint does not say which languages it translates, and expected data of one pair "
                          f"in {folder}, got {held}; pass --source-lang and --target-lang")
    return pairs[0]


def _dictionaries(folder: str | os.PathLike[str], source_lang: str,
                  target_lang: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Source and target symbols from dict.<lang>.txt in ``folder``."""
    missing = [name for name in (f"dict.{source_lang}.txt", f"dict.{target_lang}.txt")
               if not (Path(folder) / name).is_file()]
    if missing:
        raise ExportError(f"expected {' and '.join(missing)} in {folder}, got no such file; {DATA_ADVICE}")
    return (load_symbols(Path(folder) / f"dict.{source_lang}.txt"),
            load_symbols(Path(folder) / f"dict.{target_lang}.txt"))
