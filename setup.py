"""The package's build. What it is called, needs and installs stands in pyproject.toml; the CUDA operators are here.

They are compiled where nvcc and a CUDA build of torch are at hand (pip install --no-build-isolation); everywhere else,
and where that fails, the package installs without them, and compiles them on first use on a GPU if it can.
"""

import importlib.util
import os
import shutil
import warnings
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent


def build_recipe():
    """``lightseq_fairseq._build``, without importing the package."""
    spec = importlib.util.spec_from_file_location("_build", HERE / "lightseq_fairseq" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cuda_operators():
    """Arguments of setup() that compile csrc/ops, or none where that can't be done."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        return {}
    recipe = build_recipe()
    sources = [os.path.relpath(source, HERE) for source in recipe.sources(HERE)]
    nvcc = cpp_extension.CUDA_HOME and shutil.which("nvcc", path=f"{cpp_extension.CUDA_HOME}/bin")
    if torch.version.cuda is None or not nvcc or not sources:
        return {}

    class BuildIfPossible(cpp_extension.BuildExtension):
        """A toolkit of another CUDA version, or half of one, is no reason not to install."""

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                warnings.warn(f"the CUDA operators are left for their first use: {error}", stacklevel=1)

    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", recipe.DEFAULT_ARCHITECTURES)
    extension = cpp_extension.CUDAExtension(f"lightseq_fairseq.{recipe.NAME}", sources, py_limited_api=True,
                                            extra_compile_args=recipe.COMPILE_FLAGS, optional=True)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildIfPossible},
            "options": {"bdist_wheel": {"py_limited_api": "cp310"}}}


setup(**cuda_operators())
