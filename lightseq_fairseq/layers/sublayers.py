"""What travels between the sublayers of a stack, and the linear maps and norms that it goes through.

Few rows take ``decode_linear`` (ops/decode_linear.py): a sublayer leaves the sum in front of the norm and its moments,
and whoever reads it normalises. Many go through torch's GEMMs, and a sublayer ends in one operator that adds bias and
residual and normalises.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightseq_fairseq import ops
from lightseq_fairseq.layers.residual import LayerNorm
from lightseq_fairseq.ops.activation import ACTIVATION_FUNCTIONS
from lightseq_fairseq.ops.decode_linear import MAX_ELEMENTS, MAX_NORMED, Folded, decode_linear, fold, serves
from lightseq_fairseq.ops.linear import InferenceLinear

_PARTED_COLUMNS, _PARTED_ROWS, _MOST_PARTS = 1024, 256, 8
"""Columns from which, and rows up to which, a product is made in parts; twice the rows for twice the columns."""


class InferenceNorm:
    """A layer norm without the module call around it: a decoding step has dozens."""

    def __init__(self, norm: LayerNorm) -> None:
        self.shape, self.weight, self.bias, self.eps = list(norm.weight.shape), norm.weight, norm.bias, norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return torch.native_layer_norm(x, self.shape, self.weight, self.bias, self.eps)[0]


@dataclass
class Stream:
    """A sum (R, C) and the norm that is still to be applied to it, None if there is none."""

    sum: Tensor
    norm: InferenceNorm | None
    moments: Tensor | None = None
    """Of the sum, see ops/decode_linear.py, if whoever made it has left them."""
    _normed: Tensor | None = None

    @property
    def normed(self) -> Tensor:
        """(R, C): norm(sum), made here if nobody has yet."""
        if self.norm is None:
            return self.sum
        if self._normed is None:
            norm = self.norm
            self._normed = ops.layer_norm(self.sum, norm.weight, norm.bias, norm.eps)
        return self._normed


class Sublayers:
    """How the sublayers of a stack read the stream and join it; later changes of the weights are not seen."""

    def __init__(self, normalize_before: bool) -> None:
        self.normalize_before = normalize_before
        self._folded: dict[int, Folded] = {}

    def fold(self, linear: InferenceLinear, norm: InferenceNorm) -> Folded:
        """``linear`` behind ``norm``, which is always the same for one map."""
        if id(linear) not in self._folded:
            self._folded[id(linear)] = fold(linear.weight, linear.bias, norm.weight, norm.bias)
        return self._folded[id(linear)]

    def read(self, stream: Stream, linear: InferenceLinear, most: int = MAX_ELEMENTS) -> Tensor:
        """The stream, normalised, through a linear map with its activation: (R, C) -> (R, O). ``most``: see
        ops/decode_linear.py."""
        norm = stream.norm
        if norm is None or stream.moments is None or not serves(stream.sum, linear.weight):
            return self.linear(stream.normed, linear.weight, linear.bias, linear.activation_name, most)
        folded = self.fold(linear, norm)
        return decode_linear(stream.sum, folded.weight, folded.bias, linear.activation_name, sums=folded.sums,
                             moments=stream.moments, eps=norm.eps)[0]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str,
               most: int = MAX_ELEMENTS) -> Tensor:
        """(R, I) -> (R, O)."""
        if serves(x, weight, most):
            return decode_linear(x, weight, bias, activation)[0]
        if activation == "relu" and bias is not None:  # which the GEMM does on its way out
            return torch._addmm_activation(bias, x, weight.t())
        if activation != "linear" and bias is not None:
            return ops.bias_activation_dropout(F.linear(x, weight), bias, activation)
        return ACTIVATION_FUNCTIONS[activation](F.linear(x, weight, bias))

    def join(self, x: Tensor, linear: InferenceLinear, stream: Stream, norm: InferenceNorm | None) -> Stream:
        """The sum of ``linear`` of ``x`` (R, I) and the residual, to be normalised by ``norm``."""
        pre, bias = self.normalize_before, linear.bias
        assert bias is not None
        if serves(x, linear.weight):
            collect = norm is not None and stream.sum.size(1) <= MAX_NORMED
            if pre or stream.moments is None or stream.norm is None:
                residual = stream.sum if pre else stream.normed
                out, moments = decode_linear(x, linear.weight, bias, residual=residual, collect=collect)
            else:
                old = stream.norm
                out, moments = decode_linear(x, linear.weight, bias, moments=stream.moments, residual=stream.sum,
                                             gain=old.weight, shift=old.bias, eps=old.eps, collect=collect)
            return Stream(out, norm, moments if collect else None)
        if norm is not None and (parts := _parts(x, linear.weight)) is not None:
            residual = stream.sum if pre else stream.normed
            total, normed = ops.parts_residual_layer_norm(parts, bias, residual, norm.weight, norm.bias, norm.eps)
            return Stream(total, norm, None, normed)
        y, residual = F.linear(x, linear.weight), stream.sum if pre else stream.normed
        if norm is None:
            return Stream(ops.bias_dropout_residual(y, bias, residual), None)
        total, normed = ops.bias_dropout_residual_layer_norm(y, bias, residual, norm.weight, norm.bias, norm.eps)
        return Stream(total, norm, None, normed)


def _parts(x: Tensor, weight: Tensor) -> Tensor | None:
    """``x`` (R, I) times the transpose of ``weight`` (O, I), by parts of the columns: (S, R, O) fp32. None where few
    columns or many rows make enough work of it as it is (H200; 64 rows of 4096 to 1024 and the norm behind them take
    7.7 us in eight parts and 8.6 in one)."""
    (rows, inner), outer = x.shape, weight.size(0)
    count = min(_MOST_PARTS, 1 << max(2, inner // (8 * rows)).bit_length() - 1)
    if (not x.is_cuda or x.dtype not in (torch.float16, torch.bfloat16) or inner < _PARTED_COLUMNS
            or inner % (8 * count) or rows > _PARTED_ROWS * min(2, inner // _PARTED_COLUMNS)):
        return None
    x, weight = x.reshape(rows, count, -1), weight.view(outer, count, -1)
    return torch.bmm(x.transpose(0, 1), weight.permute(1, 2, 0), out_dtype=torch.float32)
