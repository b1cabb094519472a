"""decode_linear: out = act(norm(x) weight^T + bias) + residual, for the few rows of a decoding step.

    x         (R, I)       weight (O, I)    bias (O,) or None
    residual  (R, O)       or None; the norm of it is added where ``gain`` (O,) and ``shift`` (O,) are given
    out       (R, O)       computed in fp32
    moments   (R, C / 16, 2) fp32: mean, and sum of squared deviations from it, of each 16 columns of a tensor (R, C);
                           those of ``out``, as rounded, come back if asked for

A norm (of x where there are ``sums``, else of the residual) takes mean and deviation from ``moments`` that the tensor's
maker has left. That of x has its gain in the weights (:func:`fold`) and costs little: with W = weight * gain, rounded,

    norm(x) weight^T = rstd * (x W^T - mean * sums) + weight shift,    sums = W 1, (O,) fp32

where mean * sums takes away just what the mean has added, however W was rounded. A layer of a decoder is eight
launches this way: six of these, two of attention. Weights do not change while others run, so a launch fetches its own
before the one ahead of it has ended. The kernel takes 16-bit types; for what else it does not, :func:`serves` says no.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightseq_fairseq.ops import _extension
from lightseq_fairseq.ops._library import accumulate_dtype, check, register, shape
from lightseq_fairseq.ops.activation import ACTIVATION_FUNCTIONS

MOMENT_COLUMNS = 16
"""Columns that share their moments."""
MAX_ROWS = 64
"""Rows up to which the kernel is faster than torch's GEMM and an operator beside it (H200, 512 columns),"""
MAX_ELEMENTS = 32768
"""and elements of its narrower side: 42 rows of 768, 32 of 1024."""
MAX_ELEMENTS_AHEAD = 65536
"""The same in front of an operator that has much to fetch meanwhile, which it can only beside a kernel that lets it:
of 64 rows of 1024 the product takes 4.7 us instead of 4.1, it and cross-attention over 19 200 tokens 0.9 us less."""
MAX_OUTER = 8192
"""Outputs up to which it is."""
MAX_NORMED = 2048
"""Columns of what it normalises."""


class Folded(NamedTuple):
    """A linear map behind a norm, with the norm's gain and shift in it."""

    weight: Tensor
    """(O, I): weight * gain, rounded."""
    bias: Tensor
    """(O,): bias + weight shift."""
    sums: Tensor
    """(O,) fp32: of each row of ``weight``."""


def fold(weight: Tensor, bias: Tensor | None, gain: Tensor, shift: Tensor) -> Folded:
    """``weight`` (O, I) and ``bias`` (O,) behind a norm of ``gain`` (I,) and ``shift`` (I,)."""
    wide = accumulate_dtype(weight.dtype)
    folded = (weight.to(wide) * gain.to(wide)).to(weight.dtype)
    moved = weight.to(wide) @ shift.to(wide)
    moved = moved if bias is None else moved + bias.to(wide)
    return Folded(folded, moved.to(weight.dtype), folded.to(wide).sum(1).to(torch.float32))


def moments_of(x: Tensor) -> Tensor:
    """(R, C) -> moments (R, C / 16, 2)."""
    tiles = x.to(accumulate_dtype(x.dtype)).view(x.size(0), -1, MOMENT_COLUMNS)
    mean = tiles.mean(2, keepdim=True)
    return torch.cat((mean, (tiles - mean).square().sum(2, keepdim=True)), 2).to(torch.float32)


def _statistics(moments: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation of each row, (R, 1)."""
    mean = moments[..., 0].mean(1, keepdim=True)
    squares = moments[..., 1] + MOMENT_COLUMNS * (moments[..., 0] - mean).square()
    return mean, (squares.mean(1, keepdim=True) / MOMENT_COLUMNS + eps).rsqrt()


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, sums: Tensor | None,
             moments: Tensor | None, residual: Tensor | None, gain: Tensor | None, shift: Tensor | None, eps: float,
             collect: bool) -> tuple[Tensor, Tensor]:
    """(R, I), (O, I) -> out (R, O), its moments (R, O / 16, 2) or nothing."""
    wide = accumulate_dtype(x.dtype)
    out = F.linear(x.to(wide), weight.to(wide))
    added = None if residual is None else residual.to(wide)
    if moments is not None:
        mean, rstd = _statistics(moments, eps)
        if sums is not None:
            out = rstd * (out - mean * sums)
        elif added is not None and gain is not None and shift is not None:
            added = (added - mean) * rstd * gain.to(wide) + shift.to(wide)
    out = ACTIVATION_FUNCTIONS[activation](out if bias is None else out + bias.to(wide))
    out = out if added is None else out + added
    out = out.to(x.dtype)
    return out, moments_of(out) if collect else x.new_empty(0, dtype=torch.float32)


_decode_linear = register(
    "decode_linear(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? sums, Tensor? moments,"
    " Tensor? residual, Tensor? gain, Tensor? shift, float eps, bool collect) -> (Tensor, Tensor)", _forward,
    lambda x, weight, bias, activation, sums, moments, residual, gain, shift, eps, collect: (
        x.new_empty(x.size(0), weight.size(0)),
        x.new_empty((x.size(0), weight.size(0) // MOMENT_COLUMNS, 2) if collect else (0,), dtype=torch.float32)))


def decode_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "linear", *,
                  sums: Tensor | None = None, moments: Tensor | None = None, residual: Tensor | None = None,
                  gain: Tensor | None = None, shift: Tensor | None = None, eps: float = 1e-5,
                  collect: bool = False) -> tuple[Tensor, Tensor]:
    """``out`` (R, O), and with ``collect`` its moments (R, O / 16, 2); see the head of this file.

    Raises ValueError for shapes, dtypes or names that do not fit.
    """
    rows, inner = x.shape
    outer = weight.size(0)
    normed = inner if sums is not None else outer
    kind = x.dtype
    tables = {"weight": (weight, (outer, inner), kind), "bias": (bias, (outer,), kind),
              "sums": (sums, (outer,), torch.float32), "residual": (residual, (rows, outer), kind),
              "moments": (moments, (rows, normed // MOMENT_COLUMNS, 2), torch.float32),
              "gain": (gain, (outer,), kind), "shift": (shift, (outer,), kind)}
    check("decode_linear",
          *((t is None or (t.shape == size and t.dtype == dtype and t.is_contiguous()),
             lambda n=name, t=t, s=size, d=dtype: f"{n} must be {s} {d}, contiguous, got {shape(t)} {t.dtype}")
            for name, (t, size, dtype) in tables.items()),
          ((gain is None) == (shift is None) and (gain is None or residual is not None),
           lambda: "gain and shift must be given together, and with a residual"),
          ((moments is not None) == ((sums is not None) != (gain is not None)),
           lambda: "moments must be given with either sums or gain, and with nothing else"),
          (moments is None or (normed % MOMENT_COLUMNS == 0 and normed <= MAX_NORMED),
           lambda: f"what is normalised must have a multiple of {MOMENT_COLUMNS} columns up to {MAX_NORMED}, "
                   f"got {normed}"),
          (not collect or outer % MOMENT_COLUMNS == 0,
           lambda: f"weight must have a multiple of {MOMENT_COLUMNS} rows for moments of out, got {outer}"),
          (activation in ACTIVATION_FUNCTIONS,
           lambda: f"activation must be one of {', '.join(ACTIVATION_FUNCTIONS)}, got {activation!r}"))
    arguments = (x.contiguous(), weight, bias, activation, sums, moments, residual, gain, shift, eps, collect)
    if x.is_cuda and not (_extension.loaded() and _compiled(x, weight)):
        return _forward(*arguments)
    return _decode_linear(*arguments)


def serves(x: Tensor, weight: Tensor, most: int = MAX_ELEMENTS) -> bool:
    """Whether :func:`decode_linear` is the way to go for these, and not torch's GEMM, with ``most`` elements of the
    narrower side."""
    outer, inner = weight.shape
    return (x.size(0) <= MAX_ROWS and x.size(0) * min(outer, inner) <= most and outer <= MAX_OUTER
            and inner % MOMENT_COLUMNS == 0 and outer % MOMENT_COLUMNS == 0
            and (not x.is_cuda or (_extension.loaded() and _compiled(x, weight))))


def _compiled(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes them: 512 columns in eight parts always fit."""
    outer, inner = weight.shape
    return (x.dtype in (torch.float16, torch.bfloat16) and outer % 8 == 0 and inner % 16 == 0
            and any(inner % (16 * parts) == 0 and inner // parts <= 512 for parts in (1, 2, 4, 8))
            and torch.cuda.get_device_capability(x.device) >= (9, 0))
