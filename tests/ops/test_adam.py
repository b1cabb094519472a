"""ops.adam against its definition, optim.FusedAdam against fairseq's Adam."""

from __future__ import annotations

import copy

import pytest
import torch
from fairseq.optim.adam import Adam as FairseqAdam

from lightseq_fairseq.ops import adam
from lightseq_fairseq.optim import FusedAdam, gradient_norm
from tests import tolerances

SHAPES = [(1,), (3, 5), (7, 1, 2), (0,), (64, 33)]
HYPER = dict(lr=0.01, betas=(0.9, 0.98), eps=1e-3, weight_decay=0.1)  # a large eps: its place shows


def tensors(seed: int, dtype=torch.float64, device="cpu", scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)
            for shape in SHAPES]


def states(dtype=torch.float64, device="cpu"):
    """params, grads, exp_avgs, exp_avg_sqs after some steps."""
    moments = torch.float64 if dtype == torch.float64 else torch.float32
    return [tensors(1, dtype, device), tensors(2, dtype, device), tensors(3, moments, device),
            [v.square() for v in tensors(4, moments, device)]]


def step_of_definition(lists, **hyper):
    for one in zip(*lists, strict=True):
        adam.reference(*one, **hyper)


STEP = dict(lr=0.01, beta1=0.9, beta2=0.98, eps=1e-3, weight_decay=0.1)


def test_definition_by_hand():
    """t=1, no decay: m/(1-b1) = g and v/(1-b2) = g^2, so that the step is lr * g / (|g| + eps / sqrt(1 - b2))."""
    param, exp_avg, exp_avg_sq = torch.tensor([1.0]), torch.zeros(1), torch.zeros(1)
    adam.reference(param, torch.tensor([4.0]), exp_avg, exp_avg_sq, lr=0.5, beta1=0.9, beta2=0.75, eps=1.0,
                   weight_decay=0.0, step=1, scale=2.0)
    assert exp_avg.item() == pytest.approx(0.2) and exp_avg_sq.item() == pytest.approx(1.0)
    assert param.item() == pytest.approx(1 - 0.5 * 2 / (2 + 1 / 0.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("step", [1, 10, 5000])
@pytest.mark.parametrize("scale", [1.0, 128.0, torch.tensor(128.0)], ids=str)
def test_step_is_the_definition(dtype, step, scale, device, monkeypatch):
    monkeypatch.setattr(adam, "CHUNK", 16)
    got, exact = states(dtype, device), states(torch.float64, device)
    adam.adam_(*got, **STEP, step=step, scale=scale.to(device) if isinstance(scale, torch.Tensor) else scale)
    step_of_definition(exact, **STEP, step=step, scale=scale)
    for got_list, want_list in zip((got[0], *got[2:]), (exact[0], *exact[2:]), strict=True):
        for got_one, want in zip(got_list, want_list, strict=True):
            torch.testing.assert_close(got_one.double(), want, **tolerances.OP[torch.float32])


def test_chunks_hold_every_tensor_once(monkeypatch):
    monkeypatch.setattr(adam, "CHUNK", 10)
    sizes = [4, 6, 1, 30, 5, 5, 5]
    runs = [sizes[run] for run in adam.chunks([torch.empty(size) for size in sizes])]
    assert runs == [[4, 6], [1], [30], [5, 5], [5]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_parameters_are_rounded_once(dtype, device):
    got, want = states(dtype, device), states(dtype, device)
    want[0] = [param.float() for param in want[0]]
    adam.adam_(*got, **STEP, step=3, scale=8.0)
    step_of_definition(want, **STEP, step=3, scale=8.0)
    for param, exact in zip(got[0], want[0], strict=True):
        assert param.dtype == dtype
        torch.testing.assert_close(param.float(), exact, **tolerances.OP[dtype])
    for moment, exact in zip(got[2] + got[3], want[2] + want[3], strict=True):
        assert moment.dtype == torch.float32
        torch.testing.assert_close(moment, exact, **tolerances.OP[torch.float32])


def test_any_memory_layout(device):
    """The kernel underneath walks raw memory: transposed and sliced tensors must not come out scrambled."""
    got, want = states(torch.float32, device), states(torch.float32, device)
    got[0] = [torch.stack([param, param], -1)[..., 0] for param in got[0]]
    got[1] = [grad.transpose(0, -1).contiguous().transpose(0, -1) for grad in got[1]]
    assert not got[0][1].is_contiguous() and not got[1][1].is_contiguous()
    adam.adam_(*got, **STEP, step=2)
    step_of_definition(want, **STEP, step=2)
    for param, exact in zip(got[0], want[0], strict=True):
        torch.testing.assert_close(param, exact, **tolerances.OP[torch.float32])


def model(dtype=torch.float32, device="cpu") -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(tensor) for tensor in tensors(1, dtype, device)]


def take_steps(optimizer, params, count, start=0, scale=1.0, rarely=None):
    """``count`` steps on gradients that depend on the step only; ``rarely`` names a parameter of every second one."""
    for number in range(start, start + count):
        for index, (param, grad) in enumerate(zip(params, tensors(100 + number), strict=True)):
            param.grad = None if index == rarely and number % 2 else (grad * scale).to(param)
        optimizer.step() if isinstance(optimizer, FairseqAdam) else optimizer.step(scale=scale)


def assert_same_params(got, want, dtype=torch.float32):
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), **tolerances.OP[dtype])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_trajectory_is_fairseqs(weight_decay, device):
    hyper = HYPER | dict(weight_decay=weight_decay)
    got, want = model(device=device), model(device=device)
    take_steps(FusedAdam(got, **hyper), got, 20, rarely=1)
    take_steps(FairseqAdam(want, **hyper), want, 20, rarely=1)
    assert_same_params(got, want)


@pytest.mark.parametrize("scale", [64.0, torch.tensor(64.0)], ids=str)
def test_scaled_gradients_give_the_same_trajectory(scale, device):
    got, want = model(device=device), model(device=device)
    take_steps(FusedAdam(got, **HYPER), got, 10, scale=scale)
    take_steps(FairseqAdam(want, **HYPER), want, 10)
    assert_same_params(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_memory_efficient_trajectory_is_fairseqs(dtype, device):
    got, want = model(dtype, device), model(dtype, device)
    ours, stock = FusedAdam(got, **HYPER), FairseqAdam(want, **HYPER)
    for number in range(10):
        take_steps(ours, got, 1, number)
        take_steps(stock, want, 1, number)
        assert_same_params(got, want, dtype)
        with torch.no_grad():  # 16-bit rounding must not add up
            for one, other in zip(got, want, strict=True):
                one.copy_(other)
    for one, other in zip(got, want, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert ours.state[one][name].dtype == torch.float32
            torch.testing.assert_close(ours.state[one][name], stock.state[other][name])


def test_flat_parameter_is_the_same_as_its_pieces(device):
    pieces = model(device=device)
    flat = torch.nn.Parameter(torch.cat([piece.detach().flatten() for piece in pieces]))
    one, many = FusedAdam([flat], **HYPER), FusedAdam(pieces, **HYPER)
    for number in range(5):
        flat.grad = torch.cat([grad.float().flatten() for grad in tensors(100 + number)]).to(device)
        one.step()
        take_steps(many, pieces, 1, number)
    torch.testing.assert_close(flat.detach(), torch.cat([piece.detach().flatten() for piece in pieces]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first, then", [(FairseqAdam, FusedAdam), (FusedAdam, FairseqAdam), (FusedAdam, FusedAdam)])
def test_state_moves_between_fairseqs_adam_and_ours(first, then, dtype, device):
    """Ten steps with one and ten with the other, the state going through a checkpoint in CPU memory."""
    params, whole = model(dtype, device), model(dtype, device)
    optimizer = first(params, **HYPER)
    take_steps(optimizer, params, 10, rarely=2)
    state = copy.deepcopy(optimizer.state_dict()) | {"loss_scale": 4.0}
    for entry in state["state"].values():
        assert type(entry["step"]) is int and set(entry) == {"step", "exp_avg", "exp_avg_sq"}
        entry.update({name: entry[name].cpu() for name in ("exp_avg", "exp_avg_sq")})

    resumed = then(params, **HYPER)
    resumed.load_state_dict(state)
    if then is FairseqAdam:  # fairseq's wrapper puts the fp32 moments back after torch has cast them
        resumed.state.update({param: state["state"][key] for key, param in enumerate(params) if key in state["state"]})
    take_steps(resumed, params, 10, 10, rarely=2)
    reference = FairseqAdam(whole, **HYPER)
    take_steps(reference, whole, 20, rarely=2)
    assert_same_params(params, whole, dtype)
    for param, other in zip(params, whole, strict=True):
        assert resumed.state[param]["step"] == reference.state[other]["step"]


def test_resumed_run_is_bit_for_bit(device):
    whole, stopped = model(device=device), model(device=device)
    take_steps(FusedAdam(whole, **HYPER), whole, 20)
    first = FusedAdam(stopped, **HYPER)
    take_steps(first, stopped, 10)
    second = FusedAdam(stopped, **HYPER)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take_steps(second, stopped, 10, 10)
    for one, other in zip(whole, stopped, strict=True):
        assert torch.equal(one, other)


def test_loaded_state_is_not_shared_with_the_checkpoint(device):
    params = model(device=device)
    optimizer = FusedAdam(params, **HYPER)
    take_steps(optimizer, params, 1)
    state = copy.deepcopy(optimizer.state_dict())
    before = state["state"][1]["exp_avg"].clone()
    optimizer.load_state_dict(state)
    take_steps(optimizer, params, 1, 1)
    assert torch.equal(state["state"][1]["exp_avg"], before) and state["state"][1]["step"] == 1


def test_apex_counts_steps_once_for_a_group(device):
    params = model(device=device)
    optimizer = FusedAdam(params, **HYPER)
    take_steps(optimizer, params, 3)
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        del entry["step"]
    state["param_groups"][0]["step"] = 3
    optimizer.load_state_dict(state)
    assert {optimizer.state[param]["step"] for param in params} == {3}


def test_amsgrad_and_sparse_gradients_are_refused():
    params = model()
    state = FairseqAdam(params, amsgrad=True).state_dict()
    with pytest.raises(ValueError, match="written with amsgrad, which is not supported; train on with"):
        FusedAdam(params).load_state_dict(state)
    params[1].grad = torch.ones(3, 5).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients are not supported"):
        FusedAdam(params).step()


def test_closure_runs_with_gradients():
    param = torch.nn.Parameter(torch.ones(2))

    def closure():
        loss = (param * 3).sum()
        loss.backward()
        return loss

    assert FusedAdam([param]).step(closure).item() == 6 and param.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_gradient_norm(dtype, device):
    """Of all tensors together, in fp32: a norm beyond 65504 is nothing special in fp16."""
    grads = [grad * 3000 for grad in tensors(5, dtype, device)]
    want = torch.cat([grad.flatten().double() for grad in grads]).norm()
    got = gradient_norm(grads)
    assert want > 65504 and got.dtype == torch.float32 and got.dim() == 0
    torch.testing.assert_close(got.double(), want, **tolerances.OP[torch.float32])
    assert gradient_norm([]) == 0
