"""The package's build. What it is called, needs and installs stands in pyproject.toml; the operators are here.

Those for the CPU are compiled where torch and a C++ compiler are at hand (pip install --no-build-isolation), those for
CUDA where nvcc and a CUDA build of torch are too. Everywhere else, and where that fails, the package installs without
them, and compiles them on first use if it can.
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


def operators():
    """Arguments of setup() that compile csrc, or none where that can't be done."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        return {}
    recipe = build_recipe()

    class BuildIfPossible(cpp_extension.BuildExtension):
        """A toolkit of another CUDA version, or half of one, is no reason not to install."""

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                warnings.warn(f"operators are left for their first use: {error}", stacklevel=1)

    def extension(kind, name, sources, flags):
        return kind(f"lightseq_fairseq.{name}", [os.path.relpath(source, HERE) for source in sources],
                    py_limited_api=True, extra_compile_args=flags, optional=True)

    extensions = []
    if recipe.cpu_sources(HERE):
        extensions.append(extension(cpp_extension.CppExtension, recipe.CPU_NAME, recipe.cpu_sources(HERE),
                                    {"cxx": recipe.CPU_COMPILE_FLAGS}))
    nvcc = cpp_extension.CUDA_HOME and shutil.which("nvcc", path=f"{cpp_extension.CUDA_HOME}/bin")
    if torch.version.cuda is not None and nvcc and recipe.sources(HERE):
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", recipe.DEFAULT_ARCHITECTURES)
        extensions.append(extension(cpp_extension.CUDAExtension, recipe.NAME, recipe.sources(HERE),
                                    recipe.COMPILE_FLAGS))
    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildIfPossible},
            "options": {"bdist_wheel": {"py_limited_api": "cp310"}}}


setup(**operators())
