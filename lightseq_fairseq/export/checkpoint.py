"""Reading a fairseq checkpoint without fairseq, omegaconf or numpy, and without running anything that it names.

``torch.load(weights_only=True)`` builds tensors, dicts and lists. Of the classes that fairseq's checkpoints name
besides, each one in ``INERT`` becomes a :class:`Record`, which holds what was stored and does nothing with it; any
other name ends in an error.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from collections.abc import Iterator
from typing import Any

import torch

from lightseq_fairseq.model_file import ModelFileError


class ExportError(ModelFileError):
    """A checkpoint that cannot be exported, and why."""


class Record:
    """Stands for an object of a class that is not loaded: its attributes, nothing else."""

    def __new__(cls, *args: Any) -> Record:
        """Whatever arguments its pickle gives it."""
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def _empty_dict(*args: Any) -> dict[Any, Any]:
    return {}


INERT = [
    "argparse.Namespace",  # the arguments of models that are not configured by a dataclass
    "typing.Any",
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple")),
    "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig",  # fairseq 0.10 stored its configuration so
    "omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata",
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Boolean", "Enum", "Float", "Integer", "String")),
    "numpy.dtype", "numpy.ndarray",  # meters, --eval-bleu's above all
    *(f"numpy.{module}.multiarray.{name}" for module in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *(f"numpy.dtypes.{kind}DType" for kind in ("Bool", "Float32", "Float64", "Int32", "Int64")),
    *(f"fairseq.{module}.{kind}Meter" for module in ("meters", "logging.meters")  # whole objects before fairseq 0.9
      for kind in ("Average", "Stopwatch", "Sum", "Time")),
]


@contextlib.contextmanager
def _inert_classes() -> Iterator[None]:
    """Inside, the names in INERT stand for :class:`Record` alone, whatever this process has allowed before."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        torch.serialization.add_safe_globals([(Record, name) for name in INERT])
        torch.serialization.add_safe_globals([(_empty_dict, "collections.defaultdict")])
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``path`` holds: "model" is a dict of tensors, "cfg" or "args" has the arguments.

    Tensors may be mapped from the file. ExportError for a file that is no fairseq checkpoint.
    """
    try:
        mapped = zipfile.is_zipfile(path)  # torch before 1.6 wrote another format
        with _inert_classes():
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise ExportError(f"{path}: no such file") from None
    except OSError as error:
        raise ExportError(f"{path}: cannot be read ({error.strerror or error})") from error
    except pickle.UnpicklingError as error:
        raise ExportError(f"{path}: expected a fairseq checkpoint of tensors and arguments, got one that torch refuses "
                          f"to load safely ({_first_sentence(error)})") from error
    except Exception as error:  # torch reports a damaged file by almost any exception
        raise ExportError(f"{path}: expected a fairseq checkpoint, got a file that torch cannot read "
                          f"({_first_sentence(error)}); copy it again") from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise ExportError(f"{path}: expected a fairseq checkpoint with a 'model' of named tensors, got another file")
    strange = [name for name, value in state["model"].items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise ExportError(f"{path}: {strange[0]} must be a tensor; the checkpoint is of another kind of model")
    return state


def _first_sentence(error: Exception) -> str:
    """What went wrong, without torch's advice on how to load the file unsafely."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), lines[0] if lines else "")
    return told.split(". Please")[0].split(" Please use")[0] or type(error).__name__


def plain(value: Any) -> Any:
    """``value`` with namespaces and omegaconf's nodes, whole or as :class:`Record`, turned into dicts and values."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if not isinstance(value, Record):
        return value
    held = vars(value)
    if "_content" in held:
        return plain(held["_content"])
    if "_val" in held:
        return plain(held["_val"])
    return {key: plain(item) for key, item in held.items()}
