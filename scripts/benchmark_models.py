#!/usr/bin/env python3
"""Time Hugging Face's models and the same models exported, alternating, in one run on one machine.

    python scripts/benchmark_models.py [--cases gpt2-b1,bert-base-32x128] [--contenders hf-eager,hf-best,lightseq]

Random weights from each family's configuration; every case does the same work for all: as many tokens, none of them
the last before its time. ``hf-eager`` is Hugging Face as it comes, with eager attention; ``hf-best`` has sdpa, a static
cache and torch.compile (which its beam search does not use). Inputs begin on the host, encoders' outputs end on the
device, tokens on the host.

    gpt2-bB               GPT-2 124M, top-k sampling of 128 tokens behind 32; milliseconds a token
    bart-base-beam4-bB    32 tokens in, 32 out; milliseconds a batch
    bart-large-greedy-bB  300 tokens in, 128 out; milliseconds a batch
    bert-base-BxT         B texts of up to T tokens, half of the slots padding; milliseconds a batch

Results go to models.json ({"gpu", "torch", "commit", "rows": [{"case", "contender", "ms"}]}) and models.png in --out,
medians over alternating repeats, and a table is printed. Each contender has a process of its own. One that fails leaves
its reason in place of "ms".
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from benchmark_train import RESULTS, can_plot, machine  # noqa: E402
from contender import Contender, Failed  # noqa: E402

os.environ.setdefault("HF_HUB_OFFLINE", "1")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CONTENDERS = ("hf-eager", "hf-best", "lightseq")
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
TOP_K = 50

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {}),
    "bart-base": ("BartForConditionalGeneration", "BartConfig", dict(
        d_model=768, encoder_layers=6, decoder_layers=6, encoder_attention_heads=12, decoder_attention_heads=12,
        encoder_ffn_dim=3072, decoder_ffn_dim=3072, vocab_size=50265)),
    "bart-large": ("BartForConditionalGeneration", "BartConfig", dict(vocab_size=50265)),
    "bert-base": ("BertModel", "BertConfig", {}),
}
"""Class, class of its configuration, and what differs from its defaults."""
TINY: dict[str, dict[str, Any]] = {
    "gpt2": dict(n_embd=32, n_layer=2, n_head=2, vocab_size=99, bos_token_id=98, eos_token_id=98),
    **dict.fromkeys(("bart-base", "bart-large"), dict(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=99)),
    "bert-base": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=99),
}
"""Sizes with which --tiny tries the script out."""


class Case:
    """One row of the table: a model and what it has to do."""

    def __init__(self, name: str, tiny: bool) -> None:
        self.name, self.tiny = name, tiny
        self.model, rest = next((model, name.removeprefix(f"{model}-")) for model in MODELS if name.startswith(model))
        if self.model == "bert-base":
            self.batch, self.width = map(int, rest.split("x"))
            self.new = 0
        else:
            self.batch = int(rest.rsplit("b", 1)[1])
            self.width, self.new = {"gpt2": (32, 128), "bart-base": (32, 32), "bart-large": (300, 128)}[self.model]
        if tiny:
            self.new = min(self.new, 6)
        self.beam = 4 if "beam4" in rest else 1
        self.divisor = self.new if self.model == "gpt2" else 1

    def inputs(self, vocab: int, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask (B, T) int64 on the host; BERT's are half padding."""
        rng = random.Random(3)
        ids = torch.tensor([[rng.randrange(5, vocab - 1) for _ in range(self.width)] for _ in range(self.batch)])
        mask = torch.ones_like(ids)
        if self.model == "bert-base":
            lengths = [self.width // 2]
            while len(lengths) < self.batch:  # pairs that fill one row together
                length = rng.randrange(self.width // 8, self.width - self.width // 8)
                lengths += [length, self.width - length]
            for row, length in zip(mask, lengths, strict=False):
                row[length:] = 0
            ids = ids.where(mask.bool(), pad)
        return ids, mask


class HuggingFace:
    """The stock model; ``best`` with sdpa, static cache and torch.compile."""

    def __init__(self, case: Case, folder: Path, dtype: torch.dtype, best: bool) -> None:
        import transformers

        cls = getattr(transformers, MODELS[case.model][0])
        self.case, self.best = case, best
        self.model = cls.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa" if best else "eager")
        self.model.to(DEVICE).eval()
        config = self.model.config
        pad = config.eos_token_id if config.pad_token_id is None else config.pad_token_id
        self.ids, self.mask = case.inputs(config.vocab_size, pad)
        self.forward = torch.compile(self.model, mode="reduce-overhead") if best and not case.new else self.model
        self.options: dict[str, Any] = dict(
            max_new_tokens=case.new, min_new_tokens=case.new, num_beams=case.beam, do_sample=case.model == "gpt2",
            pad_token_id=pad, max_length=None)
        if case.model == "gpt2":
            self.options |= dict(top_k=TOP_K)
        else:
            self.options |= dict(forced_eos_token_id=None, forced_bos_token_id=None, early_stopping=False)
        if best:
            self.options |= dict(cache_implementation="static")

    @torch.no_grad()
    def __call__(self) -> int:
        """Tokens made, or encoded."""
        ids, mask = self.ids.to(DEVICE), self.mask.to(DEVICE)
        if not self.case.new:
            if self.best and ON_GPU:
                torch.compiler.cudagraph_mark_step_begin()
            self.forward(ids, attention_mask=mask)
            return int(self.mask.sum())
        found = self.model.generate(ids, attention_mask=mask, **self.options).cpu()
        before = ids.size(1) if self.case.model == "gpt2" else 1
        return found.size(0) * (found.size(1) - before)


class LightSeq:
    """The exported model."""

    def __init__(self, case: Case, folder: Path, dtype: torch.dtype) -> None:
        from lightseq_fairseq.export.huggingface import from_huggingface
        from lightseq_fairseq.generator.generator import Generator
        from lightseq_fairseq.generator.options import GenerationOptions
        from lightseq_fairseq.generator.text_encoder import TextEncoder

        model = from_huggingface(folder).model
        self.case = case
        self.ids, self.mask = case.inputs(model.config.src_vocab_size - (case.model == "gpt2"), model.config.pad)
        if not case.new:
            self.encoder = TextEncoder(model, DEVICE, dtype)
            return
        self.generator = Generator([model], DEVICE, dtype)
        draws = dict(sampling=True, sampling_topk=TOP_K) if case.model == "gpt2" else {}
        self.options = GenerationOptions(beam=case.beam, min_len=case.new - 1, max_len_b=case.new - 1, **draws)
        self.rows = [row[real.bool()] for row, real in zip(self.ids, self.mask, strict=True)]

    def __call__(self) -> int:
        """Tokens made, eos included, or encoded."""
        if not self.case.new:
            self.encoder(self.ids, self.mask)
            return int(self.mask.sum())
        found = self.generator.generate(self.rows, self.options)
        return sum(len(hypotheses[0].tokens) for hypotheses in found)


def make_model(case: Case, folder: Path) -> None:
    """A folder as save_pretrained writes it, with random weights."""
    import transformers

    cls, config, arguments = MODELS[case.model]
    sizes = arguments | (TINY[case.model] if case.tiny else {})
    torch.manual_seed(1)
    getattr(transformers, cls)(getattr(transformers, config)(**sizes)).save_pretrained(folder)


def contender(kind: str, name: str, tiny: bool, folder: Path, dtype: torch.dtype) -> HuggingFace | LightSeq:
    """As one of CONTENDERS, in its own process."""
    logging.disable(logging.WARNING)
    case = Case(name, tiny)
    if kind == "lightseq":
        return LightSeq(case, folder, dtype)
    return HuggingFace(case, folder, dtype, kind == "hf-best")


def alternate(case: Case, contenders: dict[str, Contender], warm: int, repeats: int) -> dict[str, float | str]:
    """Median milliseconds of each contender, which take turns; of one that fails, its reason."""
    results: dict[str, float | str] = {}
    made: dict[str, int] = {}
    for name, run in contenders.items():
        try:
            for _ in range(warm):
                _, made[name] = run()
        except Failed as error:
            results[name] = str(error)
    if len(set(made.values())) > 1:
        raise SystemExit(f"{case.name}: not the same work, tokens of each: {made}")
    times: dict[str, list[float]] = {name: [] for name in contenders if name not in results}
    for _ in range(repeats):
        for name, seconds in times.items():
            seconds.append(contenders[name]()[0])
    return results | {name: statistics.median(seconds) * 1e3 / case.divisor for name, seconds in times.items()}


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Bars of milliseconds, on a log scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if "ms" in row]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    figure, axes = plt.subplots(figsize=(1.3 * len(cases) + 2, 4.5), layout="constrained")
    width = 0.8 / len(contenders)
    for offset, contender in enumerate(contenders):
        own = {row["case"]: row["ms"] for row in rows if row["contender"] == contender}
        places = [i + width * offset for i, case in enumerate(cases) if case in own]
        bars = axes.bar(places, [own[case] for case in cases if case in own], 0.95 * width, label=contender)
        axes.bar_label(bars, fmt="%.3g", fontsize=7)
    axes.set(yscale="log", ylabel="ms a batch (gpt2: a token)", title=title)
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(cases))], [case.replace("-", "\n") for case in cases])
    axes.legend()
    figure.savefig(path, dpi=120)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a row a case: milliseconds of Hugging Face, eager and at its best where measured, and of ours."""
    def digits(x: float | None) -> str:
        return "" if x is None else f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"

    times: dict[str, dict[str, float]] = {}
    for row in rows:
        times.setdefault(row["case"], {}).update({row["contender"]: row["ms"]} if "ms" in row else {})
    lines = ["| fp16 | Hugging Face, eager | at its best | ours | times eager |", "|---|---|---|---|---|"]
    for case, own in times.items():
        eager, ours = own.get("hf-eager", own.get("huggingface")), own.get("lightseq")
        ratio = f"{eager / ours:.1f}" if eager and ours else ""
        lines.append(f"| {case} | {digits(eager)} | {digits(own.get('hf-best'))} | {digits(ours)} | {ratio} |")
    return "\n".join(lines)


CASES = [*(f"gpt2-b{batch}" for batch in (1, 8)), *(f"bart-base-beam4-b{batch}" for batch in (1, 8, 32)),
         *(f"bart-large-greedy-b{batch}" for batch in (32, 64, 128)),
         *(f"bert-base-{size}" for size in ("1x32", "8x128", "32x128", "128x128"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="of those above, with any B and T")
    parser.add_argument("--contenders", default=",".join(CONTENDERS if ON_GPU else ("hf-eager", "lightseq")))
    parser.add_argument("--dtype", default="fp16" if ON_GPU else "fp32", choices=DTYPES)
    parser.add_argument("--warm", type=int, default=3, help="runs in front of those that count")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    wanted, cases = args.contenders.split(","), args.cases.split(",")
    wrong = [name for name in wanted if name not in CONTENDERS]
    wrong += [name for name in cases if not name.startswith(tuple(MODELS))]
    if wrong:
        parser.error(f"unknown {', '.join(wrong)}")
    logging.disable(logging.WARNING)
    dtype, rows = DTYPES[args.dtype], []
    args.out.mkdir(parents=True, exist_ok=True)
    about = machine()
    for name in cases:
        case = Case(name, args.tiny)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            make_model(case, folder)
            contenders = {each: Contender(contender, each, name, args.tiny, folder, dtype) for each in wanted}
            results = alternate(case, contenders, args.warm, args.repeats)
            for each in contenders.values():
                each.close()
        for each, found in results.items():
            value = {"failed": found} if isinstance(found, str) else {"ms": round(found, 4)}
            rows.append({"case": name, "contender": each, **value})
            print(json.dumps(rows[-1]), flush=True)
        (args.out / "models.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print(table(rows))
    if can_plot() and any("ms" in row for row in rows):
        plot(rows, args.out / "models.png", f"{about['gpu']}, torch {about['torch']}, {args.dtype}")


if __name__ == "__main__":
    main()
