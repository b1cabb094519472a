"""The exported model: one reader and one writer for protobuf and HDF5, files of LightSeq's included.

::

    model = load("model.pb")
    save(model, "model.hdf5", dtype=torch.bfloat16)
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

import torch

from lightseq_fairseq.model_file.contents import FORMAT_VERSION, pack, unpack
from lightseq_fairseq.model_file.spec import DTYPES, ModelFile, ModelFileError

__all__ = ["DTYPES", "FORMATS", "FORMAT_VERSION", "ModelFile", "ModelFileError", "backend",
           "format_of", "load", "save"]

FORMATS = {"protobuf": (".pb", ".proto"), "hdf5": (".hdf5", ".h5")}
"""Formats and the suffixes that choose them."""


def format_of(path: str | os.PathLike[str], format: str | None = None) -> str:
    """``format`` if given, else what the suffix of ``path`` says; ModelFileError if that is neither."""
    if format is not None:
        if format not in FORMATS:
            raise ModelFileError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
        return format
    for name, suffixes in FORMATS.items():
        if Path(path).suffix.lower() in suffixes:
            return name
    known = ", ".join(suffix for suffixes in FORMATS.values() for suffix in suffixes)
    raise ModelFileError(f"{path}: a model file must end in one of {known}; rename it or name its format "
                         f"({', '.join(FORMATS)})")


def load(path: str | os.PathLike[str], format: str | None = None) -> ModelFile:
    """Read a model written by :func:`save` or by LightSeq, on the CPU.

    ``format`` is "protobuf" or "hdf5"; the suffix decides without it. ModelFileError, with the path, what was
    expected and what was found, for anything but a complete and consistent model.
    """
    module = backend(format_of(path, format))
    try:
        return unpack(module.read(Path(path)))
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from None


def save(model: ModelFile, path: str | os.PathLike[str], format: str | None = None,
         dtype: torch.dtype = torch.float32) -> None:
    """Write ``model`` with its weights in ``dtype`` (float32, float16 or bfloat16).

    The file appears under its name only when it is complete. ModelFileError if the model contradicts itself or does
    not fit the format.
    """
    module = backend(format_of(path, format))
    unfinished = Path(f"{path}.tmp")
    try:
        module.write(pack(model, dtype), unfinished)
        unfinished.replace(path)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be written ({error.strerror or error})") from error
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def backend(format: str) -> ModuleType:
    """The module that reads and writes ``format``, imported when first needed."""
    return importlib.import_module(f"lightseq_fairseq.model_file.{format}")
