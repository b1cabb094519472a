"""The sum over rows, written or added to."""

from __future__ import annotations

import pytest
import torch

from lightseq_fairseq import ops

SHAPES = [(1, 1), (7, 24), (333, 33), (1000, 1544)]


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(shape, dtype, add, device):
    torch.manual_seed(1)
    x = torch.randn(shape, device=device).to(dtype) + 0.5
    out = torch.randn(shape[1], device=device).to(dtype)
    expected = x.double().sum(0) + (out.double() if add else 0)
    ops.column_sum_(out, x, add)
    rounding = torch.finfo(dtype).eps / 2  # of the result; 1e-6 is for the sum of 1000 in fp32
    torch.testing.assert_close(out.double(), expected, rtol=1.01 * rounding + 1e-6, atol=1e-4)


def test_contract_of_the_op(device):
    torch.library.opcheck(torch.ops.lightseq.column_sum_.default,
                          (torch.randn(16, device=device), torch.randn(5, 16, device=device), True))


def test_everything_wrong_is_reported_together():
    with pytest.raises(ValueError, match=r"out must have shape \(4,\), got \(3,\); out must be torch.float32"):
        ops.column_sum_(torch.zeros(3, dtype=torch.float16), torch.zeros(2, 4))
