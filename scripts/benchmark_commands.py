#!/usr/bin/env python3
"""Run fairseq-train and lightseq-train as a user does and read the words a second that they print.

    python scripts/benchmark_commands.py DATA_BIN [--cases base-512,base-4096,base-16384,big-4096] [--dtypes fp16,bf16]
                                         [--gpus 1,4]

Data loading, logging and everything else included; DATA_BIN as for benchmark_train.py. Each command trains --epochs
epochs, the last of which counts, as all shapes of batches have been seen by then: words of its log lines over their
seconds. Further arguments go to both commands. Rows go to scripts/results/commands.json, and a table is printed:
lightseq-train against fairseq-train, and several GPUs (each with batches of that size) against the fewest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from benchmark_train import CONTENDERS, RESULTS, ROOT, machine, training_arguments  # noqa: E402

MODULES = {"fairseq": "fairseq_cli.train", "lightseq": "lightseq_fairseq.cli.train"}


def words_per_second(log: str, epoch: int) -> tuple[float, float]:
    """Words and updates a second in the ``train_inner`` lines of an epoch, the first of which also has its start."""
    mark = "| train_inner | "
    lines = [json.loads(line.split(mark, 1)[1]) for line in log.splitlines() if mark + "{" in line]
    lines = [line for line in lines if line["epoch"] == epoch]
    lines = lines[1:] if len(lines) > 1 else lines
    if not lines:
        raise ValueError(f"no line of epoch {epoch} in the log; log more often or train longer")
    seconds = sum(1 / float(line["ups"]) for line in lines)  # of one update of each line, all lines having as many
    words = sum(float(line["wps"]) / float(line["ups"]) for line in lines)
    return words / seconds, len(lines) / seconds


def measure(contender: str, case: str, dtype: str, gpus: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row: a command that must succeed."""
    command = [sys.executable, "-m", MODULES[contender], *training_arguments(contender, case, str(args.data), dtype),
               "--num-workers", str(args.num_workers), "--max-epoch", str(args.epochs), "--disable-validation",
               "--no-save", "--log-format", "json", "--log-interval", str(args.log_interval), *args.further]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if torch.cuda.is_available():
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(gpus)))
    start = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}\n{result.stdout[-3000:]}{result.stderr[-3000:]}")
    words, updates = words_per_second(result.stdout, args.epochs)
    return {"case": case, "dtype": dtype, "gpus": gpus, "contender": contender, "words_per_s": round(words),
            "updates_per_s": round(updates, 2), "command_seconds": round(time.monotonic() - start, 1)}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; ratios to fairseq-train on as many GPUs, and to the same command on the fewest."""
    lines = ["| case | GPUs | fairseq-train, words/s | lightseq-train, words/s | ratio | against fewest GPUs |",
             "|---|---|---|---|---|---|"]
    speed = {(row["case"], row["dtype"], row["gpus"], row["contender"]): row["words_per_s"] for row in rows}
    fewest = min(row["gpus"] for row in rows)
    for case, dtype, gpus in dict.fromkeys((row["case"], row["dtype"], row["gpus"]) for row in rows):
        stock, ours, one = (speed.get(key) for key in (
            (case, dtype, gpus, "fairseq"), (case, dtype, gpus, "lightseq"), (case, dtype, fewest, "lightseq")))
        cells = [f"{case} {dtype}", gpus, stock or "", ours or "", f"{ours / stock:.1f}" if ours and stock else "",
                 f"{ours / one:.2f}" if ours and one else ""]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="fairseq-preprocess folder")
    parser.add_argument("--cases", default="base-512,base-4096,base-16384,big-4096")
    parser.add_argument("--dtypes", default="fp16" if torch.cuda.is_available() else "fp32")
    parser.add_argument("--gpus", default="1")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--log-interval", type=int, default=20)
    parser.add_argument("--num-workers", type=int, default=1, help="fairseq's own default")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args, args.further = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    about, rows = machine(), []
    for case in args.cases.split(","):
        for dtype in args.dtypes.split(","):
            for gpus in map(int, args.gpus.split(",")):
                for contender in args.contenders.split(","):
                    rows.append(measure(contender, case, dtype, gpus, args))
                    print(json.dumps(rows[-1]), flush=True)
                    (args.out / "commands.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
