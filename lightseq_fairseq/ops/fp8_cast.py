"""fp8_cast: 16-bit matrices in 8 bits, as they are and transposed; fp8_scale_: the scales of their next casts.

    rows[r, c] = columns[c, r] = round(clamp(x[r, c] * scale, -limit, limit))        amax = max(amax, |x|)

    x              (R, C) fp16 or bf16
    scale, amax    (1,) fp32; amax is written
    rows, columns  (R, C) and (C, R) float8_e4m3fn (limit 448) or float8_e5m2 (limit 57 344)

Finite numbers saturate. Infinities and NaN become NaN, so that an overflow is still one in what is made of them.

Delayed scaling (Micikevicius et al. 2022, arXiv:2209.05433, section 3.2; "delayed" as NVIDIA's Transformer Engine has
it) casts with what earlier updates have shown. After an update, for each tensor with its history (H,) of amax:

    history = amax, then the history without its last, where amax is finite; as it was where not (an overflow)
    scale   = the largest power of two not above limit / (2 max(history)); as it was where the history is all 0
    inverse = 1 / scale                     amax = 0

The 2 is room for a tensor, or for the loss scale, to double from one update to the next. A power of two rounds nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightseq_fairseq.ops import _extension
from lightseq_fairseq.ops._library import check, register, shape

FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
"""Formats of activations and weights, and of gradients."""
TILE = 64, 128
"""Rows and columns that a thread block casts; of those of a :func:`tile_table` too."""
_ROOM = 2.0
_EXTREME = 2.0**60
"""Of scales, so that the product of two inverses is neither infinite nor 0 in fp32."""


def tile_table(shapes: list[tuple[int, int]]) -> Tensor:
    """(T, 3) int64, rows (number of the matrix, first row, first column) of the tiles of matrices of these shapes."""
    height, width = TILE
    tiles = [(i, row, column) for i, (rows, columns) in enumerate(shapes)
             for row in range(0, rows, height) for column in range(0, columns, width)]
    return torch.tensor(tiles, dtype=torch.int64).view(-1, 3)


def _bytes(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    scaled = (x.float() * scale).clamp(-limit, limit)
    return torch.where(x.isfinite(), scaled, torch.nan).to(dtype).view(torch.uint8)


def _raise(amax: Tensor, x: Tensor) -> None:
    if x.numel():
        amax.copy_(torch.maximum(amax, x.abs().max().float()))


def _cast(x: Tensor, scale: Tensor, amax: Tensor, e5m2: bool, rows: bool, columns: bool) -> tuple[Tensor, Tensor]:
    eight = _bytes(x, scale, GRADIENT if e5m2 else FORWARD)
    _raise(amax, x)
    nothing = eight.new_empty(0)
    return (eight if rows else nothing), (eight.t().clone(memory_format=torch.contiguous_format) if columns
                                          else nothing.clone())


def _cast_fake(x: Tensor, scale: Tensor, amax: Tensor, e5m2: bool, rows: bool,
               columns: bool) -> tuple[Tensor, Tensor]:
    return (x.new_empty(x.shape if rows else (0,), dtype=torch.uint8),
            x.new_empty((x.size(1), x.size(0)) if columns else (0,), dtype=torch.uint8))


def _cast_many(rows: Tensor, columns: Tensor, amax: Tensor, param: Tensor, scale: Tensor, matrices: Tensor,
               tiles: Tensor) -> None:
    for i, (begin, height, width, place) in enumerate(matrices.tolist()):
        x = param[begin:begin + height * width].view(height, width)
        eight = _bytes(x, scale[i], FORWARD)
        rows[place:place + x.numel()] = eight.flatten()
        columns[place:place + x.numel()] = eight.t().flatten()
        _raise(amax[i], x)


def _scale(amax: Tensor, history: Tensor, scale: Tensor, inverse: Tensor, limit: Tensor) -> None:
    shifted = torch.cat((amax[:, None], history[:, :-1]), 1)
    history.copy_(torch.where(amax.isfinite()[:, None], shifted, history))
    largest = history.amax(1)
    wanted = (limit / (_ROOM * largest)).clamp(1 / _EXTREME, _EXTREME)
    power = torch.ldexp(torch.ones_like(wanted), torch.frexp(wanted).exponent - 1)
    scale.copy_(torch.where(largest > 0, power, scale))
    inverse.copy_(1 / scale)
    amax.zero_()


_fp8_cast = register("fp8_cast(Tensor x, Tensor scale, Tensor(a!) amax, bool e5m2, bool rows, bool columns) ->"
                     " (Tensor, Tensor)", _cast, _cast_fake)
_fp8_cast_many = register("fp8_cast_many_(Tensor(a!) rows, Tensor(b!) columns, Tensor(c!) amax, Tensor param,"
                          " Tensor scale, Tensor matrices, Tensor tiles) -> ()", _cast_many, None)
_fp8_scale = register("fp8_scale_(Tensor(a!) amax, Tensor(b!) history, Tensor(c!) scale, Tensor(d!) inverse,"
                      " Tensor limit) -> ()", _scale, None)


@torch.no_grad()
def fp8_cast(x: Tensor, scale: Tensor, amax: Tensor, dtype: torch.dtype, rows: bool = True,
             columns: bool = True) -> tuple[Tensor | None, Tensor | None]:
    """``x`` (R, C) times ``scale`` in ``dtype``, (R, C) and transposed (C, R), each None unless asked for."""
    check("fp8_cast",
          (x.dim() == 2, lambda: f"x must have shape (R, C), got {shape(x)}"),
          (x.dtype in (torch.float16, torch.bfloat16), lambda: f"x must be float16 or bfloat16, got {x.dtype}"),
          (dtype in (FORWARD, GRADIENT), lambda: f"dtype must be {FORWARD} or {GRADIENT}, got {dtype}"),
          *((tensor.numel() == 1 and tensor.dtype == torch.float32,
             lambda n=name, t=tensor: f"{n} must be one float32, got {shape(t)} {t.dtype}")
            for name, tensor in dict(scale=scale, amax=amax).items()))
    if x.is_cuda:
        _extension.loaded()
    eight, transposed = _fp8_cast(x.contiguous(), scale, amax, dtype == GRADIENT, rows, columns)
    return eight.view(dtype) if rows else None, transposed.view(dtype) if columns else None


@torch.no_grad()
def fp8_cast_many_(rows: Tensor, columns: Tensor, amax: Tensor, param: Tensor, scale: Tensor, matrices: Tensor,
                   tiles: Tensor) -> None:
    """:func:`fp8_cast` to float8_e4m3fn of many matrices that lie in ``param`` (P,), 16 bits.

    ``rows`` and ``columns`` (Q,) uint8 receive them, ``amax`` (M,) is raised, ``scale`` (M,). ``matrices`` (M, 4)
    int64: begin in param, R, C, begin in rows and columns; R, C and the latter must be multiples of 16, the former of
    8, and all must lie inside the tensors, which is not checked: it is on the device. ``tiles`` see :func:`tile_table`.
    """
    check("fp8_cast_many_",
          (param.dim() == 1 and param.dtype in (torch.float16, torch.bfloat16),
           lambda: f"param must be (P,) float16 or bfloat16, got {shape(param)} {param.dtype}"),
          (rows.dim() == 1 and rows.shape == columns.shape and rows.dtype == columns.dtype == torch.uint8,
           lambda: f"rows and columns must be (Q,) uint8, got {shape(rows)} {rows.dtype} and {shape(columns)} "
                   f"{columns.dtype}"),
          (matrices.dim() == 2 and matrices.size(-1) == 4 and matrices.dtype == torch.int64,
           lambda: f"matrices must be (M, 4) int64, got {shape(matrices)} {matrices.dtype}"),
          (tiles.dim() == 2 and tiles.size(-1) == 3 and tiles.dtype == torch.int64,
           lambda: f"tiles must be (T, 3) int64, got {shape(tiles)} {tiles.dtype}"),
          *((tensor.shape == matrices.shape[:1] and tensor.dtype == torch.float32,
             lambda n=name, t=tensor: f"{n} must be {shape(matrices)[:1]} float32, got {shape(t)} {t.dtype}")
            for name, tensor in dict(scale=scale, amax=amax).items()))
    if param.is_cuda:
        _extension.loaded()
    _fp8_cast_many(rows, columns, amax, param, scale, matrices, tiles)


@torch.no_grad()
def fp8_scale_(amax: Tensor, history: Tensor, scale: Tensor, inverse: Tensor, limit: Tensor) -> None:
    """After an update: ``amax`` (S,) into ``history`` (S, H), and the next ``scale`` and ``inverse`` (S,), all fp32.

    ``limit`` (S,) is the largest number of each tensor's format. ``inverse`` alone may be strided.
    """
    flat = dict(amax=amax, scale=scale, inverse=inverse, limit=limit)
    check("fp8_scale_",
          (history.dim() == 2 and history.size(1) > 0, lambda: f"history must be (S, H), got {shape(history)}"),
          *((tensor.dtype == torch.float32, lambda n=name, t=tensor: f"{n} must be float32, got {t.dtype}")
            for name, tensor in dict(flat, history=history).items()),
          *((tensor.shape == history.shape[:1],
             lambda n=name, t=tensor: f"{n} must have shape {shape(history)[:1]}, got {shape(t)}")
            for name, tensor in flat.items()))
    if amax.is_cuda:
        _extension.loaded()
    _fp8_scale(amax, history, scale, inverse, limit)
