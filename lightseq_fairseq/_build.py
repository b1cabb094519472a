"""How the operators are compiled; read by setup.py, by compilation on first use and by the compile check of CI.

Only LibTorch's stable ABI is used (torch >= 2.10), which is why one shared library serves every Python and torch.
Imports nothing of the package, so that setup.py can read it before the package is installed.
"""

from __future__ import annotations

import os
from pathlib import Path

NAME = "_C"
"""Stem of the CUDA operators' shared library, which lies in the package beside this file."""
CPU_NAME = "_cpu"
"""Stem of that of the CPU operators."""

DEFAULT_ARCHITECTURES = "8.0;8.9;9.0a;9.0+PTX"
"""A100, L4/RTX 40, H100/H200 with the products that they alone have, and newer ones through PTX. TORCH_CUDA_ARCH_LIST
overrides it."""

_TORCH_2_10 = "-DTORCH_TARGET_VERSION=0x020a000000000000"
STABLE_ABI = ["-DUSE_CUDA", _TORCH_2_10]
CPU_COMPILE_FLAGS = ["-O3", "-std=c++20", "-ffp-contract=fast", "-Wno-psabi", _TORCH_2_10]
COMPILE_FLAGS = {
    "cxx": ["-O3", "-std=c++20", *STABLE_ABI],
    "nvcc": ["-O3", "-std=c++20", "--expt-relaxed-constexpr", *STABLE_ABI],
}


def sources(root: Path | None = None) -> list[str]:
    """Every ``csrc/ops/*.cu`` under ``root`` (default: the checkout this package lies in); empty when there is none."""
    root = root or Path(__file__).resolve().parent.parent
    return sorted(os.fspath(path) for path in (root / "csrc" / "ops").glob("*.cu"))


def cpu_sources(root: Path | None = None) -> list[str]:
    """Likewise ``csrc/cpu/*.cpp``."""
    root = root or Path(__file__).resolve().parent.parent
    return sorted(os.fspath(path) for path in (root / "csrc" / "cpu").glob("*.cpp"))


def built_library(name: str = NAME) -> Path | None:
    """The library that an install has built, if it did."""
    return next(iter(sorted(Path(__file__).resolve().parent.glob(f"{name}*.so"))), None)
