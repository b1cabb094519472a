"""All trained parameters of a run in flat buffers: one kernel then reads and writes each kind of them.

fairseq's objects stay what they are and see the same values: parameters, fp32 masters and Adam's moments become views
of the buffers, so that checkpoints, EMA and validation work on them unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightseq_fairseq.ops.flat_adam import segment_table
from lightseq_fairseq.optim import FusedAdam

_ALIGNMENT = 8
"""Elements that the place of a parameter is a multiple of: 16 bytes of 16-bit numbers."""


class FlatStorage:
    """Buffers behind fairseq's optimizer, which is ls_adam, alone or inside FP16Optimizer.

    ``param`` and ``grad`` (Q,) lie in an order of our own, where the members of each of the ``neighbours`` follow one
    another and vectors come behind matrices; ``master``, ``exp_avg`` and ``exp_avg_sq`` (P,) likewise, except where
    FP16Optimizer has made one flat master: its order decides what a checkpoint holds. ``segments`` says which elements
    belong together.
    """

    def __init__(self, optimizer: Any, neighbours: Sequence[Sequence[Tensor]] = ()) -> None:
        inner: FusedAdam = optimizer.optimizer
        wrapped = hasattr(optimizer, "fp32_params")
        params = [p for p in (optimizer.fp16_params if wrapped else optimizer.params) if p.requires_grad]
        self.params: list[Tensor] = params
        self.optimizer = inner
        self.group = inner.param_groups[0]
        places, size = _places(params, neighbours)
        if wrapped and optimizer.has_flat_params:
            (flat,) = optimizer.fp32_params.values()
            flat.grad = None  # fairseq's fp32 gradients, as large as the master, which nothing writes any more
            self.masters, self.master = [flat], flat.data
            in_master = [0, *torch.tensor([p.numel() for p in params]).cumsum(0).tolist()]
            ranges = [(m, p, param.numel()) for m, p, param in zip(in_master, places, params, strict=False)]
        else:
            self.masters = list(optimizer.fp32_params) if wrapped else params
            self.master = params[0].new_zeros(size, dtype=torch.float32)
            in_master, ranges = places, [(0, 0, size)]
            _move(self.masters, self.master, places)
        self.param = self.master
        if wrapped:
            self.param = self.master.new_zeros(size, dtype=params[0].dtype)
            _move(params, self.param, places)
        self.grad = torch.zeros_like(self.param)
        self.grads = _views(params, self.grad, places)
        self.segments = segment_table(ranges).to(self.master.device)
        self.exp_avg, self.exp_avg_sq = (self._adopt(name, in_master) for name in ("exp_avg", "exp_avg_sq"))
        steps = {int(state["step"]) for state in (inner.state[m] for m in self.masters)}
        if len(steps) != 1:
            raise ValueError(f"parameters have been updated unequally often ({sorted(steps)} times)")
        self.steps = torch.tensor(steps.pop(), device=self.master.device)

    def write_back(self) -> None:
        """Let the optimizer's state say how many steps were made; everything else it has already."""
        steps = int(self.steps)
        for master in self.masters:
            self.optimizer.state[master]["step"] = steps

    def _adopt(self, name: str, places: list[int]) -> Tensor:
        """The moments of this name in one buffer, those that the optimizer has among them."""
        flat = torch.zeros_like(self.master)
        for master, view in zip(self.masters, _views(self.masters, flat, places), strict=True):
            state = self.optimizer.state[master]
            state.setdefault("step", 0)
            if name in state:
                view.copy_(state[name])
            state[name] = view
        return flat


def _places(params: list[Tensor], neighbours: Sequence[Sequence[Tensor]]) -> tuple[list[int], int]:
    """Where each parameter begins and the size of all. Neighbours follow one another; vectors, whose gradients are few
    bytes and come late, follow the matrices."""
    group_of = {id(param): group for group in neighbours for param in group}
    number = {id(param): i for i, param in enumerate(params)}
    places, end = [-1] * len(params), 0
    for param in sorted(params, key=lambda param: param.dim() < 2):
        for member in group_of.get(id(param), (param,)):
            i = number.get(id(member))
            if i is not None and places[i] < 0:
                places[i] = end
                end = -(-(end + member.numel()) // _ALIGNMENT) * _ALIGNMENT
    return places, end


def _views(shaped: list[Tensor], flat: Tensor, places: list[int]) -> list[Tensor]:
    return [flat[place:place + p.numel()].view(p.shape) for place, p in zip(places, shaped, strict=False)]


def _move(tensors: list[Tensor], flat: Tensor, places: list[int]) -> None:
    """Make every tensor a view of ``flat``, with the values it has."""
    for tensor, view in zip(tensors, _views(tensors, flat, places), strict=True):
        view.copy_(tensor.data)
        tensor.data = view
