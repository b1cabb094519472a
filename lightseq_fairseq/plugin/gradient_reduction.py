"""Gradients averaged over ranks in pieces, each as soon as it is complete, while the backward pass goes on.

As in DistributedDataParallel (Li et al. 2020) the flat gradient is cut into buckets, here views of it. The products of
a backward pass come in the same order every time, so the first one tells how many each bucket must wait for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

_BUCKET_BYTES = 24 << 20
"""Large enough for NCCL's full bandwidth, small enough that the last one ends soon after the backward pass."""


class GradientReduction:
    """Averages ``grad`` (Q,), whose ``places`` belong to ``params``, over ``group``."""

    def __init__(self, grad: Tensor, params: Sequence[Tensor], places: Sequence[Tensor], group: Any) -> None:
        self.group = group
        self.buckets, self.bucket_of = _cut(grad, params, places)
        self.expected: Counter[int] | None = None
        """Products that fill each bucket; none for those that autograd fills too, at the very end."""
        self._seen: Counter[int] = Counter()
        self._under_way: list[Any] = []
        self._started: set[int] = set()

    def begin(self) -> None:
        """Before the backward pass whose gradients complete an update."""
        self._seen.clear()
        self._started.clear()

    def written(self, params: Iterable[Tensor]) -> None:
        """``params`` have a further part of their gradients in the current stream."""
        for param in params:
            bucket = self.bucket_of[param.data_ptr()]
            self._seen[bucket] += 1
            if self.expected is not None and self._seen[bucket] == self.expected[bucket]:
                self._start(bucket)

    def finish(self, late: Iterable[Tensor]) -> None:
        """All gradients are in the current stream, in which their averages are from here on.

        ``late`` are the parameters with a part that :meth:`written` was not told of.
        """
        for bucket in range(len(self.buckets)):
            if bucket not in self._started:
                self._start(bucket)
        for work in self._under_way:
            work.wait()
        self._under_way.clear()
        if self.expected is None:
            self.expected = self._seen.copy()
            for param in late:
                self.expected.pop(self.bucket_of[param.data_ptr()], None)

    def _start(self, bucket: int) -> None:
        self._started.add(bucket)
        self._under_way.append(dist.all_reduce(self.buckets[bucket], op=dist.ReduceOp.AVG, group=self.group,
                                               async_op=True))


def _cut(grad: Tensor, params: Sequence[Tensor], places: Sequence[Tensor]) -> tuple[list[Tensor], dict[int, int]]:
    """Views of ``grad`` that together are all of it, and by the address of a parameter the number of its view."""
    starts = sorted((place.storage_offset(), param.data_ptr()) for param, place in zip(params, places, strict=True))
    least = _BUCKET_BYTES // grad.element_size()
    cuts, bucket_of = [0], {}
    for (_, address), end in zip(starts, [*(start for start, _ in starts[1:]), grad.numel()], strict=True):
        bucket_of[address] = len(cuts) - 1
        if end - cuts[-1] >= least and end < grad.numel():
            cuts.append(end)
    return [grad[begin:end] for begin, end in zip(cuts, [*cuts[1:], grad.numel()], strict=True)], bucket_of
