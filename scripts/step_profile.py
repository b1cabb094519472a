"""Where the time of a training step goes: kernels of a profiled run, classed by name, and what the device waits.

Imported by benchmark_train.py for its --profile. KERNEL_CLASSES is the one place that knows names of kernels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

KERNEL_CLASSES = (
    ("communication", r"nccl"),
    ("casts to 8 bits", r"lightseq::fp8_cast"),
    ("loss", r"lightseq::cross_entropy|log_?softmax|nll_loss|cross_entropy|scatter_gather|argmax|\bgather"),
    ("attention", r"lightseq::attention|flash|fmha|sdpa|attention|softmax"),
    ("GEMM", r"gemm|cutlass|cublas|nvjet|xmma|splitk|gemv|tensorop"),
    ("norm", r"lightseq::(bias_dropout_residual_)?layer_norm|layer_?norm|gammabeta"),
    ("embedding", r"embedding|indexselect|index_select|compute_grad_weight|radixsort|krn_partial|sum_and_scatter"),
    ("optimizer", r"adam|multi_tensor_apply|lpnorm|normtwo|normops"),
    ("copies", r"memcpy|memset|copy|catarray|fillfunctor"),
    ("bias, activation, dropout, residual",
     r"lightseq::(bias_|column_sum)|dropout|elementwise|vectorized|reduce_kernel|distribution|triton"),
)
"""Class and pattern, ignoring case; the first that is found in a kernel's name counts, "other" where none is."""

GAPS = "launch gaps"
"""Time of a step in which no kernel runs: launches, the host, waiting for data."""


class Kernel(NamedTuple):
    """One kernel or copy that ran on the device."""

    name: str
    start_us: float
    end_us: float


def kernel_class(name: str) -> str:
    """The class of a kernel of this (demangled) name."""
    return next((kind for kind, pattern in KERNEL_CLASSES if re.search(pattern, name, re.IGNORECASE)), "other")


def busy_us(kernels: Sequence[Kernel]) -> float:
    """Time in which at least one kernel runs; they overlap where there are several streams."""
    busy, end = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda k: k.start_us):
        busy += max(0.0, kernel.end_us - max(kernel.start_us, end))
        end = max(end, kernel.end_us)
    return busy


def profile_row(kernels: Sequence[Kernel], steps: int, ms: float) -> dict[str, Any]:
    """Milliseconds a step by class, of ``kernels`` that ran in ``steps`` steps; ``ms`` is a step's without profiler."""
    classes = dict.fromkeys([*(kind for kind, _ in KERNEL_CLASSES), "other"], 0.0)
    for kernel in kernels:
        classes[kernel_class(kernel.name)] += (kernel.end_us - kernel.start_us) / steps / 1e3
    rounded = {kind: round(time, 4) for kind, time in classes.items() if time > 0}
    rounded[GAPS] = round(max(0.0, ms - busy_us(kernels) / steps / 1e3), 4)
    return {"ms": round(ms, 3), "kernels": round(len(kernels) / steps, 1), "classes": rounded}


def record(run: Callable[[], Any]) -> list[Kernel]:
    """The kernels of ``run`` on the CUDA device."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
    return [Kernel(event.name, event.time_range.start, event.time_range.end) for event in profiler.events()
            if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a column for each row of the profile, a line for each class."""
    kinds = [kind for kind in (*(kind for kind, _ in KERNEL_CLASSES), "other", GAPS)
             if any(kind in row["classes"] for row in rows)]
    head = ["ms a step", *(f"{row['case']} {row['contender']}" for row in rows)]
    lines = [head, ["---"] * len(head)]
    lines += [[kind, *(f"{row['classes'].get(kind, 0.0):.3f}" for row in rows)] for kind in kinds]
    lines += [["step", *(f"{row['ms']:.3f}" for row in rows)], ["kernels", *(f"{row['kernels']:g}" for row in rows)]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Stacked bars of milliseconds by class."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 0.6 * len(rows) + 2), layout="constrained")
    labels, ends = [f"{row['case']} {row['contender']}" for row in rows], [0.0] * len(rows)
    colours = plt.get_cmap("tab20").colors
    for colour, kind in zip(colours, (*(kind for kind, _ in KERNEL_CLASSES), "other", GAPS), strict=False):
        times = [row["classes"].get(kind, 0.0) for row in rows]
        if any(times):
            axes.barh(labels, times, left=ends, label=kind, color="lightgrey" if kind == GAPS else colour)
            ends = [end + time for end, time in zip(ends, times, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="ms a step", title=title)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
