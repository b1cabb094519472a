"""One training step as one CUDA graph: forward, loss, backward, reduction, norm, clipping, Adam.

The host copies a packed batch to the device, replays the graph of its bucket and reads what came of the step before.
Whether that one overflowed is not known when the next is launched: the host sends learning rate and loss scale for
both outcomes, and the device takes those of the outcome that came about. On a device without graphs the same steps
run one by one.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightseq_fairseq.layers.capture import capture
from lightseq_fairseq.layers.fp8 import DelayedScaling
from lightseq_fairseq.layers.linear import WeightGradients
from lightseq_fairseq.ops.cross_entropy import label_smoothed_cross_entropy
from lightseq_fairseq.ops.flat_adam import flat_adam_
from lightseq_fairseq.plugin.flat_storage import FlatStorage
from lightseq_fairseq.plugin.gradient_reduction import GradientReduction
from lightseq_fairseq.plugin.graph_choice import GraphChoice
from lightseq_fairseq.plugin.packed_batch import Bucket, PackedBatch


class Rates(NamedTuple):
    """What the host decides about an update."""

    lr: float
    loss_scale: float


class Result(NamedTuple):
    """Sums over the micro-batches of one update and over all ranks, on the host."""

    loss: float
    nll_loss: float
    correct: float
    total: float
    sample_size: float
    ntokens: float
    nsentences: float
    norm: float


_SUMS = len(Result._fields) - 1  # all but the norm


@dataclass(frozen=True)
class StepConfig:
    """What stays the same for a whole run."""

    epsilon: float
    pad: int
    max_norm: float
    report_accuracy: bool
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    group: Any = None
    """Process group of the data-parallel ranks; None for one rank."""
    world_size: int = 1


class WholeStep:
    """Updates of one model through flat storage, a graph for each (bucket, role of the micro-batch)."""

    def __init__(self, model: Any, storage: FlatStorage, config: StepConfig,
                 fp8: DelayedScaling | None = None) -> None:
        """``fp8``: of the model's linear maps, which then multiply in 8 bits."""
        self.model, self.storage, self.config, self.fp8 = model, storage, config, fp8
        self.device = storage.master.device
        self.weight_gradients = WeightGradients(storage.param, storage.grad, fp8)
        self.reduction = None
        if config.world_size > 1:
            self.reduction = GradientReduction(storage.grad, storage.params, storage.grads, config.group)
        self.graphs: dict[tuple[Bucket, bool, bool], torch.cuda.CUDAGraph] = {}
        # before the stream of the weight gradients, wherever both have something to run
        self.stream = torch.cuda.Stream(self.device, priority=-1) if self._on_gpu else None
        self.choices = defaultdict[tuple[bool, bool], GraphChoice](GraphChoice)
        self.inputs: dict[Bucket, Tensor] = {}
        self.staging: dict[Bucket, list[Tensor]] = {}
        self.pool: Any = None
        self.warm = False
        self.launched = 0
        self.sums = torch.zeros(_SUMS, device=self.device)
        self.norm = torch.zeros((), device=self.device)
        self.result = torch.zeros(_SUMS + 1, device=self.device)
        self.landing = [torch.zeros(_SUMS + 1, pin_memory=self._on_gpu) for _ in range(2)]
        self.events = [torch.cuda.Event() for _ in range(2)] if self._on_gpu else []

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def launch(self, batch: PackedBatch, counts: tuple[float, float, float], if_good: Rates, if_overflow: Rates,
               first: bool = True, last: bool = True) -> None:
        """Start one micro-batch of an update, the ``last`` of which makes it.

        ``counts`` are its sample size, tokens and sentences. The rates are those for the outcomes of the update
        before, which need not have ended.
        """
        replays = self._on_gpu and self.warm
        if replays:
            bucket = self.choices[first, last](batch.bucket, batch.real)
            batch = batch if bucket == batch.bucket else batch.moved(bucket, self.config.pad)
        bucket = batch.bucket
        controls = bucket.views(batch.buffer).controls
        controls[:7] = torch.tensor([*if_good, *if_overflow, *counts])
        self._to_device(batch)
        if replays:
            key = bucket, first, last
            if key not in self.graphs:
                self.graphs[key] = self._capture(*key)
            self.graphs[key].replay()
        else:
            # a whole update: by it every rank learns in which order to reduce gradients, and which maps are in 8 bits
            self.warm = last
            self._run(bucket, first, last)
            if self.fp8 is not None and last:
                self.fp8.settle()
        if last:
            slot = self.launched % 2
            self.landing[slot].copy_(self.result, non_blocking=True)
            if self._on_gpu:
                self.events[slot].record()
            self.launched += 1

    def wait(self) -> Result:
        """What came of the latest update whose result was not asked for before."""
        slot = (self.launched - 1) % 2
        return self._read(slot)

    def wait_for_previous(self) -> Result:
        """What came of the update before the latest."""
        return self._read(self.launched % 2)

    def _read(self, slot: int) -> Result:
        if self._on_gpu:
            self.events[slot].synchronize()
        return Result(*self.landing[slot].tolist())

    def _to_device(self, batch: PackedBatch) -> None:
        bucket = batch.bucket
        if bucket not in self.inputs:
            self.inputs[bucket] = torch.empty(bucket.words, dtype=torch.int64, device=self.device)
            self.staging[bucket] = [torch.empty(bucket.words, dtype=torch.int64, pin_memory=self._on_gpu)
                                    for _ in range(4)]
        # at most two updates are under way, so a buffer is free again after its turn
        staging = self.staging[bucket]
        pinned = staging.pop(0)
        staging.append(pinned)
        pinned.copy_(batch.buffer)
        self.inputs[bucket].copy_(pinned, non_blocking=True)

    def _capture(self, bucket: Bucket, first: bool, last: bool) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
            # what the eager update held
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
        assert self.stream is not None
        with capture(graph, self.stream, self.pool):
            self._run(bucket, first, last)
        return graph

    def _run(self, bucket: Bucket, first: bool, last: bool) -> None:
        """The step itself, as it is captured."""
        config, storage = self.config, self.storage
        views = bucket.views(self.inputs[bucket])
        good = self.norm.isfinite()
        rates = torch.where(good, views.controls[0:2], views.controls[2:4])
        source_packing, target_packing = views.packings(bucket)
        self.weight_gradients.on_written = None
        if self.reduction is not None and last:
            self.reduction.begin()
            self.weight_gradients.on_written = self.reduction.written
        if self.fp8 is not None:
            self.fp8.begin(first)
        with self._autograd(), self.weight_gradients.begin(first):
            logits = self.model.forward_packed(views.source_tokens, source_packing, views.previous_tokens,
                                               target_packing)
            sums = [*self._accuracy(logits.detach(), views.targets)]
            loss, nll = label_smoothed_cross_entropy(logits, views.targets, config.epsilon, config.pad,
                                                     overwrite_logits=True)
            grads = torch.autograd.grad(loss, storage.params, rates[1].to(loss.dtype), allow_unused=True)
        with torch.no_grad():
            late = self._collect(grads, first)
            fresh = torch.cat((torch.stack((loss.detach(), nll.detach(), *sums)), views.controls[4:7]))
            self.sums.copy_(fresh) if first else self.sums.add_(fresh)
            if last:
                self._reduce(late)
                self._update(*rates)

    @staticmethod
    @contextlib.contextmanager
    def _autograd() -> Iterator[None]:
        with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
            yield

    def _accuracy(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if not self.config.report_accuracy:
            return self.norm.new_zeros(()), self.norm.new_zeros(())
        counted = targets != self.config.pad
        correct = (logits.argmax(-1) == targets) & counted
        return correct.sum().float(), counted.sum().float()

    def _collect(self, grads: tuple[Tensor | None, ...], first: bool) -> list[Tensor]:
        """Autograd's gradients into the flat buffer too, added to those of earlier micro-batches.

        Returns the parameters that it had gradients of.
        """
        self.weight_gradients.join()
        fresh: list[tuple[Tensor, Tensor]] = []
        more: list[tuple[Tensor, Tensor]] = []
        for param, place, grad in zip(self.storage.params, self.storage.grads, grads, strict=True):
            filled = not first or param.data_ptr() in self.weight_gradients.written
            if grad is not None:
                (more if filled else fresh).append((place, grad))
            elif not filled:
                place.zero_()
        for function, pairs in ((torch._foreach_copy_, fresh), (torch._foreach_add_, more)):
            if pairs:
                function(*map(list, zip(*pairs, strict=True)))
        return [param for param, grad in zip(self.storage.params, grads, strict=True) if grad is not None]

    def _reduce(self, late: list[Tensor]) -> None:
        if self.reduction is not None:
            dist.all_reduce(self.sums, group=self.config.group)
            self.reduction.finish(late)

    def _update(self, lr: Tensor, loss_scale: Tensor) -> None:
        config, storage = self.config, self.storage
        sample_size = self.sums[4]
        multiplier = config.world_size / (torch.where(sample_size > 0, sample_size, 1.0) * loss_scale)
        flat_adam_(storage.master, storage.exp_avg, storage.exp_avg_sq, storage.param, storage.steps, self.norm,
                   storage.grad, storage.segments, lr, multiplier, max_norm=config.max_norm, beta1=config.beta1,
                   beta2=config.beta2, eps=config.eps, weight_decay=config.weight_decay)
        if self.fp8 is not None:
            self.fp8.end()
        self.result.copy_(torch.cat((self.sums, self.norm[None])))
