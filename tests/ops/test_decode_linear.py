"""ops.decode_linear against its formula in fp64, and in 16 bits beside plain PyTorch's own error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightseq_fairseq.ops.activation import ACTIVATION_FUNCTIONS
from lightseq_fairseq.ops.decode_linear import decode_linear

EPS = 1e-5
SIZES = [(1, 16, 8), (4, 512, 1536), (16, 48, 24), (17, 512, 512), (32, 128, 40), (33, 64, 520), (100, 512, 1536),
         (130, 256, 72), (200, 512, 2048), (4, 2048, 512), (20, 1024, 512), (40, 4096, 1024), (300, 2048, 512),
         (5, 512, 8200), (20, 512, 8200), (50, 512, 8200), (70, 512, 8200), (3, 20, 12)]


def operands(rows, inner, outer, dtype, device):
    """x, weight, bias, residual, norm_weight, norm_bias; some rows of x lie far from 0, as a residual stream does."""
    draw = torch.Generator().manual_seed(rows + inner + outer)
    x = torch.randn(rows, inner, generator=draw) + torch.linspace(-3, 3, rows)[:, None]
    tensors = (x, torch.randn(outer, inner, generator=draw) * inner**-0.5, torch.randn(outer, generator=draw),
               torch.randn(rows, outer, generator=draw), 1 + torch.randn(inner, generator=draw) / 4,
               torch.randn(inner, generator=draw) / 4)
    return [tensor.to(device, dtype) for tensor in tensors]


def formula(x, weight, bias, activation, residual, norm_weight, norm_bias):
    """In the dtype of the operands; returns out and normed."""
    if norm_weight is not None:
        x = F.layer_norm(x, x.shape[1:], norm_weight, norm_bias, EPS)
    out = ACTIVATION_FUNCTIONS[activation](F.linear(x, weight, bias))
    return out if residual is None else out + residual, x


def compare(given, dtype, activation="linear", absent=()):
    x, weight, bias, residual, norm_weight, norm_bias = given
    norm = (None, None) if "norm" in absent else (norm_weight, norm_bias)
    bias, residual = (None if name in absent else tensor for name, tensor in (("bias", bias), ("residual", residual)))
    keep = norm[0] is not None
    got = decode_linear(x, weight, bias, activation, residual, *norm, EPS, keep)
    rest = [None if tensor is None else tensor.double() for tensor in (residual, *norm)]
    exact = formula(x.double(), weight.double(), None if bias is None else bias.double(), activation, *rest)
    plain = formula(x, weight, bias, activation, residual, *norm)
    for mine, want, other in zip(got[:1 + keep], exact, plain, strict=False):
        assert mine.dtype == dtype and mine.shape == want.shape
        error, plain_error = ((y.double() - want).abs().max().item() for y in (mine, other))
        largest = want.abs().max().item()
        rounding = torch.finfo(dtype).eps / 2 * largest
        assert error <= (max(2 * plain_error, rounding) * 1.001 if dtype.itemsize == 2 else 1e-5 * max(1, largest))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_everything_together(size, dtype, device):
    compare(operands(*size, dtype, device), dtype)


@pytest.mark.parametrize("absent", [("norm",), ("bias",), ("residual",), ("bias", "residual"),
                                    ("norm", "bias", "residual")], ids=str)
@pytest.mark.parametrize("size", [(7, 512, 72), (9, 2048, 512), (150, 512, 1024)], ids=str)
def test_what_may_be_absent(size, absent, device):
    compare(operands(*size, torch.float16, device), torch.float16, absent=absent)


@pytest.mark.parametrize("activation", ACTIVATION_FUNCTIONS)
@pytest.mark.parametrize("absent", [(), ("residual",)], ids=str)
def test_activations(activation, absent, device):
    for dtype in (torch.float32, torch.bfloat16):
        compare(operands(5, 64, 72, dtype, device), dtype, activation, absent)


def test_in_a_chain(device):
    """Each reads what the one before has written, many times over: with launches that overlap an error would show."""
    x, weight, bias, _, norm_weight, norm_bias = operands(4, 512, 512, torch.float16, device)
    up = operands(4, 512, 2048, torch.float16, device)[1]
    down = operands(4, 2048, 512, torch.float16, device)[1]

    def run():
        y = x
        for _ in range(20):
            z, y = decode_linear(y, weight, bias, "linear", None, norm_weight, norm_bias, EPS, True)
            h, _ = decode_linear(z, up, None, "relu")
            y, _ = decode_linear(h, down, bias, "linear", y)
        return y

    first = run()
    assert all(torch.equal(first, run()) for _ in range(5))
    want = x.cpu().double()
    weights = [t.cpu().double() for t in (weight, bias, norm_weight, norm_bias, up, down)]
    for _ in range(20):
        want = F.layer_norm(want, (512,), weights[2], weights[3], EPS)
        want = want + F.linear(F.linear(F.linear(want, weights[0], weights[1]), weights[4]).relu(), weights[5],
                               weights[1])
    assert (first.cpu().double() - want).abs().max() <= 0.02 * want.abs().max()


def test_what_does_not_fit_is_named(device):
    x, weight, bias, residual, norm_weight, _ = operands(3, 16, 8, torch.float32, device)
    with pytest.raises(ValueError, match=r"weight must have 16 columns.*bias must be \(16,\)"):
        decode_linear(x, weight.t().contiguous(), bias[:7])
    with pytest.raises(ValueError, match="given together"):
        decode_linear(x, weight, norm_weight=norm_weight)
    with pytest.raises(ValueError, match=r"residual must be \(3, 8\)"):
        decode_linear(x, weight, residual=residual[:2])
    with pytest.raises(ValueError, match="activation must be one of"):
        decode_linear(x, weight, activation="sine")


def test_contract(device):
    given = operands(3, 32, 16, torch.float32, device)
    x, weight, bias, residual, norm_weight, norm_bias = given
    if device.type == "cpu":
        torch.library.opcheck(torch.ops.lightseq.decode_linear.default,
                              (x, weight, bias, "relu", residual, norm_weight, norm_bias, EPS, True))
