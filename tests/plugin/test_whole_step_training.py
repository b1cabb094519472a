"""Whatever fairseq documents about a training holds while its updates are whole steps: the log, validation, EMA,
precisions, moves between stock fairseq and ours, the ends of epochs and of training, and what makes steps fall back.

As in test_ls_trainer.py the steps run without graphs on the CPU. Flat fp16 needs two stand-ins there, as fairseq asks
for the current CUDA device.
"""

from __future__ import annotations

import math
import shutil

import pytest
import torch

from lightseq_fairseq.plugin import ls_trainer
from lightseq_fairseq.plugin.ls_trainer import LSTrainer
from tests import tolerances
from tests.conftest import build_model, training_args
from tests.plugin.test_ls_trainer import OURS, RECIPE, SIZES, STOCK, Run, assert_same_curve

VALIDATING = [flag for flag in RECIPE if flag != "--disable-validation"]
TIMES = {"wps", "ups", "wall", "train_wall", "gb_free"}
"""What a log line says about speed and memory, not about the training."""
FP16 = ["--fp16", "--fp16-init-scale", "4"]
LOSS_16_BIT = 1e-2
"""Relative; 16-bit roundings of two implementations drift apart so far within 20 updates."""


class ValidatingRun(Run):
    recipe = VALIDATING


@pytest.fixture
def stock_trainer():
    from fairseq.trainer import Trainer

    return Trainer


@pytest.fixture
def train(data_bin, tmp_path, monkeypatch, device):
    """train(trainer class, folder, *flags) -> Run; on the CPU fairseq's flat fp16 runs too."""
    if device.type == "cpu":
        monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
        monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)

    def run(trainer_class, folder, *flags, kind=Run):
        done = kind(data_bin, tmp_path / folder, monkeypatch, device, trainer_class,
                    *(OURS if trainer_class is LSTrainer else STOCK), *flags)
        assert trainer_class is not LSTrainer or done.trainer._step is not None, done.trainer.obstacle
        return done

    return run


@pytest.fixture
def log_lines(monkeypatch):
    """(tag, step, values) of each line that fairseq's progress bar is given, speed and memory left out."""
    from fairseq.logging import progress_bar

    lines = []

    def record(bar, stats, tag=None, step=None):
        lines.append((tag, step, {key: float(value) for key, value in stats.items() if key not in TIMES}))

    for method in ("log", "print"):
        monkeypatch.setattr(progress_bar.SimpleProgressBar, method, record)
    return lines


@pytest.mark.parametrize("flags", [
    ["--validate-interval-updates", "7"],
    ["--validate-interval-updates", "3", "--save-interval-updates", "6", "--validate-after-updates", "5"],
    ["--update-freq", "3", "--skip-remainder-batch", "--max-epoch", "3", "--max-update", "0"],
    ["--update-freq", "2,1", "--max-epoch", "2", "--max-update", "0", "--clip-norm", "0.5"],
    ["--max-update", "1"],
    ["--log-interval", "1", "--max-update", "4"],
    ["--report-accuracy", "--max-update", "10"],
], ids=" ".join)
def test_log_lines_are_fairseqs(flags, train, log_lines, stock_trainer):
    """Of training, of epochs and of validation, each at its update: a result read too late would be in another."""
    curves = []
    for trainer, folder in ((stock_trainer, "stock"), (LSTrainer, "ours")):
        log_lines.clear()
        train(trainer, folder, "--log-interval", "5", *flags, kind=ValidatingRun)
        curves.append(list(log_lines))
    stock, ours = curves
    assert [line[:2] for line in ours] == [line[:2] for line in stock] and len(stock) >= 2
    for (tag, step, mine), (_, _, theirs) in zip(ours, stock, strict=True):
        assert mine.keys() == theirs.keys(), (tag, step)
        for key, value in theirs.items():
            assert mine[key] == pytest.approx(value, rel=2e-3, abs=2e-3), (tag, step, key)


@pytest.mark.parametrize("flags", [
    ["--ema-decay", "0.9"],
    ["--ema-decay", "0.9", "--ema-start-update", "5", "--ema-update-freq", "2"],
    ["--ema-decay", "0.9", "--ema-fp32", "--bf16"],
    ["--ema-decay", "0.9", "--ema-fp32", "--fp16", "--fp16-init-scale", str(2**40)],  # no average over skipped updates
], ids=" ".join)
def test_exponential_moving_average_is_fairseqs(flags, train, stock_trainer):
    stock, ours = (train(trainer, folder, "--store-ema", *flags)
                   for trainer, folder in ((stock_trainer, "stock"), (LSTrainer, "ours")))
    want, got = (run.trainer.ema.get_model().state_dict() for run in (stock, ours))
    moved = max(float((value.cpu() - stock.state[name].cpu()).abs().max()) for name, value in want.items())
    assert moved > 1e-3, "the average must differ from the model for the test to tell them apart"
    if "--bf16" in flags or "--fp16" in flags:
        # where a gradient is near 0 its sign is rounding's, and Adam takes a whole step by it: so on the whole
        apart, way = (sum(float((value.float() - other[name].to(value).float()).abs().sum())
                          for name, value in want.items() if value.is_floating_point()) for other in (got, stock.state))
        assert apart < 0.1 * way
        return
    for name, value in want.items():
        if not name.endswith("k_proj.bias"):  # see test_updates_are_fairseqs
            torch.testing.assert_close(got[name], value, rtol=2e-2, atol=2e-4)


def test_the_moving_average_is_in_the_checkpoint_and_goes_on_from_it(train, tmp_path):
    flags = ["--store-ema", "--ema-decay", "0.9"]
    whole = train(LSTrainer, "whole", *flags, "--max-update", "14")
    train(LSTrainer, "parts", *flags, "--max-update", "7")
    rest = train(LSTrainer, "parts", *flags, "--max-update", "14")
    saved = torch.load(tmp_path / "parts" / "checkpoint_last.pt")["extra_state"]["ema"]
    for name, value in whole.trainer.ema.get_model().state_dict().items():
        assert torch.equal(rest.trainer.ema.get_model().state_dict()[name], value), name
        assert torch.equal(saved[name], value.cpu()), name


@pytest.mark.parametrize("flags", [["--bf16"], FP16, [*FP16, "--fp16-no-flatten-grads"]], ids=" ".join)
def test_every_precision_follows_fairseqs_loss_curve(flags, train, stock_trainer):
    stock, ours = (train(trainer, folder, *flags)
                   for trainer, folder in ((stock_trainer, "stock"), (LSTrainer, "ours")))
    assert len(ours.logs) == len(stock.logs) == 20 and stock.logs[-1]["loss"] < stock.logs[0]["loss"]
    for mine, theirs in zip(ours.logs, stock.logs, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=LOSS_16_BIT)


@pytest.mark.parametrize("flags", [
    ["--fp16-init-scale", str(2**40)],  # two dozen overflows in front of the first update
    ["--fp16-init-scale", str(2**16), "--fp16-scale-window", "2"],  # and again every other update
    ["--fp16-init-scale", str(2**16), "--fp16-scale-window", "2", "--update-freq", "2", "--log-interval", "1"],
], ids=" ".join)
def test_overflows_skip_updates_as_fairseqs_do(flags, train, log_lines, stock_trainer):
    stock, ours = (train(trainer, folder, "--fp16", *flags, "--max-update", "12")
                   for trainer, folder in ((stock_trainer, "stock"), (LSTrainer, "ours")))
    assert ours.trainer.get_num_updates() == stock.trainer.get_num_updates() == 12
    scaler = ours.trainer.optimizer.scaler
    assert scaler._last_overflow_iter >= 0 and scaler.__dict__ == stock.trainer.optimizer.scaler.__dict__
    for mine, theirs in zip(ours.logs, stock.logs, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=LOSS_16_BIT)
    half = len(log_lines) // 2
    assert [line[:2] for line in log_lines[:half]] == [line[:2] for line in log_lines[half:]]


def test_a_loss_scale_below_the_minimum_ends_training_with_a_crash_checkpoint(train, tmp_path, stock_trainer):
    flags = ["--fp16", "--fp16-init-scale", str(2**40), "--min-loss-scale", str(2**37)]
    with pytest.raises(FloatingPointError, match="Minimum loss scale reached"):
        train(LSTrainer, "ours", *flags)
    assert torch.load(tmp_path / "ours" / "crash.pt")["optimizer_history"][-1]["criterion_name"]


@pytest.mark.parametrize("flags", [[], ["--bf16"], FP16], ids=" ".join)
def test_losses_join_from_stock_to_ours_to_stock(flags, train, stock_trainer):
    """Checkpoints within an epoch, with optimizer, scheduler and batches; no --reset-*."""
    whole = train(stock_trainer, "whole", *flags, "--max-update", "15")
    legs = [train(trainer, "legs", *flags, "--max-update", str(updates)).logs
            for trainer, updates in ((stock_trainer, 5), (LSTrainer, 10), (stock_trainer, 15))]
    assert [len(leg) for leg in legs] == [5, 5, 5]
    joined = [log["loss"] for leg in legs for log in leg]
    assert joined == pytest.approx([log["loss"] for log in whole.logs],
                                   rel=LOSS_16_BIT if flags else tolerances.LOSS_CURVE["rtol"])


def test_reset_optimizer_begins_anew_from_the_parameters(train, tmp_path, stock_trainer):
    train(stock_trainer, "stock", "--max-update", "8")
    shutil.copytree(tmp_path / "stock", tmp_path / "ours")
    resets = ["--reset-optimizer", "--reset-lr-scheduler", "--reset-dataloader", "--reset-meters"]
    stock, ours = (train(trainer, folder, *resets, "--max-update", "6")
                   for trainer, folder in ((stock_trainer, "stock"), (LSTrainer, "ours")))
    assert len(ours.logs) == 6
    assert_same_curve(ours, stock)
    state = torch.load(tmp_path / "ours" / "checkpoint_last.pt")["last_optimizer_state"]["state"]
    assert {entry["step"] for entry in state.values()} == {6}


def test_the_seed_decides_everything(train):
    dropout = ["--dropout", "0.2", "--attention-dropout", "0.1", "--activation-dropout", "0.1"]
    first, second, other = (train(LSTrainer, f"run{i}", *dropout, "--seed", seed, "--no-save")
                            for i, seed in enumerate(("3", "3", "4")))
    assert first.logs == second.logs and first.logs != other.logs
    assert all(torch.equal(value, second.state[name]) for name, value in first.state.items())


def test_falling_back_is_said_once_with_its_reason(data_bin, tmp_path, monkeypatch, device):
    lines = []
    monkeypatch.setattr(ls_trainer.logger, "info", lambda message, *args: lines.append(message % args))
    run = Run(data_bin, tmp_path, monkeypatch, device, LSTrainer, *OURS, "--encoder-layerdrop", "0.2",
              "--max-epoch", "3", "--max-update", "0", "--max-tokens", "1000")
    assert run.trainer._step is None and run.trainer.get_num_updates() > 3
    assert lines == ["an update is not one graph, because layers are dropped at random"]


def users_task(trainer, monkeypatch):
    monkeypatch.setattr(type(trainer.task), "train_step", lambda task, *args, **kwargs: None)


def users_criterion(trainer, monkeypatch):
    criterion = trainer.get_criterion()
    criterion.__class__ = type("Users", (type(criterion),), {"forward": lambda self, model, sample: None})


def users_model(trainer, monkeypatch):
    model = trainer.get_model()
    model.__class__ = type("Users", (type(model),), {"forward": lambda self, **net_input: None})


@pytest.mark.parametrize("users_own, reason", [
    (users_task, "the task makes steps of its own"), (users_criterion, "the criterion is not"),
    (users_model, "the model has a forward of its own")])
def test_a_users_own_step_is_not_taken_over(users_own, reason, data_bin, monkeypatch):
    monkeypatch.setattr(LSTrainer, "whole_step_devices", ("cpu",))
    task, model = build_model(data_bin, *OURS, *SIZES)
    args = training_args(data_bin, *RECIPE, *OURS)
    trainer = LSTrainer(args, task, model, task.build_criterion(args))
    assert trainer.obstacle is None
    del trainer.__dict__["obstacle"]
    users_own(trainer, monkeypatch)
    assert reason in trainer.obstacle


def test_gradients_that_are_not_finite_end_fp32_training(train, tmp_path):
    """The learning rate blows the model up; fairseq raises the same error."""
    with pytest.raises(FloatingPointError, match="gradients are Nan/Inf"):
        train(LSTrainer, "ours", "--lr", "1e30", "--clip-norm", "0")
    state = torch.load(tmp_path / "ours" / "crash.pt")["model"]
    assert any(not math.isfinite(float(value.sum())) or float(value.abs().max()) > 1e10 for value in state.values())
