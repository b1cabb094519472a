"""Whole runs of fairseq-train: ls_transformer + ls_label_smoothed_cross_entropy + ls_adam against the stock three.

The toy corpus makes about 16 batches an epoch at --max-tokens 250, so that 20 updates cross an epoch boundary.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lightseq_fairseq.plugin  # noqa: F401
from tests import tolerances
from tests.conftest import build_model, preprocess
from tests.plugin.recorded_run import RECIPE, SIZES, Run

MULTI30K = Path(__file__).parents[3] / "shared" / "data" / "multi30k"
NO_DROPOUT = ["--dropout", "0", "--attention-dropout", "0", "--activation-dropout", "0"]
DROPOUT = ["--dropout", "0.2", "--attention-dropout", "0.1", "--activation-dropout", "0.1"]
PRE_NORM = ["--encoder-normalize-before", "--decoder-normalize-before"]
CASES = {
    "post-LN": ("transformer", []),
    "pre-LN": ("transformer", PRE_NORM),
    "iwslt": ("transformer_iwslt_de_en", []),
    "t2t": ("transformer_wmt_en_de_big_t2t", []),
    "update-freq": ("transformer", ["--update-freq", "2", "--clip-norm", "0"]),
    "pre-LN, tied, sentence-avg": ("transformer", [*PRE_NORM, "--share-decoder-input-output-embed", "--sentence-avg"]),
}


def stock(arch: str) -> list[str]:
    return ["--arch", arch, "--criterion", "label_smoothed_cross_entropy", "--optimizer", "adam"]


def ours(arch: str) -> list[str]:
    return ["--arch", f"ls_{arch}", "--criterion", "ls_label_smoothed_cross_entropy", "--optimizer", "ls_adam"]


def train(data: Path, save_dir: Path, monkeypatch, *flags: str) -> Run:
    """fairseq-train on the CPU."""
    from fairseq.trainer import Trainer

    return Run(data, save_dir, monkeypatch, torch.device("cpu"), Trainer, *flags)


@pytest.fixture
def run(data_bin, tmp_path, monkeypatch):
    number = iter(range(10))
    return lambda *flags: train(data_bin, tmp_path / f"run{next(number)}", monkeypatch, *flags)


def assert_same_curve(got: list[float], want: list[float]):
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), **tolerances.LOSS_CURVE)


@pytest.mark.parametrize("case", CASES)
def test_twenty_updates_follow_fairseqs_loss_curve(run, case):
    arch, flags = CASES[case]
    got, want = (run(*three(arch), *SIZES, *NO_DROPOUT, *flags, "--no-save") for three in (ours, stock))
    assert len(want.losses) == 20 and want.losses[-1] < 0.9 * want.losses[0], "there must be something to learn"
    assert type(got.trainer.get_model()) is not type(want.trainer.get_model())
    assert_same_curve(got.losses, want.losses)
    torch.testing.assert_close(torch.tensor(got.norms), torch.tensor(want.norms), rtol=1e-3, atol=0)


@pytest.mark.parametrize("flags", [
    ["--bf16"], ["--memory-efficient-bf16"], ["--fp16", "--fp16-no-flatten-grads"], ["--memory-efficient-fp16"],
    ["--amp"]], ids=" ".join)
def test_every_precision_follows_fairseqs_loss_curve(run, flags):
    flags = [*SIZES, *NO_DROPOUT, *flags, "--fp16-init-scale", "4", "--no-save"]
    got, want = (run(*three("transformer"), *flags) for three in (ours, stock))
    assert len(want.losses) == 20 and want.losses[-1] < 0.9 * want.losses[0]
    torch.testing.assert_close(torch.tensor(got.losses), torch.tensor(want.losses), rtol=2e-2, atol=0)


@pytest.fixture(scope="module")
def multi30k(tmp_path_factory) -> Path:
    """The first sentences of Multi30k, words as they come; those seen once are unknown."""
    if not MULTI30K.exists():
        pytest.skip("Multi30k is not beside this checkout (../shared/data/multi30k)")
    text = tmp_path_factory.mktemp("multi30k-text")
    for split, source, count in (("train", "train", 1500), ("valid", "val", 50), ("test", "test_2016_flickr", 50)):
        for ours, theirs in (("xx", "en"), ("yy", "de")):
            lines = (MULTI30K / f"{source}.{theirs}").read_text().lower().splitlines()[:count]
            (text / f"{split}.{ours}").write_text("\n".join(lines) + "\n")
    return preprocess(text, tmp_path_factory.mktemp("multi30k"), "--thresholdsrc", "2", "--thresholdtgt", "2")


def test_twenty_updates_on_real_text(multi30k, tmp_path, monkeypatch):
    got, want = (train(multi30k, tmp_path, monkeypatch, *three("transformer_iwslt_de_en"), *SIZES, *NO_DROPOUT,
                       "--max-tokens", "1000", "--no-save") for three in (ours, stock))
    assert len(want.losses) == 20 and want.losses[-1] < 0.9 * want.losses[0]
    assert_same_curve(got.losses, want.losses)


@pytest.mark.parametrize("stop", ["checkpoint_1_7.pt", "checkpoint1.pt", "checkpoint_2_14.pt"],
                         ids=["within epoch 1", "at the epoch boundary", "within epoch 2"])
@pytest.mark.parametrize("three", [ours, stock])
def test_resumed_run_continues_bit_for_bit(run, three, stop):
    """With dropout: its seed is the number of the update. Stock fairseq draws other batches from epoch 2 on."""
    flags = [*three("transformer"), *SIZES, *DROPOUT, "--save-interval-updates", "7", "--max-tokens", "400"]
    whole = run(*flags)
    resumed = run(*flags, "--restore-file", str(whole.save_dir / stop))
    done = len(whole.losses) - len(resumed.losses)
    assert 0 < done < 20 and torch.load(whole.save_dir / stop)["optimizer_history"][-1]["num_updates"] == done
    assert resumed.losses == whole.losses[done:]
    for name, value in resumed.state.items():
        assert torch.equal(value, whole.state[name]), name


@pytest.mark.parametrize("first, then", [(stock, ours), (ours, stock)], ids=["stock to ours", "ours to stock"])
def test_runs_move_between_stock_and_ours(run, first, then):
    """With everything: optimizer, scheduler and batches go on, no --reset-*."""
    flags = [*SIZES, *NO_DROPOUT, "--save-interval-updates", "8"]
    whole = run(*first("transformer"), *flags)
    moved = run(*then("transformer"), *flags, "--restore-file", str(whole.save_dir / "checkpoint_1_8.pt"))
    assert len(moved.losses) == 12
    assert_same_curve(moved.losses, whole.losses[8:])


def test_fairseq_without_us_goes_on_from_our_checkpoint(run, data_bin, tmp_path):
    """fairseq-train in a process that never heard of us; 2.6's weights_only is put off, as it must be there.

    It sees no GPU either: with one, its --cpu fails in clipping.
    """
    flags = [*SIZES, *NO_DROPOUT, "--save-interval-updates", "8"]
    begun = run(*ours("transformer"), *flags)
    log = subprocess.run(
        [sys.executable, "-m", "fairseq_cli.train", str(data_bin), "--cpu", *stock("transformer"), *RECIPE, *flags,
         "--restore-file", str(begun.save_dir / "checkpoint_1_8.pt"), "--save-dir", str(tmp_path / "stock"),
         "--log-format", "json", "--log-interval", "1"],
        env=os.environ | {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, cwd=tmp_path)
    assert log.returncode == 0, log.stdout[-2000:] + log.stderr[-2000:]
    assert "(epoch 1 @ 8 updates)" in log.stdout and "lightseq" not in log.stdout.replace("ls_transformer", "")
    state = torch.load(tmp_path / "stock" / "checkpoint_last.pt")
    assert state["optimizer_history"][-1]["num_updates"] == 20
    for name, value in begun.state.items():  # 8 updates together, 12 alike but for rounding
        torch.testing.assert_close(state["model"][name], value, rtol=0, atol=1e-3)


@pytest.mark.parametrize("arch, flags", [
    ("transformer", []), ("transformer", [*PRE_NORM, "--layernorm-embedding", "--encoder-learned-pos"]),
    ("transformer_wmt_en_de_big_t2t", ["--share-decoder-input-output-embed"])], ids=str)
def test_flat_fp16_parameters_are_laid_out_as_fairseqs(data_bin, arch, flags):
    """--fp16 keeps moments in one flat tensor, which another order of parameters would scramble."""
    layouts = []
    for three in (ours, stock):
        _, model = build_model(data_bin, *three(arch), *SIZES, *flags)
        layouts.append([(name, tuple(param.shape)) for name, param in model.named_parameters()])
    assert layouts[0] == layouts[1] and len(layouts[0]) > 40


def test_flat_fp16_run_goes_on_in_the_other(run, monkeypatch):
    """On the CPU fairseq's flat tensors need a stand-in for the CUDA device they are keyed by."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    flags = [*SIZES, *NO_DROPOUT, "--fp16", "--fp16-init-scale", "4", "--save-interval-updates", "8"]
    whole = run(*stock("transformer"), *flags)
    moved = run(*ours("transformer"), *flags, "--restore-file", str(whole.save_dir / "checkpoint_1_8.pt"))
    torch.testing.assert_close(torch.tensor(moved.losses), torch.tensor(whole.losses[8:]), rtol=2e-2, atol=0)
