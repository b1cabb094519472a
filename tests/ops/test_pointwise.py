"""Norm, activations, embedding and the fused linear map, each against its formula in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from lightseq_fairseq import ops
from lightseq_fairseq.config import ACTIVATIONS
from lightseq_fairseq.ops.activation import ACTIVATION_FUNCTIONS

FORMULAS = {
    "relu": lambda x: max(x, 0.0),
    "relu_squared": lambda x: max(x, 0.0) ** 2,
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_accurate": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_fast": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "swish": lambda x: x / (1 + math.exp(-x)),
    "tanh": math.tanh,
    "linear": lambda x: x,
}


def test_every_activation_of_a_config_has_a_formula():
    assert set(ACTIVATIONS) == set(FORMULAS) == set(ACTIVATION_FUNCTIONS)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name, device):
    x = torch.linspace(-6, 6, 41, device=device)
    expected = torch.tensor([FORMULAS[name](value) for value in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(ACTIVATION_FUNCTIONS[name](x).double().cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 33), (4, 512)])
def test_layer_norm(shape, device):
    x = torch.randn(shape, device=device) * 3 + 1
    weight, bias = torch.randn(shape[-1], device=device), torch.randn(shape[-1], device=device)
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double() + bias.double()
    torch.testing.assert_close(ops.layer_norm(x, weight, bias, 1e-3).double(), expected, rtol=1e-5, atol=1e-5)


def test_embedding_scales_tokens_not_positions():
    weight, table = torch.randn(11, 6, requires_grad=True), torch.randn(9, 6)
    tokens, rows = torch.tensor([4, 10, 1, 4]), torch.tensor([2, 3, 4, 2])
    y = ops.embedding(tokens, weight, 2.5, 1, rows, table)
    torch.testing.assert_close(y, weight[tokens] * 2.5 + table[rows])
    y.sum().backward()
    assert weight.grad[1].eq(0).all(), "the padding row takes no gradient"
    torch.testing.assert_close(weight.grad[4], torch.full((6,), 5.0))


@pytest.mark.parametrize("rows", [1, 4, 33])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_inference_linear(rows, activation, device):
    weight, bias = torch.randn(29, 17, device=device), torch.randn(29, device=device)
    x = torch.randn(rows, 17, device=device)
    linear = ops.InferenceLinear(weight, bias, activation)
    plain = x.double() @ weight.double().T + bias.double()
    expected = ACTIVATION_FUNCTIONS[activation](plain)
    torch.testing.assert_close(linear(x).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_inference_linear_adds_to_a_residual(bias, device):
    weight, b = torch.randn(16, 24, device=device), torch.randn(16, device=device) if bias else None
    x, residual = torch.randn(5, 24, device=device), torch.randn(5, 16, device=device)
    before = residual.clone()
    expected = residual + torch.nn.functional.linear(x, weight, b)
    torch.testing.assert_close(ops.InferenceLinear(weight, b).add(x, residual), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(residual, before), "the residual itself is not written to"
