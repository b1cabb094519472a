#!/usr/bin/env python3
"""Time language models of GPT-3's shapes, beside what EET published.

    python scripts/benchmark_gpt3_shapes.py [--shapes 125M,350M,760M,1.3B,2.7B,6.7B,13B] [--batches 4,16]

Shapes are those of Brown et al. 2020 (arXiv:2005.14165), table 2.1, whose 1.3B and 13B have head sizes that do not
divide their widths: here 16 heads of 128 and a width of 5120. Random weights, greedily 512 tokens behind a context of
512; milliseconds a token are those of the whole call, the pass over the context included, over 512, as EET (NetEase,
github.com/NetEase-FuXi/EET) has them for an A100. Results go to scripts/results/gpt3_shapes.json, and a table is
printed.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from benchmark_models import DEVICE, DTYPES, ON_GPU  # noqa: E402
from benchmark_train import RESULTS, machine  # noqa: E402
from contender import synchronize  # noqa: E402

from lightseq_fairseq.config import TransformerConfig  # noqa: E402
from lightseq_fairseq.generator.generator import Generator  # noqa: E402
from lightseq_fairseq.inference import GenerationOptions  # noqa: E402
from lightseq_fairseq.model_file import ModelFile  # noqa: E402
from lightseq_fairseq.model_file.spec import tensor_shapes, tied_tensors  # noqa: E402

SHAPES = {"tiny": (2, 32, 2), "125M": (12, 768, 12), "350M": (24, 1024, 16), "760M": (24, 1536, 16),
          "1.3B": (24, 2048, 16), "2.7B": (32, 2560, 32), "6.7B": (32, 4096, 32), "13B": (40, 5120, 40)}
"""Layers, width, heads."""
EET = {4: {"125M": 2.69, "350M": 5.58, "760M": 6.64, "1.3B": 7.3, "2.7B": 46.1, "6.7B": 17.2, "13B": 29.3},
       16: {"125M": 2.84, "350M": 6.0, "760M": 7.39, "1.3B": 8.27, "2.7B": 116.0, "6.7B": 23.18, "13B": 43.42}}
"""EET's milliseconds a token on an A100, fp16, by batch."""


def model_of(shape: str, context: int, new: int, dtype: torch.dtype) -> ModelFile:
    """Random weights, on the device from the start: the largest would take minutes on a host."""
    layers, width, heads = SHAPES[shape]
    vocabulary = 50257 if shape != "tiny" else 99
    config = TransformerConfig(
        src_vocab_size=vocabulary, tgt_vocab_size=vocabulary, stacks="decoder", decoder_layers=layers,
        decoder_embed_dim=width, decoder_ffn_embed_dim=4 * width, decoder_attention_heads=heads, activation_fn="gelu",
        decoder_normalize_before=True, decoder_positions="learned", max_target_positions=context + new,
        position_offset=0, no_scale_embedding=True, share_decoder_input_output_embed=True, no_cross_attention=True)
    draws = torch.Generator(DEVICE).manual_seed(1)
    tensors = {name: torch.empty(size, dtype=dtype, device=DEVICE).normal_(0, 0.02, generator=draws)
               for name, size in tensor_shapes(config).items()}
    return ModelFile(config, tensors | {tied: tensors[first] for tied, first in tied_tensors(config).items()})


def milliseconds(generator: Generator, batch: int, context: int, new: int, repeats: int) -> list[float]:
    """Of a token, in each call."""
    draws = torch.Generator().manual_seed(2)
    texts = list(torch.randint(4, generator.config.tgt_vocab_size, (batch, context), generator=draws))
    options, times = GenerationOptions(beam=1, min_len=new - 1, max_len_b=new - 1), []
    for repeat in range(repeats + 1):  # the first is to warm up
        synchronize()
        start = time.perf_counter()
        found = generator.generate(texts, options)
        synchronize()
        made = {len(hypotheses[0].tokens) for hypotheses in found}
        if made != {new}:
            raise SystemExit(f"{made} tokens were made where {new} were asked for")
        if repeat:
            times.append((time.perf_counter() - start) * 1e3 / new)
    return times


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a column a shape."""
    shapes = list(dict.fromkeys(row["case"].rsplit("-b", 1)[0] for row in rows))
    lines = [f"| ms a token | {' | '.join(shapes)} |", "|---" * (len(shapes) + 1) + "|"]
    for batch in dict.fromkeys(int(row["case"].rsplit("-b", 1)[1]) for row in rows):
        own = {row["case"]: row["ms"] for row in rows}
        theirs = " | ".join(str(EET.get(batch, {}).get(shape, "")) for shape in shapes)
        ours = " | ".join(f"{own[f'{shape}-b{batch}']:.2f}" for shape in shapes)
        lines += [f"| EET on an A100, batch {batch} | {theirs} |", f"| ours, batch {batch} | {ours} |"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(list(SHAPES)[1:]))
    parser.add_argument("--batches", default="4,16")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--dtype", default="fp16" if ON_GPU else "fp32", choices=DTYPES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    wrong = [shape for shape in args.shapes.split(",") if shape not in SHAPES]
    if wrong:
        parser.error(f"unknown {', '.join(wrong)}: choose from {', '.join(SHAPES)}")
    logging.disable(logging.WARNING)
    args.out.mkdir(parents=True, exist_ok=True)
    about, rows, dtype = machine(), [], DTYPES[args.dtype]
    for shape in args.shapes.split(","):
        generator = Generator([model_of(shape, args.context, args.new, dtype)], DEVICE, dtype)
        for batch in map(int, args.batches.split(",")):
            times = milliseconds(generator, batch, args.context, args.new, args.repeats)
            ms = round(statistics.median(times), 4)
            rows.append({"case": f"{shape}-b{batch}", "contender": "lightseq", "ms": ms})
            print(json.dumps(rows[-1]), flush=True)
        del generator
        if ON_GPU:
            torch.cuda.empty_cache()
        (args.out / "gpt3_shapes.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
