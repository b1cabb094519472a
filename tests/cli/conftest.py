"""A briefly trained stock model, and fairseq's commands beside ours in this process."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from unittest import mock

import pytest

from tests.conftest import training_args

TINY = [flag for side in ("encoder", "decoder") for flag in (
    f"--{side}-layers", "2", f"--{side}-embed-dim", "32", f"--{side}-ffn-embed-dim", "64",
    f"--{side}-attention-heads", "4")]


def train_stock(data: Path, folder: Path, *flags: str) -> Path:
    """Train fairseq's own transformer as ``flags`` say; returns the checkpoint."""
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq_cli import train

    args = training_args(
        data, "--arch", "transformer", "--optimizer", "adam", "--criterion", "label_smoothed_cross_entropy",
        "--label-smoothing", "0.1", "--dropout", "0.1", "--lr", "5e-3", "--lr-scheduler", "inverse_sqrt",
        "--warmup-updates", "20", "--max-tokens", "1000", "--num-workers", "0", "--no-progress-bar",
        "--disable-validation", "--no-epoch-checkpoints", "--save-dir", str(folder), *flags)
    train.main(convert_namespace_to_omegaconf(args))
    return folder / "checkpoint_last.pt"


@pytest.fixture(scope="session")
def checkpoint(data_bin, tmp_path_factory) -> Path:
    """Good enough that sentences differ and end, bad enough that hypotheses compete."""
    return train_stock(data_bin, tmp_path_factory.mktemp("stock"), *TINY, "--max-update", "150")


@pytest.fixture(scope="session")
def second_checkpoint(data_bin, tmp_path_factory) -> Path:
    return train_stock(data_bin, tmp_path_factory.mktemp("stock"), *TINY, "--max-update", "150", "--seed", "2",
                       "--decoder-layers", "1")


def run_command(entry, *arguments: object, stdin: str = "") -> tuple[int, list[str], str]:
    """Exit status, lines on stdout, and stderr of a command's entry point, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with mock.patch.object(sys, "argv", ["command", *map(str, arguments)]), \
            mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8")), \
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = entry() or 0
        except SystemExit as end:
            status = end.code or 0
    return status, out.getvalue().splitlines(), err.getvalue()
