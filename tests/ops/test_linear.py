"""Linear maps of inference: in 8 bits close to what they stand for, row by row; logits as exact as they must be."""

from __future__ import annotations

import pytest
import torch

from lightseq_fairseq.ops.activation import ACTIVATION_FUNCTIONS
from lightseq_fairseq.ops.cpu import compiled_operators
from lightseq_fairseq.ops.linear import InferenceLinear, has_int8, linear_to_logits, quantize_rows
from tests import tolerances

in_8_bits = pytest.mark.skipif(not has_int8(), reason="this build of torch lacks oneDNN's 8-bit operators")
SIZES = [(1, 16, 16), (3, 37, 53), (5, 512, 129), (67, 96, 64)]


def operands(rows: int, inner: int, outer: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(rows)
    scale = torch.logspace(-3, 2, rows)[:, None]  # rows of very different size
    return torch.randn(rows, inner) * scale, torch.randn(outer, inner) * 0.1, torch.randn(outer)


@in_8_bits
@pytest.mark.parametrize("rows, inner, outer", SIZES)
@pytest.mark.parametrize("activation", ["linear", "relu", "gelu"])
def test_each_row_is_within_the_error_of_8_bits(rows, inner, outer, activation):
    """Half a step of x times all of |w|, and the other way round: the most that rounding can do."""
    x, weight, bias = operands(rows, inner, outer)
    got = InferenceLinear(weight, bias, activation, int8=True)(x)
    exact = x.double() @ weight.double().t() + bias
    want = ACTIVATION_FUNCTIONS[activation](exact)
    x_step, w_step = x.abs().amax(1, keepdim=True).double() / 127, weight.abs().amax(1).double() / 127
    most = x_step / 2 * weight.abs().sum(1) + w_step / 2 * x.abs().sum(1, keepdim=True) + x_step * w_step * inner / 4
    assert got.dtype == torch.float32
    assert ((got - want).abs() <= 1.2 * most + 1e-5).all()
    if inner > 100 and activation == "linear":  # and on the whole far less
        assert (got - exact).norm() < 0.02 * (exact - bias).norm()


@in_8_bits
def test_rows_do_not_know_one_another():
    x, weight, bias = operands(7, 64, 48)
    linear = InferenceLinear(weight, bias, int8=True)
    together = linear(x)
    for row in range(7):
        torch.testing.assert_close(linear(x[row:row + 1])[0], together[row], rtol=0, atol=0)


@in_8_bits
@pytest.mark.parametrize("rows, inner", [(1, 1), (3, 7), (5, 64), (2, 1025)])
def test_compiled_and_plain_quantization_agree(rows, inner):
    compiled = compiled_operators()
    if compiled is None:
        pytest.skip("there is no compiler, hence no compiled operator")
    x = operands(rows, inner, 1)[0]
    x[-1] = 0
    for lanes in (0, 4, 8, 16):
        (mine, scale), (want, wanted) = compiled.quantize_rows(x, lanes), quantize_rows(x)
        torch.testing.assert_close(scale, wanted)
        assert mine.dtype == torch.uint8 and (mine.int() - want.int()).abs().max() <= 1  # halves may go either way
        assert (mine != want).float().mean() < 0.01 and (mine[-1] == 128).all()


@in_8_bits
def test_zeros_stay_zeros():
    x, weight, bias = operands(4, 32, 24)
    x[2] = 0
    weight[5] = 0
    got = InferenceLinear(weight, bias, int8=True)(x)
    torch.testing.assert_close(got[2], bias)
    torch.testing.assert_close(got[:, 5], bias[5].expand(4))


@in_8_bits
def test_a_residual_is_added_and_a_bias_may_be_missing():
    x, weight, bias = operands(6, 40, 72)
    residual = torch.randn(6, 72)
    for own in (bias, None):
        linear = InferenceLinear(weight, own, int8=True)
        torch.testing.assert_close(linear.add(x, residual), residual + linear(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
def test_logits(dtype, biased, device):
    x, weight, bias = (tensor.to(device, dtype) for tensor in operands(5, 96, 193))
    want = x.double() @ weight.double().t() + (bias.double() if biased else 0)
    got = linear_to_logits(x, weight, bias if biased else None)
    in_fp32 = dtype == torch.bfloat16 and device.type == "cuda"
    assert got.dtype == (torch.float32 if in_fp32 else dtype)
    largest = want.abs().amax(1, keepdim=True)
    bound = tolerances.OP[got.dtype]["rtol"]
    assert ((got.double() - want).abs() <= bound * largest + bound).all()
