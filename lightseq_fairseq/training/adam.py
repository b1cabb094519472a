"""LSAdam: LightSeq's (and apex's) Adam over :class:`lightseq_fairseq.optim.FusedAdam`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightseq_fairseq.optim import FusedAdam, gradient_norm


class LSAdam(FusedAdam):
    """Adam with decoupled weight decay; arguments are LightSeq's, their order too.

    ``params`` of fp32, fp16, bf16 or fp64; moments and arithmetic are fp32 (fp64 for fp64). ``max_grad_norm`` above 0
    clips each group's gradients to that 2-norm. ``bias_correction=False`` leaves out the division by 1 - beta^t.
    Weight decay takes ``lr * weight_decay`` of a parameter, as AdamW has it and fairseq; LightSeq multiplies by the
    bias-corrected step instead. Raises ValueError for ``eps_inside_sqrt`` and ``amsgrad``.
    """

    def __init__(self, params: Any, lr: float = 1e-3, bias_correction: bool = True,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, eps_inside_sqrt: bool = False,
                 weight_decay: float = 0.0, max_grad_norm: float = 0.0, amsgrad: bool = False) -> None:
        if eps_inside_sqrt:
            raise ValueError("LSAdam: eps_inside_sqrt is not supported, eps is added behind the square root; use an "
                             "eps of the size of its square root instead")
        if amsgrad:
            raise ValueError("LSAdam: amsgrad is not supported; use torch.optim.AdamW(amsgrad=True)")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        for group in self.param_groups:
            group.setdefault("bias_correction", bias_correction)
            group.setdefault("max_grad_norm", max_grad_norm)
        self.defaults |= {"bias_correction": bias_correction, "max_grad_norm": max_grad_norm}
        self._norms: Sequence[float | Tensor] | None = None

    def step(self, closure: Callable[[], Any] | None = None,  # type: ignore[override]  # LightSeq's order
             grads: Sequence[Any] | None = None, scale: float | Tensor = 1.0,
             grad_norms: Sequence[float | Tensor] | None = None) -> Any:
        """Update every parameter that has a gradient; gradients are ``scale`` times too large.

        ``grads`` takes the place of the parameters' own: one tensor for each parameter in order, or a list of them for
        each group. ``grad_norms`` are the norms of each group's gradients, as they are, for ``max_grad_norm``.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        kept = [param.grad for param in params]
        if grads is not None:
            flat = [grad for item in grads for grad in ([item] if isinstance(item, Tensor) else item)]
            if len(flat) != len(params):
                raise ValueError(f"LSAdam: grads must hold one tensor for each of {len(params)} parameters, got "
                                 f"{len(flat)}")
            for param, grad in zip(params, flat, strict=True):
                param.grad = grad.to(param.dtype)
        self._norms = grad_norms
        try:
            return super().step(closure, scale)
        finally:
            self._norms = None
            if grads is not None:
                for param, grad in zip(params, kept, strict=True):
                    param.grad = grad

    def group_scale(self, index: int, scale: float | Tensor) -> float | Tensor:
        """``scale``, larger where it takes that to bring the group's norm down to ``max_grad_norm``."""
        group = self.param_groups[index]
        if group["max_grad_norm"] <= 0:
            return scale
        grads = [param.grad for param in group["params"] if param.grad is not None]
        norm = torch.as_tensor(gradient_norm(grads) if self._norms is None else self._norms[index])
        excess: Tensor = norm / scale / group["max_grad_norm"]
        return scale * excess.clamp(min=1.0)
