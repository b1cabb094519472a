"""What a model file holds, whichever format it is written in, and the way from there to a ModelFile and back.

A model that LightSeq can express goes, in fp32, into LightSeq's own arrays; everything else goes into tensors of our
own, by fairseq's names. The reader gathers all that is wrong before it converts anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from lightseq_fairseq.config import ConfigError, TransformerConfig, exported_fields
from lightseq_fairseq.model_file import lightseq
from lightseq_fairseq.model_file.spec import (
    DTYPES,
    ModelFile,
    ModelFileError,
    config_problems,
    differences,
    raise_all,
    symbol_problems,
    tensor_shapes,
    tied_tensors,
    validate,
)

FORMAT_VERSION = 2
"""Raise by one when a reader of the version before would misread the new file: a field of Config, Extension or Tensor
that it may not ignore, another meaning of an old one, another answer of lightseq.obstacles or lightseq.layout. A field
that old readers may ignore needs no new version. Older versions stay readable. 2: models of one stack, positions that
begin elsewhere, token types, poolers."""


@dataclass(frozen=True)
class Stored:
    """One array of a file: its size is known, its values are read when asked for."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass
class Extension:
    """What LightSeq's format has no field for."""

    config: dict[str, Any]
    src_symbols: tuple[str, ...] | None = None
    tgt_symbols: tuple[str, ...] | None = None
    source_lang: str | None = None
    target_lang: str | None = None
    tensors: dict[str, Stored] = field(default_factory=dict)


@dataclass
class Contents:
    """A model file, format aside."""

    arrays: dict[str, Stored] = field(default_factory=dict)
    """LightSeq's weights, flat fp32, by its HDF5 names: ``encoder_stack/0/ffn_first_kernel``."""
    conf: dict[str, Any] = field(default_factory=dict)
    """LightSeq's ``model_conf``; ``format_version`` is 0 or absent in files of LightSeq's own."""
    extension: Extension | None = None


def pack(model: ModelFile, dtype: torch.dtype = torch.float32) -> Contents:
    """``model`` with every tensor in ``dtype``; ModelFileError if it contradicts itself or does not fit."""
    if dtype not in DTYPES.values():
        raise ModelFileError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    validate(model)
    config, conf, pieces = model.config, {"format_version": FORMAT_VERSION}, {}
    if dtype == torch.float32 and not lightseq.obstacles(config):
        conf |= lightseq.model_conf(config, model.decoding)
        pieces = lightseq.layout(config)
    arrays = {path: Stored(dtype, (piece.size,), _lazily(piece.pack, model.tensors)) for path, piece in pieces.items()}
    own = {name: Stored(dtype, shape, _lazily(_cast, name, model.tensors[name], dtype))
           for name, shape in _own_shapes(config, pieces).items()}
    return Contents(arrays, conf, Extension(exported_fields(config), model.src_symbols, model.tgt_symbols,
                                            model.source_lang, model.target_lang, own))


def unpack(contents: Contents) -> ModelFile:
    """The model in ``contents``; ModelFileError if anything is missing, left over or of another size."""
    version = contents.conf.get("format_version", 0)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ModelFileError(f"expected format version {FORMAT_VERSION} or older, got {version}; "
                             "install a newer lightseq-fairseq or export the model again with this one")
    if version < 0 or (version == 0) != (contents.extension is None):
        raise ModelFileError(f"format version {version} and the part that holds the configuration do not agree: the "
                             "file is truncated or damaged, export or copy it again")
    if contents.extension is None:
        return _unpack_foreign(contents)
    extension = contents.extension
    config = _config_of(extension.config)
    stored = len(contents.arrays) + len(extension.tensors)
    layers = config.encoder_layers * config.has_encoder, config.decoder_layers * config.has_decoder
    if sum(layers) > stored:
        raise ModelFileError(f"expected weights of {layers[0]} + {layers[1]} layers, "
                             f"got {stored} arrays in all: the file is truncated or damaged, export or copy it again")
    problems = symbol_problems(config, extension.src_symbols, extension.tgt_symbols)
    pieces = lightseq.layout(config) if contents.arrays and not lightseq.obstacles(config) else {}
    problems += _array_differences(pieces, contents.arrays)
    raise_all(problems + differences(_own_shapes(config, pieces), _shapes(extension.tensors)))
    tensors = {name: stored.read() for name, stored in extension.tensors.items()}
    return ModelFile(config, _in_order(config, tensors | _read_arrays(pieces, contents.arrays)),
                     extension.src_symbols, extension.tgt_symbols, extension.source_lang, extension.target_lang)


def _unpack_foreign(contents: Contents) -> ModelFile:
    """A file made by LightSeq: sizes follow from the lengths of its arrays."""
    sizes = {path: math.prod(stored.shape) for path, stored in contents.arrays.items()}
    bias = contents.arrays.get("trg_embedding/shared_bias")
    try:
        config = lightseq.infer_config(sizes, contents.conf, bool(bias and bias.read().any()))
    except ConfigError as error:
        raise ModelFileError(str(error)) from None
    pieces = lightseq.layout(config, foreign=True)
    raise_all(config_problems(config) + _array_differences(pieces, contents.arrays))
    decoding = {key: contents.conf[key] for key in lightseq.DECODING if contents.conf.get(key)}
    return ModelFile(config, _in_order(config, _read_arrays(pieces, contents.arrays)), decoding=decoding)


def _config_of(found: Mapping[str, Any]) -> TransformerConfig:
    """TransformerConfig from a file's fields, each of the type that the class declares."""
    kinds = {"int": int, "bool": bool, "str": str, "float": float}
    problems = []
    for declared in fields(TransformerConfig):
        value = found.get(declared.name)
        kind = kinds[str(declared.type).split()[0]]
        if value is not None and type(value) is not kind:
            problems.append(f"{declared.name} must be of type {kind.__name__}, got {value!r}")
    unknown = set(found) - {declared.name for declared in fields(TransformerConfig)}
    problems += [f"{name} is not known here" for name in sorted(unknown)]
    problems += [f"{name} is missing" for name in ("src_vocab_size", "tgt_vocab_size") if found.get(name) is None]
    raise_all(problems)
    try:
        config = TransformerConfig(**{name: value for name, value in found.items() if value is not None})
    except ConfigError as error:
        raise ModelFileError(str(error)) from None
    raise_all(config_problems(config))
    return config


def _own_shapes(config: TransformerConfig, pieces: Mapping[str, lightseq.Piece]) -> dict[str, tuple[int, ...]]:
    """The tensors that ``pieces`` do not give back."""
    given_back = {name for piece in pieces.values() for name in piece.gives_back}
    return {name: shape for name, shape in tensor_shapes(config).items() if name not in given_back}


def _shapes(stored: Mapping[str, Stored]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in stored.items()}


def _array_differences(pieces: Mapping[str, lightseq.Piece], arrays: Mapping[str, Stored]) -> list[str]:
    return differences({path: (piece.size,) for path, piece in pieces.items()}, _shapes(arrays))


def _read_arrays(pieces: Mapping[str, lightseq.Piece], arrays: dict[str, Stored]) -> dict[str, Tensor]:
    """Tensors by fairseq's names; each array is let go once it is converted."""
    tensors: dict[str, Tensor] = {}
    for path, piece in pieces.items():
        stored = arrays.pop(path)
        if piece.gives_back:
            tensors |= piece.unpack(stored.read())
    return tensors


def _in_order(config: TransformerConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` in the order of the specification, tied names added."""
    complete = {name: tensors[name] for name in tensor_shapes(config)}
    return complete | {alias: complete[name] for alias, name in tied_tensors(config).items()}


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` on the CPU, contiguous, in ``dtype``; refused where finite values would become infinite."""
    cast = tensor.detach().to("cpu", dtype).contiguous()
    if dtype == torch.float16 and not torch.isfinite(cast).all() and torch.isfinite(tensor).all():
        raise ModelFileError(f"{name} has values up to {tensor.abs().max():.3g}, too large for {dtype}; use bfloat16")
    return cast


def _lazily(function: Callable[..., Tensor], *args: Any) -> Callable[[], Tensor]:
    return lambda: function(*args)
