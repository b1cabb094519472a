"""The ``lightseq`` operator namespace: schema, reference and shape function of each op, registered once.

The reference answers every device; the compiled library, where it loads, takes over CUDA tensors under the same
schema. Nothing else chooses between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "lightseq"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def register(schema: str, reference: Callable[..., Any], fake: Callable[..., Any] | None) -> Any:
    """Define an op by its schema, ``name(...) -> ...``; returns the callable ``torch.ops.lightseq.name.default``.

    ``fake`` gives the outputs' shapes; None where nothing is returned.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake or (lambda *args: None), lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def register_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Attach a backward formula to a registered op."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums and statistics are taken in fp32, in fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(op: str, *conditions: tuple[bool, Callable[[], str]]) -> None:
    """ValueError gathering every condition that fails, in the words its function gives."""
    wrong = [words() for holds, words in conditions if not holds]
    if wrong:
        raise ValueError(f"{op}: " + "; ".join(wrong))


def shape(tensor: Tensor) -> tuple[int, ...]:
    """For messages."""
    return tuple(tensor.shape)
