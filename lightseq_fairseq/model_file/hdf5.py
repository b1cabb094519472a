"""Model files in HDF5, for models above protobuf's 2 GiB.

LightSeq's weights are flat float32 datasets under its names (``encoder_stack/0/ffn_first_kernel``), its ``model_conf``
scalar datasets. Ours stand in the group ``lightseq_fairseq``: attributes ``format_version`` and the languages, the
configuration as attributes of ``config``, the vocabularies as UTF-8 lines in ``src_symbols`` and ``tgt_symbols``, and
``tensors/<name>`` with an attribute ``dtype`` (HDF5 has no bfloat16, which is stored as 16-bit integers).

A file may come from anywhere, so only what this module writes is followed: groups, and datasets whose values lie
uncompressed in the file itself. Together they may not claim more bytes than the file has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightseq_fairseq.model_file.contents import Contents, Extension, Stored
from lightseq_fairseq.model_file.spec import DTYPES, ModelFileError

OWN = "lightseq_fairseq"
"""The group that holds what LightSeq has no dataset for."""

LAYERS = {"encoder_stack": "n_encoder_stack", "decoder_stack": "n_decoder_stack"}
"""LightSeq's groups of numbered layers, and where ``model_conf`` says how many there are."""

LIBVER = ("v108", "v108")
"""The file structures of HDF5 1.8 (2008), the first with checksums: a damaged file is an error, not a guess."""

_STORED_AS = {torch.float32: np.dtype("<f4"), torch.float16: np.dtype("<f2"), torch.bfloat16: np.dtype("<i2")}


def read(path: Path) -> Contents:
    """The contents of ``path``; ModelFileError if it is not an HDF5 file of plain arrays."""
    with open(path, "rb") as raw:
        if raw.read(8) != b"\x89HDF\r\n\x1a\n":
            raise ModelFileError("expected an HDF5 file, got another format or an empty file; a protobuf message "
                                 'must be named .pb or read with format="protobuf"')
    try:
        with h5py.File(path, "r") as file:
            return _Reader(path.stat().st_size).contents(file)
    except ModelFileError:
        raise
    except Exception as error:  # what h5py raises for a damaged file is not narrower than this
        raise ModelFileError(f"expected a complete HDF5 file, got one that HDF5 cannot read ({error}); "
                             "export or copy the file again") from error


class _Reader:
    """Reads one file and counts the bytes that its datasets may still claim."""

    def __init__(self, file_size: int) -> None:
        self.left = file_size

    def contents(self, file: h5py.File) -> Contents:
        contents = Contents()
        for name, item in _members(file):
            if name == OWN:
                contents.extension = self.extension(item)
                contents.conf["format_version"] = _attributes(item).get("format_version", 0)
            elif name == "model_conf":
                contents.conf |= {key: self.value(dataset) for key, dataset in _members(item)
                                  if key not in LAYERS.values()}
            else:
                parts = _members(item) if name in LAYERS else [("", item)]
                for index, part in parts:
                    for field, dataset in _members(part):
                        array = torch.from_numpy(self.array(dataset)).flatten()  # LightSeq wrote float64 at times
                        path = "/".join(filter(None, (name, index, field)))
                        contents.arrays[path] = _stored(array.to(torch.float32))
        return contents

    def extension(self, group: Any) -> Extension:
        members, languages = dict(_members(group)), _attributes(group)
        symbols = {side: self.lines(members[f"{side}_symbols"]) for side in ("src", "tgt")
                   if f"{side}_symbols" in members}
        tensors = {name: _stored(self.tensor(dataset)) for name, dataset in _members(members["tensors"])}
        return Extension(_attributes(members["config"]), symbols.get("src"), symbols.get("tgt"),
                         languages.get("source_lang"), languages.get("target_lang"), tensors)

    def array(self, dataset: Any) -> npt.NDArray[Any]:
        """The values of ``dataset``; ModelFileError, before anything is allocated, unless the file holds them all."""
        if not isinstance(dataset, h5py.Dataset) or dataset.shape is None or dataset.dtype.kind not in "biuf":
            raise ModelFileError(f"{dataset.name} must be an array of numbers; export the file again")
        stored, needed = dataset.id.get_storage_size(), dataset.size * dataset.dtype.itemsize
        if dataset.external or dataset.is_virtual or stored != needed:
            raise ModelFileError(f"{dataset.name} of shape {dataset.shape} must have {needed} bytes in this file, "
                                 f"got {stored}; truncated, compressed and external data are not read")
        self.left -= needed
        if self.left < 0:
            raise ModelFileError(f"{dataset.name} claims {needed} bytes, more than the file has left; "
                                 "export or copy the file again")
        values = np.empty(dataset.shape, dataset.dtype)
        if values.size:
            dataset.read_direct(values)
        return values

    def tensor(self, dataset: Any) -> Tensor:
        name = _attributes(dataset).get("dtype")
        if name not in DTYPES or dataset.dtype != _STORED_AS[DTYPES[name]]:
            raise ModelFileError(f"{dataset.name} must be of type {', '.join(DTYPES)}, got {name!r}")
        return torch.from_numpy(self.array(dataset)).view(DTYPES[name])

    def lines(self, dataset: Any) -> tuple[str, ...]:
        return tuple(self.array(dataset).tobytes().decode("utf-8").split("\n"))

    def value(self, dataset: Any) -> Any:
        """One value of ``model_conf``: a number, or a word as an array of character codes."""
        values = self.array(dataset)
        return values.item() if values.ndim == 0 else values.astype("u1").tobytes().decode("ascii", "replace")


def _members(group: Any) -> Iterator[tuple[str, Any]]:
    """What ``group`` holds itself; links to other places are not followed."""
    if not isinstance(group, h5py.Group):
        raise ModelFileError(f"{group.name} must be a group; export the file again")
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ModelFileError(f"{name} in {group.name} is a link to another place, which is not followed")
        yield str(name), group[name]


def _attributes(item: Any) -> dict[str, Any]:
    """Scalar attributes as Python values. Strings of variable length are refused: in a damaged file the library may
    search for them for ever."""
    values = {}
    for name in item.attrs:
        attribute = item.attrs.get_id(name)
        if attribute.shape != () or attribute.dtype.kind not in "biufS":
            raise ModelFileError(f"attribute {name} of {item.name} must be one number or a string of fixed length; "
                                 "export the file again")
        value = item.attrs[name].item()
        values[str(name)] = value.decode("utf-8") if isinstance(value, bytes) else value
    return values


def _stored(tensor: Tensor) -> Stored:
    return Stored(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def write(contents: Contents, path: Path) -> None:
    """Write ``contents`` to ``path``, array by array."""
    with h5py.File(path, "w", libver=LIBVER) as file:
        for name, stored in contents.arrays.items():
            put(file, name, stored.read())
        if contents.arrays:
            counts = {key: len(file[stack]) if stack in file else 0 for stack, key in LAYERS.items()}
            put_conf(file, {key: value for key, value in contents.conf.items() if key != "format_version"} | counts)
        if contents.extension:
            _write_own(file.create_group(OWN), contents.conf["format_version"], contents.extension)


def put(file: h5py.File, path: str, values: Tensor) -> None:
    """Write one of LightSeq's weights, flat and in float32."""
    file.create_dataset(path, data=values.detach().to("cpu", torch.float32).flatten().numpy())


def put_conf(file: h5py.File, conf: dict[str, Any]) -> None:
    """Write ``model_conf``; words become arrays of character codes, as LightSeq's engine reads them."""
    for key, value in conf.items():
        file[f"model_conf/{key}"] = np.frombuffer(value.encode("ascii"), "i1") if isinstance(value, str) else value


def _write_own(group: h5py.Group, version: int, extension: Extension) -> None:
    languages = {"source_lang": extension.source_lang, "target_lang": extension.target_lang}
    _write_attributes(group, {"format_version": version, **languages})
    _write_attributes(group.create_group("config"), extension.config)
    _write_lines(group, "src_symbols", extension.src_symbols)
    _write_lines(group, "tgt_symbols", extension.tgt_symbols)
    names = {dtype: name for name, dtype in DTYPES.items()}
    tensors = group.create_group("tensors")
    for name, stored in extension.tensors.items():
        tensor = stored.read()
        tensor = tensor.view(torch.int16) if stored.dtype == torch.bfloat16 else tensor
        _write_attributes(tensors.create_dataset(name, data=tensor.numpy()), {"dtype": names[stored.dtype]})


def _write_attributes(item: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if value is not None:
            item.attrs[name] = np.bytes_(value.encode("utf-8")) if isinstance(value, str) else value


def _write_lines(group: h5py.Group, name: str, symbols: Sequence[str] | None) -> None:
    if symbols is not None:
        group.create_dataset(name, data=np.frombuffer("\n".join(symbols).encode("utf-8"), "u1"))
