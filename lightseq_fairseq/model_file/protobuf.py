"""Model files in protobuf: ``lightseq.proto`` in this folder, which LightSeq's engine reads.

The messages are built from that text when this module is imported, so that one package serves every protobuf from
4.25 on, with no compiler and no generated code. A packed ``repeated float`` and ``bytes`` are the same on the wire:
the field number, the length, the values in little-endian order. Declared as bytes a weight is copied at once instead
of becoming a Python list of floats, about ten times faster, and the file does not differ by a bit.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet
from torch import Tensor

from lightseq_fairseq.model_file.contents import Contents, Extension, Stored
from lightseq_fairseq.model_file.spec import DTYPES, ModelFileError

LIMIT = 2**31 - 1
"""Bytes of a message that every protobuf implementation can read."""

_Field = descriptor_pb2.FieldDescriptorProto


def message_class(name: str, floats_as_bytes: bool = True) -> Any:
    """A message of ``lightseq.proto``; ``floats_as_bytes`` turns each ``repeated float`` into ``bytes``."""
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_schema(floats_as_bytes))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(name))


def _schema(floats_as_bytes: bool) -> Any:
    """``lightseq.proto``, parsed: flat messages of scalars and of other messages are all that it has."""
    text = re.sub("//.*", "", (Path(__file__).parent / "lightseq.proto").read_text(encoding="utf-8"))
    if floats_as_bytes:
        text = text.replace("repeated float ", "bytes ")
    file = descriptor_pb2.FileDescriptorProto(name="lightseq_fairseq/model_file/lightseq.proto", syntax="proto3")
    for message_name, body in re.findall(r"message (\w+) \{(.*?)\}", text, re.DOTALL):
        message = file.message_type.add(name=message_name)
        for label, kind, name, number in re.findall(r"(?:(optional|repeated) )?(\w+) (\w+) = (\d+);", body):
            field = message.field.add(name=name, number=int(number), label=_Field.LABEL_OPTIONAL)
            if label == "repeated":
                field.label = _Field.LABEL_REPEATED
            elif label == "optional":
                field.proto3_optional = True
                field.oneof_index = len(message.oneof_decl)
                message.oneof_decl.add(name=f"_{name}")
            if kind[0].isupper():
                field.type, field.type_name = _Field.TYPE_MESSAGE, f".{kind}"
            else:
                field.type = _Field.Type.Value(f"TYPE_{kind.upper()}")
    return file


Transformer = message_class("Transformer")
"""The whole file as one message, weights as bytes."""

Bert, Gpt = message_class("Bert"), message_class("Gpt")
"""Other files of LightSeq's; on the wire the types of their fields tell them from a Transformer."""


def read(path: Path) -> Contents:
    """The contents of ``path``; ModelFileError if it is not such a message."""
    message = _parse(path.read_bytes())
    parts = {"src_embedding": message.src_embedding}
    parts |= {f"encoder_stack/{i}": layer for i, layer in enumerate(message.encoder_stack)}
    if isinstance(message, Transformer):
        parts["trg_embedding"] = message.trg_embedding
        parts |= {f"decoder_stack/{i}": layer for i, layer in enumerate(message.decoder_stack)}
    arrays = {f"{part}/{field.name}": _stored(f"{part}/{field.name}", value, torch.float32)
              for part, layer in parts.items() for field, value in layer.ListFields()}
    conf = {field.name: value for field, value in message.model_conf.ListFields()}
    extended = isinstance(message, Transformer) and message.HasField("extension")
    return Contents(arrays, conf, _read_extension(message) if extended else None)


def _parse(data: bytes) -> Any:
    if data[:8] == b"\x89HDF\r\n\x1a\n":
        raise ModelFileError('expected a protobuf message, got HDF5; name it .hdf5 or pass format="hdf5"')
    if data[:4] == b"PK\x03\x04":
        raise ModelFileError("expected a protobuf message, got a PyTorch checkpoint; export it with lightseq-export")
    try:
        message = Transformer.FromString(data)
    except (DecodeError, UnicodeDecodeError):  # the second from protobuf's implementation in Python
        raise ModelFileError("expected a protobuf message, got bytes that are none or end too early; "
                             "export or copy the file again") from None
    if not message.ListFields():
        raise ModelFileError("expected the weights of a Transformer, got an empty message; export the file again")
    two_stacks = message.trg_embedding.token_embedding or message.decoder_stack
    known = two_stacks or message.HasField("model_conf") or message.HasField("extension")
    message = message if known else _of_one_stack(data)
    if message is None:
        raise ModelFileError("expected the weights of a LightSeq encoder-decoder Transformer, got parts of one or "
                             "another model; of other models only BERT and GPT are supported")
    return message


def _of_one_stack(data: bytes) -> Any | None:
    """``data``, which is no whole Transformer, as a Bert or Gpt; None if it is neither.

    Their ``model_conf`` has the number of a Transformer's ``trg_embedding``, but a number in it where that has an
    array, and a Gpt's a word or a float where a Bert's has a number: fields of another type are unknown ones.
    """
    for kind in (Bert, Gpt):
        try:
            message = kind.FromString(data)
        except (DecodeError, UnicodeDecodeError):
            continue
        parts = (message, message.src_embedding, *message.encoder_stack, message.model_conf)
        if not any(len(UnknownFieldSet(part)) for part in parts):
            return message
    return None


def _read_extension(message: Any) -> Extension:
    extension = message.extension
    tensors: dict[str, Stored] = {}
    for entry in extension.tensors:
        if entry.dtype not in DTYPES:
            raise ModelFileError(f"{entry.name} must be of type {', '.join(DTYPES)}, got {entry.dtype!r}")
        if entry.name in tensors:
            raise ModelFileError(f"{entry.name} is there twice; export the file again")
        tensors[entry.name] = _stored(entry.name, entry.data, DTYPES[entry.dtype], tuple(entry.shape))
    return Extension(
        {field.name: value for field, value in extension.config.ListFields()},
        tuple(extension.src_symbols) or None, tuple(extension.tgt_symbols) or None,
        extension.source_lang or None, extension.target_lang or None, tensors)


def _stored(name: str, data: bytes, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> Stored:
    """``data`` as an array, without ``shape`` a flat one; ModelFileError if that needs another number of bytes."""
    count, rest = divmod(len(data), dtype.itemsize)
    stored = Stored(dtype, (count,) if shape is None else shape, lambda: _tensor(data, dtype).view(stored.shape))
    if rest or stored.nbytes != len(data) or min(stored.shape) < 0:
        raise ModelFileError(f"{name} of shape {stored.shape} must have {stored.nbytes} bytes, got {len(data)}; "
                             "export or copy the file again")
    return stored


def _tensor(data: bytes, dtype: torch.dtype) -> Tensor:
    """A view of ``data``, not to be written to."""
    if not data:
        return torch.empty(0, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(data, dtype=dtype)


def write(contents: Contents, path: Path) -> None:
    """Write ``contents`` to ``path``; ModelFileError above :data:`LIMIT` bytes."""
    extension = contents.extension
    tensors = extension.tensors if extension else {}
    total = sum(stored.nbytes for stored in (*contents.arrays.values(), *tensors.values()))
    message = Transformer()
    if total <= LIMIT:
        for name, stored in contents.arrays.items():
            put(message, name, stored.read())
        put_conf(message, contents.conf)
        if extension:
            _fill_extension(message.extension, extension)
        data = message.SerializeToString()
        total = max(total, len(data))
    if total > LIMIT:
        raise ModelFileError(f"a protobuf file must not exceed {LIMIT} bytes, got {total}; write HDF5 instead "
                             '(a name that ends in .hdf5, or format="hdf5"), or 16-bit weights')
    path.write_bytes(data)


def put(message: Any, path: str, values: Tensor) -> None:
    """Set the weight at LightSeq's HDF5 name ``path`` in ``message``, whose floats may be declared either way."""
    *parents, name = path.split("/")
    part = getattr(message, parents[0])
    if len(parents) == 2:
        while len(part) <= int(parents[1]):
            part.add()
        part = part[int(parents[1])]
    values = values.detach().to("cpu", torch.float32).flatten()
    if part.DESCRIPTOR.fields_by_name[name].type == _Field.TYPE_BYTES:
        setattr(part, name, values.numpy().tobytes())
    else:
        getattr(part, name)[:] = values.tolist()


def put_conf(message: Any, conf: dict[str, Any]) -> None:
    """Set fields of ``model_conf``."""
    for key, value in conf.items():
        setattr(message.model_conf, key, value)


def _fill_extension(message: Any, extension: Extension) -> None:
    message.config.SetInParent()
    for name, value in extension.config.items():
        if value is not None:
            setattr(message.config, name, value)
    message.src_symbols.extend(extension.src_symbols or ())
    message.tgt_symbols.extend(extension.tgt_symbols or ())
    message.source_lang = extension.source_lang or ""
    message.target_lang = extension.target_lang or ""
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, stored in extension.tensors.items():
        data = stored.read().flatten().view(torch.uint8).numpy()
        message.tensors.add(name=name, dtype=names[stored.dtype], shape=stored.shape, data=np.asarray(data).tobytes())
