"""ops.layer_norm against its formula, on each path that the width of a row may take."""

from __future__ import annotations

import pytest
import torch

from lightseq_fairseq import ops
from tests.ops.comparison import check_graph, check_misaligned, compare, run, saved_bytes

SHAPES = [(1, 3), (3, 7), (2, 8), (5000, 40), (70, 264), (346, 512), (37, 520), (9, 1031), (300, 1024), (600, 1000),
          (11, 2056), (5, 4096), (3, 8192), (6, 8200), (2, 16384), (2, 16411)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5


def sample(shape):
    return [torch.randn(shape, dtype=torch.float64) * 3 + 1, torch.randn(shape[-1], dtype=torch.float64),
            torch.randn(shape[-1], dtype=torch.float64)]


def op(x, weight, bias):
    return ops.layer_norm(x, weight, bias, EPS)


def formula(x, weight, bias):
    """In fp64 the definition; in 16 bits PyTorch's own norm, which takes its statistics in fp32."""
    if x.dtype != torch.float64:
        return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, EPS)
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight + bias


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_and_gradients(shape, dtype, device):
    compare(op, formula, sample(shape), dtype, device)


@pytest.mark.parametrize("columns", [24, 1031, 8200])
def test_a_large_mean_does_not_hide_the_variance(columns, device):
    x = (torch.randn(5, columns, dtype=torch.float64) + 1000).to(device, torch.float32)
    ones = torch.ones(columns, device=device)
    torch.testing.assert_close(op(x, ones, ones * 0).double(), formula(x.double(), ones.double(), ones.double() * 0),
                               rtol=1e-3, atol=1e-3)


def test_one_column_is_its_own_mean(device):
    """xhat is 0, but for the rounding of the mean, which rstd = eps ** -0.5 enlarges."""
    inputs = [tensor.to(device, torch.float32) for tensor in sample((5, 1))]
    y, dx, dweight, dbias = run(op, inputs, [torch.ones(5, 1)])
    torch.testing.assert_close(y, inputs[2].expand(5, 1))
    torch.testing.assert_close((dx, dweight, dbias), (y * 0, dweight * 0, y[0] * 0 + 5), rtol=0, atol=1e-3)


def test_gradient_is_the_derivative():
    assert torch.autograd.gradcheck(op, [tensor.requires_grad_() for tensor in sample((4, 7))])


def test_leading_dimensions_and_strides(device):
    x, weight, bias = (tensor.to(device, torch.float32) for tensor in sample((2, 3, 5, 16)))
    y = op(x.transpose(0, 2), weight, bias)
    torch.testing.assert_close(y, op(x, weight, bias).transpose(0, 2))
    assert op(x[0, 0, 0], weight, bias).shape == (16,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_in_fp32_under_16_bit_activations(dtype, device):
    x, weight, bias = sample((100, 512))
    x = x.to(device, dtype)
    weight, bias = (tensor.to(device, torch.float32).requires_grad_() for tensor in (weight, bias))
    y = op(x, weight, bias)
    torch.testing.assert_close(y.double(), formula(x.double(), weight.double(), bias.double()),
                               rtol=torch.finfo(dtype).eps, atol=1e-5)
    y.sum().backward()
    assert y.dtype == dtype and weight.grad.dtype == bias.grad.dtype == torch.float32


@pytest.mark.parametrize("shape", [(9, 16), (3, 8200)], ids=str)
def test_misaligned_memory(shape, device):
    check_misaligned(op, sample(shape), device)


def test_replayed_in_a_graph(device):
    check_graph(op, sample((3000, 72)), None, device)


def test_what_is_saved(device):
    x, weight, bias = (tensor.to(device, torch.bfloat16).requires_grad_() for tensor in sample((64, 32)))
    mean_and_rstd = 2 * 4 * len(x)
    assert saved_bytes(lambda: op(x, weight, bias)) == x.nbytes + weight.nbytes + mean_and_rstd


def test_no_rows(device):
    x, weight, bias = (tensor.to(device, torch.float32).requires_grad_() for tensor in sample((0, 16)))
    op(x, weight, bias).sum().backward()
    assert x.grad.shape == (0, 16) and not weight.grad.any() and not bias.grad.any()


def test_everything_wrong_is_reported_together():
    with pytest.raises(ValueError) as error:
        op(torch.zeros(2, 3), torch.zeros(4), torch.zeros(3, dtype=torch.float16))
    assert "weight must be (3,) in fp32 or torch.float32, got (4,)" in str(error.value)
    assert "bias must be (3,) in fp32 or torch.float32, got (3,) in torch.float16" in str(error.value)


def test_contract_of_the_op(device):
    x, weight, bias = (tensor.to(device, torch.float32).requires_grad_() for tensor in sample((7, 16)))
    torch.library.opcheck(torch.ops.lightseq.layer_norm.default, (x, weight, bias, EPS))
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    _, mean, rstd = torch.ops.lightseq.layer_norm.default(x, weight, bias, EPS)
    torch.library.opcheck(torch.ops.lightseq.layer_norm_backward.default, (x + 1, x, weight, mean, rstd))
