#!/usr/bin/env python3
"""Time beam search of a fixed number of tokens: fairseq, CTranslate2 and ours, alternating, in one run on one machine.

    python scripts/benchmark_generate.py [--sizes base,demo] [--batches 1,8,32] [--dtype fp32]

``demo`` is the model that scripts/demo.sh trains. One Transformer with random weights serves all, each in a process of
its own; every output has exactly --length tokens, so that all do the same work. CTranslate2 is left out where it is not
installed (pip install ctranslate2). Results go to scripts/results/generate[_cpu].json and .png: milliseconds a batch,
medians over alternating repeats.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from benchmark_train import RESULTS, can_plot, machine  # noqa: E402
from contender import Contender  # noqa: E402

ARCHITECTURES = {
    "tiny": ["transformer_tiny"], "base": ["transformer_wmt_en_de"], "big": ["transformer_wmt_en_de_big"],
    "demo": ["transformer", *(word for side in ("encoder", "decoder") for word in (
        f"--{side}-layers", "2", f"--{side}-embed-dim", "128", f"--{side}-ffn-embed-dim", "512",
        f"--{side}-attention-heads", "4"))]}
VOCABULARIES = {"demo": 1736}
"""Types of the sizes whose vocabulary is not the option's."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
CONTENDERS = ("fairseq", "ctranslate2", "lightseq")
ON_GPU = torch.cuda.is_available()


def sentences(count: int, vocabulary: int) -> list[list[int]]:
    """Ids of ``count`` sentences of 10 to 50 tokens, eos behind each; lengths as subword corpora of news have them."""
    rng = random.Random(3)
    lengths = [min(50, max(10, round(rng.lognormvariate(3.2, 0.45)))) for _ in range(count)]
    return [[*(rng.randrange(4, vocabulary) for _ in range(n)), 2] for n in lengths]


class Fairseq:
    """fairseq-generate's own generator over the model."""

    def __init__(self, folder: Path, args: argparse.Namespace, checkpoint: dict[str, Any]) -> None:
        from fairseq.sequence_generator import SequenceGenerator

        self.model, dictionary = checkpoint["module"].eval(), checkpoint["task"].target_dictionary
        if ON_GPU:
            self.model.cuda().to(DTYPES[args.dtype])
        self.generator = SequenceGenerator([self.model], dictionary, beam_size=args.beam, max_len_b=args.length,
                                           min_len=args.length)

    def __call__(self, batch: list[list[int]]) -> int:
        from fairseq.data.data_utils import collate_tokens

        tokens = collate_tokens([torch.tensor(s) for s in batch], 1, 2, left_pad=True)
        lengths = torch.tensor([len(s) for s in batch])
        net_input = {"src_tokens": tokens, "src_lengths": lengths}
        if ON_GPU:
            net_input = {key: value.cuda() for key, value in net_input.items()}
        found = self.generator.generate([self.model], {"net_input": net_input})
        return sum(len(hypotheses[0]["tokens"]) for hypotheses in found)


class CTranslate2:
    """CTranslate2's translator, converted from the same checkpoint."""

    def __init__(self, folder: Path, args: argparse.Namespace, checkpoint: dict[str, Any], workers: int = 1) -> None:
        """``workers`` translate at once, on one device."""
        import ctranslate2

        kind = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8"}[args.dtype]
        converter = ctranslate2.converters.FairseqConverter(
            str(folder / "model.pt"), str(folder), "en", "de", unsafe_deserialization=True)  # made here, just now
        converter.convert(str(folder / "ct2"), quantization=kind, force=True)
        self.translator = ctranslate2.Translator(
            str(folder / "ct2"), device="cuda" if ON_GPU else "cpu", compute_type=kind, inter_threads=workers,
            intra_threads=0 if ON_GPU else torch.get_num_threads())
        self.options = dict(beam_size=args.beam, min_decoding_length=args.length, max_decoding_length=args.length)

    def __call__(self, batch: list[list[int]]) -> int:
        found = self.translator.translate_batch([[f"w{i}" for i in s[:-1]] for s in batch], max_batch_size=len(batch),
                                                **self.options)
        return sum(len(result.hypotheses[0]) + 1 for result in found)


class LightSeq:
    """Our generator over the exported model file."""

    def __init__(self, folder: Path, args: argparse.Namespace, checkpoint: dict[str, Any]) -> None:
        from lightseq_fairseq import model_file
        from lightseq_fairseq.export.fairseq import from_checkpoints
        from lightseq_fairseq.generator.generator import Generator
        from lightseq_fairseq.generator.options import GenerationOptions

        model_file.save(from_checkpoints([str(folder / "model.pt")], data_bin=str(folder)), folder / "model.hdf5")
        self.generator = Generator.load(folder / "model.hdf5", dtype=DTYPES[args.dtype])
        self.options = GenerationOptions(beam=args.beam, max_len_b=args.length, min_len=args.length)

    def __call__(self, batch: list[list[int]]) -> int:
        from lightseq_fairseq.generator.generator import sentences_of

        found = self.generator.generate(sentences_of(batch), self.options)
        return sum(len(hypotheses[0].tokens) for hypotheses in found)


def make_checkpoint(folder: Path, size: str, vocabulary: int) -> dict[str, Any]:
    """A stock fairseq checkpoint with random weights, its dictionaries beside it."""
    from fairseq import options, tasks, utils

    for language in ("en", "de"):
        (folder / f"dict.{language}.txt").write_text("".join(f"w{i} 1\n" for i in range(4, vocabulary)))
    args = options.parse_args_and_arch(options.get_training_parser(), [
        str(folder), "--task", "translation", "-s", "en", "-t", "de", "--share-all-embeddings", "--cpu",
        "--arch", *ARCHITECTURES[size]])
    task = tasks.setup_task(args)
    utils.set_torch_seed(1)
    module = task.build_model(args)
    history = {"optimizer_history": [{"num_updates": 0, "best_loss": 1.0}], "last_optimizer_state": {},
               "extra_state": {"epoch": 1, "train_iterator": {"epoch": 1}}}
    torch.save({"args": args, "cfg": None, "model": module.state_dict(), **history}, folder / "model.pt")
    return {"module": module, "task": task}


def contender(name: str, size: str, vocabulary: int, args: argparse.Namespace) -> Fairseq | CTranslate2 | LightSeq:
    """One of CONTENDERS, in its own process; the weights are the same in all."""
    logging.disable(logging.INFO)
    classes = dict(zip(CONTENDERS, (Fairseq, CTranslate2, LightSeq), strict=True))
    with tempfile.TemporaryDirectory() as temporary:
        return classes[name](Path(temporary), args, make_checkpoint(Path(temporary), size, vocabulary))


def alternate(contenders: dict[str, Contender], batches: list[list[list[int]]], length: int) -> dict[str, float]:
    """Median milliseconds a batch of each contender, whose hypotheses are on the host then; they take turns on every
    batch."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for name, run in contenders.items():
        _, made = run(batches[0])
        expected = len(batches[0]) * (length + 1)
        if made != expected:
            raise SystemExit(f"{name} made {made} tokens where {expected} were asked for: not the same work")
        run(batches[0])
    for batch in batches:
        for name, run in contenders.items():
            times[name].append(run(batch)[0])
    return {name: statistics.median(seconds) * 1e3 for name, seconds in times.items()}


LABELS = {"fairseq": "fairseq-generate", "ctranslate2": "CTranslate2 4.8.5", "lightseq": "lightseq-generate"}


def table(rows: list[dict[str, Any]], unit: str) -> str:
    """Markdown for the README; ``unit`` is "ms", of a batch, or "ms_per_step"."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    found = {(row["case"], row["contender"]): row[unit] for row in rows}
    lines = ["| sentences a batch | " + " | ".join(_label(case).replace("\nbatch", "") for case in cases) + " |",
             "|---" * (len(cases) + 1) + "|"]
    for contender in CONTENDERS:
        numbers = [found[case, contender] for case in cases]
        lines.append(f"| {LABELS[contender]} | " + " | ".join(
            f"{x:.1f}" if x >= 1 else f"{x:.2f}" for x in numbers) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Bars of milliseconds a batch, on a log scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = list(dict.fromkeys(row["case"] for row in rows))
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    figure, axes = plt.subplots(figsize=(1.5 * len(cases) + 2, 4), layout="constrained")
    width = 0.8 / len(contenders)
    for offset, contender in enumerate(contenders):
        heights = [next(r["ms"] for r in rows if (r["case"], r["contender"]) == (case, contender)) for case in cases]
        bars = axes.bar([i + width * offset for i in range(len(cases))], heights, 0.95 * width, label=contender)
        axes.bar_label(bars, fmt="%.0f")
    axes.set(yscale="log", ylabel="ms a batch", title=title)
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(cases))], [_label(case) for case in cases])
    axes.legend()
    figure.savefig(path, dpi=120)


def _label(case: str) -> str:
    """"base-beam4-len30-b8" -> the model over its batch size."""
    size, *_, batch = case.split("-")
    return f"{size}\nbatch {batch.removeprefix('b')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="base" if ON_GPU else "base,demo")
    parser.add_argument("--batches", default="1,8,32,128" if ON_GPU else "1,8,32")
    parser.add_argument("--beam", type=int, default=4)
    parser.add_argument("--length", type=int, default=30)
    parser.add_argument("--vocabulary", type=int, default=28672)
    parser.add_argument("--dtype", default="fp16" if ON_GPU else "fp32", choices=DTYPES)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.disable(logging.INFO)
    wanted = args.contenders.split(",")
    if args.dtype == "int8":
        if ON_GPU:
            parser.error("--dtype int8 is for the CPU")
        wanted = [name for name in wanted if name != "fairseq"]  # which has no 8 bits
    if "ctranslate2" in wanted and importlib.util.find_spec("ctranslate2") is None:
        print("ctranslate2 is not installed and is left out")
        wanted.remove("ctranslate2")
    rows = []
    for size in args.sizes.split(","):
        vocabulary = VOCABULARIES.get(size, args.vocabulary)
        contenders = {name: Contender(contender, name, size, vocabulary, args) for name in wanted}
        for count in map(int, args.batches.split(",")):
            pool = sentences(count * args.repeats, vocabulary)
            batches = [pool[i * count:(i + 1) * count] for i in range(args.repeats)]
            case = f"{size}-beam{args.beam}-len{args.length}-b{count}"
            for name, ms in alternate(contenders, batches, args.length).items():
                rows.append({"case": case, "contender": name, "ms": round(ms, 2),
                             "ms_per_step": round(ms / (args.length + 1), 3)})
                print(json.dumps(rows[-1]), flush=True)
        for each in contenders.values():
            each.close()
    args.out.mkdir(parents=True, exist_ok=True)
    about = {**machine(), "dtype": args.dtype, "threads": torch.get_num_threads()}
    stem = "generate" if ON_GPU else "generate_cpu_int8" if args.dtype == "int8" else "generate_cpu"
    (args.out / f"{stem}.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    if not can_plot():
        return
    where = about["gpu"] if ON_GPU else f"{about['threads']} CPU cores"
    plot(rows, args.out / f"{stem}.png", f"{where}, torch {about['torch']}, {args.dtype}, beam {args.beam}")


if __name__ == "__main__":
    main()
