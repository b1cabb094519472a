#!/usr/bin/env python3
"""Train configs/train/multi30k.yaml with several seeds and precisions, average, translate and score.

    bash scripts/prepare_multi30k.sh
    python scripts/benchmark_quality.py data/multi30k/data-bin [--seeds 1,2,3] [--dtypes fp16,bf16] [--parallel 1]

Each run: the recipe (8 000 updates), the average of the checkpoints of the last 10 epochs, the test set with beam 5 and
lenpen 0.6. BLEU is what fairseq-generate prints, of words that are lower-cased and tokenised. --contenders
fairseq,lightseq trains stock fairseq too; --parallel runs trainings side by side, which costs each of them time, so
seconds are comparable only without it. Rows go to scripts/results/quality.json as soon as they are known.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from benchmark_train import RESULTS, ROOT, machine  # noqa: E402

STOCK = ["model._name=transformer", "criterion._name=label_smoothed_cross_entropy", "optimizer._name=adam"]
AVERAGED = 10
GENERATION = ["--beam", "5", "--lenpen", "0.6", "--remove-bpe", "--batch-size", "128"]


class Run(NamedTuple):
    """One training."""

    contender: str
    dtype: str
    seed: int

    def __str__(self) -> str:
        return f"{self.contender} {self.dtype} seed {self.seed}"


def command(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def environment() -> dict[str, str]:
    """That of the commands, which find this checkout first."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def training(run: Run, args: argparse.Namespace, folder: Path) -> list[str]:
    """The command of one training, whose checkpoints go to ``folder``."""
    module = {"lightseq": "lightseq_fairseq.cli.hydra_train", "fairseq": "fairseq_cli.hydra_train"}[run.contender]
    stock = [f"common.user_dir={ROOT / 'lightseq_fairseq'}", *STOCK] if run.contender == "fairseq" else []
    return command(
        module, "--config-dir", ROOT / "configs" / "train", "--config-name", "multi30k", *stock,
        f"task.data={args.data.resolve()}", f"common.seed={run.seed}", f"common.fp16={run.dtype == 'fp16'}",
        f"common.bf16={run.dtype == 'bf16'}", f"common.cpu={not torch.cuda.is_available()}", "common.log_format=json",
        f"optimization.max_update={args.max_update}", f"checkpoint.save_dir={folder / 'checkpoints'}",
        f"hydra.run.dir={folder}", *args.override)


def watched(command: list[str], label: str, max_update: int, log: Path) -> str:
    """Output of a training that must succeed; says every 30 seconds how far it is."""
    lines, said = [], time.monotonic()
    with open(log, "w") as file, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                                  env=environment()) as process:
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            lines.append(line)
            step = re.search(r'"num_updates": "(\d+)"', line)
            if step and time.monotonic() - said > 30:
                said = time.monotonic()
                loss = re.search(r'"(?:train_)?loss": "([\d.]+)"', line)
                print(f"{label}: {step[1]} of {max_update} updates, loss {loss[1] if loss else '?'}", flush=True)
    if process.returncode:
        raise RuntimeError(f"{label} failed, see {log}:\n" + "".join(lines[-20:]))
    return "".join(lines)


def output(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, env=environment())
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return result.stdout


def epoch(checkpoint: Path) -> int:
    """checkpoint12.pt -> 12."""
    return int(re.sub(r"\D", "", checkpoint.name))


def measure(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """One row: BLEU, and seconds as the training command says them and in all."""
    folder = args.work / str(run).replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    log = watched(training(run, args, folder), str(run), args.max_update, folder / "train.log")
    seconds = time.monotonic() - begin
    said = re.findall(r"done training in ([\d.]+) seconds", log)
    checkpoints = sorted((folder / "checkpoints").glob("checkpoint[0-9]*.pt"), key=epoch)[-AVERAGED:]
    if not checkpoints:
        raise RuntimeError(f"{run}: no epoch was completed, so there is nothing to average; train longer")
    model = folder / "model.pb"
    output(command("lightseq_fairseq.cli.export", "--average", *checkpoints, "-o", model))
    translated = output(command("lightseq_fairseq.cli.generate", args.data, "--path", model, *GENERATION))
    (folder / "generate.txt").write_text(translated)
    bleu = re.findall(r"BLEU4? = ([\d.]+)", translated)
    return {**run._asdict(), "bleu": float(bleu[-1]), "train_seconds": float(said[-1]),
            "command_seconds": round(seconds, 1), "updates_per_s": round(args.max_update / float(said[-1]), 1),
            "averaged": len(checkpoints)}


def summary(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean and extremes over seeds."""
    lines = ["| | BLEU, mean (least to most) | seeds | seconds of training |", "| --- | --- | --- | --- |"]
    for key in dict.fromkeys((row["contender"], row["dtype"]) for row in rows):
        own = [row for row in rows if (row["contender"], row["dtype"]) == key]
        bleu, seconds = [row["bleu"] for row in own], [row["train_seconds"] for row in own]
        lines.append(f"| {' '.join(key)} | {statistics.mean(bleu):.2f} ({min(bleu):.2f} to {max(bleu):.2f}) "
                     f"| {len(own)} | {statistics.mean(seconds):.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="data-bin of prepare_multi30k.sh")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--dtypes", default="fp16,bf16" if torch.cuda.is_available() else "fp32")
    parser.add_argument("--contenders", default="lightseq")
    parser.add_argument("--max-update", type=int, default=8000)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder for checkpoints and logs (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("override", nargs="*", help="of the recipe, such as model.dropout=0.2")
    args = parser.parse_intermixed_args()
    runs = [Run(contender, dtype, int(seed)) for seed in args.seeds.split(",") for dtype in args.dtypes.split(",")
            for contender in args.contenders.split(",")]
    args.out.mkdir(parents=True, exist_ok=True)
    about, rows, lock = {**machine(), "parallel": args.parallel}, [], threading.Lock()

    def measure_and_write(run: Run) -> None:
        row = measure(run, args)
        with lock:
            rows.append(row)
            print(json.dumps(row), flush=True)
            (args.out / "quality.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(args.parallel) as pool:
        args.work = (args.work or Path(temporary)).resolve()
        list(pool.map(measure_and_write, runs))
    print(summary(rows))


if __name__ == "__main__":
    main()
