"""adam: one step of Adam with decoupled weight decay (Kingma & Ba 2015; Loshchilov & Hutter 2019), as fairseq has it.

    g = grad / scale                              m = beta1 * m + (1 - beta1) * g
                                                  v = beta2 * v + (1 - beta2) * g * g
    param = param - lr * weight_decay * param
    param = param - lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)

    params, grads           lists of tensors on one device, of any shapes, in fp32, fp16, bf16 or fp64
    exp_avgs, exp_avg_sqs   m and v: contiguous, of the shapes of params, in fp32 (fp64 for fp64)
    scale                   1, or a number or 0-dim tensor that the gradients were multiplied with

Everything is updated in place; computed in the type of m and v, 16-bit parameters being rounded once at the end.
fp32 gradients are divided by scale in place, as fairseq's multiply_grads does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

FUSED_DEVICES = ("cpu", "cuda")
CHUNK = 1 << 23
"""Elements that are widened to fp32 at a time, which bounds what a step over 16-bit parameters allocates."""


def reference(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, lr: float, beta1: float,
              beta2: float, eps: float, weight_decay: float, step: int, scale: float | Tensor = 1.0) -> None:
    """The step for one parameter."""
    grad = grad.to(exp_avg.dtype) / scale
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    wide = param.to(exp_avg.dtype)
    wide = wide - lr * weight_decay * wide
    step_size = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    param.copy_(wide.addcdiv_(exp_avg, exp_avg_sq.sqrt() + eps, value=-step_size))


def chunks(params: Sequence[Tensor]) -> Iterator[slice]:
    """Cut a list of tensors into runs of at most CHUNK elements; a larger tensor is a run of its own."""
    start = elements = 0
    for i, param in enumerate(params):
        if i > start and elements + param.numel() > CHUNK:
            yield slice(start, i)
            start, elements = i, 0
        elements += param.numel()
    yield slice(start, len(params))


def _laid_out_as(moment: Tensor, tensor: Tensor) -> Tensor:
    """``tensor`` in the type and with the strides of ``moment``: the kernel underneath walks raw memory, and on CUDA it
    wants equal strides even of dimensions of size 1."""
    tensor = tensor.to(moment.dtype)
    return tensor if tensor.stride() == moment.stride() else torch.empty_like(moment).copy_(tensor)


def adam_(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor],
          exp_avg_sqs: Sequence[Tensor], *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
          step: int, scale: float | Tensor = 1.0) -> None:
    """Take step number ``step`` (from 1) for all ``params``, which lie on one device; see the head of this file."""
    if not params:
        return
    device = params[0].device
    if device.type not in FUSED_DEVICES:
        for tensors in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
            reference(*tensors, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, step=step,
                      scale=scale)
        return
    steps = torch.full((), float(step), device=device)
    if isinstance(scale, Tensor):
        grad_scale = scale.to(device, torch.float32)
    else:
        grad_scale = None if scale == 1 else torch.full((), scale, device=device)
    for run in chunks(params):
        exp_avg_run, exp_avg_sq_run = list(exp_avgs[run]), list(exp_avg_sqs[run])
        wide_params, wide_grads = (
            [_laid_out_as(exp_avg, tensor) for tensor, exp_avg in zip(tensors[run], exp_avg_run, strict=True)]
            for tensors in (params, grads))
        # torch divides sqrt(v) by sqrt(1 - beta2^t) before it adds eps, fairseq after: hence eps is divided too
        torch._fused_adamw_(
            wide_params, wide_grads, exp_avg_run, exp_avg_sq_run, [], [steps] * len(wide_params), lr=lr, beta1=beta1,
            beta2=beta2, weight_decay=weight_decay, eps=eps / math.sqrt(1 - beta2**step), amsgrad=False,
            maximize=False, grad_scale=grad_scale)
        for param, wide in zip(params[run], wide_params, strict=True):
            if wide is not param:
                param.copy_(wide)
