"""--optimizer ls_adam inside fairseq's own wrappers, against --optimizer adam there."""

from __future__ import annotations

import copy

import pytest
import torch
from fairseq import optim, utils
from fairseq.optim import FP16Optimizer, MemoryEfficientFP16Optimizer
from omegaconf import OmegaConf

import lightseq_fairseq.plugin  # noqa: F401
from lightseq_fairseq.optim import FusedAdam
from lightseq_fairseq.plugin.ls_adam import parse_betas
from tests import tolerances

WRAPPERS = {
    "fp32": (None, torch.float32, {}),
    "fp16 flat": (FP16Optimizer, torch.float16, {"fp16": True}),
    "fp16 unflat": (FP16Optimizer, torch.float16, {"fp16": True, "fp16_no_flatten_grads": True}),
    "bf16": (FP16Optimizer, torch.bfloat16, {"bf16": True}),
    "memory-efficient fp16": (MemoryEfficientFP16Optimizer, torch.float16, {"fp16": True}),
    "memory-efficient bf16": (MemoryEfficientFP16Optimizer, torch.bfloat16, {"bf16": True}),
}


@pytest.fixture
def flat_params_on_the_cpu(monkeypatch):
    """fairseq keys its flat fp32 copies by CUDA device; None is the index of the CPU."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)


def configuration(name: str, **common):
    scaling = {"fp16_init_scale": 4, "fp16_scale_window": 2, "fp16_scale_tolerance": 0.0,
               "threshold_loss_scale": None, "min_loss_scale": 1e-4, "tpu": False}
    return OmegaConf.create({
        "optimizer": {"_name": name, "lr": [0.02], "adam_betas": "(0.9, 0.98)", "adam_eps": 1e-6,
                      "weight_decay": 0.01, "tpu": False},
        "optimization": {"lr": [0.02], "update_freq": [1]}, "common": scaling | common})


def build(name: str, wrapper: str, params):
    cls, _, common = WRAPPERS[wrapper]
    cfg = configuration(name, **common)
    if cls is None:
        return optim.build_optimizer(cfg.optimizer, params)
    return cls.build_optimizer(cfg, params)


def model(wrapper: str) -> torch.nn.Module:
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 1)).to(WRAPPERS[wrapper][1])


def update(net, optimizer, number: int, clip_norm: float = 0.05) -> float:
    """One update as Trainer.train_step does it; returns the gradient norm."""
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(number)).to(next(net.parameters()))
    optimizer.zero_grad()
    optimizer.backward(net(x).square().sum())
    optimizer.multiply_grads(1 / torch.tensor(8.0))
    norm = optimizer.clip_grad_norm(clip_norm)
    optimizer.step()
    return float(norm)


def assert_same(net, other, dtype):
    for one, another in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.detach(), another.detach(), **tolerances.OP[dtype])


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_updates_are_those_of_adam(wrapper, flat_params_on_the_cpu):
    ours, stock = model(wrapper), model(wrapper)
    our_optimizer, stock_optimizer = (
        build(name, wrapper, list(net.parameters())) for name, net in (("ls_adam", ours), ("adam", stock)))
    assert isinstance(our_optimizer.optimizer, FusedAdam) and our_optimizer.supports_step_with_scale
    for number in range(6):
        norms = [update(net, optimizer, number)
                 for net, optimizer in ((ours, our_optimizer), (stock, stock_optimizer))]
        assert norms[0] == pytest.approx(norms[1], rel=1e-2 if number else 1e-6)
        assert norms[0] > 0.05, "clipping must have something to do"
    assert_same(ours, stock, WRAPPERS[wrapper][1])


@pytest.mark.parametrize("names", [("adam", "ls_adam"), ("ls_adam", "adam"), ("ls_adam", "ls_adam")])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_state_moves_through_checkpoints(wrapper, names, flat_params_on_the_cpu):
    first, whole = model(wrapper), model(wrapper)
    optimizer, whole_optimizer = build(names[0], wrapper, list(first.parameters())), build(
        names[0], wrapper, list(whole.parameters()))
    for number in range(3):
        update(first, optimizer, number)
        update(whole, whole_optimizer, number)
    state = copy.deepcopy(optimizer.state_dict())

    second = model(wrapper)
    second.load_state_dict(first.state_dict())
    resumed = build(names[1], wrapper, list(second.parameters()))
    resumed.load_state_dict(state, optimizer_overrides={})
    moments = [value for entry in resumed.state_dict()["state"].values() for value in entry.values()
               if torch.is_tensor(value)]
    assert moments and all(value.dtype == torch.float32 for value in moments)
    for number in range(3, 6):
        update(second, resumed, number)
        update(whole, whole_optimizer, number)
    assert_same(second, whole, WRAPPERS[wrapper][1])


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_clipping_is_fairseqs(max_norm, dtype):
    nets = []
    for _ in range(2):
        net = model("fp32").to(dtype)
        for number, param in enumerate(net.parameters()):
            param.grad = torch.full_like(param, number - 1.5)
        nets.append(net)
    ours, stock = nets
    assert ours[0].weight.grad is not None
    norm = build("ls_adam", "fp32", list(ours.parameters())).clip_grad_norm(max_norm, lambda norm: norm * 2)
    want = utils.clip_grad_norm_(stock.parameters(), max_norm, lambda norm: norm * 2)
    torch.testing.assert_close(norm, want)
    for one, other in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_clipping_without_gradients_and_with_experts():
    net = model("fp32")
    optimizer = build("ls_adam", "fp32", list(net.parameters()))
    assert optimizer.clip_grad_norm(1.0) == 0
    for param in net.parameters():
        param.grad = torch.ones_like(param)
    net[0].weight.expert = True
    assert optimizer.clip_grad_norm(0.0) == pytest.approx((9 + 9 + 1) ** 0.5)


@pytest.mark.parametrize("betas", ["(0.8, 0.9)", "[0.8, 0.9]", [0.8, 0.9], (0.8, 0.9), OmegaConf.create([0.8, 0.9])])
def test_betas_in_every_form(betas):
    assert parse_betas(betas) == (0.8, 0.9)


@pytest.mark.parametrize("betas", ["__import__('os').getcwd()", "(0.9", "0.9", "(0.9, 0.9, 0.9)", "('a', 'b')", None])
def test_other_betas_are_refused(betas):
    with pytest.raises(ValueError, match="--adam-betas must be two numbers such as"):
        parse_betas(betas)


def test_betas_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"--adam-betas must lie in \[0, 1\)"):
        parse_betas("(0.9, 1.0)")


@pytest.mark.parametrize("option", ["use_old_adam", "fp16_adam_stats", "tpu"])
def test_options_of_adam_that_are_not_taken_are_named(option):
    cfg = configuration("ls_adam").optimizer
    cfg[option] = True
    with pytest.raises(ValueError, match=f"ls_adam: --{option.replace('_', '-')} is not supported; use|moments"):
        optim.build_optimizer(cfg, list(model("fp32").parameters()))


def test_default_configuration_builds():
    optimizer = optim.build_optimizer(OmegaConf.create({"_name": "ls_adam", "lr": [0.1], "tpu": False}),
                                      list(model("fp32").parameters()))
    assert optimizer.optimizer_config == {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    assert type(optimizer).__name__ == "FairseqAdam", "what checkpoints record"
