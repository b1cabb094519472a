"""Linear maps of training layers, and gradients of their weights beside the backward pass instead of in it.

Backward of y = x W^T + b makes dx = dy W, for which the layers below wait, and dW = dy^T x and db = the sum of dy over
rows, for which nobody waits but the optimizer. While a :class:`WeightGradients` is active, the latter are computed on a
CUDA stream of their own and written to their places in flat storage; else autograd has them as usual.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightseq_fairseq import ops
from lightseq_fairseq.layers.fp8 import DelayedScaling, WeightProduct


class WeightGradients:
    """Puts gradients of linear maps into ``grad`` (P,), whose places are those of the parameters in ``param`` (P,).

    Active from ``with gradients:`` to its end, for the forward and the backward pass of one micro-batch. What it wrote
    is there for the current stream after :meth:`join`. With ``fp8``, the maps that it takes multiply in 8 bits.
    """

    _active: ClassVar[WeightGradients | None] = None
    _AHEAD = 8
    """Products under way before the oldest of them are waited for, and their operands' memory is used again."""

    def __init__(self, param: Tensor, grad: Tensor, fp8: DelayedScaling | None = None) -> None:
        self.param, self.grad, self.fp8 = param, grad, fp8
        self.stream = torch.cuda.Stream(param.device) if param.is_cuda else None
        self.written: set[int] = set()
        """Addresses of the parameters that have a gradient of this micro-batch in ``grad``."""
        self.on_written: Callable[[Sequence[Tensor]], None] | None = None
        """Told of the parameters of each product, in the stream in which it is there."""
        self._add = False
        self._under_way: deque[tuple[Any, ...]] = deque()

    @classmethod
    def active(cls, parameters: Sequence[Tensor]) -> WeightGradients | None:
        """The active one if all ``parameters`` have their places in it."""
        active = cls._active
        return active if active is not None and all(map(active._holds, parameters)) else None

    def begin(self, first: bool) -> WeightGradients:
        """Before a micro-batch: the ``first`` of an update overwrites ``grad``, others add to it."""
        self.written.clear()
        self._add = not first
        return self

    def __enter__(self) -> WeightGradients:
        WeightGradients._active = self
        return self

    def __exit__(self, *_: object) -> None:
        WeightGradients._active = None

    def product(self, weights: Sequence[Tensor], biases: Sequence[Tensor], dy: Tensor,
                x: Tensor | WeightProduct) -> None:
        """The gradients of y = x W^T + b, of adjacent ``weights`` and ``biases``; dy (N, O), x (N, I).

        In place of ``x`` the product itself where it is in 8 bits; only the biases then need ``dy``.
        """
        add = self._adds([*weights, *biases])
        if self.stream is None:
            self._compute(weights, biases, dy, x, add)
            return
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self._compute(weights, biases, dy, x, add)
        operands = (dy, x) if isinstance(x, Tensor) else (x.dy, x.x, *((dy,) if biases else ()))
        self._under_way.append((self.stream.record_event(), *operands))
        if len(self._under_way) == 2 * self._AHEAD:
            for _ in range(self._AHEAD):
                done, *_ = self._under_way.popleft()
            current.wait_event(done)

    def reads(self, tensor: Tensor) -> bool:
        """Whether a product under way may still read ``tensor``."""
        return any(tensor.data_ptr() == operand.data_ptr() for _, *operands in self._under_way for operand in operands)

    def join(self) -> None:
        """Let the current stream wait for all products."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        self._under_way.clear()

    def place(self, parameter: Tensor) -> Tensor:
        """The part of ``grad`` that belongs to ``parameter``."""
        offset = (parameter.data_ptr() - self.param.data_ptr()) // self.param.element_size()
        return self.grad[offset:offset + parameter.numel()].view(parameter.shape)

    def _holds(self, parameter: Tensor) -> bool:
        begin = self.param.data_ptr()
        return begin <= parameter.data_ptr() < begin + self.param.numel() * self.param.element_size()

    def _adds(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the places hold something to add to; marks them as written."""
        used = [parameter for parameter in parameters if parameter.data_ptr() in self.written]
        if not self._add and 0 < len(used) < len(parameters):
            for parameter in parameters:
                if parameter.data_ptr() not in self.written:
                    self.place(parameter).zero_()
        self.written.update(parameter.data_ptr() for parameter in parameters)
        return self._add or bool(used)

    def _compute(self, weights: Sequence[Tensor], biases: Sequence[Tensor], dy: Tensor, x: Tensor | WeightProduct,
                 add: bool) -> None:
        dweight = adjacent([self.place(weight) for weight in weights])
        assert dweight is not None
        if isinstance(x, WeightProduct):
            x.write(dweight, add)
        elif add:
            dweight.addmm_(dy.t(), x)
        else:
            torch.mm(dy.t(), x, out=dweight)
        if biases:
            dbias = adjacent([self.place(bias) for bias in biases])
            assert dbias is not None
            ops.column_sum_(dbias, dy, add)
        if self.on_written is not None:
            self.on_written([*weights, *biases])


def adjacent(tensors: Sequence[Tensor]) -> Tensor | None:
    """Tensors that lie behind one another in memory as one, joined along dimension 0; None where they do not."""
    first, rows = tensors[0], 0
    end = first.data_ptr()
    for tensor in tensors:
        if (tensor.data_ptr() != end or tensor.shape[1:] != first.shape[1:] or not tensor.is_contiguous()
                or tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()):
            return None
        end += tensor.numel() * tensor.element_size()
        rows += tensor.size(0)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(N, I) -> (N, O)."""
    return _apply(x, [weight], [] if bias is None else [bias], fork=False)[0]


def forked_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """:func:`linear` of ``x``, and ``x`` for the residual around it, whose gradient the GEMM of dx then adds to."""
    return _apply(x, [weight], [] if bias is None else [bias], fork=True)


def joint_projection(x: Tensor, projections: Sequence[nn.Linear], heads: int) -> tuple[Tensor, Tensor]:
    """Several projections of ``x`` (N, K) to C each, as one GEMM -> (N, len(projections), H, D); and ``x`` as above."""
    y, x = _apply(x, [projection.weight for projection in projections],
                  [projection.bias for projection in projections], fork=True)
    return y.view(x.size(0), len(projections), heads, -1), x


def _apply(x: Tensor, weights: list[Tensor], biases: list[Tensor], fork: bool) -> tuple[Tensor, Tensor]:
    gradients = WeightGradients.active([*weights, *biases])
    if gradients is not None and adjacent(weights) is not None and (not biases or adjacent(biases) is not None):
        return _Linear.apply(gradients, fork, len(weights), x, *weights, *biases)
    weight, bias = (None if not parameters else parameters[0] if len(parameters) == 1 else torch.cat(parameters)
                    for parameters in (weights, biases))
    assert weight is not None
    return F.linear(x, weight, bias), x


class _Linear(torch.autograd.Function):
    """y and, with ``fork``, x once more, of parameters whose gradients :class:`WeightGradients` takes."""

    @staticmethod
    def forward(ctx: Any, gradients: WeightGradients, fork: bool, count: int, x: Tensor,
                *parameters: Tensor) -> tuple[Tensor, Tensor | None]:
        weights, biases = parameters[:count], parameters[count:]
        ctx.gradients, ctx.weights, ctx.biases, ctx.eight = gradients, weights, biases, None
        ctx.set_materialize_grads(False)
        weight, bias = adjacent(weights), adjacent(biases) if biases else None
        assert weight is not None
        if gradients.fp8 is not None and gradients.fp8.takes(x, weight):
            y, ctx.eight = gradients.fp8.forward(x, weight, bias)
        else:
            ctx.save_for_backward(x)
            y = F.linear(x, weight, bias)
        return y, x.view_as(x) if fork else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dresidual: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        none: tuple[None, ...] = (None,) * (len(ctx.weights) + len(ctx.biases))
        if dy is None:
            return None, None, None, dresidual, *none
        weight = adjacent(ctx.weights)
        assert weight is not None
        dy = dy.reshape(-1, weight.size(0))
        if ctx.eight is not None:
            dx, product = gradients.fp8.backward(ctx.eight, dy, ctx.needs_input_grad[3])
            gradients.product(ctx.weights, ctx.biases, dy, product)
            return None, None, None, dx if dresidual is None or dx is None else dx.add_(dresidual), *none
        (x,) = ctx.saved_tensors
        gradients.product(ctx.weights, ctx.biases, dy, x)
        if not ctx.needs_input_grad[3]:
            dx = None
        elif dresidual is None:
            dx = dy @ weight
        elif gradients.reads(dresidual):
            dx = torch.addmm(dresidual, dy, weight)
        else:  # nobody else has a use for it: autograd has summed it up for this node alone
            dx = dresidual.addmm_(dy, weight)
        return None, None, None, dx, *none
