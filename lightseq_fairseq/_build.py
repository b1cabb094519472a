"""How the CUDA operators are compiled; read by setup.py, by compilation on first use and by the compile check of CI.

Only LibTorch's stable ABI is used (torch >= 2.10), which is why one shared library serves every Python and torch.
Imports nothing of the package, so that setup.py can read it before the package is installed.
"""

from __future__ import annotations

import os
from pathlib import Path

NAME = "_C"
"""Stem of the shared library, which lies in the package beside this file."""

DEFAULT_ARCHITECTURES = "8.0;8.9;9.0+PTX"
"""A100, L4/RTX 40, H100/H200, and newer ones through PTX. TORCH_CUDA_ARCH_LIST overrides it."""

STABLE_ABI = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
COMPILE_FLAGS = {
    "cxx": ["-O3", "-std=c++20", *STABLE_ABI],
    "nvcc": ["-O3", "-std=c++20", "--expt-relaxed-constexpr", *STABLE_ABI],
}


def sources(root: Path | None = None) -> list[str]:
    """Every ``csrc/ops/*.cu`` under ``root`` (default: the checkout this package lies in); empty when there is none."""
    root = root or Path(__file__).resolve().parent.parent
    return sorted(os.fspath(path) for path in (root / "csrc" / "ops").glob("*.cu"))


def built_library() -> Path | None:
    """The library that an install has built, if it did."""
    return next(iter(sorted(Path(__file__).resolve().parent.glob(f"{NAME}*.so"))), None)
