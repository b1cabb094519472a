"""LightSeq's weights (bytedance/lightseq, inference/proto/transformer.proto) and fairseq's, each from the other; those
of its BERT and GPT (bert.proto, gpt.proto), which are read alone.

LightSeq stores flat fp32 arrays: linear maps as [in, out], queries, keys and values side by side, the keys and values
of all decoder layers together, token embeddings already scaled, the target's transposed, positions as a plain table.
Its engine always normalises in front of a sublayer and once behind the last layer. A post-LN model whose embeddings are
normalised is the same chain of norms begun one earlier, so its norms move up by one place; other post-LN models, untied
outputs and differing widths have no place in this format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightseq_fairseq.config import TransformerConfig
from lightseq_fairseq.model_file.spec import ModelFileError, tensor_shapes

MAX_STEP = 1024
"""Positions that LightSeq's engine can take; longer tables are cut for it."""

GELU = ("gelu_accurate", "gelu_fast", "gelu")
"""LightSeq's ``use_gelu``: its kernel computes the tanh form (the first two), its exporters use it for all."""

QKV_WEIGHT = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
QKV_BIAS = ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
ENCODER_LAYER = {
    "multihead_project_kernel_qkv":    QKV_WEIGHT,
    "multihead_project_bias_qkv":      QKV_BIAS,
    "multihead_project_kernel_output": ("self_attn.out_proj.weight",),
    "multihead_project_bias_output":   ("self_attn.out_proj.bias",),
    "ffn_first_kernel":                ("fc1.weight",),
    "ffn_first_bias":                  ("fc1.bias",),
    "ffn_second_kernel":               ("fc2.weight",),
    "ffn_second_bias":                 ("fc2.bias",),
}
DECODER_LAYER = {
    "self_project_kernel_qkv":         QKV_WEIGHT,
    "self_project_bias_qkv":           QKV_BIAS,
    "self_project_kernel_output":      ("self_attn.out_proj.weight",),
    "self_project_bias_output":        ("self_attn.out_proj.bias",),
    "encdec_project_kernel_q":         ("encoder_attn.q_proj.weight",),
    "encdec_project_bias_q":           ("encoder_attn.q_proj.bias",),
    "encdec_project_kernel_output":    ("encoder_attn.out_proj.weight",),
    "encdec_project_bias_output":      ("encoder_attn.out_proj.bias",),
    "ffn_first_kernel":                ("fc1.weight",),
    "ffn_first_bias":                  ("fc1.bias",),
    "ffn_second_kernel":               ("fc2.weight",),
    "ffn_second_bias":                 ("fc2.bias",),
}
NORMS = {
    "encoder": {"multihead_norm": "self_attn_layer_norm", "ffn_norm": "final_layer_norm"},
    "decoder": {"self_norm": "self_attn_layer_norm", "encdec_norm": "encoder_attn_layer_norm",
                "ffn_norm": "final_layer_norm"},
}
"""Norms of one layer in the order in which they are applied: LightSeq's name, fairseq's name."""

NEVER = -30000.0
"""The output bias of a type that exists for padding alone: exp() of it is 0, and fp16 can hold it."""

ONE_STACK_EPS = {"encoder": 1e-12, "decoder": 1e-5}
"""Of BERT's norms and GPT-2's, which their files do not say; LightSeq's engine has one for all."""

DECODING = {"beam_size": 4, "length_penalty": 0.6, "extra_decode_length": 50, "sampling_method": "beam_search",
            "topk": 1, "topp": 0.75, "diverse_lambda": 0.0}
"""How LightSeq's engine is to decode, which its files hold, and what its exporter writes unless told otherwise."""


@dataclass(frozen=True)
class Piece:
    """One of LightSeq's arrays: its length, and the way from and to fairseq's tensors."""

    size: int
    pack: Callable[[Mapping[str, Tensor]], Tensor]
    """Named tensors -> flat fp32 array."""
    unpack: Callable[[Tensor], dict[str, Tensor]]
    gives_back: tuple[str, ...]
    """The names that ``unpack`` returns; none for what our own files keep elsewhere."""


def obstacles(config: TransformerConfig) -> list[str]:
    """Why LightSeq's format cannot express this model; empty if it can."""
    pre = config.encoder_normalize_before and config.decoder_normalize_before
    post = not (config.encoder_normalize_before or config.decoder_normalize_before)
    widths = {config.encoder_embed_dim, config.decoder_embed_dim, config.input_dim, config.output_dim}
    checks = {
        f"a model of stacks {config.stacks!r}": config.stacks != "encoder-decoder",
        "token types": config.type_vocab_size > 0,
        "a pooler": config.pooler,
        "pre-LN needs a norm behind each stack and none behind the embeddings":
            pre and (config.no_decoder_final_norm or config.layernorm_embedding),
        "post-LN needs layernorm_embedding": post and not config.layernorm_embedding,
        "pre-LN and post-LN are mixed": not (pre or post),
        "the output projection is not the target embedding": not config.tied_output,
        "embedding widths differ": len(widths) > 1,
        "feed-forward widths differ": config.encoder_ffn_embed_dim != config.decoder_ffn_embed_dim,
        "numbers of heads differ": config.encoder_attention_heads != config.decoder_attention_heads,
        f"activation {config.activation_fn}": config.activation_fn not in ("relu", *GELU),
        "cross_self_attention": config.cross_self_attention,
        "no_cross_attention": config.no_cross_attention,
        "no decoder layer": config.decoder_layers == 0,
        "eos is 0": config.eos == 0,
    }
    return [reason for reason, applies in checks.items() if applies]


def model_conf(config: TransformerConfig, decoding: Mapping[str, Any]) -> dict[str, Any]:
    """LightSeq's ``model_conf`` for a model without :func:`obstacles`."""
    return {
        "head_num": config.decoder_attention_heads, "src_padding_id": config.pad, "trg_start_id": config.start,
        "trg_end_id": config.eos, "is_post_ln": not config.decoder_normalize_before,
        "no_scale_embedding": config.no_scale_embedding, "use_gelu": config.activation_fn in GELU,
    } | {key: decoding.get(key, default) for key, default in DECODING.items()}


def infer_config(sizes: Mapping[str, int], conf: Mapping[str, Any], output_bias: bool) -> TransformerConfig:
    """The configuration of a file made by LightSeq, from the lengths of its arrays (``sizes``) and its ``model_conf``.

    Positions become a learned table, whatever they were. ModelFileError where the sizes do not add up to a model.
    """
    if conf.get("multilg_type") or any(path.endswith("/lang_emb") for path in sizes):
        raise ModelFileError("multilingual LightSeq models (multilg_type, lang_emb) are not supported")
    if _is_one_stack(sizes, conf):
        return _infer_one_stack(sizes, conf)
    width, inner = sizes.get("trg_embedding/norm_scale", 0), sizes.get("decoder_stack/0/ffn_first_bias", 0)
    if not (width and inner):
        raise ModelFileError("expected the weights of a LightSeq encoder-decoder Transformer, got neither its "
                             "trg_embedding/norm_scale nor its decoder layers; of other models only BERT and GPT are "
                             "supported")
    rows = _rows(sizes, width, "src_embedding/token_embedding", "trg_embedding/token_embedding",
                 "src_embedding/position_embedding", "trg_embedding/position_embedding")
    src_vocab, tgt_vocab, src_positions, tgt_positions = rows
    layers = {side: len({path.split("/")[1] for path in sizes if path.startswith(f"{side}_stack/")})
              for side in NORMS}
    post = bool(conf.get("is_post_ln"))
    heads, start = _integer(conf, "head_num"), _integer(conf, "trg_start_id")
    return TransformerConfig(
        src_vocab_size=src_vocab, tgt_vocab_size=tgt_vocab,
        encoder_layers=layers["encoder"], encoder_embed_dim=width, encoder_ffn_embed_dim=inner,
        encoder_attention_heads=heads,
        decoder_layers=layers["decoder"], decoder_embed_dim=width, decoder_ffn_embed_dim=inner,
        decoder_attention_heads=heads,
        activation_fn="gelu_accurate" if conf.get("use_gelu") else "relu",
        encoder_normalize_before=not post, decoder_normalize_before=not post, layernorm_embedding=post,
        encoder_positions="learned", decoder_positions="learned",
        max_source_positions=src_positions, max_target_positions=tgt_positions,
        no_scale_embedding=bool(conf.get("no_scale_embedding")), share_decoder_input_output_embed=True,
        output_bias=output_bias, bos=start, pad=_integer(conf, "src_padding_id"),
        eos=_integer(conf, "trg_end_id") or tgt_vocab - 1, unk=min(3, tgt_vocab - 1), decoder_start=start)


def _rows(sizes: Mapping[str, int], width: int, *paths: str) -> list[int]:
    """How many rows of ``width`` values each of the arrays has."""
    counts = []
    for path in paths:
        count, rest = divmod(sizes.get(path, 0), width)
        if rest or not count:
            raise ModelFileError(f"{path} must be rows of {width} values, got {sizes.get(path, 0)} values")
        counts.append(count)
    return counts


def _is_one_stack(sizes: Mapping[str, int], conf: Mapping[str, Any]) -> bool:
    """Whether this is a BERT or a GPT, rather than what is left of a translation model."""
    two_stacks = any(path.startswith(("trg_embedding/", "decoder_stack/")) for path in sizes)
    begun = sizes.get("src_embedding/norm_scale") and sizes.get("encoder_stack/0/ffn_first_bias")
    return bool(begun) and not (two_stacks or conf.get("trg_start_id") or conf.get("trg_end_id"))


def _infer_one_stack(sizes: Mapping[str, int], conf: Mapping[str, Any]) -> TransformerConfig:
    """BERT's configuration, or GPT's, which alone says how to sample and where to end.

    A GPT's padding is mostly a type that its vocabulary lacks; then one is added, see :data:`NEVER`.
    """
    width, inner = sizes["src_embedding/norm_scale"], sizes["encoder_stack/0/ffn_first_bias"]
    vocab, positions = _rows(sizes, width, "src_embedding/token_embedding", "src_embedding/position_embedding")
    layers = len({path.split("/")[1] for path in sizes if path.startswith("encoder_stack/")})
    pad, heads = _integer(conf, "src_padding_id"), _integer(conf, "head_num")
    gpt = any(conf.get(key) for key in ("sampling_method", "eos_id", "topp", "extra_decode_length", "beam_size"))
    stacks, post = "decoder" if gpt else "encoder", bool(conf.get("is_post_ln"))
    added = gpt and pad >= vocab
    vocab, pad = (vocab + 1, vocab) if added else (vocab, pad)
    eos = _integer(conf, "eos_id") if gpt else pad
    gelu = gpt or conf.get("use_gelu")  # a GPT's own use_gelu came late, with the value that all have
    return TransformerConfig(
        stacks=stacks, src_vocab_size=vocab, tgt_vocab_size=vocab, no_cross_attention=gpt,
        encoder_layers=0 if gpt else layers, encoder_embed_dim=width, encoder_ffn_embed_dim=inner,
        encoder_attention_heads=heads, decoder_layers=layers if gpt else 0, decoder_embed_dim=width,
        decoder_ffn_embed_dim=inner, decoder_attention_heads=heads,
        activation_fn="gelu_accurate" if gelu else "relu", encoder_normalize_before=not post,
        decoder_normalize_before=not post, layernorm_embedding=post, encoder_positions="learned",
        decoder_positions="learned", max_source_positions=positions, max_target_positions=positions, position_offset=0,
        no_scale_embedding=True, share_decoder_input_output_embed=gpt, output_bias=added,
        layer_norm_eps=ONE_STACK_EPS[stacks], bos=eos, pad=pad, eos=eos, unk=pad)


def _integer(conf: Mapping[str, Any], key: str) -> int:
    value = conf.get(key, 0)
    if not isinstance(value, int):
        raise ModelFileError(f"model_conf/{key} must be an integer, got {value!r}")
    return value


def layout(config: TransformerConfig, foreign: bool = False) -> dict[str, Piece]:
    """Every array of a LightSeq file for this model, by its HDF5 name.

    In files of our own the position tables only serve LightSeq's engine: sinusoids are computed again and learned
    tables are kept whole elsewhere. In a ``foreign`` file the table is all there is.
    """
    if config.stacks != "encoder-decoder":
        return _one_stack_layout(config)
    shapes = tensor_shapes(config)
    pieces = {path: _linear_piece(names, shapes) for path, names in _projections(config)}
    pieces |= {path: _linear_piece((name,), shapes) for path, name in _norms(config)}
    for prefix, side in (("src_embedding", "encoder"), ("trg_embedding", "decoder")):
        pieces[f"{prefix}/token_embedding"] = _token_piece(config, side)
        pieces[f"{prefix}/position_embedding"] = _position_piece(config, side, foreign)
    pieces["trg_embedding/shared_bias"] = _bias_piece(config)
    return pieces


def _projections(config: TransformerConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(array, the tensors that stand side by side in it)."""
    for side, layers, table in (("encoder", config.encoder_layers, ENCODER_LAYER),
                                ("decoder", config.decoder_layers, DECODER_LAYER)):
        for i in range(layers):
            for name, parts in table.items():
                yield f"{side}_stack/{i}/{name}", tuple(f"{side}.layers.{i}.{part}" for part in parts)
    for name, part in (("kernel", "weight"), ("bias", "bias")):
        yield f"trg_embedding/encode_output_project_{name}_kv", tuple(
            f"decoder.layers.{i}.encoder_attn.{key}_proj.{part}"
            for i in range(config.decoder_layers) for key in ("k", "v"))


def _norms(config: TransformerConfig) -> Iterator[tuple[str, str]]:
    """(array, tensor) for each norm in the order of application."""
    for side, layers, prefix, pre in (
            ("encoder", config.encoder_layers, "src", config.encoder_normalize_before),
            ("decoder", config.decoder_layers, "trg", config.decoder_normalize_before)):
        yield from _norm_chain(side, layers, f"{side}_stack", prefix, pre)


def _norm_chain(side: str, layers: int, stack: str, prefix: str, pre: bool) -> Iterator[tuple[str, str]]:
    """(array, tensor) for each norm of one stack; post-LN chains begin one norm earlier."""
    pairs = [(f"{stack}/{i}/{theirs}", f"{side}.layers.{i}.{ours}")
             for i in range(layers) for theirs, ours in NORMS[stack.removesuffix("_stack")].items()]
    places = [theirs for theirs, _ in pairs] + [f"{prefix}_embedding/norm"]
    norms = [ours for _, ours in pairs]
    norms = [*norms, f"{side}.layer_norm"] if pre else [f"{side}.layernorm_embedding", *norms]
    for place, norm in zip(places, norms, strict=True):
        yield f"{place}_scale", f"{norm}.weight"
        yield f"{place}_bias", f"{norm}.bias"


def _one_stack_layout(config: TransformerConfig) -> dict[str, Piece]:
    """Of a BERT or GPT of LightSeq's: its names are those of an encoder, its embedding is not scaled."""
    side, shapes = "encoder" if config.has_encoder else "decoder", tensor_shapes(config)
    layers, pre = ((config.encoder_layers, config.encoder_normalize_before) if config.has_encoder else
                   (config.decoder_layers, config.decoder_normalize_before))
    pieces = {f"encoder_stack/{i}/{name}": _linear_piece(tuple(f"{side}.layers.{i}.{part}" for part in parts), shapes)
              for i in range(layers) for name, parts in ENCODER_LAYER.items()}
    pieces |= {path: _linear_piece((name,), shapes)
               for path, name in _norm_chain(side, layers, "encoder_stack", "src", pre)}
    pieces["src_embedding/position_embedding"] = _position_piece(config, side, foreign=True)
    table, bias = f"{side}.embed_tokens.weight", "decoder.output_projection.bias"
    rows, width = shapes[table]
    rows -= config.output_bias

    def pack(tensors: Mapping[str, Tensor]) -> Tensor:
        return _fp32(tensors[table][:rows]).flatten()

    def unpack(array: Tensor) -> dict[str, Tensor]:
        if not config.output_bias:
            return {table: array.view(rows, width).clone()}
        return {table: torch.cat((array.view(rows, width), torch.zeros(1, width))),
                bias: torch.cat((torch.zeros(rows), torch.full((1,), NEVER)))}

    gives_back = (table, bias) if config.output_bias else (table,)
    pieces["src_embedding/token_embedding"] = Piece(rows * width, pack, unpack, gives_back)
    return pieces


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Weights (out, in) as flat [in, out + out + ...]; vectors end to end."""
    return torch.cat([_fp32(part).t() for part in parts], dim=-1).flatten()


def _linear_piece(names: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]) -> Piece:
    """The array that :func:`side_by_side` makes of these tensors."""
    outs = [shapes[name][0] for name in names]
    inputs = shapes[names[0]][1:]

    def pack(tensors: Mapping[str, Tensor]) -> Tensor:
        return side_by_side([tensors[name] for name in names])

    def unpack(array: Tensor) -> dict[str, Tensor]:
        rows = array.view(*inputs, sum(outs)).t().contiguous()  # [in, sum(out)] -> (sum(out), in)
        return dict(zip(names, torch.split(rows, outs), strict=True))

    return Piece(sum(outs) * math.prod(inputs), pack, unpack, names)


def _token_piece(config: TransformerConfig, side: str) -> Piece:
    """Embedding (V, H) times sqrt(H); the target's as [H, V]."""
    name = f"{side}.embed_tokens.weight"
    vocab = config.src_vocab_size if side == "encoder" else config.tgt_vocab_size
    width = config.encoder_embed_dim
    scale = 1.0 if config.no_scale_embedding else width**0.5
    source = "encoder.embed_tokens.weight" if config.share_all_embeddings else name

    def pack(tensors: Mapping[str, Tensor]) -> Tensor:
        table = _fp32(tensors[source]) * scale
        return (table if side == "encoder" else table.t()).flatten()

    def unpack(array: Tensor) -> dict[str, Tensor]:
        table = array.view(vocab, width) if side == "encoder" else array.view(width, vocab).t().contiguous()
        return {name: table / scale}

    return Piece(vocab * width, pack, unpack, (name,) if source == name else ())


def _position_piece(config: TransformerConfig, side: str, foreign: bool) -> Piece:
    """The rows of fairseq's table from the first token's on. Foreign files may have any number of rows."""
    name, width, offset = f"{side}.embed_positions.weight", config.encoder_embed_dim, config.first_position
    kind = config.encoder_positions if side == "encoder" else config.decoder_positions
    own = config.max_source_positions if side == "encoder" else config.max_target_positions
    rows = own if foreign else min(config.max_source_positions, config.max_target_positions, MAX_STEP)

    def pack(tensors: Mapping[str, Tensor]) -> Tensor:
        if kind == "learned":
            return _fp32(tensors[name][offset:offset + rows]).flatten()
        return (sinusoids(offset, rows, width) if kind == "sinusoidal" else torch.zeros(rows, width)).flatten()

    def unpack(array: Tensor) -> dict[str, Tensor]:
        return {name: torch.cat((torch.zeros(offset, width), array.view(rows, width)))}

    return Piece(rows * width, pack, unpack, (name,) if foreign else ())


def _bias_piece(config: TransformerConfig) -> Piece:
    """Added to the logits; zeros where the model has none."""
    name, vocab = "decoder.output_projection.bias", config.tgt_vocab_size

    def pack(tensors: Mapping[str, Tensor]) -> Tensor:
        return _fp32(tensors[name]) if config.output_bias else torch.zeros(vocab)

    return Piece(vocab, pack, lambda array: {name: array.clone()}, (name,) if config.output_bias else ())


def sinusoids(first: int, count: int, width: int) -> Tensor:
    """(count, width) fp32: positions first, first + 1, ... of tensor2tensor's table, which fairseq uses."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float) * -(math.log(10000) / max(half - 1, 1)))
    angles = torch.arange(first, first + count, dtype=torch.float)[:, None] * frequencies
    return torch.nn.functional.pad(torch.cat((angles.sin(), angles.cos()), dim=1), (0, width % 2))


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32)
