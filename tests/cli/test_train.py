"""lightseq-train and lightseq-validate as commands: one process, two ranks, a --user-dir of the user's own."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import lightseq_fairseq
from lightseq_fairseq import fairseq_compat

ROOT = Path(__file__).parents[2]
TINY = [flag for side in ("encoder", "decoder") for flag in (
    f"--{side}-layers", "1", f"--{side}-embed-dim", "16", f"--{side}-ffn-embed-dim", "16",
    f"--{side}-attention-heads", "2")]
RECIPE = [*TINY, "--task", "translation", "--dropout", "0", "--lr", "1e-2", "--max-tokens", "250", "--cpu",
          "--num-workers", "0", "--log-format", "json", "--log-interval", "1", "--criterion",
          "ls_label_smoothed_cross_entropy", "--label-smoothing", "0.1", "--optimizer", "ls_adam"]
TWO_RANKS_ON_THE_CPU = """
import torch
torch.cuda.device_count = lambda: 2
from lightseq_fairseq.cli.train import main
{}
if __name__ == "__main__":
    main()
"""
WHOLE_STEPS = """
from lightseq_fairseq.plugin.ls_trainer import LSTrainer
LSTrainer.whole_step_devices = ("cpu",)
"""
USER_PACKAGE = """
from fairseq.models import ARCH_CONFIG_REGISTRY, register_model, register_model_architecture
from fairseq.models.transformer import TransformerModel

@register_model("users_model")
class UsersModel(TransformerModel):
    pass

register_model_architecture("users_model", "users_model")(ARCH_CONFIG_REGISTRY["transformer"])
register_model_architecture("ls_transformer", "users_ls_transformer")(ARCH_CONFIG_REGISTRY["ls_transformer"])
"""


def command(program: list[str], *arguments: object) -> str:
    """Output of a command that must succeed, on the CPU: there two ranks need no two GPUs."""
    result = subprocess.run([sys.executable, *program, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def lightseq_train(*arguments: object) -> str:
    return command(["-m", "lightseq_fairseq.cli.train"], *arguments)


def logged(output: str, part: str) -> list[dict]:
    """The JSON lines of fairseq's ``train_inner``, ``train`` or ``valid`` progress bar."""
    return [json.loads(line.split(f"| {part} | ")[1]) for line in output.splitlines() if f"| {part} | {{" in line]


@pytest.fixture(autouse=True)
def checkpoints_can_be_read():
    fairseq_compat.apply()


@pytest.fixture(scope="module")
def user_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("user") / "users_own_package"
    folder.mkdir()
    (folder / "__init__.py").write_text(USER_PACKAGE)
    return folder


@pytest.fixture(scope="module")
def trained(data_bin, tmp_path_factory) -> tuple[Path, str]:
    """Checkpoint folder and output of 6 updates on batches taken two by two."""
    folder = tmp_path_factory.mktemp("trained")
    output = lightseq_train(data_bin, *RECIPE, "--arch", "ls_transformer", "--save-dir", folder,
                            "--max-update", 6, "--update-freq", 2)
    return folder, output


def test_train_logs_as_fairseq_does(trained):
    _, output = trained
    losses = [float(line["loss"]) for line in logged(output, "train_inner")]
    assert len(losses) == 6 and losses[-1] < losses[0]
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| INFO \| "
    assert all(re.match(stamp, line) for line in output.splitlines() if "fairseq_cli.train" in line)
    assert re.search(stamp + r"fairseq_cli\.train \| model: LSTransformerModel", output)


def test_two_ranks_train_and_resume(trained, data_bin, user_dir, tmp_path):
    """Two spawned processes see the two batches that one takes with --update-freq 2, and both user packages."""
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS_ON_THE_CPU.format(""))
    folder = tmp_path / "checkpoints"
    flags = [*RECIPE, "--user-dir", user_dir, "--arch", "users_ls_transformer", "--save-dir", folder,
             "--disable-validation", "--distributed-world-size", 2, "--distributed-backend", "gloo",
             "--ddp-backend", "legacy_ddp"]
    command([str(script)], data_bin, *flags, "--max-update", 4)
    output = command([str(script)], data_bin, *flags, "--max-update", 6)
    assert "training on 2 devices" in output and "@ 4 updates)" in output
    got, want = (torch.load(path / "checkpoint_last.pt") for path in (folder, trained[0]))
    assert got["optimizer_history"][-1]["num_updates"] == 6
    for name, value in want["model"].items():
        torch.testing.assert_close(got["model"][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("flags", [["--stop-time-hours", "10"], ["--bf16", "--clip-norm", "0.5"]], ids=" ".join)
def test_two_ranks_of_whole_steps_train_as_one_that_takes_batches_two_by_two(flags, data_bin, tmp_path):
    """Past the end of an epoch, where the last batch leaves one rank without."""
    script = tmp_path / "ranks.py"
    script.write_text(TWO_RANKS_ON_THE_CPU.format(WHOLE_STEPS))
    flags = [data_bin, *RECIPE, "--arch", "ls_transformer", "--disable-validation", "--max-tokens", 270,
             "--max-epoch", 2, *flags]
    ranks = ["--distributed-world-size", 2, "--distributed-backend", "gloo"]
    one, two = (command([str(script)], *flags, "--save-dir", tmp_path / name, *more)
                for name, more in (("one", ["--update-freq", 2, "--distributed-world-size", 1]), ("two", ranks)))
    assert "training on 2 devices" in two
    want, got = (logged(output, "train_inner") for output in (one, two))
    assert len(got) == len(want) > 10
    for mine, theirs in zip(got, want, strict=True):
        assert mine["wpb"] == theirs["wpb"] and mine["bsz"] == theirs["bsz"]
        assert float(mine["loss"]) == pytest.approx(float(theirs["loss"]), rel=5e-3)
    batches = [float(line["bsz"]) for line in want]
    assert min(batches) < 0.8 * max(batches), "an epoch must end with a single batch"
    one, two = (torch.load(tmp_path / name / "checkpoint_last.pt")["model"] for name in ("one", "two"))
    # Sums in bf16 are rounded differently in other batches, and Adam makes whole steps of small gradients: as vectors
    # the models still agree. Key biases apart, which the softmax does not see: their gradients are rounding alone.
    names = [name for name in one if not name.endswith("k_proj.bias")]
    want, got = (torch.cat([model[name].float().flatten() for name in names]) for model in (one, two))
    assert (got - want).norm() < (1e-2 if "--bf16" in flags else 1e-3) * want.norm()


def test_two_nodes_started_by_torchrun_train_as_one_process(data_bin, tmp_path):
    """As in configs/README.md, a node here being one process on the CPU."""
    script = tmp_path / "node.py"
    script.write_text(TWO_RANKS_ON_THE_CPU.format(WHOLE_STEPS).replace("lambda: 2", "lambda: 1"))
    flags = [data_bin, *RECIPE, "--arch", "ls_transformer", "--disable-validation", "--max-update", 4]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1, "--master-addr", "localhost",
                "--master-port", port, "--node-rank"]
    with ThreadPoolExecutor(2) as nodes:
        outputs = list(nodes.map(
            lambda node: command([*map(str, torchrun), str(node), str(script)], *flags, "--save-dir", tmp_path / "two",
                                 "--distributed-world-size", 2, "--distributed-backend", "gloo"), range(2)))
    lightseq_train(*flags, "--update-freq", 2, "--save-dir", tmp_path / "one")
    want, got = (torch.load(tmp_path / name / "checkpoint_last.pt")["model"] for name in ("one", "two"))
    for name, value in want.items():
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(got[name], value, rtol=1e-2, atol=1e-3)
    assert [len(logged(output, "train_inner")) for output in outputs] == [4, 0], "one rank writes the log"


def test_a_users_own_user_dir_works_beside_ours(data_bin, user_dir, tmp_path):
    lightseq_train(data_bin, *RECIPE, "--user-dir", user_dir, "--arch", "users_model", "--max-update", 2,
                   "--save-dir", tmp_path)
    cfg = torch.load(tmp_path / "checkpoint_last.pt")["cfg"]
    assert cfg["model"]._name == "users_model" and cfg["optimizer"]["_name"] == "ls_adam"
    output = command(["-m", "lightseq_fairseq.cli.validate"], data_bin, "--user-dir", user_dir, "--cpu",
                     "--task", "translation", "--path", tmp_path / "checkpoint_last.pt", "--batch-size", 8,
                     "--log-format", "json")
    assert len(logged(output, "valid")) == 1


def test_validate_gives_the_loss_of_training(trained, data_bin):
    folder, output = trained
    want = logged(output, "valid")[-1]
    output = command(["-m", "lightseq_fairseq.cli.validate"], data_bin, "--cpu", "--max-tokens", 250,
                     "--task", "translation", "--path", folder / "checkpoint_last.pt", "--log-format", "json")
    assert float(logged(output, "valid")[-1]["valid_loss"]) == pytest.approx(float(want["valid_loss"]), abs=2e-3)


@pytest.mark.parametrize("program", ["fairseq_cli.train", "lightseq_fairseq.cli.train"])
def test_our_package_as_user_dir(data_bin, program):
    """Stock fairseq-train learns of us so; lightseq-train does not mind being told twice."""
    output = command(["-m", program], data_bin, *RECIPE, "--user-dir", Path(lightseq_fairseq.__file__).parent,
                     "--arch", "ls_transformer", "--max-update", 1, "--no-save", "--disable-validation")
    assert "model: LSTransformerModel" in output
