"""The GEMMs of linear maps in 8 bits, their scales delayed (see ops/fp8_cast.py).

    y = x W^T + b     x, W in e4m3               one cast of x and one of W, as they are and transposed, and one of dy
    dx = dy W         dy in e5m2                 serve all three: the tensor cores of Hopper want both operands with
    dW = dy^T x                                  the summed dimension last

Results are in 16 bits, sums in the tensor cores' own precision ("fast accumulation": 14 bits beside the largest
addend), which is finer than the 2 or 3 bits of an operand. A map takes part whose three dimensions are multiples of 16.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightseq_fairseq.ops.fp8_cast import FORWARD, GRADIENT, fp8_cast, fp8_cast_many_, fp8_scale_, tile_table

HISTORY = 16
"""Updates whose largest magnitudes decide a scale."""
_MULTIPLE = 16
_X, _WEIGHT, _DY = range(3)
_FORMATS = (FORWARD, FORWARD, GRADIENT)


def multiply(a: Tensor, b: Tensor, inverse_a: Tensor, inverse_b: Tensor, dtype: torch.dtype,
             bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """(M, K) times the transpose of (N, K), both 8 bits, and the inverses of their scales -> (M, N) in ``dtype``.

    On the CPU, where it is a reference, in fp32.
    """
    if a.is_cuda:
        return torch._scaled_mm(a, b.t(), inverse_a, inverse_b, bias=bias, out_dtype=dtype, use_fast_accum=True,
                                out=out)
    y = (a.float() @ b.float().t()) * (inverse_a * inverse_b)
    y = (y if bias is None else y + bias).to(dtype)
    return y if out is None else out.copy_(y)


class WeightProduct(NamedTuple):
    """dW = dy^T x, still to be computed."""

    dy: Tensor
    """(O, N)."""
    x: Tensor
    """(I, N)."""
    inverse_dy: Tensor
    inverse_x: Tensor

    def write(self, dweight: Tensor, add: bool) -> None:
        """Into ``dweight`` (O, I), or added to it."""
        operands = self.dy, self.x, self.inverse_dy, self.inverse_x, dweight.dtype
        if add:
            dweight.add_(multiply(*operands))
        else:
            multiply(*operands, out=dweight)


class Saved(NamedTuple):
    """What the backward pass of a map needs."""

    map: int
    x: Tensor
    """(I, N)."""
    weight: Tensor
    """(I, O)."""


class DelayedScaling:
    """Linear maps whose weights lie in ``param`` (P,), 16 bits, and the scales of what they multiply.

    The maps are those that are met in the first update, which therefore must not be captured: there every tensor is
    cast with a scale of its own moment. From the second update on the weights are cast together, by :meth:`begin`.
    State in flat tensors, the rows x, weight and dy: ``amax``, ``scale``, ``inverse`` (3, M), ``history`` (3, M, 16),
    all fp32, of at most M maps. Each number of ``inverse`` has 16 bytes of its own, as cuBLAS wants to read it.
    """

    def __init__(self, param: Tensor, maps: int, kept: Collection[int] = (), group: Any = None) -> None:
        """``kept``: addresses of weights whose maps stay in 16 bits. ``group``: of the data-parallel ranks."""
        self.param, self.kept, self.group = param, kept, group
        self.maps: dict[tuple[int, int, int], int] = {}
        """Number of a map by begin in ``param``, outputs and inputs of its weight."""
        self.amax = torch.zeros(3, maps, device=param.device)
        self.history = torch.zeros(3, maps, HISTORY, device=param.device)
        self.scale, self.inverse = torch.ones_like(self.amax), torch.ones(3, maps, 4, device=param.device)[..., 0]
        limits = [torch.finfo(dtype).max for dtype in _FORMATS]
        self.limit = torch.tensor(limits, device=param.device)[:, None].repeat(1, maps)
        self._met: set[tuple[int, int]] = set()
        self._weights: dict[int, tuple[Tensor, Tensor]] = {}
        self._table: tuple[Tensor, ...] | None = None

    # An update ----------------------------------------------------------------------------------------------------

    def begin(self, first: bool) -> None:
        """Before a micro-batch: casts the weights in front of the ``first`` of an update."""
        if self._table is not None and first:
            rows, columns, matrices, tiles = self._table
            count = len(matrices)
            fp8_cast_many_(rows, columns, self.amax[_WEIGHT, :count], self.param, self.scale[_WEIGHT, :count], matrices,
                           tiles)

    def end(self) -> None:
        """After the last micro-batch of an update: the scales of the next, the same on all ranks."""
        if self.group is not None:
            dist.all_reduce(self.amax, dist.ReduceOp.MAX, group=self.group)
        fp8_scale_(self.amax.view(-1), self.history.view(-1, HISTORY), self.scale.view(-1), self.inverse.view(-1),
                   self.limit.view(-1))

    def settle(self) -> None:
        """After the first update, outside any capture: room for the weights of all maps that were met."""
        if self._table is not None or not self.maps:
            return
        matrices, shapes, size = [], [], 0
        for begin, rows, columns in self.maps:
            matrices.append((begin, rows, columns, size))
            shapes.append((rows, columns))
            size += rows * columns
        flat = [torch.empty(size, dtype=torch.uint8, device=self.param.device) for _ in range(2)]
        for i, (_, rows, columns, place) in enumerate(matrices):
            row_major, column_major = (eight[place:place + rows * columns].view(FORWARD) for eight in flat)
            self._weights[i] = row_major.view(rows, columns), column_major.view(columns, rows)
        tables = torch.tensor(matrices, dtype=torch.int64), tile_table(shapes)
        self._table = *flat, *(table.to(self.param.device) for table in tables)

    # A linear map -------------------------------------------------------------------------------------------------

    def takes(self, x: Tensor, weight: Tensor) -> bool:
        """Whether a map's products, x (N, I) and weight (O, I), are in 8 bits."""
        return (x.dtype == weight.dtype and x.element_size() == 2 and weight.data_ptr() not in self.kept
                and (weight.data_ptr() - self.param.data_ptr()) % 16 == 0
                and all(size % _MULTIPLE == 0 and size > 0 for size in (x.size(0), *weight.shape)))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Saved]:
        """x (N, I), weight (O, I) -> (N, O)."""
        number = self._number(weight)
        x_rows, x_columns = self._cast(_X, number, x)
        weight_rows, weight_columns = self._weights.get(number) or self._cast(_WEIGHT, number, weight)
        y = multiply(x_rows, weight_rows, self._inverse(_X, number), self._inverse(_WEIGHT, number), x.dtype, bias)
        return y, Saved(number, x_columns, weight_columns)

    def backward(self, saved: Saved, dy: Tensor, wants_dx: bool) -> tuple[Tensor | None, WeightProduct]:
        """dy (N, O) -> dx (N, I) if wanted, and the product for the gradient of the weight."""
        rows, columns = self._cast(_DY, saved.map, dy)
        inverse = self._inverse(_DY, saved.map)
        dx = None
        if wants_dx:
            dx = multiply(rows, saved.weight, inverse, self._inverse(_WEIGHT, saved.map), dy.dtype)
        return dx, WeightProduct(columns, saved.x, inverse, self._inverse(_X, saved.map))

    def _number(self, weight: Tensor) -> int:
        begin = (weight.data_ptr() - self.param.data_ptr()) // self.param.element_size()
        number = self.maps.setdefault((begin, *weight.shape), len(self.maps))
        assert number < self.amax.size(1)
        return number

    def _inverse(self, kind: int, number: int) -> Tensor:
        return self.inverse[kind, number:number + 1]

    def _cast(self, kind: int, number: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tensor as it is and transposed; of one met for the first time, by what it holds itself."""
        tensor = slice(number, number + 1)
        amax, scale = self.amax[kind, tensor], self.scale[kind, tensor]
        if (kind, number) not in self._met:
            self._met.add((kind, number))
            fp8_cast(x, scale, amax, _FORMATS[kind], rows=False, columns=False)
            if self.group is not None:
                dist.all_reduce(amax, dist.ReduceOp.MAX, group=self.group)
            fp8_scale_(amax, self.history[kind, tensor], scale, self.inverse[kind, tensor], self.limit[kind, tensor])
        rows, columns = fp8_cast(x, scale, amax, _FORMATS[kind])
        assert rows is not None and columns is not None
        return rows, columns

    # A checkpoint -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Between updates, on the CPU: ``maps`` (M, 3) int64, ``history`` (3, M, 16) and ``scale`` (3, M) fp32."""
        count = len(self.maps)
        maps = torch.tensor(list(self.maps), dtype=torch.int64).view(-1, 3)
        return {"maps": maps, "history": self.history[:, :count].cpu().clone(),
                "scale": self.scale[:, :count].cpu().clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Before any map was met; maps of another model are as good as none."""
        for i, (begin, rows, columns) in enumerate(state["maps"].tolist()):
            if begin + rows * columns > self.param.numel() or len(self.maps) == self.amax.size(1):
                continue
            number = self.maps[begin, rows, columns] = len(self.maps)
            self.history[:, number] = state["history"][:, i].to(self.history)
            self.scale[:, number] = state["scale"][:, i].to(self.scale)
            self._met.update((kind, number) for kind in range(3))
        self.inverse.copy_(1 / self.scale)
