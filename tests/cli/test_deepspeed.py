"""lightseq-deepspeed trains what lightseq-train trains: the same losses, checkpoints that move between the two.

DeepSpeed is no dependency: without it (pip install 'deepspeed==0.19.*') only refusals are tested. Its first start
compiles for a minute or two.
"""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from lightseq_fairseq.cli import deepspeed
from tests.cli.test_train import RECIPE, command, lightseq_train, logged
from tests.conftest import build_model, training_args

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None,
                                     reason="DeepSpeed is not installed (pip install 'deepspeed==0.19.*')")
TWO_RANKS_ON_THE_CPU = """
import torch
torch.cuda.device_count = lambda: 2
from lightseq_fairseq.cli.{} import main
if __name__ == "__main__":
    main()
"""
FLAGS = [*RECIPE, "--arch", "ls_transformer", "--disable-validation", "--max-tokens", 270, "--clip-norm", "0.5",
         "--lr-scheduler", "inverse_sqrt", "--warmup-updates", 4]


def losses(output: str) -> list[float]:
    return [float(line["loss"]) for line in logged(output, "train_inner")]


@needs_deepspeed
@pytest.mark.parametrize("precision", [[], ["--bf16"]], ids=["fp32", "bf16"])
def test_losses_join_from_ours_to_deepspeed_to_ours(precision, data_bin, tmp_path):
    """On two ranks, which take in an update what one process takes with --update-freq 2."""
    flags = [data_bin, *FLAGS, *precision]
    whole = losses(lightseq_train(*flags, "--update-freq", 2, "--max-update", 7, "--save-dir", tmp_path / "whole"))
    joined = []
    for program, updates in (("train", 2), ("deepspeed", 5), ("train", 7)):
        script = tmp_path / f"two_ranks_{program}.py"
        script.write_text(TWO_RANKS_ON_THE_CPU.format(program))
        output = command([str(script)], *flags, "--save-dir", tmp_path / "legs", "--max-update", updates,
                         "--distributed-world-size", 2, "--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp")
        assert "training on 2 devices" in output
        joined += losses(output)
    assert len(whole) == 7
    assert joined == pytest.approx(whole, rel=1e-2 if precision else 2e-3)
    want, got = (torch.load(tmp_path / folder / "checkpoint_last.pt")["last_optimizer_state"]
                 for folder in ("whole", "legs"))
    assert got["state"].keys() == want["state"].keys()
    for name, state in want["state"].items():
        assert got["state"][name]["step"] == state["step"] == 7
        torch.testing.assert_close(got["state"][name]["exp_avg"], state["exp_avg"], rtol=5e-2,
                                   atol=5e-3 if precision else 5e-4)


@needs_deepspeed
def test_one_process_accumulates_batches(data_bin, tmp_path):
    flags = [data_bin, *FLAGS, "--update-freq", 3, "--max-update", 4, "--no-save"]
    got, want = (losses(command(["-m", f"lightseq_fairseq.cli.{program}"], *flags))
                 for program in ("deepspeed", "train"))
    assert got == pytest.approx(want, rel=2e-3) and len(want) == 4


def test_absence_of_deepspeed_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="DeepSpeed is not installed"):
        deepspeed.main()


@pytest.mark.parametrize("flags, named", [
    (["--amp"], "--amp"), (["--memory-efficient-bf16", "--bf16"], "--memory-efficient"),
    (["--optimizer", "adam"], "--optimizer adam"), (["--amp", "--use-bmuf"], "--amp.*; --use-bmuf")])
def test_what_is_not_supported_is_refused_by_name(flags, named, data_bin):
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    from lightseq_fairseq.plugin.deepspeed_trainer import DeepSpeedTrainer

    flags = ["--arch", "ls_transformer", "--criterion", "ls_label_smoothed_cross_entropy", "--optimizer", "ls_adam",
             "--max-tokens", "100", *flags]
    task, model = build_model(data_bin, *flags)
    cfg = convert_namespace_to_omegaconf(training_args(data_bin, *flags))
    with pytest.raises(ValueError, match=f"lightseq-deepspeed does not support .*{named}"):
        DeepSpeedTrainer(cfg, task, model, task.build_criterion(cfg.criterion))
