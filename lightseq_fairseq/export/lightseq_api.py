"""LightSeq's own export functions, for scripts that call them: the same names, arguments and fields.

``file`` is a ``Transformer`` message, of LightSeq's generated class or of ``lightseq_fairseq.model_file.protobuf``, or
with ``save_pb=False`` an ``h5py.File``. A ``state_dict`` may name its tensors as fairseq does, or be packed as in
LightSeq's layers: one flat ``para`` for each, whose order :data:`ENCODER_PARA` and :data:`DECODER_PARA` give.
What comes out has no vocabulary and only what LightSeq's format can say; ``lightseq-export`` has no such limits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightseq_fairseq.export.checkpoint import ExportError
from lightseq_fairseq.model_file import backend
from lightseq_fairseq.model_file.lightseq import DECODER_LAYER, ENCODER_LAYER, NORMS, side_by_side, sinusoids

ENCODER_PARA = ("self_attn.qkv", "self_attn.out_proj", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm")
DECODER_PARA = ("self_attn.qkv", "self_attn.out_proj", "self_attn_layer_norm",
                "encoder_attn.q_proj", "encoder_attn.out_proj", "encoder_attn_layer_norm",
                "fc1", "fc2", "final_layer_norm")
"""Weight and bias of each in turn; then LightSeq's clipping limits (12 and 24, none before its version 3); then, in
the first decoder layer, the keys and values of all layers."""

FIRST_POSITION = 2
"""Row of fairseq's position table for the first token, pad being 1; LightSeq's layers start at row 0."""


def export_ls_config(file: Any, head_num: int, src_padding_id: int, trg_start_id: int, trg_end_id: int,
                     n_encoder_stack: int, n_decoder_stack: int, is_post_ln: bool = False,
                     no_scale_embedding: bool = False, use_gelu: bool = False, beam_size: int = 4,
                     length_penalty: float = 0.6, extra_decode_length: int = 50,
                     sampling_method: str = "beam_search", topk: int = 1, topp: float = 0.75,
                     diverse_lambda: float = 0, save_pb: bool = True) -> None:
    """Write ``model_conf``. The numbers of layers are for HDF5; a message has them in its lists."""
    conf = {"head_num": head_num, "src_padding_id": src_padding_id, "trg_start_id": trg_start_id,
            "trg_end_id": trg_end_id, "is_post_ln": is_post_ln, "no_scale_embedding": no_scale_embedding,
            "use_gelu": use_gelu, "beam_size": beam_size, "length_penalty": length_penalty,
            "extra_decode_length": extra_decode_length, "sampling_method": sampling_method, "topk": topk,
            "topp": topp, "diverse_lambda": diverse_lambda}
    if not save_pb:
        conf |= {"n_encoder_stack": n_encoder_stack, "n_decoder_stack": n_decoder_stack}
    _backend(save_pb).put_conf(file, conf)


def export_ls_embedding(file: Any, state_dict: Mapping[str, Tensor], max_length: int, emb_dim: int, is_encoder: bool,
                        save_pb: bool = True) -> None:
    """Write the token embedding times sqrt(emb_dim), the target's transposed, and ``max_length`` positions.

    The tensor is the one with ``embed_tokens`` in its name: fairseq's (V, emb_dim), ``embeddings`` of an
    ``LSTransformerEmbeddingLayer``, or LightSeq's own, flat with one clipping limit behind it. Positions are sinusoids,
    or the learned ``embed_positions.weight`` of fairseq, ``pos_embeddings`` of an ``LSTransformerEmbeddingLayer``.
    """
    side, prefix = ("encoder", "src_embedding") if is_encoder else ("decoder", "trg_embedding")
    unwritten = [name for name in state_dict if "embed_tokens.layer_norm" in name]
    if unwritten:
        raise ExportError(f"{unwritten[0]}: LightSeq's pre-LN models have no norm behind the embedding")
    name = _only(state_dict, "embed_tokens", side)
    table, of_fairseq = state_dict[name].detach().float(), name.endswith(".weight")
    shape = tuple(table.shape)
    table = table[:-1] if table.dim() == 1 and table.numel() % emb_dim == 1 else table
    if table.numel() % emb_dim or (table.dim() > 1 and table.size(-1) != emb_dim):
        raise ExportError(f"{name}: expected rows of emb_dim={emb_dim} values, got shape {shape}")
    table = table.reshape(-1, emb_dim) * emb_dim**0.5
    first, learned = (FIRST_POSITION, "embed_positions") if of_fairseq else (0, "pos_embeddings")
    if any(other.removesuffix(".weight").endswith(f".{learned}") for other in state_dict):
        positions = state_dict[_only(state_dict, learned, side)].detach()[first:first + max_length]
    else:
        positions = sinusoids(first, max_length, emb_dim)
    _backend(save_pb).put(file, f"{prefix}/token_embedding", table if is_encoder else table.t())
    _backend(save_pb).put(file, f"{prefix}/position_embedding", positions)


def export_ls_encoder(file: Any, state_dict: Mapping[str, Tensor], hidden_size: int, intermediate_size: int,
                      save_pb: bool = True) -> None:
    """Write the encoder's layers."""
    for index, layer in _layers(state_dict, "encoder", hidden_size, intermediate_size):
        _put_layer(file, f"encoder_stack/{index}", layer, "encoder", save_pb)


def export_ls_decoder(file: Any, state_dict: Mapping[str, Tensor], hidden_size: int, intermediate_size: int,
                      nlayer: int, save_pb: bool = True) -> None:
    """Write the decoder's layers, and the keys and values of all their cross-attentions side by side."""
    layers = dict(_layers(state_dict, "decoder", hidden_size, intermediate_size, nlayer))
    if len(layers) != nlayer:
        raise ExportError(f"export_ls_decoder: expected nlayer={nlayer} layers, got {len(layers)}")
    for index, layer in layers.items():
        _put_layer(file, f"decoder_stack/{index}", layer, "decoder", save_pb)
    for name, part in (("kernel", "weight"), ("bias", "bias")):
        shared = [layers[0][f"encoder_attn.kv.{part}"]] if f"encoder_attn.kv.{part}" in layers[0] else [
            layer[f"encoder_attn.{key}_proj.{part}"] for layer in layers.values() for key in ("k", "v")]
        _backend(save_pb).put(file, f"trg_embedding/encode_output_project_{name}_kv", side_by_side(shared))


def export_fs_weights(transformer: Any, state_dict: Mapping[str, Tensor], args: Any = None,
                      save_pb: bool = True) -> None:
    """Write what fairseq's models add: the norms behind both stacks and a bias of zeros over the target vocabulary."""
    norms = {f"{prefix}_embedding/norm_{theirs}": f"{side}.layer_norm.{ours}"
             for prefix, side in (("src", "encoder"), ("trg", "decoder"))
             for theirs, ours in (("scale", "weight"), ("bias", "bias"))}
    missing = [name for name in norms.values() if name not in state_dict]
    if missing:
        raise ExportError(f"export_fs_weights: expected the norm behind each stack, got none ({', '.join(missing)}); "
                          "LightSeq's format has no post-LN model without it, export this one with lightseq-export")
    for path, name in norms.items():
        _backend(save_pb).put(transformer, path, state_dict[name])
    table = state_dict[_only(state_dict, "embed_tokens", "decoder")]
    width = state_dict["decoder.layer_norm.weight"].numel()
    _backend(save_pb).put(transformer, "trg_embedding/shared_bias", torch.zeros(table.numel() // width))


def unpack_ls_layers(state_dict: Mapping[str, Tensor], hidden_size: int, intermediate_size: int,
                     num_decoder_layer: int) -> dict[str, Tensor]:
    """A checkpoint of LightSeq's own ``LSTransformer``, for ``lightseq_fairseq.training.LSTransformer``.

    Its flat ``para`` are taken apart into separate tensors by fairseq's names, the keys and values of layer 0 given to
    the layers that use them; half-precision copies (``para_16``) and clipping limits are left out. Anything else keeps
    its name. ExportError names a ``para`` of another length.
    """
    unpacked: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        parent, _, last = name.rpartition(".")
        if last == "para" and parent.endswith("embed_tokens"):
            table = tensor[:tensor.numel() // hidden_size * hidden_size]
            unpacked[f"{parent}.embeddings"] = table.view(-1, hidden_size)
        elif last not in ("para", "para_16"):
            unpacked[name] = tensor
    for side, nlayer in (("encoder", 0), ("decoder", num_decoder_layer)):
        packed = {name: tensor for name, tensor in state_dict.items()
                  if name.endswith(".para") and side in name.split(".") and "embed_tokens" not in name}
        for index, layer in _layers(packed, side, hidden_size, intermediate_size, nlayer) if packed else ():
            for name, tensor in layer.items():
                owner, part = name.rpartition(".")[::2]
                if owner == "self_attn.qkv":
                    for key, value in zip("qkv", tensor.chunk(3), strict=True):
                        unpacked[f"{side}.layers.{index}.self_attn.{key}_proj.{part}"] = value
                elif owner == "encoder_attn.kv":
                    for i, value in enumerate(tensor.chunk(2 * nlayer)):
                        unpacked[f"{side}.layers.{i // 2}.encoder_attn.{'kv'[i % 2]}_proj.{part}"] = value
                elif name != "limits":
                    unpacked[f"{side}.layers.{index}.{name}"] = tensor
    return unpacked


def _backend(save_pb: bool) -> Any:
    return backend("protobuf" if save_pb else "hdf5")


def _only(state_dict: Mapping[str, Tensor], part: str, side: str) -> str:
    """The one name with ``part`` among its dotted parts; that of ``side`` where encoder and decoder both have one."""
    names = [name for name in state_dict if part in name.split(".")]
    names = [name for name in names if part == "pos_embeddings" or not name.endswith(".pos_embeddings")]
    names = names if len(names) == 1 else [name for name in names if side in name.split(".")]
    if len(names) != 1:
        raise ExportError(f"expected one tensor of the {side} with {part} in its name, got {names or 'none'}")
    return names[0]


def _layers(state_dict: Mapping[str, Tensor], side: str, hidden: int, inner: int,
            nlayer: int = 0) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(number, tensors by their names within the layer) in order, packed layers taken apart."""
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state_dict.items():
        parts = name.split(".")
        places = [place for place, part in enumerate(parts) if part.isdigit()]
        if not places or (side not in parts and {"encoder", "decoder"} & set(parts)):
            continue
        index, rest = int(parts[places[-1]]), ".".join(parts[places[-1] + 1:])
        if parts[-1] == "para":
            layers[index] = _take_apart(name, tensor, side, hidden, inner, nlayer if index == 0 else 0)
        else:
            layers.setdefault(index, {})[rest] = tensor
    if not layers:
        raise ExportError(f"expected {side} layers named '...N...para' or '...layers.N...', got none")
    yield from sorted(layers.items())


def _take_apart(name: str, para: Tensor, side: str, hidden: int, inner: int, nlayer: int) -> dict[str, Tensor]:
    """The tensors packed in one flat ``para``; ``nlayer`` where it ends in the keys and values of all layers."""
    order, limits = (ENCODER_PARA, 12) if side == "encoder" else (DECODER_PARA, 24)
    shapes: dict[str, tuple[int, ...]] = {}
    for part in order:
        rows = {"self_attn.qkv": 3 * hidden, "fc1": inner}.get(part, hidden)
        norm = part.endswith("layer_norm")
        shapes[f"{part}.weight"] = (rows,) if norm else (rows, inner if part == "fc2" else hidden)
        shapes[f"{part}.bias"] = (rows,)
    kv: dict[str, tuple[int, ...]] = {}
    if nlayer and side == "decoder":
        kv = {"encoder_attn.kv.weight": (2 * nlayer * hidden, hidden), "encoder_attn.kv.bias": (2 * nlayer * hidden,)}
    count = sum(torch.Size(shape).numel() for shape in (shapes | kv).values())
    if para.numel() not in (count, count + limits):
        raise ExportError(f"{name}: expected {count} or {count + limits} values for hidden_size={hidden} and "
                          f"intermediate_size={inner}, got {para.numel()}")
    tensors, start = {}, 0
    for part, shape in [*shapes.items(), ("limits", (para.numel() - count,)), *kv.items()]:
        size = torch.Size(shape).numel()
        tensors[part] = para[start:start + size].view(shape)
        start += size
    return tensors


def _put_layer(file: Any, path: str, layer: Mapping[str, Tensor], side: str, save_pb: bool) -> None:
    """Write one layer's projections and norms; ExportError names the tensors that it lacks."""
    fields: dict[str, tuple[str, ...]] = dict(ENCODER_LAYER if side == "encoder" else DECODER_LAYER)
    for theirs, ours in NORMS[side].items():
        fields |= {f"{theirs}_scale": (f"{ours}.weight",), f"{theirs}_bias": (f"{ours}.bias",)}
    if "self_attn.qkv.weight" in layer:  # queries, keys and values in one tensor already
        fields = {field: (names[0].replace("q_proj", "qkv"),) if len(names) == 3 else names
                  for field, names in fields.items()}
    missing = [name for names in fields.values() for name in names if name not in layer]
    if missing:
        raise ExportError(f"{path}: expected {', '.join(missing)}, got a layer without")
    for field, names in fields.items():
        _backend(save_pb).put(file, f"{path}/{field}", side_by_side([layer[name] for name in names]))
