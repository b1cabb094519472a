#!/usr/bin/env python3
"""Run fairseq-generate and lightseq-generate as a user does, and see when they say what.

    python scripts/benchmark_generate_commands.py DATA_BIN CHECKPOINT [--dtypes fp32,fp16] [--repeats 2]

The same checkpoint, test set and options for both (beam 5, batches of 128 unless further arguments say otherwise), in
turns. Of each command: seconds to its end, the sentences a second that it prints, and where the seconds to the first
translation go. Rows go to scripts/results/generate_commands.json (the fastest of the repeats), and a table is printed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from benchmark_train import RESULTS, ROOT, machine  # noqa: E402

MODULES = {"fairseq": "fairseq_cli.generate", "lightseq": "lightseq_fairseq.cli.generate"}
MARKS = {"imports": "'_name': None, 'common'", "first": "H-", "last": " tokens/s)"}
"""What a line has in it when imports and arguments, the first translation and the last of them are done."""
_TRANSLATED = re.compile(r"Translated ([\d,]+) sentences .* in [\d.]+s \(([\d.,]+) sentences/s")


def as_stock(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint for fairseq-generate: the model that ls_ was put in front of, with the same weights."""
    from lightseq_fairseq import fairseq_compat

    fairseq_compat.apply()
    state = torch.load(checkpoint, map_location="cpu", weights_only=False)
    model = state["cfg"]["model"]
    fields = vars(model) if isinstance(model, argparse.Namespace) else model  # of a command line, or of hydra
    for name in ("_name", "arch"):
        if isinstance(fields.get(name), str):
            fields[name] = fields[name].removeprefix("ls_")
    path = folder / "stock.pt"
    torch.save(state, path)
    return path


def run(command: list[str]) -> dict[str, Any]:
    """Seconds from its start to each of MARKS and to its end, and sentences a second; the command must succeed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                   "PYTHONUNBUFFERED": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    start, lines, found = time.monotonic(), [], {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as at:
        assert at.stdout is not None
        for line in at.stdout:
            lines.append(line)
            for mark, text in MARKS.items():
                if mark not in found and (line.startswith(text) if mark == "first" else text in line):
                    found[mark] = time.monotonic() - start
    whole = time.monotonic() - start
    said = [match for line in lines if (match := _TRANSLATED.search(line))]
    if at.returncode or not said or set(found) != set(MARKS):
        raise SystemExit(f"{' '.join(command)}\n{''.join(lines)[-3000:]}")
    return {"seconds": round(whole, 2), **{f"to_{mark}_s": round(found[mark], 2) for mark in MARKS},
            "sentences": int(said[-1][1].replace(",", "")), "sentences_per_s": float(said[-1][2].replace(",", ""))}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| command | imports | model, first batch | other batches | score, end | whole command | sentences/s |",
             "|---|---|---|---|---|---|---|"]
    for row in rows:
        times = [0.0, *(row[f"to_{mark}_s"] for mark in MARKS), row["seconds"]]
        parts = " | ".join(f"{end - begin:.1f} s" for begin, end in itertools.pairwise(times))
        lines.append(f"| {row['contender']}-generate {row['dtype']} | {parts} | {row['seconds']:.1f} s | "
                     f"{row['sentences_per_s']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="fairseq-preprocess folder")
    parser.add_argument("checkpoint", type=Path, help="of ls_transformer or transformer")
    parser.add_argument("--dtypes", default="fp32,fp16" if torch.cuda.is_available() else "fp32")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args, further = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {"fairseq": as_stock(args.checkpoint, Path(folder)), "lightseq": args.checkpoint}
        for _ in range(args.repeats):
            for dtype in args.dtypes.split(","):
                for contender, module in MODULES.items():
                    command = [sys.executable, "-m", module, str(args.data), "--path", str(paths[contender]),
                               "--gen-subset", "test", "--beam", "5", "--batch-size", "128",
                               "--required-batch-size-multiple", "1", *further]  # of others fairseq loses the rest
                    command += [f"--{dtype}"] if dtype != "fp32" else []
                    command += [] if torch.cuda.is_available() else ["--cpu"]
                    row = {"contender": contender, "dtype": dtype, **run(command)}
                    print(json.dumps(row), flush=True)
                    best = rows.get((contender, dtype), row)
                    rows[contender, dtype] = min(best, row, key=lambda row: row["seconds"])
    report = {**machine(), "rows": list(rows.values())}
    (args.out / "generate_commands.json").write_text(json.dumps(report, indent=1) + "\n")
    print(table(list(rows.values())))


if __name__ == "__main__":
    main()
