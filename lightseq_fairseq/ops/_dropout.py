"""Dropout as every op has it: an element is kept iff its 16 random bits reach ``threshold(p)``, then scaled.

On CUDA the bits are Philox4x32-10 of seed and position (csrc/common/philox.cuh); here they come from torch's own
generator. Either way the seed alone decides, so that backward draws the mask again instead of keeping it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightseq_fairseq.ops._library import accumulate_dtype, shape

LEVELS = 1 << 16
"""Probabilities are multiples of 1 / LEVELS."""


def threshold(p: float) -> int:
    """Of LEVELS equally likely numbers those below this one drop an element."""
    return int(p * LEVELS + 0.5)


def scale(p: float) -> float:
    """What a kept element is multiplied by, so that the mean stays."""
    kept = LEVELS - threshold(p)
    return LEVELS / kept if kept else 0.0


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """``x`` with a share ``p`` of its elements 0 and the others scaled; the same for the same seed and shape."""
    if p == 0:
        return x
    assert seed is not None
    value = int(seed)
    folded = (value ^ (value >> 32) * 0x9E3779B1) & 0xFFFFFFFF  # torch's CPU generator heeds the lower word only
    generator = torch.Generator(x.device).manual_seed(folded)
    draws = torch.randint(LEVELS, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    return x * (draws >= threshold(p)) * scale(p)


def seed_checks(p: float, seed: Tensor | None, like: Tensor) -> tuple[tuple[bool, Callable[[], str]], ...]:
    """The conditions that ``_library.check`` asks of ``p`` and ``seed``."""
    return (
        (0 <= p <= 1, lambda: f"p must lie in [0, 1], got {p}"),
        (p == 0 or seed is not None, lambda: f"seed must be given where p is not 0, got None with p {p}"),
        (seed is None or (seed.shape == (1,) and seed.dtype == torch.int64 and seed.device == like.device),
         lambda: f"seed must be (1,) int64 on {like.device}, got {shape(seed)} {seed.dtype} on {seed.device}"),
    )


def vector_check(name: str, vector: Tensor, size: int, like: Tensor) -> tuple[bool, Callable[[], str]]:
    """The condition on a parameter of one number a column: (size,), fp32 or of the dtype of ``like``."""
    return (vector.shape == (size,) and vector.dtype in (like.dtype, accumulate_dtype(like.dtype)),
            lambda: f"{name} must be ({size},) in fp32 or {like.dtype}, got {shape(vector)} in {vector.dtype}")
