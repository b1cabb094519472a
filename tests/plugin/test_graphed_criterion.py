"""fairseq's own loop over our criterion, whose passes are replayed: same losses, gradients, log, parameters.

On the CPU the two passes run without graphs, everything else being the same; --device cuda replays graphs.
"""

from __future__ import annotations

import logging

import pytest
import torch

import lightseq_fairseq.plugin  # noqa: F401
from lightseq_fairseq.plugin.graphed_criterion import GraphedCriterion
from tests import tolerances
from tests.conftest import build_model
from tests.plugin.recorded_run import SIZES
from tests.plugin.test_ls_trainer import OURS, STOCK, Run

CASES = {
    "post-LN": [],
    "pre-LN, tied": ["--encoder-normalize-before", "--decoder-normalize-before", "--share-decoder-input-output-embed"],
    "update-freq": ["--update-freq", "3", "--clip-norm", "0"],
    "accuracy, prefix, sentence-avg": ["--report-accuracy", "--ignore-prefix-size", "2", "--sentence-avg"],
}


@pytest.fixture(autouse=True)
def graphs_everywhere(monkeypatch):
    monkeypatch.setattr(GraphedCriterion, "devices", ("cpu", "cuda"))


@pytest.fixture
def run(data_bin, tmp_path, monkeypatch, device):
    from fairseq.trainer import Trainer

    number = iter(range(10))
    return lambda *flags: Run(data_bin, tmp_path / f"run{next(number)}", monkeypatch, device, Trainer, *flags)


def graphed(run: Run) -> GraphedCriterion:
    return run.trainer.get_criterion()._graphed


def assert_same_curve(ours: Run, stock: Run, rtol: float = tolerances.LOSS_CURVE["rtol"]) -> None:
    assert len(ours.logs) == len(stock.logs) == 20
    for mine, theirs in zip(ours.logs, stock.logs, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert mine[key] == pytest.approx(value, rel=rtol), key


@pytest.mark.parametrize("case", CASES)
def test_updates_are_fairseqs(case, run):
    stock, ours = run(*STOCK, *CASES[case], "--no-save"), run(*OURS, *CASES[case], "--no-save")
    assert graphed(ours).buckets, graphed(ours).said
    assert_same_curve(ours, stock)
    for name, value in stock.state.items():
        if not name.endswith("k_proj.bias"):  # its true gradient is 0, so that Adam follows the sign of rounding errors
            torch.testing.assert_close(ours.state[name], value, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("flags", [["--bf16"], ["--memory-efficient-bf16"], ["--fp16"], ["--memory-efficient-fp16"]],
                         ids=" ".join)
def test_every_precision_follows_fairseqs_loss_curve(run, flags, device):
    if device.type == "cpu" and flags == ["--fp16"]:
        flags = [*flags, "--fp16-no-flatten-grads"]  # flat fp16 training needs a GPU
    flags = [*flags, "--fp16-init-scale", "4", "--no-save"]
    stock, ours = run(*STOCK, *flags), run(*OURS, *flags)
    assert graphed(ours).buckets, graphed(ours).said
    assert_same_curve(ours, stock, rtol=2e-2)


def test_dropout_draws_anew_every_step(run):
    """The mask is a function of fairseq's seed for the update, in the replayed pass as in the one that is not."""
    dropout = ["--dropout", "0.3", "--attention-dropout", "0.1", "--no-save"]
    first, second, none = run(*OURS, *dropout), run(*OURS, *dropout), run(*OURS, "--no-save")
    assert first.losses == second.losses and graphed(first).buckets
    assert sum(abs(a - b) for a, b in zip(first.losses, none.losses, strict=True)) > 0.05


def test_layerdrop_runs_eagerly_and_says_so(run, caplog):
    caplog.set_level(logging.INFO, logger="lightseq_fairseq")
    result = run(*OURS, "--encoder-layerdrop", "0.5", "--max-update", "3", "--no-save")
    assert not graphed(result).buckets
    assert graphed(result).said == {
        "forward and backward run one kernel after another, because layers are dropped at random"}


@pytest.fixture
def model_and_batch(data_bin, device):
    task, model = build_model(data_bin, *OURS[:2], "--dropout", "0", *SIZES)
    task.load_dataset("train")
    dataset = task.dataset("train")
    sample = dataset.collater([dataset[i] for i in range(7)])
    sample["net_input"] = {name: value.to(device) for name, value in sample["net_input"].items()}
    sample["target"] = sample["target"].to(device)
    model.to(device).train()
    model(**sample["net_input"], packed_output=True)[0].sum().backward()  # libraries set themselves up in eager passes
    model.zero_grad(set_to_none=True)
    return model, sample


def criterion_of(model) -> GraphedCriterion:
    return GraphedCriterion(0.1, model.decoder.padding_idx, 0, False)


def test_gradients_add_up_and_are_none_of_the_graphs(model_and_batch):
    """Two backward passes without zero_grad: the second must not overwrite what the first has left."""
    model, sample = model_and_batch
    criterion = criterion_of(model)
    assert criterion(model, sample) is None  # the first is eager
    criterion(model, sample).loss.backward()
    once = [param.grad.clone() for param in model.parameters()]
    criterion(model, sample).loss.backward()
    for param, grad in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(param.grad, 2 * grad, rtol=1e-5, atol=1e-6)


def test_a_second_loss_before_the_first_ones_backward_pass_is_left_to_the_caller(model_and_batch):
    model, sample = model_and_batch
    criterion = criterion_of(model)
    criterion(model, sample)
    first = criterion(model, sample)
    assert criterion(model, sample) is None
    first.loss.backward()
    again = criterion(model, sample)
    assert again is not None
    del again  # never differentiated
    assert criterion(model, sample) is not None


def test_a_loss_has_one_backward_pass(model_and_batch):
    model, sample = model_and_batch
    criterion = criterion_of(model)
    criterion(model, sample)
    loss = criterion(model, sample).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute it anew"):
        loss.backward()


def test_moved_parameters_get_new_graphs(model_and_batch):
    model, sample = model_and_batch
    criterion = criterion_of(model)
    criterion(model, sample)
    before = criterion(model, sample).loss.item()
    for param in model.parameters():
        param.data = param.data.clone() * 0.5
    assert criterion(model, sample) is None and not criterion.buckets
    assert abs(criterion(model, sample).loss.item() - before) > 1e-3


def test_frozen_parameters_have_no_gradient(model_and_batch):
    model, sample = model_and_batch
    frozen = model.encoder.layers[0].fc1.weight
    frozen.requires_grad = False
    criterion = criterion_of(model)
    criterion(model, sample)
    criterion(model, sample).loss.backward()
    assert frozen.grad is None and model.encoder.layers[1].fc1.weight.grad.abs().sum() > 0


def test_no_graph_where_no_gradient_is_wanted(model_and_batch):
    model, sample = model_and_batch
    criterion = criterion_of(model)
    with torch.no_grad():
        assert criterion(model, sample) is None and not criterion.warm
    assert criterion(model.eval(), sample) is None and not criterion.warm


def test_hooks_on_modules_are_heeded(model_and_batch):
    """fairseq's NanDetector watches every module by hooks, which a replay would pass by."""
    model, sample = model_and_batch
    criterion = criterion_of(model)
    criterion(model, sample)
    handle = model.encoder.layers[0].register_forward_hook(lambda *_: None)
    assert criterion(model, sample) is None
    handle.remove()
    assert criterion(model, sample) is not None
