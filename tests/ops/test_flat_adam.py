"""One update over flat storage is fairseq's clipping and Adam, or nothing at all on an overflow."""

from __future__ import annotations

import pytest
import torch
from fairseq.optim.adam import Adam

from lightseq_fairseq.ops.flat_adam import flat_adam_, segment_table

SIZES = [1, 7, 1000, 4099, 20008]
SETTINGS = dict(beta1=0.9, beta2=0.98, eps=1e-6, weight_decay=0.01)


class State:
    def __init__(self, size, dtype, device):
        self.master = torch.randn(size, device=device)
        self.exp_avg, self.exp_avg_sq = torch.zeros(size, device=device), torch.zeros(size, device=device)
        self.param = self.master if dtype == torch.float32 else self.master.to(dtype)
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        self.norm = torch.zeros((), device=device)
        self.segments = segment_table([(0, 0, size)]).to(device)

    def step(self, grad, lr, multiplier, max_norm):
        scalar = [torch.tensor(value, device=grad.device) for value in (lr, multiplier)]
        flat_adam_(self.master, self.exp_avg, self.exp_avg_sq, self.param, self.steps, self.norm, grad,
                   self.segments, *scalar, max_norm=max_norm, **SETTINGS)


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_trajectory_is_fairseqs(size, dtype, max_norm, device):
    ours = State(size, dtype, device)
    theirs = torch.nn.Parameter(ours.master.clone())
    adam = Adam([theirs], betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
    for update in range(5):
        grad = (torch.randn(size, device=device) * 8).to(dtype)
        lr, multiplier = 0.01 * (update + 1), 0.125
        ours.step(grad, lr, multiplier, max_norm)
        theirs.grad = grad.float() * multiplier
        norm = theirs.grad.norm()
        if max_norm > 0:
            theirs.grad *= (max_norm / (norm + 1e-6)).clamp(max=1)
        adam.param_groups[0]["lr"] = lr
        adam.step()
        torch.testing.assert_close(ours.norm, norm, rtol=1e-5, atol=0)
        torch.testing.assert_close(ours.master, theirs.data, rtol=1e-5, atol=1e-6)
        assert torch.equal(ours.param, ours.master.to(dtype))
    assert ours.steps.item() == 5


@pytest.mark.parametrize("lengths", [[8, 16, 20000], [3, 8, 8193, 5, 64]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_segments_join_two_orders(dtype, lengths, device):
    """Segments of a master in another order, with gaps in the parameters, take the step of a plain layout."""
    size, gap = sum(lengths), 8
    plain, other = State(size, dtype, device), State(size, torch.float32, device)
    room = size + gap * len(lengths)
    other.master.copy_(plain.master)
    other.param = torch.full((room,), 7.0, dtype=dtype, device=device)
    begins = torch.tensor([0, *lengths]).cumsum(0).tolist()
    ranges, end = [], 0
    for i in reversed(range(len(lengths))):
        ranges.append((begins[i], end, lengths[i]))
        end += lengths[i] + gap
    other.segments = segment_table(ranges).to(device)
    for _ in range(3):
        grad = torch.randn(size, device=device).to(dtype)
        scattered = torch.zeros(room, dtype=dtype, device=device)
        for master, param, length in ranges:
            scattered[param:param + length] = grad[master:master + length]
        plain.step(grad, 0.1, 0.5, 0.7)
        other.step(scattered, 0.1, 0.5, 0.7)
        torch.testing.assert_close(other.master, plain.master, rtol=1e-5, atol=1e-6)  # sums of squares in two orders
    covered = torch.zeros(room, dtype=torch.bool, device=device)
    for master, param, length in ranges:
        covered[param:param + length] = True
        assert torch.equal(other.param[param:param + length], other.master[master:master + length].to(dtype))
    assert (other.param[~covered] == 7).all()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("place", [0, -1])
def test_an_overflow_changes_nothing(bad, place, device):
    state = State(1000, torch.float16, device)
    state.step(torch.randn(1000, device=device).half(), 0.1, 1.0, 0.0)
    before = [t.clone() for t in (state.master, state.exp_avg, state.exp_avg_sq, state.param, state.steps)]
    grad = torch.randn(1000, device=device).half()
    grad[place] = bad
    state.step(grad, 0.1, 1.0, 1.0)
    assert not state.norm.isfinite()
    after = (state.master, state.exp_avg, state.exp_avg_sq, state.param, state.steps)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_contract_of_the_op(device):
    state = State(24, torch.float16, device)
    scalars = [torch.tensor(value, device=device) for value in (0.1, 0.5)]
    torch.library.opcheck(torch.ops.lightseq.flat_adam_.default,
                          (state.master, state.exp_avg, state.exp_avg_sq, state.param, state.steps, state.norm,
                           torch.randn(24, device=device).half(), state.segments, *scalars, 1.0, 0.9, 0.98, 1e-8, 0.0))


def test_everything_wrong_is_reported_together():
    state = State(4, torch.float32, "cpu")
    state.exp_avg = state.exp_avg[:2]
    state.steps = state.steps.float()
    with pytest.raises(ValueError, match=r"exp_avg must have shape \(4,\), got \(2,\); steps must be int64"):
        state.step(torch.randn(4), 0.1, 1.0, 0.0)
