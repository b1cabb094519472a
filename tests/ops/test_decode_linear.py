"""ops.decode_linear against its formula in fp64, and in 16 bits beside plain PyTorch's own error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightseq_fairseq.ops.activation import ACTIVATION_FUNCTIONS
from lightseq_fairseq.ops.decode_linear import decode_linear, fold, moments_of

EPS = 1e-5
SIZES = [(1, 16, 16), (4, 512, 1536), (16, 48, 32), (17, 512, 512), (32, 128, 48), (33, 64, 528), (100, 512, 1536),
         (130, 256, 80), (200, 512, 2048), (4, 2048, 512), (20, 1024, 512), (40, 4096, 1024), (9, 4096, 1024),
         (128, 2048, 512), (64, 2048, 512), (64, 2048, 2048), (5, 512, 8208), (90, 1024, 4096)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Given:
    """Operands of one call. Some rows lie far from 0, as a residual stream does, and gains from 1."""

    def __init__(self, rows, inner, outer, dtype, device):
        draw = torch.Generator().manual_seed(rows + inner + outer)
        away = torch.linspace(-3, 3, rows)[:, None]

        def normal(*size):
            return torch.randn(*size, generator=draw)

        tensors = dict(x=normal(rows, inner) + away, weight=normal(outer, inner) * inner**-0.5, bias=normal(outer),
                       residual=2 * normal(rows, outer) + away,
                       gain_in=1 + normal(inner) / 4, shift_in=normal(inner) / 4,
                       gain_out=1 + normal(outer) / 4, shift_out=normal(outer) / 4)
        for name, tensor in tensors.items():
            setattr(self, name, tensor.to(device, dtype))

    def formula(self, kind, activation="linear", absent=(), norm=None):
        """In plain PyTorch, in the dtype ``kind``."""
        x, weight, bias, residual, gain_in, shift_in, gain_out, shift_out = (t.to(kind) for t in vars(self).values())
        if norm == "x":
            x = F.layer_norm(x, x.shape[1:], gain_in, shift_in, EPS)
        out = ACTIVATION_FUNCTIONS[activation](F.linear(x, weight, None if "bias" in absent else bias))
        if "residual" in absent:
            return out
        return out + (F.layer_norm(residual, residual.shape[1:], gain_out, shift_out, EPS) if norm == "residual"
                      else residual)

    def compute(self, activation="linear", absent=(), norm=None, collect=False):
        weight, bias, rest = self.weight, None if "bias" in absent else self.bias, {}
        if norm == "x":
            weight, bias, rest["sums"] = fold(weight, bias, self.gain_in, self.shift_in)
            rest["moments"] = moments_of(self.x)
        elif norm == "residual":
            rest = dict(gain=self.gain_out, shift=self.shift_out, moments=moments_of(self.residual))
        if "residual" not in absent:
            rest["residual"] = self.residual
        return decode_linear(self.x, weight, bias, activation, eps=EPS, collect=collect, **rest)


def compare(given, dtype, **how):
    out, moments = given.compute(collect=True, **how)
    exact, plain = given.formula(torch.float64, **how), given.formula(dtype, **how)
    assert out.dtype == dtype and out.shape == exact.shape
    error, plain_error = ((y.double() - exact).abs().max().item() for y in (out, plain))
    largest = exact.abs().max().item()
    rounding = torch.finfo(dtype).eps / 2 * largest
    assert error <= (max(2 * plain_error, rounding) * 1.001 if dtype.itemsize == 2 else 1e-5 * max(1, largest))
    torch.testing.assert_close(moments, moments_of(out), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", [None, "x", "residual"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_together(size, dtype, norm, device):
    if max(size[1:]) > 2048 and norm is not None:
        return
    compare(Given(*size, dtype, device), dtype, norm=norm)


@pytest.mark.parametrize("absent", [("bias",), ("residual",), ("bias", "residual")], ids=str)
@pytest.mark.parametrize("size", [(7, 512, 80), (9, 2048, 512), (90, 512, 1024)], ids=str)
def test_what_may_be_absent(size, absent, device):
    given = Given(*size, torch.float16, device)
    compare(given, torch.float16, absent=absent)
    compare(given, torch.float16, absent=absent, norm="x")


def test_outputs_not_a_multiple_of_16(device):
    given = Given(5, 64, 40, torch.float16, device)
    out, moments = given.compute()
    torch.testing.assert_close(out, given.formula(torch.float16), rtol=2e-3, atol=2e-3)
    assert moments.numel() == 0


@pytest.mark.parametrize("activation", ACTIVATION_FUNCTIONS)
@pytest.mark.parametrize("absent", [(), ("residual",)], ids=str)
def test_activations(activation, absent, device):
    for dtype in (torch.float32, torch.bfloat16):
        compare(Given(5, 64, 80, dtype, device), dtype, activation=activation, absent=absent)


@pytest.mark.parametrize("rows", [4, 20, 70])
def test_in_a_chain(rows, device):
    """Each reads what the one before has written, many times over: with launches that overlap an error would show."""
    one, up, down = (Given(rows, *size, torch.float16, device) for size in ((512, 512), (512, 2048), (2048, 512)))
    folded = fold(up.weight, up.bias, up.gain_in, up.shift_in)

    def run():
        y, moments = decode_linear(one.x, one.weight, one.bias, collect=True)
        for _ in range(20):
            h, _ = decode_linear(y, folded.weight, folded.bias, "relu", sums=folded.sums, moments=moments)
            y, moments = decode_linear(h, down.weight, down.bias, moments=moments, residual=y, gain=one.gain_out,
                                       shift=one.shift_out, collect=True)
        return y

    first = run()
    assert all(torch.equal(first, run()) for _ in range(5))
    y = F.linear(one.x.double(), one.weight.double(), one.bias.double())
    for _ in range(20):
        z = F.layer_norm(y, (512,), up.gain_in.double(), up.shift_in.double(), EPS)
        h = F.linear(z, up.weight.double(), up.bias.double()).relu()
        y = F.linear(h, down.weight.double(), down.bias.double()) + F.layer_norm(
            y, (512,), one.gain_out.double(), one.shift_out.double(), EPS)
    assert (first.double() - y).abs().max() <= 0.02 * y.abs().max()


def test_a_mean_far_from_zero(device):
    """What the mean adds to the product is taken away again, to the last bit of the weights."""
    given = Given(6, 512, 64, torch.float16, device)
    given.x = given.x + 30
    compare(given, torch.float16, norm="x", absent=("residual",))


def test_what_does_not_fit_is_named(device):
    given = Given(3, 16, 32, torch.float32, device)
    with pytest.raises(ValueError, match=r"weight must be \(16, 16\).*bias must be \(16,\)"):
        decode_linear(given.x, given.weight[:16, :15], given.bias)
    with pytest.raises(ValueError, match="given together, and with a residual"):
        decode_linear(given.x, given.weight, gain=given.gain_out, shift=given.shift_out,
                      moments=moments_of(given.residual))
    with pytest.raises(ValueError, match="moments must be given with either"):
        decode_linear(given.x, given.weight, moments=moments_of(given.x))
    with pytest.raises(ValueError, match=r"residual must be \(3, 32\)"):
        decode_linear(given.x, given.weight, residual=given.residual[:2])
    with pytest.raises(ValueError, match="activation must be one of"):
        decode_linear(given.x, given.weight, activation="sine")


def test_contract(device):
    if device.type == "cpu":
        given = Given(3, 32, 16, torch.float32, device)
        torch.library.opcheck(torch.ops.lightseq.decode_linear.default, (
            given.x, given.weight, given.bias, "relu", None, moments_of(given.residual), given.residual, given.gain_out,
            given.shift_out, EPS, True))
