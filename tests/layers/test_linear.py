"""Gradients that go to their places in flat storage are those of autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightseq_fairseq.layers.linear import WeightGradients, adjacent, forked_linear, joint_projection, linear

SIZES = [(1, 8, 16), (37, 24, 40)]


class Flat:
    """Linear maps whose parameters lie in one buffer, and the same maps apart from it."""

    def __init__(self, inner, outer, count, device):
        self.maps = [nn.Linear(inner, outer).to(device) for _ in range(count)]
        self.apart = [nn.Linear(inner, outer).to(device) for _ in range(count)]
        shaped = [m.weight for m in self.maps] + [m.bias for m in self.maps]
        self.param = torch.cat([p.detach().flatten() for p in shaped])
        self.grad = torch.full_like(self.param, float("nan"))
        places = self.param.split([p.numel() for p in shaped])
        for p, place in zip(shaped, places, strict=True):
            p.data = place.view(p.shape)
        for ours, theirs in zip(self.maps, self.apart, strict=True):
            theirs.load_state_dict(ours.state_dict())
        self.gradients = WeightGradients(self.param, self.grad)

    def check(self):
        self.gradients.join()
        for ours, theirs in zip(self.maps, self.apart, strict=True):
            for name in ("weight", "bias"):
                expected = getattr(theirs, name).grad
                if expected is not None:
                    place = self.gradients.place(getattr(ours, name))
                    torch.testing.assert_close(place, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(3)


@pytest.mark.parametrize("rows, inner, outer", SIZES)
def test_joint_projection(rows, inner, outer, device):
    flat = Flat(inner, outer, 3, device)
    x = torch.randn(rows, inner, device=device, requires_grad=True)
    y, same = joint_projection(x, flat.apart, 2)
    dy, dsame = torch.randn_like(y), torch.randn_like(same)
    expected_dx, = torch.autograd.grad((y, same), (x,), (dy, dsame), retain_graph=True)
    torch.autograd.backward((y, same), (dy, dsame))
    with flat.gradients.begin(first=True):
        z, same = joint_projection(x, flat.maps, 2)
        dx, *unused = torch.autograd.grad((z, same), (x, *(m.weight for m in flat.maps)), (dy, dsame.clone()),
                                          allow_unused=True)
    assert unused == [None] * 3
    torch.testing.assert_close(z, y)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-4, atol=1e-5)
    flat.check()


def test_second_use_and_later_batches_add(device):
    flat = Flat(24, 24, 1, device)
    ours, theirs = flat.maps[0], flat.apart[0]
    for first in (True, False):
        x = torch.randn(5, 24, device=device, requires_grad=True)
        with flat.gradients.begin(first):
            y, _ = forked_linear(linear(x, ours.weight, ours.bias), ours.weight)
            y.square().sum().backward()
        F.linear(theirs(x), theirs.weight).square().sum().backward()
    flat.check()
    assert ours.weight.grad is None


def test_parameters_of_one_product_that_were_used_before(device):
    """k alone, then k and v together: the place of v is overwritten, that of k added to."""
    flat = Flat(8, 16, 2, device)
    x = torch.randn(7, 8, device=device, requires_grad=True)
    with flat.gradients.begin(first=True):
        joint, _ = joint_projection(x, flat.maps, 4)
        alone = linear(x, flat.maps[0].weight, flat.maps[0].bias)
        (joint.sum() + (alone ** 2).sum()).backward()  # the later product's gradient comes first
    (sum(m(x).sum() for m in flat.apart) + (flat.apart[0](x) ** 2).sum()).backward()
    flat.check()


def test_a_residual_gradient_in_use_is_not_written_to(device):
    """Without dropout a sublayer's gradient is its residual's too, and a product may still read it."""
    flat = Flat(64, 64, 2, device)
    ours, theirs = flat.maps, flat.apart
    x = torch.randn(512, 64, device=device, requires_grad=True)

    def run(first, second, fork):
        y, same = fork(x, first.weight)
        return linear(torch.tanh(y), second.weight) + same

    run(*theirs, lambda x, w: (F.linear(x, w), x)).square().sum().backward()
    expected, x.grad = x.grad, None
    with flat.gradients.begin(first=True):
        run(*ours, forked_linear).square().sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-3)
    flat.check()


def test_without_places_autograd_has_them(device):
    maps = [nn.Linear(8, 16, device=device) for _ in range(2)]
    y, _ = joint_projection(torch.randn(3, 8, device=device), maps, 2)
    y.sum().backward()
    assert all(m.weight.grad is not None and m.bias.grad is not None for m in maps)


def test_adjacent():
    flat = torch.arange(24.0)
    one, two, far = flat[:8].view(2, 4), flat[8:12].view(1, 4), flat[16:].view(2, 4)
    assert torch.equal(adjacent([one, two]), flat[:12].view(3, 4))
    assert adjacent([one, far]) is None
    assert adjacent([two, one]) is None
    assert adjacent([one, two.view(4)]) is None
