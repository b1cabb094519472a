"""InferenceLinear: y = act(x weight^T + bias) for weights that no longer change.

    x       (N, I)
    weight  (O, I)    bias (O,) or None
    y       (N, O)

On the CPU in fp32 the weight is reordered once into oneDNN's blocked layout, and bias and activation become
part of the GEMM. Measured on two Zen 4 cores, weight (512, 512), against torch's linear: 2.0 times as fast with 4 rows,
1.2 times with 128; the output projection (28672, 512) 5.2 and 1.7 times. Anything else is a plain linear; on CUDA one
operator behind it adds the bias and applies the activation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightseq_fairseq.ops.activation import ACTIVATION_FUNCTIONS
from lightseq_fairseq.ops.bias_activation_dropout import bias_activation_dropout

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


class InferenceLinear:
    """A linear map with fixed weight (O, I), optional bias (O,) and an activation by fairseq name."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, activation: str = "linear") -> None:
        self.activation_name = activation
        self.activation = ACTIVATION_FUNCTIONS[activation] if activation != "linear" else None
        self.bias = bias
        self.prepacked = (_PREPACKED is not None and weight.device.type == "cpu" and weight.dtype == torch.float32
                          and activation in _FUSED_ACTIVATIONS)
        if self.prepacked:
            assert _PREPACKED is not None
            reorder, self._linear, self._linear_add = _PREPACKED
            self.weight = reorder(weight.contiguous(), None)
            self._attribute, self._algorithm = _FUSED_ACTIVATIONS[activation]
        else:
            self.weight = weight.contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """(N, I) -> (N, O)."""
        if self.prepacked:
            return self._linear(x, self.weight, self.bias, self._attribute, [], self._algorithm)
        if x.is_cuda and self.activation is not None and self.bias is not None:
            return bias_activation_dropout(F.linear(x, self.weight), self.bias, self.activation_name)
        y = F.linear(x, self.weight, self.bias)
        return y if self.activation is None else self.activation(y)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """``residual`` (N, O) plus the linear map of ``x`` (N, I); only without an activation."""
        if self.prepacked:
            return self._linear_add(x, residual, self.weight, self.bias, "add")
        return residual + F.linear(x, self.weight, self.bias)
