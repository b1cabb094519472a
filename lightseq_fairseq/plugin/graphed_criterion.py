"""Forward and backward of ``ls_label_smoothed_cross_entropy`` as two CUDA graphs a bucket, in fairseq's own loop.

``lightseq-train`` makes a whole update one graph (whole_step.py). Under ``fairseq-train --user-dir``, and where a whole
update cannot be captured, the loss at least costs two launches instead of a thousand: one that computes it, and one
that its backward pass replays. The rest of the step stays fairseq's, gradients being those of any autograd function.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightseq_fairseq.layers.capture import captured
from lightseq_fairseq.layers.decoder import TransformerDecoderLayer
from lightseq_fairseq.layers.encoder import TransformerEncoderLayer
from lightseq_fairseq.ops.cross_entropy import label_smoothed_cross_entropy
from lightseq_fairseq.plugin.graph_choice import GraphChoice
from lightseq_fairseq.plugin.ls_transformer import PackedTransformer
from lightseq_fairseq.plugin.packed_batch import Bucket, PackedBatch

logger = logging.getLogger(__name__)

_LAYERS = (TransformerEncoderLayer, TransformerDecoderLayer)


class Sums(NamedTuple):
    """Over the targets that count; fp32 scalars on the device."""

    loss: Tensor
    """The one that can be differentiated."""
    nll_loss: Tensor
    n_correct: Tensor
    total: Tensor
    """Targets that ``n_correct`` was counted of; both are 0 unless they are asked for."""


class _Bucket(NamedTuple):
    """What replays one bucket."""

    forward: Callable[[], None]
    backward: Callable[[], None]


class GraphedCriterion:
    """Graphs of one model under one criterion; ``devices`` are the device types on which they are used.

    On a device without graphs the same functions run one kernel after another, which is for tests.
    """

    devices = ("cuda",)

    def __init__(self, epsilon: float, pad: int, ignore_prefix_size: int, report_accuracy: bool) -> None:
        self.epsilon, self.pad = epsilon, pad
        self.ignore_prefix_size, self.report_accuracy = ignore_prefix_size, report_accuracy
        self.said: set[str] = set()
        self._forget()

    def _forget(self) -> None:
        self.model: Any = None
        self.buckets: dict[Bucket, _Bucket] = {}
        self.inputs: dict[Bucket, Tensor] = {}
        self.choice = GraphChoice()
        self.pool: Any = None
        self.warm = False
        self.awaiting: weakref.ref[_Turn] | None = None

    def __call__(self, model: Any, sample: dict[str, Any]) -> Sums | None:
        """The sums of a batch of fairseq's on the device, or None where the caller has to compute them itself."""
        if sample["target"].device.type not in self.devices or not (torch.is_grad_enabled() and model.training):
            return None
        params = [param for param in model.parameters() if param.requires_grad]
        obstacle = self.obstacle(model, params)
        self._say("forward and backward are replayed as CUDA graphs" if obstacle is None else
                  f"forward and backward run one kernel after another, because {obstacle}")
        if obstacle is not None:
            return None
        self._adopt(model, params)
        if not self.warm:  # libraries set themselves up in the first update
            self.warm = True
            return None
        batch = self._packed(sample)
        bucket = self.choice(batch.bucket, batch.real)
        batch = batch if bucket == batch.bucket else batch.moved(bucket, self.pad)
        if bucket not in self.inputs:
            self.inputs[bucket] = torch.empty(bucket.words, dtype=torch.int64, device=self.sums.device)
        self.inputs[bucket].copy_(batch.buffer)
        if bucket not in self.buckets:
            self.buckets[bucket] = self._capture(bucket) if self.sums.is_cuda else self._functions(bucket)
        turn = _Turn(self, bucket)
        self.awaiting = weakref.ref(turn)
        loss, others = _Replay.apply(turn, *self.params)
        return Sums(loss, *others.unbind())

    def obstacle(self, model: Any, params: list[Tensor]) -> str | None:
        """Why the next forward pass of ``model``, of which ``params`` are trained, cannot be replayed, or None."""
        if not isinstance(model, PackedTransformer):
            return (f"the model is a {type(model).__name__}, not ls_transformer or ls_bart itself (on several GPUs "
                    "lightseq-train has graphs)")
        layers = [*model.encoder.layers, *model.decoder.layers]
        configs = [model.encoder.config, model.decoder.config]
        awaited = self.awaiting() if self.awaiting is not None else None
        obstacles = {
            "the model has a forward of its own": type(model).forward is not type(model).known_forward,
            "autocast is on (--amp)": torch.is_autocast_enabled(),
            "layers are dropped at random":
                any(max(config.encoder_layerdrop, config.decoder_layerdrop) > 0 for config in configs),
            "layers are wrapped (--checkpoint-activations or fully sharded)":
                any(not isinstance(layer, _LAYERS) or "forward" in vars(layer) for layer in layers),
            "hooks watch its modules": any(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                                           or module._backward_pre_hooks for module in model.modules()),
            "parameters differ in type": len({param.dtype for param in params}) != 1,
            "an earlier loss still awaits its backward pass": awaited is not None and not awaited.over,
        }
        return next((words for words, holds in obstacles.items() if holds), None)

    def _say(self, line: str) -> None:
        """Each line once."""
        if line not in self.said:
            self.said.add(line)
            logger.info("%s", line)

    def _adopt(self, model: Any, params: list[Tensor]) -> None:
        """Start anew where the model, or the memory of a parameter, is another than that which graphs refer to."""
        addresses = [param.data_ptr() for param in params]
        if self.model is model and addresses == self.addresses:
            return
        self._forget()
        self.model, self.params, self.addresses = model, params, addresses
        like = params[0]
        self.sums = torch.zeros(len(Sums._fields), device=like.device)
        self.scale = torch.zeros((), device=like.device)
        self.grad = torch.zeros(sum(param.numel() for param in params), dtype=like.dtype, device=like.device)
        self.grads = self.views(self.grad)
        self.used: list[bool] = []

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parts of ``flat`` (P,) that belong to the parameters."""
        parts = flat.split([param.numel() for param in self.params])
        return [part.view(param.shape) for part, param in zip(parts, self.params, strict=True)]

    def _packed(self, sample: dict[str, Any]) -> PackedBatch:
        """The batch on the host, which has to know how many real tokens there are."""
        net_input = sample["net_input"]
        names = ("src_tokens", "prev_output_tokens")
        host = {"net_input": {name: net_input[name].cpu() for name in names}, "target": sample["target"].cpu()}
        return PackedBatch.of(host, self.pad, self.ignore_prefix_size)

    def _functions(self, bucket: Bucket) -> _Bucket:
        """The two passes, the second of which needs what the first has left behind."""
        left: list[Tensor] = []

        def forward() -> None:
            views = bucket.views(self.inputs[bucket])
            source_packing, packing = views.packings(bucket)
            logits = self.model.forward_packed(views.source_tokens, source_packing, views.previous_tokens, packing)
            if self.report_accuracy:
                counted = views.targets != self.pad
                self.sums[2] = ((logits.detach().argmax(-1) == views.targets) & counted).sum()
                self.sums[3] = counted.sum()
            loss, nll_loss = label_smoothed_cross_entropy(logits, views.targets, self.epsilon, self.pad,
                                                          overwrite_logits=True)
            self.sums[:2] = torch.stack((loss.detach(), nll_loss.detach()))
            left.append(loss)

        def backward() -> None:
            loss = left.pop()
            grads = torch.autograd.grad(loss, self.params, self.scale.to(loss.dtype), allow_unused=True)
            self.used = [grad is not None for grad in grads]
            pairs = [(place, grad) for place, grad in zip(self.grads, grads, strict=True) if grad is not None]
            torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))

        return _Bucket(forward, backward)

    def _capture(self, bucket: Bucket) -> _Bucket:
        """One graph for each pass; their memory is shared by all buckets, whose turns do not overlap."""
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        with torch.enable_grad():  # what a trial draws does not count
            return _Bucket(*captured(*self._functions(bucket), pool=self.pool,
                                     trial=torch.random.fork_rng([self.sums.device])))


class _Turn:
    """A forward pass and the backward pass that belongs to it."""

    def __init__(self, criterion: GraphedCriterion, bucket: Bucket) -> None:
        self.criterion, self.bucket, self.over = criterion, bucket, False


class _Replay(torch.autograd.Function):
    """The loss as a function of the parameters, and the other fields of :class:`Sums` (3,)."""

    @staticmethod
    def forward(ctx: Any, turn: _Turn, *params: Tensor) -> tuple[Tensor, Tensor]:
        ctx.turn = turn
        with torch.enable_grad():
            turn.criterion.buckets[turn.bucket].forward()
        loss, others = turn.criterion.sums[0].clone(), turn.criterion.sums[1:].clone()
        ctx.mark_non_differentiable(others)
        return loss, others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        turn, criterion = ctx.turn, ctx.turn.criterion
        if turn.over:
            raise RuntimeError("this loss of CUDA graphs has had its backward pass; compute it anew for another")
        turn.over = True
        criterion.scale.copy_(dloss)
        with torch.enable_grad():
            criterion.buckets[turn.bucket].backward()
        grads = criterion.views(criterion.grad.clone())  # autograd keeps them
        return None, *(grad if used else None for grad, used in zip(grads, criterion.used, strict=True))

