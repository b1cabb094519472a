"""All trained parameters of a run in flat buffers: one kernel then reads and writes each kind of them.

fairseq's objects stay what they are and see the same values: parameters, fp32 masters and Adam's moments become views
of the buffers, so that checkpoints, EMA and validation work on them unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightseq_fairseq.optim import FusedAdam

_ALIGNMENT = 8
"""Elements that each parameter's place is a multiple of, where the layout is ours to choose: 16 bytes of 16-bit."""


class FlatStorage:
    """Buffers of P elements behind fairseq's optimizer, which is ls_adam, alone or inside FP16Optimizer."""

    def __init__(self, optimizer: Any) -> None:
        inner: FusedAdam = optimizer.optimizer
        wrapped = hasattr(optimizer, "fp32_params")
        params = [p for p in (optimizer.fp16_params if wrapped else optimizer.params) if p.requires_grad]
        self.params: list[Tensor] = params
        self.optimizer = inner
        self.group = inner.param_groups[0]
        if wrapped and optimizer.has_flat_params:
            (flat,) = optimizer.fp32_params.values()
            self.masters = [flat]
            self.offsets = _offsets(params, 1)
            self.master = flat.data
        else:
            self.masters = list(optimizer.fp32_params) if wrapped else params
            self.offsets = _offsets(params, _ALIGNMENT)
            self.master = params[0].new_zeros(self.offsets[-1], dtype=torch.float32)
            self._move(self.masters, self.master)
        size, dtype, device = self.master.numel(), params[0].dtype, self.master.device
        self.param = self.master
        self.scattered: list[Tensor] = []
        """Views of ``param`` to copy to parameters that could not become views themselves."""
        if wrapped:
            self.param = torch.zeros(size, dtype=dtype, device=device)
            if all(offset % _ALIGNMENT == 0 for offset in self.offsets[:-1]):
                self._move(params, self.param)
            else:
                self.scattered = self._views(params, self.param)
        self.grad = torch.zeros(size, dtype=dtype, device=device)
        self.grads = self._views(params, self.grad)
        self.exp_avg, self.exp_avg_sq = (self._adopt(name) for name in ("exp_avg", "exp_avg_sq"))
        steps = {int(state["step"]) for state in (inner.state[m] for m in self.masters)}
        if len(steps) != 1:
            raise ValueError(f"parameters have been updated unequally often ({sorted(steps)} times)")
        self.steps = torch.tensor(steps.pop(), device=device)

    def write_back(self) -> None:
        """Let the optimizer's state say how many steps were made; everything else it has already."""
        steps = int(self.steps)
        for master in self.masters:
            self.optimizer.state[master]["step"] = steps

    def _views(self, shaped: list[Tensor], flat: Tensor) -> list[Tensor]:
        return [flat[offset:offset + p.numel()].view(p.shape)
                for offset, p in zip(self.offsets, shaped, strict=False)]

    def _move(self, tensors: list[Tensor], flat: Tensor) -> None:
        """Make every tensor a view of ``flat``, with the values it has."""
        for tensor, view in zip(tensors, self._views(tensors, flat), strict=True):
            view.copy_(tensor.data)
            tensor.data = view

    def _adopt(self, name: str) -> Tensor:
        """The moments of this name in one buffer, those that the optimizer has among them."""
        flat = torch.zeros_like(self.master)
        for master, offset in zip(self.masters, self.offsets, strict=False):
            view = flat[offset:offset + master.numel()].view(master.shape)
            state = self.optimizer.state[master]
            state.setdefault("step", 0)
            if name in state:
                view.copy_(state[name])
            state[name] = view
        return flat


def _offsets(params: list[Tensor], alignment: int) -> list[int]:
    """Where each parameter begins, and behind the last one the size of all."""
    offsets = [0]
    for param in params:
        offsets.append(-(-(offsets[-1] + param.numel()) // alignment) * alignment)
    return offsets
