"""FusedAdam: fairseq's Adam as a torch optimizer whose step is a few kernels for all parameters together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lightseq_fairseq.ops.adam import adam_

MOMENTS = ("exp_avg", "exp_avg_sq")
_ENDLESS = 1 << 40
"""A step so late that beta^step is 0 and nothing is corrected."""


def moment_dtype(param: Tensor) -> torch.dtype:
    """Moments and norms are kept in fp32, whatever the parameter is; in fp64 for fp64."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def gradient_norm(grads: Iterable[Tensor]) -> Tensor:
    """The 2-norm over all ``grads`` together, a 0-dim fp32 tensor; one kernel for each device and dtype."""
    alike = defaultdict(list)
    for grad in grads:
        alike[grad.device, grad.dtype].append(grad)
    norms = [norm.float() for same in alike.values()
             for norm in torch._foreach_norm(same, 2, dtype=moment_dtype(same[0]))]
    if not norms:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


class FusedAdam(torch.optim.Optimizer):
    """Adam with decoupled weight decay and bias correction; eps is added outside the square root.

    ``params`` may be fp32, fp16, bf16 (moments and arithmetic stay fp32) or one flat tensor. The state of a
    parameter is that of ``fairseq.optim.adam.Adam``: ``step`` (int), ``exp_avg``, ``exp_avg_sq``; a state dict
    of either loads into the other. Raises ValueError for a state dict of AMSGrad.
    """

    supports_memory_efficient_fp16 = True
    supports_flat_params = True
    supports_step_with_scale = True
    disable_mem_eff_fp16_loading_hack = True

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, scale: float | Tensor = 1.0) -> Any:
        """Update every parameter that has a gradient; gradients are ``scale`` times too large."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            together, group_scale = defaultdict(list), self.group_scale(index, scale)
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.grad.is_sparse:
                    raise RuntimeError("FusedAdam: sparse gradients are not supported; build the embedding with "
                                       "sparse=False")
                state = self.state[param]
                if not state:
                    state["step"] = 0
                    state.update({name: self._zeros(param) for name in MOMENTS})
                state["step"] += 1
                together[param.device, state["step"]].append((param, param.grad, *(state[name] for name in MOMENTS)))
            beta1, beta2 = group["betas"]
            for (_, step), tensors in together.items():
                adam_(*zip(*tensors, strict=True), lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"],
                      weight_decay=group["weight_decay"], scale=group_scale,
                      step=step if group.get("bias_correction", True) else _ENDLESS)
        return loss

    def group_scale(self, index: int, scale: float | Tensor) -> float | Tensor:
        """What the gradients of group ``index`` are divided by; ``scale``, unless a subclass clips."""
        return scale

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of this class, of fairseq's Adam or of apex's, keeping moments in fp32."""
        if any(group.get("amsgrad") for group in state_dict["param_groups"]):
            raise ValueError("FusedAdam: the state to load was written with amsgrad, which is not supported; train "
                             "on with --optimizer adam or begin anew with --reset-optimizer")
        super().load_state_dict(state_dict)
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for param, key in zip(group["params"], saved_group["params"], strict=True):
                saved = state_dict["state"].get(key)
                if not saved:
                    continue
                # torch has cast the moments to the type of the parameter; apex counts steps once for a group
                self.state[param] = {"step": int(saved.get("step", saved_group.get("step", 0)))}
                for name in MOMENTS:
                    self.state[param][name] = self._zeros(param).copy_(saved[name])

    @staticmethod
    def _zeros(param: Tensor) -> Tensor:
        return torch.zeros(param.shape, dtype=moment_dtype(param), device=param.device)
