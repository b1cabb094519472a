"""InferenceLinear: y = act(x weight^T + bias) for weights that no longer change.

    x       (N, I)
    weight  (O, I)    bias (O,) or None
    y       (N, O)

On the CPU in fp32 the weight is reordered once into oneDNN's blocked layout, and bias and activation become
part of the GEMM. Measured on two Zen 4 cores, weight (512, 512), against torch's linear: 2.0 times as fast with 4 rows,
1.2 times with 128; the output projection (28672, 512) 5.2 and 1.7 times. Anything else is a plain linear; on CUDA one
operator behind it adds the bias and applies the activation.

In 8 bits (CPU, fp32 around it) each output has a scale of its own, found once, and each row of x one for the moment:

    weight = scale * integers in [-127, 127]    x = row_scale * integers in [-127, 127]
    y = act(row_scale * scale * (integer GEMM) + bias)

after Bhandare et al. 2019 (https://arxiv.org/abs/1906.00532), without their calibration.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightseq_fairseq.ops.activation import ACTIVATION_FUNCTIONS
from lightseq_fairseq.ops.bias_activation_dropout import bias_activation_dropout
from lightseq_fairseq.ops.cpu import compiled_operators

_FUSED_ACTIVATIONS = {"linear": ("none", ""), "relu": ("relu", ""), "gelu": ("gelu", "none"),
                      "gelu_accurate": ("gelu", "tanh"), "gelu_fast": ("gelu", "tanh"), "swish": ("swish", ""),
                      "tanh": ("tanh", "")}


def _prepacked_operators() -> tuple[Any, Any, Any] | None:
    """oneDNN's reorder, linear and linear-with-addend, or None where this build of torch lacks them."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        namespace = torch.ops.mkldnn
        linear = namespace._linear_pointwise
        return namespace._reorder_linear_weight.default, linear.default, linear.binary
    except AttributeError:
        return None


_PREPACKED = _prepacked_operators()


def _int8_operators() -> tuple[Any, Any] | None:
    """oneDNN's reorder and linear for 8-bit integers, or None where this build of torch lacks them."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        return torch.ops.onednn.qlinear_prepack.default, torch.ops.onednn.qlinear_pointwise.tensor
    except AttributeError:
        return None


_INT8 = _int8_operators()
_ORIGIN = 128
"""What stands for 0 in the unsigned bytes that oneDNN multiplies fastest."""


def has_int8() -> bool:
    """Whether this build of torch multiplies 8-bit integers on the CPU."""
    return _INT8 is not None


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(N, I) fp32 -> 128 + integers in [-127, 127], (N, I) uint8, and what each row is to be multiplied by, (N, 1)."""
    scale = x.abs().amax(1, keepdim=True).mul_(1 / 127).clamp_(min=torch.finfo(torch.float32).tiny)
    return (x / scale).round_().add_(_ORIGIN).to(torch.uint8), scale


class _Int8Weight:
    """(O, I) in 8 bits, one scale for each output."""

    def __init__(self, weight: Tensor) -> None:
        assert _INT8 is not None
        prepack, self._linear = _INT8
        self.scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        integers = (weight / self.scale[:, None]).round_().to(torch.int8)
        self.packed = prepack(integers, None)
        self._zeros, self._one = torch.zeros(weight.size(0), dtype=torch.int32), torch.ones(1)
        self._origin = torch.tensor([_ORIGIN], dtype=torch.int32)
        compiled = compiled_operators()
        self._quantize = quantize_rows if compiled is None else functools.partial(compiled.quantize_rows, lanes=0)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(N, I) -> (N, O), fp32."""
        bytes_, row_scale = self._quantize(x)
        y = self._linear(bytes_, self._one, self._origin, self.packed, self.scale, self._zeros, None, 1.0, 0,
                         torch.float32, "none", [], "")
        return y.mul_(row_scale) if bias is None else torch.addcmul(bias, y, row_scale)


def linear_to_logits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` (N, I) times the transpose of ``weight`` (V, I), plus ``bias`` (V,): (N, V).

    Of bf16 on a GPU in fp32: the 8 bits of bf16 tell only logits apart that differ by more than most near ties do.
    """
    if not (x.is_cuda and x.dtype == torch.bfloat16):
        return F.linear(x, weight, bias)
    logits = torch.mm(x, weight.t(), out_dtype=torch.float32)
    return logits if bias is None else logits.add_(bias)


class InferenceLinear:
    """A linear map with fixed weight (O, I), optional bias (O,) and an activation by fairseq name."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, activation: str = "linear",
                 int8: bool = False) -> None:
        """``int8``: multiply in 8 bits, for fp32 weights on the CPU where :func:`has_int8`."""
        self.activation_name = activation
        self.activation = ACTIVATION_FUNCTIONS[activation] if activation != "linear" else None
        self.bias = bias
        self.int8 = _Int8Weight(weight) if int8 else None
        self.prepacked = (not int8 and _PREPACKED is not None and weight.device.type == "cpu"
                          and weight.dtype == torch.float32 and activation in _FUSED_ACTIVATIONS)
        if self.prepacked:
            assert _PREPACKED is not None
            reorder, self._linear, self._linear_add = _PREPACKED
            self.weight = reorder(weight.contiguous(), None)
            self._attribute, self._algorithm = _FUSED_ACTIVATIONS[activation]
        elif self.int8 is None:
            self.weight = weight.contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """(N, I) -> (N, O)."""
        if self.prepacked:
            return self._linear(x, self.weight, self.bias, self._attribute, [], self._algorithm)
        if x.is_cuda and self.activation is not None and self.bias is not None:
            return bias_activation_dropout(F.linear(x, self.weight), self.bias, self.activation_name)
        y = F.linear(x, self.weight, self.bias) if self.int8 is None else self.int8(x, self.bias)
        return y if self.activation is None else self.activation(y)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """``residual`` (N, O) plus the linear map of ``x`` (N, I); only without an activation."""
        if self.prepacked:
            return self._linear_add(x, residual, self.weight, self.bias, "add")
        return residual + (F.linear(x, self.weight, self.bias) if self.int8 is None else self.int8(x, self.bias))
