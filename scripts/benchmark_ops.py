#!/usr/bin/env python3
"""Time every operator and layer, forward and forward with backward, beside what the machine can do at best.

    python scripts/benchmark_ops.py [--sizes base,big] [--dtype fp16] [--tokens 4096] [--only layer_norm,attention]

Contenders: ours on packed tokens; plain PyTorch on the same rows (attention and layers: padded batches, as fairseq has
them; layers: fairseq's own); the same under torch.compile. Each is captured in a CUDA graph that alternates it with
reading memory larger than the L2 cache, and such reads alone are subtracted, so that caches are cold and no launch is
counted. us: median over replays, with the 20 % and 80 % quantiles. The bound is the time of the least memory traffic
(each operand once) at the measured speed of a copy, or of the arithmetic at that of a large matrix product, whichever
takes longer. Results go to scripts/results/ops.json and ops.png. On the CPU everything runs too, without graphs.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from benchmark_train import RESULTS, can_plot, machine  # noqa: E402

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CONTENDERS = ("lightseq", "eager", "compile")
P = 0.1
"""Probability of every dropout."""
EPSILON = 0.1


@dataclass(frozen=True)
class Size:
    """Dimensions of a Transformer."""

    dim: int
    ffn: int
    heads: int
    vocabulary: int
    parameters: int


SIZES = {"tiny": Size(16, 32, 2, 53, 1001), "base": Size(512, 2048, 8, 28672, 58_800_000),
         "big": Size(1024, 4096, 16, 28672, 205_700_000)}


@dataclass
class Contender:
    """A computation to time: ``forward`` of no arguments, and the tensors whose gradients backward makes."""

    forward: Callable[[], Any]
    inputs: Sequence[Tensor] = ()
    """Empty where there is no backward."""
    dout: Tensor | None = None

    def step(self) -> Any:
        """Forward and backward."""
        out = self.forward()
        if not self.inputs:
            return out
        if self.dout is None:
            self.dout = torch.ones_like(out)
        return torch.autograd.grad(out, self.inputs, self.dout)


@dataclass
class Case:
    """One operator or layer at one size, and the least that it must move and compute, forward and backward."""

    name: str
    lightseq: Contender
    eager: Contender
    gigabytes: tuple[float, float]
    teraflops: tuple[float, float] = (0.0, 0.0)

    def contender(self, name: str) -> Contender:
        if name != "compile":
            return {"lightseq": self.lightseq, "eager": self.eager}[name]
        torch.compiler.reset()  # cases share code, of which it would compile a few variants only
        return Contender(torch.compile(self.eager.forward, dynamic=False), self.eager.inputs)


@dataclass
class Bench:
    """Makes the cases of one size."""

    size: Size
    tokens: int
    dtype: torch.dtype
    device: torch.device
    lengths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        """Sentences of 10 to 80 tokens, lengths distributed as in subword corpora of news, ``tokens`` in all."""
        rng, self.lengths = random.Random(3), []
        while (left := self.tokens - sum(self.lengths)) > 0:
            self.lengths.append(min(left, 80, max(10, round(rng.lognormvariate(3.3, 0.45)))))

    def tensor(self, *shape: int, grad: bool = True) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype).requires_grad_(grad)

    @functools.cached_property
    def seed(self) -> Tensor:
        return torch.tensor([7], device=self.device)

    @functools.cached_property
    def packing(self) -> Any:
        from lightseq_fairseq.layers import Packing

        return Packing.of_lengths(self.lengths, self.device)

    @functools.cached_property
    def padding(self) -> Tensor:
        """(B, T) True where a sentence has ended."""
        lengths = torch.tensor(self.lengths, device=self.device)
        return torch.arange(max(self.lengths), device=self.device) >= lengths[:, None]

    def gigabytes(self, elements: float) -> float:
        return elements * self.dtype.itemsize / 1e9

    def pointwise(self, name: str, ours: Callable[..., Any], plain: Callable[..., Any], inputs: list[Tensor],
                  forward: float, backward: float) -> Case:
        """A case whose contenders take the same inputs; elements moved forward and backward."""
        return Case(name, Contender(lambda: ours(*inputs), inputs), Contender(lambda: plain(*inputs), inputs),
                    (self.gigabytes(forward), self.gigabytes(backward)))

    def layer_norm(self) -> list[Case]:
        from lightseq_fairseq import ops

        elements, dim = self.tokens * self.size.dim, self.size.dim
        return [self.pointwise(
            "layer_norm", lambda x, w, b: ops.layer_norm(x, w, b, 1e-5),
            lambda x, w, b: F.layer_norm(x, (dim,), w, b, 1e-5),
            [self.tensor(self.tokens, dim), self.tensor(dim), self.tensor(dim)], 2 * elements, 3 * elements)]

    def bias_activation_dropout(self) -> list[Case]:
        from lightseq_fairseq import ops

        elements = self.tokens * self.size.ffn
        return [self.pointwise(
            "bias_activation_dropout", lambda x, b: ops.bias_activation_dropout(x, b, "relu", P, self.seed),
            lambda x, b: F.dropout(F.relu(x + b), P),
            [self.tensor(self.tokens, self.size.ffn), self.tensor(self.size.ffn)], 2 * elements, 3 * elements)]

    def bias_dropout_residual(self) -> list[Case]:
        from lightseq_fairseq import ops

        elements, dim = self.tokens * self.size.dim, self.size.dim
        return [self.pointwise(
            "bias_dropout_residual", lambda x, b, r: ops.bias_dropout_residual(x, b, r, P, self.seed),
            lambda x, b, r: r + F.dropout(x + b, P),
            [self.tensor(self.tokens, dim), self.tensor(dim), self.tensor(self.tokens, dim)],
            3 * elements, 2 * elements)]

    def bias_dropout_residual_layer_norm(self) -> list[Case]:
        from lightseq_fairseq import ops

        elements, dim = self.tokens * self.size.dim, self.size.dim
        return [self.pointwise(
            "bias_dropout_residual_layer_norm",
            lambda x, b, r, w, n: ops.bias_dropout_residual_layer_norm(x, b, r, w, n, 1e-5, P, self.seed)[1],
            lambda x, b, r, w, n: F.layer_norm(r + F.dropout(x + b, P), (dim,), w, n, 1e-5),
            [self.tensor(self.tokens, dim), self.tensor(dim), self.tensor(self.tokens, dim), self.tensor(dim),
             self.tensor(dim)], 4 * elements, 4 * elements)]

    def column_sum(self) -> list[Case]:
        from lightseq_fairseq import ops

        x, out = self.tensor(self.tokens, self.size.ffn, grad=False), self.tensor(self.size.ffn, grad=False)
        return [Case("column_sum", Contender(lambda: ops.column_sum_(out, x)),
                     Contender(lambda: torch.sum(x, 0, out=out)), (self.gigabytes(x.numel()), 0.0))]

    def embedding(self) -> list[Case]:
        from lightseq_fairseq import ops

        size, positions = self.size, self.packing.positions
        tokens = torch.randint(4, size.vocabulary, (self.tokens,), device=self.device)
        table, scale = self.tensor(max(self.lengths) + 2, size.dim, grad=False), math.sqrt(size.dim)
        elements = self.tokens * size.dim
        return [self.pointwise(
            "embedding", lambda w: ops.embedding(tokens, w, scale, 1, positions + 2, table, P, self.seed),
            lambda w: F.dropout(scale * F.embedding(tokens, w, 1) + table[positions + 2], P),
            [self.tensor(size.vocabulary, size.dim)], 2 * elements, elements + size.vocabulary * size.dim)]

    def cross_entropy(self) -> list[Case]:
        from lightseq_fairseq.ops.cross_entropy import label_smoothed_cross_entropy

        size = self.size
        targets = torch.randint(4, size.vocabulary, (self.tokens,), device=self.device)

        def plain(logits: Tensor) -> Tensor:  # fairseq's label_smoothed_nll_loss
            log_probabilities = logits.log_softmax(-1, dtype=torch.float32)
            nll = -log_probabilities.gather(-1, targets[:, None])
            eps_i = EPSILON / (size.vocabulary - 1)
            return ((1 - EPSILON - eps_i) * nll - eps_i * log_probabilities.sum(-1, keepdim=True)).sum()

        elements = self.tokens * size.vocabulary
        return [self.pointwise(
            "label_smoothed_cross_entropy",
            lambda x: label_smoothed_cross_entropy(x, targets, EPSILON, 1, overwrite_logits=True)[0], plain,
            [self.tensor(self.tokens, size.vocabulary)], elements, 2 * elements)]

    def attention(self) -> list[Case]:
        """Self-attention of encoder and decoder and cross-attention; padded tensors for plain PyTorch."""
        from lightseq_fairseq import ops

        size, packing = self.size, self.packing
        head, width = size.dim // size.heads, max(self.lengths)
        keys = ~self.padding[:, None, None]
        causal = keys & torch.ones(width, width, dtype=torch.bool, device=self.device).tril()

        def scaled_dot_product(mask: Tensor) -> Contender:
            qkv = [self.tensor(len(self.lengths), size.heads, width, head) for _ in range(3)]
            return Contender(lambda: F.scaled_dot_product_attention(*qkv, attn_mask=mask, dropout_p=P), qkv)

        qkv = self.tensor(self.tokens, 3, size.heads, head)
        parts = [self.tensor(self.tokens, size.heads, head), self.tensor(self.tokens, 2, size.heads, head)]
        ours = {name: Contender(functools.partial(ops.self_attention, qkv, packing.cu_seqlens, width, is_causal, P,
                                                  seed=self.seed), [qkv])
                for name, is_causal in (("self_attention", False), ("causal_self_attention", True))}
        ours["cross_attention"] = Contender(functools.partial(
            ops.cross_attention, *parts, packing.cu_seqlens, packing.cu_seqlens, width, width, False, P,
            seed=self.seed), parts)
        elements = self.tokens * size.dim
        return [Case(name, contender, scaled_dot_product(causal if "causal" in name else keys),
                     (self.gigabytes(4 * elements), self.gigabytes(8 * elements)),
                     (self._attention_teraflops("causal" in name), 2.5 * self._attention_teraflops("causal" in name)))
                for name, contender in ours.items()]

    def _attention_teraflops(self, causal: bool) -> float:
        """Two products of each query with each key that it sees, forward."""
        return sum(length**2 for length in self.lengths) * self.size.dim * 4e-12 * (0.5 if causal else 1)

    def adam(self) -> list[Case]:
        """A whole model's update: norm, clipping, Adam and the 16-bit copy of the parameters."""
        from lightseq_fairseq.ops.flat_adam import flat_adam_, segment_table

        count = self.size.parameters
        state = [torch.zeros(count, device=self.device) for _ in range(3)]
        param, grad = self.tensor(count, grad=False), self.tensor(count, grad=False)
        steps, norm = torch.zeros((), dtype=torch.int64, device=self.device), torch.zeros((), device=self.device)
        lr, multiplier = torch.full_like(norm, 1e-4), torch.full_like(norm, 1 / 4096)
        segments = segment_table([(0, 0, count)]).to(self.device)

        def ours() -> None:
            flat_adam_(*state, param, steps, norm, grad, segments, lr, multiplier, max_norm=1.0)

        master = torch.zeros(count, device=self.device)
        optimizer = torch.optim.Adam([master], lr=lr.clone(), betas=(0.9, 0.98), fused=True,
                                     capturable=self.device.type == "cuda")

        def plain() -> None:
            wide = grad.float().mul_(multiplier)
            master.grad = wide.mul_((1 / (torch.linalg.vector_norm(wide) + 1e-6)).clamp(max=1))
            optimizer.step()
            param.copy_(master)

        moved = (count * (24 + 3 * self.dtype.itemsize) / 1e9, 0.0)  # the gradient twice: for its norm, and for Adam
        return [Case("adam", Contender(ours), Contender(plain), moved)]

    def encoder_layer(self) -> list[Case]:
        from fairseq.modules.transformer_layer import TransformerEncoderLayerBase

        from lightseq_fairseq.layers.encoder import TransformerEncoderLayer

        ours = TransformerEncoderLayer(self._config()).to(self.device, self.dtype)
        stock = TransformerEncoderLayerBase(self._stock_config()).to(self.device, self.dtype)
        x, padded = self.tensor(self.tokens, self.size.dim), self._padded()
        seeds = torch.arange(ours.SEEDS, device=self.device)[:, None]
        return [self._layer("encoder_layer", lambda: ours(x, self.packing, seeds), [x, *ours.parameters()],
                            lambda: stock(padded, self.padding), [padded, *stock.parameters()],
                            self._teraflops(4, 1))]

    def decoder_layer(self) -> list[Case]:
        from fairseq.modules.transformer_layer import TransformerDecoderLayerBase

        from lightseq_fairseq.layers.decoder import TransformerDecoderLayer

        ours = TransformerDecoderLayer(self._config()).to(self.device, self.dtype)
        stock = TransformerDecoderLayerBase(self._stock_config()).to(self.device, self.dtype)
        x, padded = self.tensor(self.tokens, self.size.dim), self._padded()
        source, padded_source = self.tensor(self.tokens, self.size.dim), self._padded()
        seeds = torch.arange(ours.SEEDS, device=self.device)[:, None]
        width = max(self.lengths)
        future = torch.full((width, width), float("-inf"), device=self.device, dtype=self.dtype).triu(1)
        return [self._layer(
            "decoder_layer", lambda: ours(x, self.packing, source, self.packing, seeds=seeds)[0],
            [x, source, *ours.parameters()],
            lambda: stock(padded, padded_source, self.padding, self_attn_mask=future,
                          self_attn_padding_mask=self.padding)[0],
            [padded, padded_source, *stock.parameters()], self._teraflops(8, 1.5))]

    def _layer(self, name: str, ours: Callable[[], Any], our_inputs: list[Tensor], stock: Callable[[], Any],
               stock_inputs: list[Tensor], teraflops: float) -> Case:
        """Weights count once forward, twice backward; activations are assumed to cost nothing beside the GEMMs."""
        weights = sum(p.numel() for p in our_inputs)
        return Case(name, Contender(ours, our_inputs), Contender(stock, stock_inputs),
                    (self.gigabytes(weights), self.gigabytes(2 * weights)), (teraflops, 2 * teraflops))

    def _teraflops(self, projections: int, attentions: float) -> float:
        """Of a layer, forward: projections (C, C), the feed-forward network, and attention over everything."""
        size = self.size
        linear = 2e-12 * self.tokens * (projections * size.dim**2 + 2 * size.dim * size.ffn)
        return linear + attentions * self._attention_teraflops(False)

    def _padded(self) -> Tensor:
        """(T, B, C)."""
        return self.tensor(max(self.lengths), len(self.lengths), self.size.dim)

    def _config(self) -> Any:
        from lightseq_fairseq.config import TransformerConfig

        size, sides = self.size, {}
        for side in ("encoder", "decoder"):
            sides |= {f"{side}_layers": 1, f"{side}_embed_dim": size.dim, f"{side}_ffn_embed_dim": size.ffn,
                      f"{side}_attention_heads": size.heads}
        return TransformerConfig(src_vocab_size=size.vocabulary, tgt_vocab_size=size.vocabulary, dropout=P,
                                 decoder_output_dim=size.dim, **sides)

    def _stock_config(self) -> Any:
        from fairseq.models.transformer import TransformerConfig, base_architecture

        size = self.size
        args = argparse.Namespace(dropout=P)
        for side in ("encoder", "decoder"):
            for option, value in (("embed_dim", size.dim), ("ffn_embed_dim", size.ffn),
                                  ("attention_heads", size.heads)):
                setattr(args, f"{side}_{option}", value)
        base_architecture(args)
        return TransformerConfig.from_namespace(args)


KINDS = ("layer_norm", "bias_activation_dropout", "bias_dropout_residual", "bias_dropout_residual_layer_norm",
         "column_sum", "embedding", "attention", "cross_entropy", "adam", "encoder_layer", "decoder_layer")
"""Methods of Bench that make cases."""


class Clock:
    """Microseconds of a computation with cold caches; see the head of this file."""

    def __init__(self, device: torch.device, replays: int, repeats: int = 10) -> None:
        self.on_gpu, self.replays, self.repeats = device.type == "cuda", replays, repeats
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size if self.on_gpu else 1 << 20
        self.other = torch.zeros(size // 4, device=device)

    def flush(self) -> None:
        """Read what is not of the computation; written lines would have to be stored while it runs."""
        self.other.amax()

    def __call__(self, function: Callable[[], Any]) -> list[float]:
        return self._on_gpu(function) if self.on_gpu else self._on_cpu(function)

    def _on_cpu(self, function: Callable[[], Any]) -> list[float]:
        function()
        times = []
        for _ in range(self.replays):
            self.flush()
            start = time.perf_counter()
            function()
            times.append((time.perf_counter() - start) * 1e6)
        return times

    def _on_gpu(self, function: Callable[[], Any]) -> list[float]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, chooses GEMMs, allocates
                self.flush()
                function()
        torch.cuda.synchronize()
        both = self._capture(lambda: (self.flush(), function()))
        return [(self._milliseconds(both) - self._milliseconds(self._reads)) * 1e3 / self.repeats
                for _ in range(self.replays + 2)][2:]

    @functools.cached_property
    def _reads(self) -> torch.cuda.CUDAGraph:
        return self._capture(self.flush)

    def _capture(self, function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(self.repeats):
                function()
        return graph

    @staticmethod
    def _milliseconds(graph: torch.cuda.CUDAGraph) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def ceilings(clock: Clock, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """GB/s of a copy (read and written bytes) and TFLOP/s of a square matrix product, as measured."""
    elements, side = (1 << 28, 8192) if device.type == "cuda" else (1 << 20, 128)
    source = torch.zeros(elements, dtype=dtype, device=device)
    target, matrix = torch.empty_like(source), torch.randn(side, side, device=device).to(dtype)
    copied = 2 * elements * dtype.itemsize / statistics.median(clock(lambda: target.copy_(source))) / 1e3
    multiplied = 2 * side**3 / statistics.median(clock(lambda: matrix @ matrix)) / 1e6
    return {"gb_per_s": round(copied, 1), "tflop_per_s": round(multiplied, 3)}


def rows_of(case: Case, size: str, contenders: Sequence[str], clock: Clock,
            ceiling: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each contender and each of forward and step (forward and backward); failures give their reason."""
    rows = []
    for name in contenders:
        contender = case.contender(name)
        for part in ("forward", "step") if contender.inputs else ("step",):
            row: dict[str, Any] = {"case": case.name, "size": size, "pass": part, "contender": name}
            try:
                times = sorted(clock(contender.forward if part == "forward" else contender.step))
            except Exception as error:  # of a contender that is not ours
                if name == "lightseq":
                    raise
                rows.append({**row, "failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
                continue
            low, us, high = (times[round(q * (len(times) - 1))] for q in (0.2, 0.5, 0.8))
            gigabytes, teraflops = (moved[0] if part == "forward" else sum(moved)
                                    for moved in (case.gigabytes, case.teraflops))
            bounds = gigabytes / ceiling["gb_per_s"] * 1e6, teraflops / ceiling["tflop_per_s"] * 1e6
            rows.append({**row, "us": round(us, 2), "us_20": round(low, 2), "us_80": round(high, 2),
                         "gb_per_s": round(gigabytes / us * 1e6, 1), "tflop_per_s": round(teraflops / us * 1e6, 3),
                         "bound_us": round(max(bounds), 2), "bound": "memory" if bounds[0] >= bounds[1] else "compute"})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """One line for each row."""
    for row in rows:
        head = f"{row['size']:5} {row['case']:32} {row['pass']:8} {row['contender']:9}"
        if "failed" in row:
            print(f"{head} failed: {row['failed']}", flush=True)
            continue
        speed = (f"{row['gb_per_s']:8.1f} GB/s" if row["bound"] == "memory" else f"{row['tflop_per_s']:8.3f} TFLOP/s")
        print(f"{head} {row['us']:9.2f} us ({row['us_20']:.2f} to {row['us_80']:.2f}) {speed}, "
              f"{100 * row['bound_us'] / row['us']:.0f} % of the bound", flush=True)


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Bars of microseconds of forward and backward, the bound as a mark; a panel for each size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [row for row in rows if row["pass"] == "step" and "us" in row]
    sizes = list(dict.fromkeys(row["size"] for row in steps))
    figure, panels = plt.subplots(1, len(sizes), figsize=(7 * len(sizes), 6), layout="constrained", squeeze=False)
    for axes, size in zip(panels[0], sizes, strict=True):
        cases = list(dict.fromkeys(row["case"] for row in steps if row["size"] == size))
        for offset, contender in enumerate(CONTENDERS):
            found = {row["case"]: row for row in steps if (row["size"], row["contender"]) == (size, contender)}
            places = [i for i, case in enumerate(cases) if case in found]
            if places:
                axes.barh([i + 0.27 * offset for i in places], [found[cases[i]]["us"] for i in places], 0.25,
                          label=contender, color=f"C{offset}")
            if contender == "lightseq":
                axes.plot([found[cases[i]]["bound_us"] for i in places], places, "k|", markersize=12, label="bound")
        axes.set(xscale="log", xlabel="us, forward and backward", title=size)
        axes.set_yticks([i + 0.27 for i in range(len(cases))], cases)
        axes.invert_yaxis()
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--sizes", default="base,big" if on_gpu else "tiny", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--dtype", default="fp16" if on_gpu else "fp32", choices=DTYPES)
    parser.add_argument("--tokens", type=int, default=4096 if on_gpu else 64)
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.disable(logging.INFO)  # fairseq turns on what every library has to say
    torch.manual_seed(1)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    if device.type == "cuda":
        from lightseq_fairseq.ops import _extension

        if not _extension.loaded():
            raise SystemExit("the compiled operators do not load: these would be the reference's times")
    clock = Clock(device, args.replays)
    ceiling = ceilings(clock, dtype, device)
    print(f"ceiling: {ceiling['gb_per_s']} GB/s, {ceiling['tflop_per_s']} TFLOP/s", flush=True)
    rows: list[dict[str, Any]] = []
    for size in args.sizes.split(","):
        bench = Bench(SIZES[size], args.tokens, dtype, device)
        for kind in args.only.split(","):
            for case in getattr(bench, kind)():
                rows += (fresh := rows_of(case, size, args.contenders.split(","), clock, ceiling))
                show(fresh)
    args.out.mkdir(parents=True, exist_ok=True)
    about = {**machine(), "dtype": args.dtype, "tokens": args.tokens, "ceiling": ceiling}
    (args.out / "ops.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    if can_plot():
        plot(rows, args.out / "ops.png",
             f"{about['gpu']}, torch {about['torch']}, {args.dtype}, {args.tokens} tokens")


if __name__ == "__main__":
    main()
