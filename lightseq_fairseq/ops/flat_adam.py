"""flat_adam: clip, step or skip, all of one update over flat storage, without the host (Kingma & Ba 2015).

    norm = |multiplier| * ||grad||                 g = grad * multiplier * min(1, max_norm / (norm + 1e-6))
    where norm is finite, and t = steps = steps + 1:
    m = beta1 * m + (1 - beta1) * g                v = beta2 * v + (1 - beta2) * g * g
    master = master - lr * weight_decay * master - lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)
    param = master, rounded

    master, exp_avg, exp_avg_sq  (P,) fp32, contiguous; m is exp_avg, v is exp_avg_sq
    param                        (P,) in the dtype of grad, or master itself where that is what is trained
    steps                        () int64, updates made so far; norm () fp32 is written
    grad                         (P,) fp32, fp16 or bf16
    lr, multiplier               () fp32 on the same device; multiplier undoes loss scale and sample size
    max_norm                     0 leaves the gradient as it is

A norm that is not finite (an overflow) leaves all but ``norm`` as it was. The formula is fairseq's Adam behind
fairseq's clip_grad_norm and FP16Optimizer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightseq_fairseq.ops import _extension
from lightseq_fairseq.ops._library import check, register, shape


def _step(master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, param: Tensor, steps: Tensor, norm: Tensor,
          grad: Tensor, lr: Tensor, multiplier: Tensor, max_norm: float, beta1: float, beta2: float, eps: float,
          weight_decay: float) -> None:
    wide = grad.to(master.dtype)
    norm.copy_(torch.linalg.vector_norm(wide) * multiplier.abs())
    finite = norm.isfinite()
    factor = multiplier * (max_norm / (norm + 1e-6)).clamp(max=1) if max_norm > 0 else multiplier
    steps.add_(finite)
    t = steps.clamp(min=1).double()
    step_size = lr * ((1 - beta2**t).sqrt() / (1 - beta1**t)).to(master.dtype)
    g = wide * factor
    m = beta1 * exp_avg + (1 - beta1) * g
    v = beta2 * exp_avg_sq + (1 - beta2) * g * g
    stepped = master * (1 - lr * weight_decay) - step_size * m / (v.sqrt() + eps)
    for old, new in ((exp_avg, m), (exp_avg_sq, v), (master, stepped)):
        old.copy_(torch.where(finite, new, old))
    param.copy_(master)


_flat_adam = register(
    "flat_adam_(Tensor(a!) master, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) param, Tensor(e!) steps,"
    " Tensor(f!) norm, Tensor grad, Tensor lr, Tensor multiplier, float max_norm, float beta1, float beta2, float eps,"
    " float weight_decay) -> ()", _step, None)


@torch.no_grad()
def flat_adam_(master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, param: Tensor, steps: Tensor, norm: Tensor,
               grad: Tensor, lr: Tensor, multiplier: Tensor, *, max_norm: float = 0.0, beta1: float = 0.9,
               beta2: float = 0.98, eps: float = 1e-8, weight_decay: float = 0.0) -> None:
    """Take one step in place, or skip it if the gradient is not finite; see the head of this file."""
    flat = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "param": param, "grad": grad}
    check("flat_adam_",
          (master.dim() == 1, lambda: f"master must have shape (P,), got {shape(master)}"),
          *((tensor.shape == master.shape,
             lambda n=name, t=tensor: f"{n} must have shape {shape(master)}, got {shape(t)}")
            for name, tensor in flat.items()),
          *((tensor.dtype == torch.float32, lambda n=name, t=tensor: f"{n} must be float32, got {t.dtype}")
            for name, tensor in dict(master=master, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, lr=lr, norm=norm,
                                     multiplier=multiplier).items()),
          (param.dtype == grad.dtype or param.data_ptr() == master.data_ptr(),
           lambda: f"param must be {grad.dtype} as grad is, got {param.dtype}"),
          (steps.dtype == torch.int64, lambda: f"steps must be int64, got {steps.dtype}"))
    if master.is_cuda:
        _extension.loaded()
    _flat_adam(master, exp_avg, exp_avg_sq, param, steps, norm, grad, lr, multiplier, max_norm, beta1, beta2, eps,
               weight_decay)
