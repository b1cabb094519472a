#!/usr/bin/env python3
"""Time fine-tuning steps of Hugging Face's BERT, its own layers and ours, taking turns in one run on one machine.

    python scripts/benchmark_huggingface_training.py [--batches 8,16,32] [--dtype fp16,bf16] [--tokens 128]

A step is forward under autocast, loss, backward, gradient clipping and AdamW of a sentence classifier with dropout 0.1,
on batches of which half the slots are padding. Steady state: every batch has been seen before the clock starts. The
rows of milliseconds, medians, take the place of those of the same cases in scripts/results/models.json.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
import benchmark_train  # noqa: E402

Batch = dict[str, Tensor]
CONTENDERS = ("huggingface", "lightseq")


def batches_of(size: int, tokens: int, vocab: int, device: torch.device, count: int = 8) -> list[Batch]:
    """``count`` batches of ``size`` sentences: one of ``tokens`` tokens, the others such that half the slots are
    padding."""
    generator = torch.Generator().manual_seed(size)
    batches = []
    for _ in range(count):
        lengths = torch.randint(1, tokens, (size,), generator=generator).float()
        lengths = (lengths * (size * tokens / 2 - tokens) / max(float(lengths[1:].sum()), 1.0)).clamp(2, tokens).long()
        lengths[0] = tokens
        real = torch.arange(tokens) < lengths[:, None]
        ids = torch.randint(5, vocab, (size, tokens), generator=generator)
        batch = {"input_ids": ids.where(real, 0), "attention_mask": real.long(),
                 "labels": torch.randint(2, (size,), generator=generator)}
        batches.append({name: tensor.to(device) for name, tensor in batch.items()})
    return batches


def step_of(model: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> Callable[[Batch], None]:
    """One fine-tuning step of ``model``."""
    parameters = list(model.train().parameters())
    optimizer = torch.optim.AdamW(parameters, lr=2e-5, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def step(batch: Batch) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def milliseconds(step: Callable[[Batch], None], batches: list[Batch]) -> float:
    """Of one step, over all ``batches``."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    synchronize()
    start = time.perf_counter()
    for batch in batches:
        step(batch)
    synchronize()
    return (time.perf_counter() - start) / len(batches) * 1e3


def rows_of(size: int, dtype: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """The rows of one case."""
    from transformers import BertConfig, BertForSequenceClassification

    from lightseq_fairseq.huggingface import accelerate

    device = torch.device(args.device)
    torch.manual_seed(1)
    config = BertConfig(num_hidden_layers=args.layers)
    models = {"huggingface": BertForSequenceClassification(config).to(device)}
    models["lightseq"] = accelerate(copy.deepcopy(models["huggingface"]))[0]
    batches = batches_of(size, args.tokens, config.vocab_size, device)[:args.steps]
    precision = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    steps = {contender: step_of(models[contender], precision, device) for contender in CONTENDERS}
    for contender in CONTENDERS:
        milliseconds(steps[contender], batches)
        milliseconds(steps[contender], batches)
    if device.type == "cuda" and not models["lightseq"].bert.encoder.layer[0].stack.graphs.passes:
        raise SystemExit("our layers were not replayed as graphs")
    times: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
    for _ in range(args.repeats):
        for contender in CONTENDERS:
            times[contender].append(milliseconds(steps[contender], batches))
    case = f"bert-base-finetune-{dtype}-b{size}x{args.tokens}"
    return [{"case": case, "contender": contender, "ms": round(statistics.median(times[contender]), 3)}
            for contender in CONTENDERS]


def with_rows(report: dict[str, object], rows: list[dict[str, object]]) -> dict[str, object]:
    """``report`` with ``rows``, whose cases leave it where it has them."""
    cases = {row["case"] for row in rows}
    old = report.get("rows", [])
    assert isinstance(old, list)
    return {**report, **benchmark_train.machine(), "rows": [row for row in old if row["case"] not in cases] + rows}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time fine-tuning of Hugging Face's BERT.")
    parser.add_argument("--batches", default="8,16,32", help="sentences a batch")
    parser.add_argument("--tokens", type=int, default=128, help="slots a sentence")
    parser.add_argument("--dtype", default="fp16,bf16", help="of autocast; fp32 for none")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=8, help="batches a measurement, at most 8")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, default=benchmark_train.RESULTS / "models.json")
    args = parser.parse_args()
    if args.device == "cuda":
        from lightseq_fairseq.ops import _extension

        if not _extension.loaded():
            raise SystemExit("the compiled operators do not load: there is nothing to measure")
    rows: list[dict[str, object]] = []
    for dtype, size in itertools.product(args.dtype.split(","), map(int, args.batches.split(","))):
        rows += rows_of(size, dtype, args)
        theirs, ours = (row["ms"] for row in rows[-2:])
        print(f"{rows[-1]['case']}: Hugging Face {theirs} ms, ours {ours} ms", flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    report = json.loads(args.output.read_text()) if args.output.exists() else {}
    args.output.write_text(json.dumps(with_rows(report, rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
