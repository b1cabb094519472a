"""Loads the compiled operators: those the install built, else compiled on first use, else none.

Which path serves is said once. The reference would answer CUDA tensors too, slowly and silently; that is why
:func:`loaded` exists, and why the tests on a GPU insist on it.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
from pathlib import Path

import torch

from lightseq_fairseq import _build

logger = logging.getLogger(__name__)


@functools.cache
def loaded() -> bool:
    """Load the operators now if they are not yet; False where they can't be had, after one warning that says why."""
    library = _build.built_library()
    try:
        if library is not None:
            torch.ops.load_library(os.fspath(library))
        else:
            _compile()
    except Exception as error:  # the reference path still gives right results
        logger.warning("CUDA operators of lightseq_fairseq are not in use (%s); plain PyTorch does their work, more "
                       "slowly", str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
        return False
    logger.info("CUDA operators of lightseq_fairseq loaded from %s", library or "the compilation cache")
    return True


@functools.cache
def cpu_loaded() -> bool:
    """Load the CPU operators of decoding; False where they can't be had, after one warning that says why."""
    library, sources = _build.built_library(_build.CPU_NAME), _build.cpu_sources()
    try:
        if library is not None and not _older(library, sources):
            torch.ops.load_library(os.fspath(library))
        else:
            _compile_cpu(sources)
    except Exception as error:  # plain PyTorch gives the same results
        logger.warning("CPU operators of lightseq_fairseq are not in use (%s); plain PyTorch does their work, more "
                       "slowly", str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
        return False
    return True


def _older(library: Path, sources: list[str]) -> bool:
    """Whether a checkout's sources have changed since its library was built."""
    folders = {Path(source).parent for source in sources}
    changed = [path.stat().st_mtime for folder in folders for path in folder.iterdir()]
    return library.stat().st_mtime < max(changed, default=0.0)


def _compile_cpu(sources: list[str]) -> None:
    from torch.utils import cpp_extension

    if not sources:
        raise RuntimeError("neither built nor here to be built: install from a checkout, with a C++ compiler")
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise RuntimeError(f"not built at install and no C++ compiler {compiler} here: install one or name it in CXX")
    logger.warning("compiling the CPU operators of lightseq_fairseq (seconds, once)")
    cpp_extension.load(name=f"lightseq{_build.CPU_NAME}", sources=sources, is_python_module=False,
                       extra_cflags=_build.CPU_COMPILE_FLAGS)


def _compile() -> None:
    from torch.utils import cpp_extension

    sources = _build.sources()
    if not sources:
        raise RuntimeError("neither built nor here to be built: install from a checkout, with nvcc on the PATH")
    if cpp_extension.CUDA_HOME is None or shutil.which("nvcc", path=f"{cpp_extension.CUDA_HOME}/bin") is None:
        raise RuntimeError("not built at install and no nvcc here: install the CUDA toolkit of this torch "
                           f"({torch.version.cuda}) or set CUDA_HOME")
    logger.warning("compiling the CUDA operators of lightseq_fairseq (a minute, once)")
    cpp_extension.load(name=f"lightseq{_build.NAME}", sources=sources, is_python_module=False,
                       extra_cflags=_build.COMPILE_FLAGS["cxx"], extra_cuda_cflags=_build.COMPILE_FLAGS["nvcc"])
