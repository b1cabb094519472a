"""ops.bias_dropout_residual_layer_norm against its steps one by one, as pre-LN and as post-LN layers use it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightseq_fairseq import ops
from tests.ops.comparison import check_graph, check_misaligned, compare, run, saved_bytes
from tests.ops.dropout_masks import multiplier, new_seed

SHAPES = [(1, 3), (3, 7), (2, 8), (5000, 40), (70, 264), (346, 512), (37, 520), (9, 1031), (300, 1024), (600, 1000),
          (11, 2056), (3, 8192), (6, 8200), (2, 16384)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5
USES = {"pre-LN": lambda out: out, "post-LN": lambda out: out[1], "sum alone": lambda out: out[0]}


def sample(shape):
    x, residual = torch.randn(2, *shape, dtype=torch.float64)
    bias, weight, norm_bias = torch.randn(3, shape[1], dtype=torch.float64)
    return [x, bias, residual, weight, norm_bias]


def op(use, p=0.0, seed=None):
    return lambda x, bias, residual, weight, norm_bias: USES[use](
        ops.bias_dropout_residual_layer_norm(x, bias, residual, weight, norm_bias, EPS, p, seed))


def formula(use, mask):
    def steps(x, bias, residual, weight, norm_bias):
        total = residual + (x + bias) * mask.to(x)
        return USES[use]((total, F.layer_norm(total, weight.shape, weight, norm_bias, EPS)))
    return steps


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("use", ["pre-LN", "post-LN"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_and_gradients(shape, use, p, dtype, device):
    seed = new_seed(device)
    compare(op(use, p, seed), formula(use, multiplier(shape, p, seed)), sample(shape), dtype, device)


@pytest.mark.parametrize("use", ["pre-LN", "post-LN"])
def test_gradient_is_the_derivative(use):
    assert torch.autograd.gradcheck(op(use, 0.3, new_seed()), [tensor.requires_grad_() for tensor in sample((4, 6))])


def test_a_norm_that_nothing_uses(device):
    inputs = [tensor.to(device, torch.float32) for tensor in sample((12, 16))]
    probe = torch.randn(12, 16, device=device)
    total, dx, dbias, dresidual, dweight, dnorm_bias = run(op("sum alone"), inputs, [probe])
    torch.testing.assert_close(total, inputs[2] + inputs[0] + inputs[1])
    torch.testing.assert_close((dx, dbias, dresidual), (probe, probe.sum(0), probe))
    assert not dweight.any() and not dnorm_bias.any()


@pytest.mark.parametrize("use", ["pre-LN", "post-LN"])
def test_an_absent_gradient_of_sum_is_not_made(use, device):
    """Post-LN layers give none: backward must see None, not zeros."""
    inputs = [tensor.to(device, torch.float32).requires_grad_() for tensor in sample((6, 8))]
    outputs = op(use)(*inputs)
    node = (outputs[1] if isinstance(outputs, tuple) else outputs).grad_fn
    seen = []
    node.register_prehook(lambda grads: seen.append([grad is not None for grad in grads]))
    sum(out.sum() for out in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    assert seen[0][:2] == [use == "pre-LN", True]


def test_without_dropout_dx_is_dresidual(device):
    inputs = [tensor.to(device, torch.float32) for tensor in sample((6, 8))]
    dx, _, dresidual, _, _ = run(op("pre-LN"), inputs)[2:]
    assert dx.data_ptr() == dresidual.data_ptr()


def test_what_is_saved(device):
    inputs = [tensor.to(device, torch.bfloat16).requires_grad_() for tensor in sample((64, 32))]
    seed = new_seed(device)
    mean_and_rstd = 2 * 4 * 64
    assert (saved_bytes(lambda: op("pre-LN", 0.1, seed)(*inputs))
            == inputs[0].nbytes + inputs[3].nbytes + mean_and_rstd + seed.nbytes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_in_fp32_under_16_bit_activations(dtype, device):
    x, bias, residual, weight, norm_bias = sample((100, 512))
    x, residual = x.to(device, dtype), residual.to(device, dtype)
    parameters = [tensor.to(device, torch.float32).requires_grad_() for tensor in (bias, weight, norm_bias)]
    total, y = ops.bias_dropout_residual_layer_norm(x, parameters[0], residual, *parameters[1:], EPS)
    wide = [tensor.double() for tensor in (x, parameters[0], residual, *parameters[1:])]
    torch.testing.assert_close(total.double(), wide[2] + wide[0] + wide[1], rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(y.double(), F.layer_norm(total.double(), (512,), *wide[3:], EPS),
                               rtol=torch.finfo(dtype).eps, atol=1e-5)
    (total.sum() + y.sum()).backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in parameters)


@pytest.mark.parametrize("shape", [(9, 16), (3, 8200)], ids=str)
def test_misaligned_memory(shape, device):
    check_misaligned(op("pre-LN"), sample(shape), device)


@pytest.mark.parametrize("columns", [72, 71])
def test_replayed_in_a_graph(columns, device):
    seed = new_seed(device)
    check_graph(op("pre-LN", 0.2, seed), sample((3000, columns)), seed, device)


def test_no_rows(device):
    inputs = [tensor.to(device, torch.float32).requires_grad_() for tensor in sample((0, 16))]
    sum(out.sum() for out in op("pre-LN")(*inputs)).backward()
    assert inputs[0].grad.shape == (0, 16) and not any(inputs[i].grad.any() for i in (1, 3, 4))


def test_everything_wrong_is_reported_together():
    x = torch.zeros(2, 3, dtype=torch.bfloat16)
    with pytest.raises(ValueError) as error:
        ops.bias_dropout_residual_layer_norm(x, x[0].float(), x[:1], x[0], torch.zeros(4), EPS)
    message = str(error.value)
    for part in ("residual must have shape (2, 3), got (1, 3)", "norm_bias must be (3,)", "must agree in dtype"):
        assert part in message


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_contract_of_the_op(p, device):
    inputs = [tensor.to(device, torch.float32).requires_grad_() for tensor in sample((7, 16))]
    seed = new_seed(device) if p else None
    forward = torch.ops.lightseq.bias_dropout_residual_layer_norm.default
    torch.library.opcheck(forward, (*inputs, EPS, p, seed))
    inputs = [tensor.detach() for tensor in inputs]
    total, y, mean, rstd = forward(*inputs, EPS, p, seed)
    for dsum in (None, total + 1):
        torch.library.opcheck(torch.ops.lightseq.bias_dropout_residual_layer_norm_backward.default,
                              (dsum, y, total, inputs[3], mean, rstd, p, seed))
