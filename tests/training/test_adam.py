"""LSAdam against torch's AdamW, and the arguments that only LightSeq's has."""

from __future__ import annotations

import pytest
import torch

from lightseq_fairseq.training import LSAdam

SHAPES = [(5000,), (3, 7), ()]  # LightSeq's kernel leaves the last 904 of 5000 as they are


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
            for shape in SHAPES]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return made


def assert_same(mine, theirs):
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_those_of_torchs_adamw(weight_decay):
    mine, theirs = parameters(), parameters()
    eps = 1e-30  # which torch adds to the corrected root, LightSeq as fairseq to the root as it is
    ours = LSAdam(mine, lr=0.01, betas=(0.9, 0.98), eps=eps, weight_decay=weight_decay)
    reference = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.98), eps=eps, weight_decay=weight_decay)
    for _ in range(3):
        ours.step()
        reference.step()
    assert_same(mine, theirs)


def test_without_bias_correction():
    mine = parameters()
    before, gradients = [p.detach().clone() for p in mine], [p.grad.clone() for p in mine]
    LSAdam(mine, lr=0.01, bias_correction=False).step()
    for parameter, start, grad in zip(mine, before, gradients, strict=True):
        expected = start - 0.01 * 0.1 * grad / ((0.001 * grad.square()).sqrt() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-10, atol=1e-12)


def test_the_norm_of_each_group_is_clipped():
    mine, theirs = parameters(), parameters()
    ours = LSAdam([dict(params=mine[:1]), dict(params=mine[1:])], lr=0.01, eps=1e-3, max_grad_norm=0.5)
    torch.nn.utils.clip_grad_norm_(theirs[:1], 0.5)
    torch.nn.utils.clip_grad_norm_(theirs[1:], 0.5)
    LSAdam(theirs, lr=0.01, eps=1e-3).step()
    for parameter in mine:
        parameter.grad *= 8
    ours.step(scale=8.0)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)  # torch's clipping adds 1e-6 to the norm


def test_gradients_and_norms_may_be_given():
    mine, theirs = parameters(), parameters()
    reference = LSAdam(theirs, lr=0.01, eps=0.1, max_grad_norm=0.5)
    reference.step()
    gradients = [parameter.grad.clone() for parameter in parameters()]
    for parameter in mine:
        parameter.grad = None
    ours = LSAdam(mine, lr=0.01, eps=0.1, max_grad_norm=0.5)
    norm = torch.cat([grad.flatten() for grad in gradients]).norm()
    ours.step(grads=gradients, grad_norms=[float(norm)])
    assert all(parameter.grad is None for parameter in mine)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)  # gradient_norm is fp32
    with pytest.raises(ValueError, match="grads must hold one tensor for each of 3 parameters, got 2"):
        ours.step(grads=gradients[:2])


def test_state_is_saved_and_loaded():
    mine, theirs = parameters(), parameters()
    first, second = LSAdam(mine, lr=0.01), LSAdam(theirs, lr=0.01)
    first.step()
    second.load_state_dict(first.state_dict())
    for a, b in zip(theirs, mine, strict=True):
        a.data.copy_(b)
    first.step()
    second.step()
    assert_same(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_parameters_have_wide_moments(dtype):
    mine = parameters(dtype)
    optimizer = LSAdam(mine, lr=0.01)
    optimizer.step()
    assert all(state["exp_avg"].dtype == torch.float32 for state in optimizer.state.values())


@pytest.mark.parametrize("option", ["eps_inside_sqrt", "amsgrad"])
def test_what_is_not_supported_is_named(option):
    with pytest.raises(ValueError, match=f"{option} is not supported"):
        LSAdam(parameters(), **{option: True})
