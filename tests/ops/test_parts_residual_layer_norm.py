"""ops.parts_residual_layer_norm against its steps one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightseq_fairseq import ops
from tests import tolerances

EPS = 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 5, 40), (16, 70, 1024), (4, 600, 512), (2, 9, 1031), (5, 3, 8200),
                                   (2, 66, 768)], ids=str)
def test_as_its_steps(shape, dtype, device):
    draw = torch.Generator().manual_seed(shape[2])
    parts = torch.randn(shape, generator=draw).to(device)
    residual = torch.randn(shape[1:], generator=draw).to(device, dtype)
    bias, weight, norm_bias = torch.randn(3, shape[2], generator=draw).to(device, dtype)
    total, y = ops.parts_residual_layer_norm(parts, bias, residual, weight, norm_bias, EPS)
    want = residual.double() + bias.double() + parts.double().sum(0)
    torch.testing.assert_close(total.double(), want, **tolerances.OP[dtype])
    want = F.layer_norm(total.double(), shape[2:], weight.double(), norm_bias.double(), EPS)  # of sum as it is rounded
    torch.testing.assert_close(y.double(), want, **tolerances.OP[dtype])


def test_what_does_not_fit_is_named(device):
    residual, vector = torch.zeros(3, 8, device=device), torch.zeros(8, device=device)
    with pytest.raises(ValueError, match=r"parts must be \(S, 3, 8\) torch.float32, got \(2, 4, 8\)"):
        ops.parts_residual_layer_norm(torch.zeros(2, 4, 8, device=device), vector, residual, vector, vector, EPS)
    with pytest.raises(ValueError, match="weight and norm_bias must agree"):
        ops.parts_residual_layer_norm(torch.zeros(2, 3, 8, device=device), vector, residual.half(), vector,
                                      vector.half(), EPS)
