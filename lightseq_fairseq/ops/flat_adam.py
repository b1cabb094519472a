"""flat_adam: clip, step or skip, all of one update over flat storage, without the host (Kingma & Ba 2015).

    norm = |multiplier| * ||grad||                 g = grad * multiplier * min(1, max_norm / (norm + 1e-6))
    where norm is finite, and t = steps = steps + 1:
    m = beta1 * m + (1 - beta1) * g                v = beta2 * v + (1 - beta2) * g * g
    master = master - lr * weight_decay * master - lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)
    param = master, rounded

    master, exp_avg, exp_avg_sq  (P,) fp32, contiguous; m is exp_avg, v is exp_avg_sq
    param, grad                  (Q,) fp32, fp16 or bf16, of one dtype; param may be master itself. What no segment
                                 covers is neither read nor written, but its gradient counts in the norm: it must be 0
    segments                     (S, 3) int64, rows (begin in master, begin in param and grad, length): which elements
                                 belong together. See :func:`segment_table`
    steps                        () int64, updates made so far; norm () fp32 is written
    lr, multiplier               () fp32 on the same device; multiplier undoes loss scale and sample size
    max_norm                     0 leaves the gradient as it is

A norm that is not finite (an overflow) leaves all but ``norm`` as it was. The formula is fairseq's Adam behind
fairseq's clip_grad_norm and FP16Optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightseq_fairseq.ops import _extension
from lightseq_fairseq.ops._library import check, register, shape

_LONGEST = 8192
"""Elements of a segment at most: what one thread block updates."""


def segment_table(ranges: Iterable[tuple[int, int, int]]) -> Tensor:
    """(S, 3) int64 of ranges (begin in master, begin in param, length), the long ones cut up."""
    return torch.tensor([(master + cut, param + cut, min(_LONGEST, length - cut))
                         for master, param, length in ranges for cut in range(0, length, _LONGEST)],
                        dtype=torch.int64).view(-1, 3)


def _step(master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, param: Tensor, steps: Tensor, norm: Tensor,
          grad: Tensor, segments: Tensor, lr: Tensor, multiplier: Tensor, max_norm: float, beta1: float, beta2: float,
          eps: float, weight_decay: float) -> None:
    wide = grad.to(master.dtype)
    norm.copy_(torch.linalg.vector_norm(wide) * multiplier.abs())
    finite = norm.isfinite()
    factor = multiplier * (max_norm / (norm + 1e-6)).clamp(max=1) if max_norm > 0 else multiplier
    steps.add_(finite)
    t = steps.clamp(min=1).double()
    step_size = lr * ((1 - beta2**t).sqrt() / (1 - beta1**t)).to(master.dtype)
    in_master, in_param = _places(segments)
    g = wide[in_param] * factor
    m = beta1 * exp_avg[in_master] + (1 - beta1) * g
    v = beta2 * exp_avg_sq[in_master] + (1 - beta2) * g * g
    stepped = master[in_master] * (1 - lr * weight_decay) - step_size * m / (v.sqrt() + eps)
    for old, new in ((exp_avg, m), (exp_avg_sq, v), (master, stepped)):
        old[in_master] = torch.where(finite, new, old[in_master])
    if param.data_ptr() != master.data_ptr():
        param[in_param] = torch.where(finite, master[in_master].to(param.dtype), param[in_param])


def _places(segments: Tensor) -> tuple[Tensor, Tensor]:
    """Where each element that a segment covers is in master, and where in param."""
    begins, lengths = segments[:, :2], segments[:, 2]
    within = torch.arange(int(lengths.sum()), device=segments.device)
    within -= (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    in_master, in_param = begins.repeat_interleave(lengths, 0).unbind(1)
    return in_master + within, in_param + within


_flat_adam = register(
    "flat_adam_(Tensor(a!) master, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) param, Tensor(e!) steps,"
    " Tensor(f!) norm, Tensor grad, Tensor segments, Tensor lr, Tensor multiplier, float max_norm, float beta1,"
    " float beta2, float eps, float weight_decay) -> ()", _step, None)


@torch.no_grad()
def flat_adam_(master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, param: Tensor, steps: Tensor, norm: Tensor,
               grad: Tensor, segments: Tensor, lr: Tensor, multiplier: Tensor, *, max_norm: float = 0.0,
               beta1: float = 0.9, beta2: float = 0.98, eps: float = 1e-8, weight_decay: float = 0.0) -> None:
    """Take one step in place, or skip it if the gradient is not finite; see the head of this file.

    ``segments`` must lie inside the tensors, which is not checked: it is on the device.
    """
    wide = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    check("flat_adam_",
          (master.dim() == 1, lambda: f"master must have shape (P,), got {shape(master)}"),
          *((tensor.shape == master.shape,
             lambda n=name, t=tensor: f"{n} must have shape {shape(master)}, got {shape(t)}")
            for name, tensor in wide.items()),
          (param.dim() == 1 and param.shape == grad.shape,
           lambda: f"param and grad must have one shape (Q,), got {shape(param)} and {shape(grad)}"),
          *((tensor.dtype == torch.float32, lambda n=name, t=tensor: f"{n} must be float32, got {t.dtype}")
            for name, tensor in dict(master=master, **wide, lr=lr, norm=norm, multiplier=multiplier).items()),
          (param.dtype == grad.dtype, lambda: f"param must be {grad.dtype} as grad is, got {param.dtype}"),
          (segments.dim() == 2 and segments.size(-1) == 3 and segments.dtype == torch.int64,
           lambda: f"segments must be (S, 3) int64, got {shape(segments)} {segments.dtype}"),
          (steps.dtype == torch.int64, lambda: f"steps must be int64, got {steps.dtype}"))
    if master.is_cuda:
        _extension.loaded()
    _flat_adam(master, exp_avg, exp_avg_sq, param, steps, norm, grad, segments, lr, multiplier, max_norm, beta1, beta2,
               eps, weight_decay)
