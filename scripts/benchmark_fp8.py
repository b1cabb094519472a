#!/usr/bin/env python3
"""What FP8 would give the GEMMs of a training step: the three of every linear map, in fp16 and in FP8, one by one.

    python scripts/benchmark_fp8.py [--tokens 12288] [--step-ms MILLISECONDS]

The maps are those of a Transformer big with 28 672 types; --tokens are the real tokens of a side in a batch (about
12 288 at --max-tokens 16384). FP8 (e4m3 forward, e5m2 gradients, one scale a tensor, known from earlier steps) wants
both operands with the summed dimension last, so a tensor is needed as it is and transposed: 4 bytes moved for each
element by a kernel that casts, none where a neighbour were to write both. With --step-ms, the time of a whole update
(benchmark_train.py --cases big-16384), it says how much faster that update were at most, and with separate casts.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

LAYERS, WIDTH, FFN, TYPES = 6, 1024, 4096, 28672
MAPS = {  # name: (inputs, outputs, how many)
    "self-attention in": (WIDTH, 3 * WIDTH, 2 * LAYERS),
    "attention out, cross query": (WIDTH, WIDTH, 4 * LAYERS),
    "cross keys and values": (WIDTH, 2 * LAYERS * WIDTH, 1),
    "first of feed-forward": (WIDTH, FFN, 2 * LAYERS),
    "second of feed-forward": (FFN, WIDTH, 2 * LAYERS),
    "output": (WIDTH, TYPES, 1),
}
FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2


def microseconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Median of ``repeats``, the operands being larger than the L2 cache."""
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[3:])


def products(tokens: int, inner: int, outer: int) -> tuple[float, float, float]:
    """Microseconds of y = x W^T, dx = dy W and dW = dy^T x together: in fp16, in FP8, and of the casts to FP8."""
    shapes = {"x": (tokens, inner), "weight": (outer, inner), "dy": (tokens, outer)}
    x, weight, dy = (torch.randn(shape, device="cuda", dtype=torch.float16) for shape in shapes.values())
    one = torch.ones((), device="cuda")
    halves = sum(map(microseconds, (lambda: x @ weight.t(), lambda: dy @ weight, lambda: dy.t() @ x)))
    x8, weight8, dy8 = x.to(FORWARD), weight.to(FORWARD), dy.to(GRADIENT)
    x8_t, weight8_t, dy8_t = (tensor.t().contiguous() for tensor in (x8, weight8, dy8))

    def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:  # (M, K), (N, K) -> (M, N)
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.float16, use_fast_accum=True)

    eights = sum(map(microseconds, (
        lambda: multiply(x8, weight8), lambda: multiply(dy8, weight8_t), lambda: multiply(dy8_t, x8_t))))
    bytes_moved = 4 * (x.numel() + dy.numel() + weight.numel())
    return halves, eights, bytes_moved / copy_speed()


def copy_speed(bytes_at_once: int = 1 << 30) -> float:
    """Bytes a microsecond of a copy, read and written."""
    if not _speed:
        source = torch.empty(bytes_at_once, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        _speed.append(2 * bytes_at_once / microseconds(lambda: target.copy_(source)))
    return _speed[0]


_speed: list[float] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=12288)
    parser.add_argument("--step-ms", type=float)
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.tokens} tokens a side, microseconds a map")
    print(f"{'':28}{'maps':>6}{'fp16':>9}{'FP8':>9}{'casts':>9}")
    totals = [0.0, 0.0, 0.0]
    for name, (inner, outer, count) in MAPS.items():
        times = products(args.tokens, inner, outer)
        totals = [total + count * time for total, time in zip(totals, times, strict=True)]
        print(f"{name:28}{count:6}" + "".join(f"{time:9.0f}" for time in times), flush=True)
    print(f"{'a step, ms':34}" + "".join(f"{total / 1e3:9.2f}" for total in totals))
    if args.step_ms:
        halves, eights, casts = (total / 1e3 for total in totals)
        for words, saved in (("with casts for nothing", halves - eights), ("with casts", halves - eights - casts)):
            print(f"{words}: {args.step_ms:.2f} -> {args.step_ms - saved:.2f} ms, "
                  f"{args.step_ms / (args.step_ms - saved):.2f} times as fast")


if __name__ == "__main__":
    main()
