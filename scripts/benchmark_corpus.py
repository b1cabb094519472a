#!/usr/bin/env python3
"""Time the translation of a corpus: CTranslate2 at its best setting, and ours in batches and in slots.

    python scripts/benchmark_corpus.py CORPUS [--size base] [--dtype fp16] [--sentences 10000]

CORPUS is a text file of source sentences; its words are cut into pieces of at most six letters, as subwords would be.
One Transformer with random weights serves both, in a process each. How long each output is, a table says, in proportion
to its source with some spread, so that all do the same work: that many tokens and eos, neither more nor less.
CTranslate2 takes one length a call, which spares it what sentences of unequal length cost in a batch, and costs it
little where there are many of each; it is swept over batch sizes in sentences and in tokens and over workers, all calls
being queued at once. ``refill`` are our slots over the whole corpus, ``batches`` our search over the same calls.
Results go to scripts/results/corpus[_cpu].json: sentences and tokens a second, medians over alternating repeats, from
ids or tokens to hypotheses on the host.
"""

from __future__ import annotations

import argparse
import collections
import functools
import importlib.util
import json
import logging
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from benchmark_generate import ARCHITECTURES, DTYPES, ON_GPU, CTranslate2, LightSeq, make_checkpoint  # noqa: E402
from benchmark_train import RESULTS, machine  # noqa: E402
from contender import Contender  # noqa: E402

LETTERS = 6
"""Of a piece at most."""
LONGEST = 200
"""Tokens of a source or an output, eos not counted."""
Work = dict[int, list[int]]
"""Sentences by the length of their output."""


def read_corpus(path: Path, count: int, vocabulary: int) -> list[list[int]]:
    """Ids of the first ``count`` sentences, eos behind each: pieces of words, numbered by how often they occur."""
    lines = [[word[i:i + LETTERS] for word in line.split() for i in range(0, len(word), LETTERS)]
             for line in path.read_text(encoding="utf-8").splitlines()[:count]]
    frequent = collections.Counter(piece for line in lines for piece in line).most_common()
    number = {piece: 4 + rank % (vocabulary - 4) for rank, (piece, _) in enumerate(frequent)}
    return [[*(number[piece] for piece in line[:LONGEST]), 2] for line in lines if line]


def length_table(sources: list[list[int]]) -> list[int]:
    """Tokens of each output without eos: 1.05 times those of its source, give or take a fifth."""
    rng = random.Random(5)
    return [min(LONGEST, max(1, round((len(source) - 1) * 1.05 * rng.lognormvariate(0.0, 0.2)))) for source in sources]


class Corpus:
    """Sources, the lengths of their outputs, and the calls that make these."""

    def __init__(self, sources: list[list[int]]) -> None:
        self.sources, self.lengths = sources, length_table(sources)
        self.tokens = sum(self.lengths) + len(sources)
        self.work: Work = {}
        for index in sorted(range(len(sources)), key=lambda i: (-self.lengths[i], -len(sources[i]))):
            self.work.setdefault(self.lengths[index], []).append(index)


def ctranslate2_run(translator: Any, corpus: Corpus, beam: int, batch: int, kind: str) -> Callable[[], int]:
    """Of one setting; ``kind`` of its batch size is "examples" or "tokens"."""
    pieces = [[f"w{i}" for i in source[:-1]] for source in corpus.sources]

    def run() -> int:
        queued = [result for length, indices in corpus.work.items() for result in translator.translate_batch(
            [pieces[i] for i in indices], beam_size=beam, min_decoding_length=length, max_decoding_length=length,
            max_batch_size=batch, batch_type=kind, asynchronous=True)]
        return sum(len(result.result().hypotheses[0]) + 1 for result in queued)

    return run


def batches_run(generator: Any, corpus: Corpus, beam: int, batch: int) -> Callable[[], int]:
    """Ours, one length a call."""
    from lightseq_fairseq.inference import GenerationOptions

    def run() -> int:
        tokens = 0
        for length, indices in corpus.work.items():
            options = GenerationOptions(beam=beam, min_len=length, max_len_b=length)
            found = generator.infer([corpus.sources[i] for i in indices], options, max_sentences=batch,
                                    max_tokens=1 << 30, refill=False)
            tokens += sum(len(hypotheses[0].tokens) for hypotheses in found)
        return tokens

    return run


def refill_run(generator: Any, corpus: Corpus, beam: int, slots: int) -> Callable[[], int]:
    """Ours, all in slots, the longest source first, as Generator.infer has it."""
    from lightseq_fairseq.generator.refill import Slots
    from lightseq_fairseq.inference import GenerationOptions

    width, steps = max(map(len, corpus.sources)), max(corpus.lengths) + 1
    options = {length: replace(GenerationOptions(beam=beam), min_len=length, max_len_b=length)
               for length in corpus.work}
    order = sorted(range(len(corpus.sources)), key=lambda i: -len(corpus.sources[i]))
    refill = generator.device_search.refill(Slots(slots, beam, -(-steps // 32) * 32, -(-width // 32) * 32))
    print(refill, flush=True)

    def run() -> int:
        for i in order:
            refill.submit(corpus.sources[i], options[corpus.lengths[i]], corpus.lengths[i])
        return sum(len(hypotheses[0].tokens) for _, hypotheses in refill.run())

    return run


def with_model(make: Any, args: argparse.Namespace) -> Any:
    """``make`` of benchmark_generate's contenders over the model, whose weights are the same in each process."""
    with tempfile.TemporaryDirectory() as temporary:
        return make(Path(temporary), args, make_checkpoint(Path(temporary), args.size, args.vocabulary))


class Ours:
    """Our runs by their names; in a process of its own."""

    def __init__(self, args: argparse.Namespace, corpus: Corpus) -> None:
        self.beam, self.corpus = args.beam, corpus
        self.generator = with_model(LightSeq, args).generator
        self.runs: dict[str, Callable[[], int]] = {}

    def __call__(self, name: str) -> int | None:
        """Tokens made; None for slots where there are none."""
        kind, size = name.split()
        if kind == "refill" and self.generator.device_search is None:
            return None
        if name not in self.runs:
            make = refill_run if kind == "refill" else batches_run
            self.runs[name] = make(self.generator, self.corpus, self.beam, int(size))
        return self.runs[name]()


class CTranslate2s:
    """CTranslate2's runs by their names; in a process of its own."""

    def __init__(self, args: argparse.Namespace, corpus: Corpus) -> None:
        self.args, self.corpus = args, corpus
        self.translators: dict[str, Any] = {}
        self.runs: dict[str, Callable[[], int]] = {}

    def __call__(self, name: str) -> int:
        """Tokens made."""
        _, size, kind, workers, _ = name.split()
        if workers not in self.translators:
            self.translators[workers] = with_model(functools.partial(CTranslate2, workers=int(workers)),
                                                   self.args).translator
        if name not in self.runs:
            self.runs[name] = ctranslate2_run(self.translators[workers], self.corpus, self.args.beam, int(size), kind)
        return self.runs[name]()


def measure(runs: dict[str, Contender], corpus: Corpus, repeats: int) -> list[dict[str, Any]]:
    """Rows of all contenders, which take turns; SystemExit where one makes another number of tokens."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):  # the first is to warm up
        for name in list(seconds):
            took, made = runs[name](name)
            if made is None:
                print(f"no GPU with the compiled operators: {name} is left out")
                del seconds[name]
                continue
            if made != corpus.tokens:
                raise SystemExit(f"{name} made {made} tokens where {corpus.tokens} were asked for: not the same work")
            if repeat:
                seconds[name].append(took)
    rows = []
    for name, times in seconds.items():
        median = statistics.median(times)
        rows.append({"contender": name, "seconds": round(median, 3), "fastest": round(min(times), 3),
                     "slowest": round(max(times), 3), "sentences_per_s": round(len(corpus.sources) / median, 1),
                     "tokens_per_s": round(corpus.tokens / median)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--size", default="base", choices=ARCHITECTURES)
    parser.add_argument("--sentences", type=int, default=10000 if ON_GPU else 100)
    parser.add_argument("--beam", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=28672)
    parser.add_argument("--dtype", default="fp16" if ON_GPU else "fp32", choices=DTYPES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slots", default="255,511,767" if ON_GPU else "15")
    parser.add_argument("--batches", default="" if ON_GPU else "16", help="ours without slots")
    parser.add_argument("--examples", default="32,64,128,256" if ON_GPU else "16", help="CTranslate2's, in sentences")
    parser.add_argument("--tokens", default="2048,4096,8192" if ON_GPU else "512", help="CTranslate2's, in tokens")
    parser.add_argument("--workers", default="1,2,4" if ON_GPU else "1", help="CTranslate2's")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.length = LONGEST
    logging.disable(logging.INFO)
    corpus = Corpus(read_corpus(args.corpus, args.sentences, args.vocabulary))
    ours = Contender(Ours, args, corpus)
    names = [f"{kind} {size}" for kind, sizes in (("batches", args.batches), ("refill", args.slots))
             for size in filter(None, sizes.split(","))]
    runs = dict.fromkeys(names, ours)
    if importlib.util.find_spec("ctranslate2") is None:
        print("ctranslate2 is not installed and is left out")
    else:
        theirs = Contender(CTranslate2s, args, corpus)
        runs |= {f"ctranslate2 {size} {kind} {workers} workers": theirs for workers in args.workers.split(",")
                 for kind, sizes in (("examples", args.examples), ("tokens", args.tokens))
                 for size in filter(None, sizes.split(","))}
    rows = measure(runs, corpus, args.repeats)
    for each in set(runs.values()):
        each.close()
    args.out.mkdir(parents=True, exist_ok=True)
    about = {**machine(), "dtype": args.dtype, "size": args.size, "beam": args.beam, "corpus": args.corpus.name,
             "sentences": len(corpus.sources), "source_tokens": sum(map(len, corpus.sources)), "tokens": corpus.tokens,
             "threads": torch.get_num_threads()}
    stem = "corpus" if ON_GPU else "corpus_cpu"
    (args.out / f"{stem}.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
