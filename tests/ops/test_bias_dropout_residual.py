"""ops.bias_dropout_residual against its three steps one by one."""

from __future__ import annotations

import pytest
import torch

from lightseq_fairseq import ops
from tests.ops.comparison import check_graph, check_misaligned, compare, run, saved_bytes
from tests.ops.dropout_masks import multiplier, new_seed

SHAPES = [(1, 1), (3, 7), (2, 8), (70, 264), (1100, 31), (346, 512)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def sample(shape):
    x, residual = torch.randn(2, *shape, dtype=torch.float64)
    return [x, torch.randn(shape[1], dtype=torch.float64), residual]


def op(p, seed):
    return lambda x, bias, residual: ops.bias_dropout_residual(x, bias, residual, p, seed)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_and_gradients(shape, p, dtype, device):
    seed = new_seed(device)
    mask = multiplier(shape, p, seed).to(device)
    compare(op(p, seed), lambda x, bias, residual: residual + (x + bias) * mask.to(x.dtype), sample(shape), dtype,
            device)


def test_gradient_is_the_derivative():
    assert torch.autograd.gradcheck(op(0.3, new_seed()), [tensor.requires_grad_() for tensor in sample((5, 6))])


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_gradients_that_are_dout_are_dout(p, device):
    """No kernel runs for them, and no memory is spent."""
    x, bias, residual = (tensor.to(device, torch.float32).requires_grad_() for tensor in sample((6, 8)))
    y = ops.bias_dropout_residual(x, bias, residual, p, new_seed(device))
    dout = torch.randn_like(y)
    dx, dresidual = torch.autograd.grad(y, (x, residual), dout)
    assert dresidual.data_ptr() == dout.data_ptr()
    assert (dx.data_ptr() == dout.data_ptr()) == (p == 0)


def test_only_the_seed_is_saved(device):
    x, bias, residual = (tensor.to(device, torch.float32).requires_grad_() for tensor in sample((64, 32)))
    seed = new_seed(device)
    assert saved_bytes(lambda: ops.bias_dropout_residual(x, bias, residual, 0.1, seed)) == bias.nbytes + seed.nbytes


def test_residual_stream_in_fp32_under_autocast(device):
    """The GEMM gives 16 bits, the parameters and the residual are fp32: the sum is fp32, as in plain PyTorch."""
    x, bias, residual = sample((33, 24))
    x, bias, residual = x.to(device, torch.bfloat16), bias.float().to(device), residual.float().to(device)
    y = ops.bias_dropout_residual(x, bias, residual)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, residual + (x + bias))


def test_misaligned_memory(device):
    check_misaligned(op(0.0, None), sample((9, 16)), device)


def test_non_contiguous_inputs_and_gradient(device):
    x, bias, residual = (tensor.to(device, torch.float32) for tensor in sample((12, 16)))
    want = run(op(0.0, None), [x, bias, residual], [torch.ones(12, 16)])
    turned = [x.t().contiguous().t(), bias, residual.t().contiguous().t()]
    for mine, other in zip(run(op(0.0, None), turned, [torch.ones(1, 1).expand(12, 16)]), want, strict=True):
        torch.testing.assert_close(mine, other)


def test_replayed_in_a_graph(device):
    seed = new_seed(device)
    check_graph(op(0.2, seed), sample((300, 72)), seed, device)


def test_no_rows(device):
    x = torch.zeros(0, 16, device=device, requires_grad=True)
    bias = torch.ones(16, device=device, requires_grad=True)
    ops.bias_dropout_residual(x, bias, x, 0.5, new_seed(device)).sum().backward()
    assert x.grad.shape == (0, 16) and not bias.grad.any()


def test_everything_wrong_is_reported_together():
    with pytest.raises(ValueError) as error:
        ops.bias_dropout_residual(torch.zeros(2, 3), torch.zeros(4), torch.zeros(1, 3))
    assert "residual must have shape (2, 3), got (1, 3)" in str(error.value)
    assert "bias must be (3,) in fp32 or torch.float32, got (4,)" in str(error.value)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_contract_of_the_op(p, device):
    x, bias, residual = (tensor.to(device, torch.float32).requires_grad_() for tensor in sample((7, 16)))
    seed = new_seed(device) if p else None
    torch.library.opcheck(torch.ops.lightseq.bias_dropout_residual.default, (x, bias, residual, p, seed))
    torch.library.opcheck(torch.ops.lightseq.bias_dropout_residual_backward.default,
                          (x.detach(), bias.detach(), p, seed))
