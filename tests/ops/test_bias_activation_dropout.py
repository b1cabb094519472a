"""ops.bias_activation_dropout against activation, bias and mask applied one by one."""

from __future__ import annotations

import pytest
import torch

from lightseq_fairseq import ops
from lightseq_fairseq.config import ACTIVATIONS
from lightseq_fairseq.ops.activation import ACTIVATION_FUNCTIONS
from tests.ops.comparison import check_graph, check_misaligned, compare, saved_bytes
from tests.ops.dropout_masks import multiplier, new_seed

SHAPES = [(1, 1), (3, 7), (2, 8), (70, 264), (1100, 31), (346, 2048)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def sample(shape):
    return [torch.randn(shape, dtype=torch.float64) * 2, torch.randn(shape[1], dtype=torch.float64)]


def functions(activation, shape, p, device):
    """The op and its formula over (x, bias), with one mask."""
    seed = new_seed(device)
    mask = multiplier(shape, p, seed).to(device)
    return (lambda x, bias: ops.bias_activation_dropout(x, bias, activation, p, seed),
            lambda x, bias: ACTIVATION_FUNCTIONS[activation](x + bias) * mask.to(x.dtype))


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(activation, shape, p, dtype, device):
    compare(*functions(activation, shape, p, device), sample(shape), dtype, device)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(activation, p, dtype, device):
    compare(*functions(activation, (33, 40), p, device), sample((33, 40)), dtype, device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_from_zero(activation, device):
    x = torch.tensor([[-30.0, -9.0, -1e-3, 0.0, 1e-3, 9.0, 30.0, 90.0]], device=device, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    y = ops.bias_activation_dropout(x, torch.zeros(8, device=device), activation)
    want = ACTIVATION_FUNCTIONS[activation](exact)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(out.sum(), leaf)[0].double()
                                 for out, leaf in ((y, x), (want, exact))), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_is_the_derivative(activation):
    x, bias = (tensor.requires_grad_() for tensor in sample((5, 6)))
    seed = new_seed()
    assert torch.autograd.gradcheck(lambda *leaves: ops.bias_activation_dropout(*leaves, activation, 0.3, seed),
                                    (x, bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bias_in_fp32_under_16_bit_activations(dtype, device):
    x, bias = sample((100, 48))
    x, bias = x.to(device, dtype), bias.to(device, torch.float32).requires_grad_()
    y = ops.bias_activation_dropout(x, bias, "gelu")
    torch.testing.assert_close(y.double(), ACTIVATION_FUNCTIONS["gelu"](x.double() + bias.double()),
                               rtol=torch.finfo(dtype).eps, atol=1e-6)
    y.sum().backward()
    assert bias.grad.dtype == torch.float32


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_misaligned_memory(activation, device):
    check_misaligned(functions(activation, (9, 16), 0.0, device)[0], sample((9, 16)), device)


def test_replayed_in_a_graph(device):
    seed = new_seed(device)
    for activation in ("relu", "gelu"):
        check_graph(lambda x, bias: ops.bias_activation_dropout(x, bias, activation, 0.2, seed),  # noqa: B023
                    sample((300, 72)), seed, device)


@pytest.mark.parametrize("activation,tensors", [("relu", 1), ("linear", 1), ("gelu", 1), ("swish", 1)])
def test_one_activation_is_saved(activation, tensors, device):
    """Plain PyTorch keeps x + bias and the mask, for some activations y too."""
    x, bias = (tensor.to(device, torch.float32).requires_grad_() for tensor in sample((64, 32)))
    seed = new_seed(device)
    saved = saved_bytes(lambda: ops.bias_activation_dropout(x, bias, activation, 0.2, seed))
    assert saved == tensors * x.nbytes + bias.nbytes + seed.nbytes


def test_no_rows(device):
    x, bias = torch.zeros(0, 16, device=device, requires_grad=True), torch.ones(16, device=device, requires_grad=True)
    ops.bias_activation_dropout(x, bias, "relu").sum().backward()
    assert x.grad.shape == (0, 16) and not bias.grad.any()


def test_everything_wrong_is_reported_together():
    with pytest.raises(ValueError) as error:
        ops.bias_activation_dropout(torch.zeros(2, 3), torch.zeros(4), "elu")
    assert "bias must be (3,) in fp32 or torch.float32, got (4,)" in str(error.value)
    assert "activation must be one of relu, relu_squared" in str(error.value) and "got 'elu'" in str(error.value)


@pytest.mark.parametrize("activation", ["relu", "linear", "gelu"])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_contract_of_the_op(activation, p, device):
    x, bias = (tensor.to(device, torch.float32) for tensor in sample((7, 16)))
    seed = new_seed(device) if p else None
    leaves = (x.requires_grad_(), bias.requires_grad_())
    torch.library.opcheck(torch.ops.lightseq.bias_activation_dropout.default, (*leaves, activation, p, seed))
    torch.library.opcheck(torch.ops.lightseq.bias_activation_dropout_backward.default,
                          (x.detach() + 1, x.detach(), bias.detach(), activation, p, seed))
