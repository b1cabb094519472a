#!/usr/bin/env python3
"""Time training steps of stock fairseq and of ours, in one run on one machine, on the same batches.

    python scripts/benchmark_train.py DATA_BIN [--cases base-512,base-4096,base-16384,big-4096] [--dtype fp16,bf16]

DATA_BIN is a fairseq-preprocess folder with a joined dictionary; for gpt2-* and roberta-* cases one of texts
(--only-source), which come in blocks of 512 tokens. Steady state: both have seen every batch shape before the clock
starts. Results go to scripts/results/train.json and train.png: milliseconds an update, target words a second, peak GPU
memory, and the ratio to stock fairseq. With --profile the milliseconds by class of kernel instead, and those in which
none runs: scripts/results/train_profile.json and train_profile.png. The table printed at the end is README.md's.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import itertools
import json
import logging
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import step_profile  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "results"
_TRANSLATION = ["--task", "translation", "--share-all-embeddings", "--label-smoothing", "0.1"]
_TEXTS = ["--tokens-per-sample", "512", "--sample-break-mode", "none"]
ARCHITECTURES = {
    "base": ("transformer_wmt_en_de", "label_smoothed_cross_entropy", _TRANSLATION),
    "big": ("transformer_wmt_en_de_big", "label_smoothed_cross_entropy", _TRANSLATION),
    "gpt2": ("transformer_lm_gpt2_small", "cross_entropy", ["--task", "language_modeling", *_TEXTS]),
    "roberta": ("roberta_base", "masked_lm", ["--task", "masked_lm", *_TEXTS]),
}
"""Sizes of the cases: architecture and criterion by fairseq's names, and what else they need."""
CONTENDERS = ("fairseq", "lightseq")
OURS = ("lightseq", "lightseq-fp8")


def training_arguments(contender: str, case: str, data: str, dtype: str) -> list[str]:
    """The command line of one contender; only the three names differ, and for lightseq-fp8 the option --ls-fp8."""
    size, max_tokens = case.split("-")
    prefix = "ls_" if contender in OURS else ""
    arch, criterion, options = ARCHITECTURES[size]
    precision = {"fp16": ["--fp16"], "bf16": ["--bf16"], "fp32": []}[dtype]
    return [data, "--arch", prefix + arch, *options, "--dropout", "0.1", "--criterion", prefix + criterion,
            "--optimizer", prefix + "adam", "--adam-betas", "(0.9, 0.98)", "--lr", "5e-4",
            "--lr-scheduler", "inverse_sqrt", "--warmup-updates", "4000", "--clip-norm", "0.0",
            "--max-tokens", max_tokens, "--fp16-init-scale", "128", "--no-progress-bar", "--num-workers", "0",
            *precision, *(["--ls-fp8"] if contender == "lightseq-fp8" else []),
            *([] if torch.cuda.is_available() else ["--cpu"])]


def build_trainer(contender: str, arguments: list[str]) -> tuple[Any, list[Any]]:
    """The trainer that the contender's command would make, and the batches of its first epoch."""
    from fairseq import options, tasks, utils
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq.trainer import Trainer

    import lightseq_fairseq.plugin  # noqa: F401
    from lightseq_fairseq.plugin.ls_trainer import LSTrainer

    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), arguments))
    utils.set_torch_seed(1)
    task = tasks.setup_task(cfg.task)
    task.load_dataset("train")
    model, criterion = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
    trainer = (LSTrainer if contender in OURS else Trainer)(cfg, task, model, criterion)
    if contender == "compile":
        model.compile(dynamic=True)
    epoch = trainer.get_train_iterator(epoch=1, load_dataset=False)
    batches = list(epoch.next_epoch_itr(shuffle=True))
    epoch.next_epoch_itr(shuffle=True)  # steps are timed in the middle of an epoch: behind its last batch ours waits
    trainer.begin_epoch(1)
    return trainer, batches


def run_steps(trainer: Any, batches: list[Any]) -> float:
    """Seconds for one update on each batch, all of them finished."""
    from fairseq.logging import metrics

    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    synchronize()
    start = time.perf_counter()
    with metrics.aggregate("benchmark", new_root=True):
        for batch in batches:
            trainer.train_step([batch])
        if hasattr(trainer, "finish_steps"):
            trainer.finish_steps()
    synchronize()
    return time.perf_counter() - start


def free_memory() -> int:
    """Bytes of the GPU that are free once CUDA and cuBLAS have taken what every program needs."""
    if not torch.cuda.is_available():
        return 0
    square = torch.ones(64, 64, dtype=torch.half, device="cuda")
    square @ square
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def measure(contender: str, case: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    free = free_memory()
    trainer, batches = build_trainer(contender, training_arguments(contender, case, args.data, dtype))
    batches = batches[:args.steps]
    run_steps(trainer, batches)
    run_steps(trainer, batches)  # whatever the first time has only prepared is done the second time
    seconds = statistics.median(run_steps(trainer, batches) for _ in range(args.repeats))
    if contender in OURS and torch.cuda.is_available() and trainer.obstacle:
        raise SystemExit(f"{case}: steps were not taken as graphs ({trainer.obstacle})")
    ms, row = seconds / len(batches) * 1e3, {"case": case, "dtype": dtype, "contender": contender}
    if args.profile:
        kernels = step_profile.record(functools.partial(run_steps, trainer, batches))
        row |= step_profile.profile_row(kernels, len(batches), ms)
    else:
        words = sum(int(batch["ntokens"]) for batch in batches)
        row |= {"ms": round(ms, 3), "target_tokens": words // len(batches), "words_per_s": round(words / seconds)}
        if torch.cuda.is_available():
            # what the allocator took and kept, graphs' memory too (fairseq resets torch's own peak at every update)
            row["peak_gib"] = round((free - torch.cuda.mem_get_info()[0]) / 2**30, 2)
    del trainer
    gc.collect()
    torch.cuda.empty_cache()
    return row


def processor() -> str:
    """The CPU's name, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> dict[str, str]:
    """What the numbers were taken on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"none ({processor()})"
    return {"gpu": gpu, "torch": torch.__version__, "commit": commit.stdout.strip() or "unknown"}


def can_plot() -> bool:
    """Whether matplotlib is there; a line says so if it is not."""
    found = importlib.util.find_spec("matplotlib") is not None
    if not found:
        print("no plot: matplotlib is not installed")
    return found


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Bars of milliseconds an update."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = list(dict.fromkeys((row["case"], row["dtype"]) for row in rows))
    figure, axes = plt.subplots(figsize=(1.6 * len(cases) + 2, 4), layout="constrained")
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    width = 0.8 / len(contenders)
    for offset, contender in enumerate(contenders):
        heights = [next(r["ms"] for r in rows if (r["case"], r["dtype"], r["contender"]) == (*case, contender))
                   for case in cases]
        bars = axes.bar([i + width * offset for i in range(len(cases))], heights, 0.95 * width, label=contender)
        axes.bar_label(bars, fmt="%.1f")
    axes.set(ylabel="ms an update", title=title)
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(cases))], map("\n".join, cases))
    axes.legend()
    figure.savefig(path, dpi=120)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a command and dtype, a column a case, milliseconds an update."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    times = {(row["contender"], row["dtype"], row["case"]): row["ms"] for row in rows}
    lines = ["| `--max-tokens` | " + " | ".join(case.replace("-", " ") for case in cases) + " |",
             "|---" * (len(cases) + 1) + "|"]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for contender in dict.fromkeys(row["contender"] for row in rows):
            found = [times.get((contender, dtype, case)) for case in cases]
            lines.append(f"| {contender}-train, {dtype} | "
                         + " | ".join("" if ms is None else f"{ms:.1f}" for ms in found) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="fairseq-preprocess folder")
    parser.add_argument("--cases", default="base-512,base-4096,base-16384,big-4096")
    parser.add_argument("--dtype", default="fp16,bf16", help="of fp16, bf16 and fp32")
    parser.add_argument("--steps", type=int, default=40, help="batches, the same for both")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--contenders", default=",".join(CONTENDERS),
                        help="compile as well: fairseq under torch.compile, which compiles for minutes; lightseq-fp8: "
                             "ours with --ls-fp8 (fp16 or bf16)")
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes (on a GPU)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.profile and not torch.cuda.is_available():
        parser.error("--profile reads the kernels of a GPU, and there is none")
    logging.disable(logging.INFO)
    rows = []
    for dtype, case in itertools.product(args.dtype.split(","), args.cases.split(",")):
        pair = {}
        for contender in args.contenders.split(","):
            row = pair[contender] = measure(contender, case, dtype, args)
            rows.append(row)
            print(json.dumps(row), flush=True)
        if pair.keys() >= set(CONTENDERS) and not args.profile:
            ratio = pair["fairseq"]["ms"] / pair["lightseq"]["ms"]
            pair["lightseq"]["ratio"] = round(ratio, 2)
            print(f"{case}, {dtype}: {ratio:.2f} times as fast as stock fairseq", flush=True)
        if pair.keys() >= set(OURS) and not args.profile:
            ratio = pair["lightseq"]["ms"] / pair["lightseq-fp8"]["ms"]
            print(f"{case}, {dtype}: --ls-fp8 {ratio:.2f} times as fast as without", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    about = machine()
    title = f"{about['gpu']}, torch {about['torch']}"
    stem = "train_profile" if args.profile else "train"
    (args.out / f"{stem}.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print(step_profile.table(rows) if args.profile else table(rows))
    if not can_plot():
        return
    if args.profile:
        step_profile.plot(rows, args.out / "train_profile.png", title)
    elif all("ratio" in row for row in rows if row["contender"] == "lightseq"):
        plot(rows, args.out / "train.png", title)


if __name__ == "__main__":
    main()
