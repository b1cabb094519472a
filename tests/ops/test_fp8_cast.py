"""Casts to 8 bits are torch's own of the scaled tensor, both ways round, and the next scale follows what was seen."""

from __future__ import annotations

import math

import pytest
import torch

from lightseq_fairseq.ops.fp8_cast import FORWARD, GRADIENT, fp8_cast, fp8_cast_many_, fp8_scale_, tile_table

SHAPES = [(1, 1), (16, 16), (63, 130), (64, 128), (80, 144), (129, 7), (208, 1040), (1000, 48)]
HALVES = [torch.float16, torch.bfloat16]
FORMATS = [FORWARD, GRADIENT]


def one(value, device):
    return torch.tensor([value], dtype=torch.float32, device=device)


def spread(shape, dtype, device):
    """Numbers of many magnitudes, so that some fall below the smallest of 8 bits and some above the largest."""
    return (torch.randn(shape, device=device) * torch.exp2(torch.randint(-18, 11, shape, device=device))).to(dtype)


def exact(x, scale, dtype):
    """In fp64: the nearest number of the format, the even one of two as near, saturated."""
    limit, bits, least = {FORWARD: (448.0, 3, -6), GRADIENT: (57344.0, 2, -14)}[dtype]
    scaled = (x.double() * scale).clamp(-limit, limit)
    exponent = (torch.frexp(scaled).exponent - 1).clamp(min=least)
    step = torch.ldexp(torch.ones_like(scaled), exponent - bits)
    return (scaled / step).round() * step


@pytest.mark.parametrize("scale", [1.0, 0.125, 64.0])
@pytest.mark.parametrize("to", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(shape, dtype, to, scale, device):
    x, amax = spread(shape, dtype, device), one(0, device)
    rows, columns = fp8_cast(x, one(scale, device), amax, to)
    assert rows.dtype == columns.dtype == to and rows.is_contiguous() and columns.is_contiguous()
    assert torch.equal(rows.double(), exact(x, scale, to))
    assert torch.equal(columns.double(), rows.double().t())
    assert amax.item() == x.abs().max().item()


@pytest.mark.parametrize("to", FORMATS, ids=str)
def test_finite_numbers_saturate_and_others_become_nan(to, device):
    limit = torch.finfo(to).max
    x = torch.zeros(32, 48, dtype=torch.bfloat16, device=device)
    x[3, 5], x[20, 40], x[31, 47] = 3e38, -3e38, limit
    for scale in (1.0, 2.0**60):  # the latter times 3e38 is infinite in fp32
        amax = one(0, device)
        rows, columns = (eight.double() for eight in fp8_cast(x, one(scale, device), amax, to))
        assert rows[3, 5] == rows[31, 47] == limit and rows[20, 40] == -limit and torch.equal(columns, rows.t())
        assert amax.item() == x.max().item()
    for bad in (math.inf, -math.inf, math.nan):
        x[7, 9], amax = bad, one(0, device)
        rows, columns = (eight.double() for eight in fp8_cast(x, one(1.0, device), amax, to))
        assert rows[7, 9].isnan() and columns[9, 7].isnan() and rows.isnan().sum() == 1
        assert not amax.isfinite()


def test_the_largest_magnitude_is_only_raised(device):
    x, amax = torch.full((16, 16), -3.0, dtype=torch.float16, device=device), one(5, device)
    fp8_cast(x, one(1, device), amax, FORWARD)
    assert amax.item() == 5
    fp8_cast(3 * x, one(1, device), amax, FORWARD)
    assert amax.item() == 9


def test_what_is_not_asked_for_is_not_made(device):
    x, scale = spread((48, 80), torch.float16, device), one(2, device)
    both = fp8_cast(x, scale, one(0, device), GRADIENT)
    for rows, columns in ((True, False), (False, True), (False, False)):
        amax = one(0, device)
        got = fp8_cast(x, scale, amax, GRADIENT, rows, columns)
        for wanted, mine, whole in zip((rows, columns), got, both, strict=True):
            assert (mine is not None) == wanted
            assert mine is None or torch.equal(mine.view(torch.uint8), whole.view(torch.uint8))
        assert amax.item() == x.abs().max().item()


def test_a_tensor_anywhere_in_memory(device):
    memory = torch.randn(64 * 128 + 1, device=device).half()
    moved = memory[1:].view(64, 128)  # no 16-byte access may touch it
    for x in (moved, moved.t(), moved[:, 3:100], moved[:0]):
        rows, columns = fp8_cast(x, one(4, device), one(0, device), FORWARD)
        assert rows.shape == x.shape and torch.equal(rows.double(), exact(x, 4, FORWARD))
        assert torch.equal(columns.double(), rows.double().t())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_many_matrices_are_cast_as_each_alone(dtype, device):
    shapes, gap = [(16, 16), (96, 32), (64, 128), (208, 144), (16, 400)], 8
    param = spread((sum(r * c + gap for r, c in shapes),), dtype, device)
    scale = torch.exp2(torch.arange(-2.0, 3.0, device=device))
    matrices, begin, place = [], 0, 0
    for r, c in shapes:
        matrices.append((begin, r, c, place))
        begin, place = begin + r * c + gap, place + r * c
    rows, columns = (torch.zeros(place, dtype=torch.uint8, device=device) for _ in range(2))
    amax = torch.zeros(len(shapes), device=device)
    fp8_cast_many_(rows, columns, amax, param, scale, torch.tensor(matrices, device=device),
                   tile_table(shapes).to(device))
    for i, (begin, r, c, place) in enumerate(matrices):
        x, alone = param[begin:begin + r * c].view(r, c), one(0, device)
        want = fp8_cast(x, scale[i:i + 1], alone, FORWARD)
        for flat, eight in zip((rows, columns), want, strict=True):
            assert torch.equal(flat[place:place + r * c], eight.view(torch.uint8).flatten())
        assert amax[i] == alone


def scales(count, history, device):
    state = {"amax": torch.zeros(count, device=device), "history": torch.zeros(count, history, device=device)}
    state |= {"scale": torch.ones(count, device=device), "inverse": torch.ones(count, 4, device=device)[:, 0]}
    return state | {"limit": torch.tensor([448.0, 57344.0] * count, device=device)[:count].clone()}


@pytest.mark.parametrize("count", [1, 7, 300])
def test_scales_are_powers_of_two_that_leave_room(count, device):
    state = scales(count, 16, device)
    for _ in range(5):
        state["amax"].copy_(torch.exp2(torch.randn(count) * 10))
        seen = state["amax"].clone()
        fp8_scale_(**state)
        assert torch.equal(state["history"][:, 0], seen) and not state["amax"].any()
    filled = state["scale"].double() * state["history"].amax(1).double() / state["limit"].double()
    assert ((0.25 < filled) & (filled <= 0.5)).all()
    assert (torch.frexp(state["scale"])[0] == 0.5).all()
    assert torch.equal(state["inverse"] * state["scale"], torch.ones_like(state["scale"]))


def test_what_was_seen_is_forgotten_in_time(device):
    state = scales(1, 3, device)
    found = []
    for amax in (448.0, 7.0, 14.0, 7.0, 7.0, 7.0):
        state["amax"].fill_(amax)
        fp8_scale_(**state)
        found.append(state["scale"].item())
    assert found == [0.5, 0.5, 0.5, 16.0, 16.0, 32.0]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_overflow_leaves_history_and_scale(bad, device):
    state = scales(2, 4, device)
    state["amax"].copy_(torch.tensor([3.0, 5.0]))
    fp8_scale_(**state)
    before = {name: tensor.clone() for name, tensor in state.items()}
    state["amax"].copy_(torch.tensor([bad, 6.0]))
    fp8_scale_(**state)
    for name, tensor in state.items():
        assert torch.equal(tensor[0], before[name][0]), name
    assert state["history"][1].tolist() == [6, 5, 0, 0]


def test_nothing_seen_says_nothing_and_extremes_stay_in_fp32(device):
    state = scales(3, 4, device)
    state["scale"][0] = 8.0
    state["amax"].copy_(torch.tensor([0.0, 1e-40, 3e38]))
    fp8_scale_(**state)
    assert state["scale"].tolist() == [8.0, 2.0**60, 2.0**-60] and state["inverse"].isfinite().all()


def test_contract_of_the_ops(device):
    ops = torch.ops.lightseq
    x, scale = torch.randn(32, 48, device=device).half(), one(2, device)
    for rows, columns in ((True, True), (False, True), (False, False)):
        torch.library.opcheck(ops.fp8_cast.default, (x, scale, one(0, device), True, rows, columns))
    eight = [torch.zeros(32 * 48, dtype=torch.uint8, device=device) for _ in range(2)]
    torch.library.opcheck(ops.fp8_cast_many_.default,
                          (*eight, one(0, device), x.flatten(), scale, torch.tensor([[0, 32, 48, 0]], device=device),
                           tile_table([(32, 48)]).to(device)))
    torch.library.opcheck(ops.fp8_scale_.default, tuple(scales(5, 4, device).values()))


def test_everything_wrong_is_reported_together():
    with pytest.raises(ValueError, match=r"x must be float16 or bfloat16, got torch.float32; dtype must be .*; amax "
                                         r"must be one float32, got \(2,\)"):
        fp8_cast(torch.zeros(2, 4), torch.ones(1), torch.zeros(2), torch.float16)
    with pytest.raises(ValueError, match=r"limit must be float32, got torch.float16; scale must have shape \(3,\)"):
        state = scales(3, 2, "cpu")
        fp8_scale_(**state | {"limit": state["limit"].half(), "scale": torch.ones(2)})
