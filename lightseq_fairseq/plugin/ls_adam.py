"""``--optimizer ls_adam``: fairseq's Adam over :class:`lightseq_fairseq.optim.FusedAdam`.

Options, learning curve and checkpoints are those of ``--optimizer adam``.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

import torch
from fairseq.optim import register_optimizer
from fairseq.optim.adam import FairseqAdam, FairseqAdamConfig
from fairseq.optim.fairseq_optimizer import FairseqOptimizer

from lightseq_fairseq.fairseq_compat import recorded_as
from lightseq_fairseq.optim import FusedAdam, gradient_norm

REFUSED = {
    "use_old_adam": "use --optimizer adam, which is the Adam it asks for",
    "fp16_adam_stats": "moments are kept in fp32; use --optimizer adam with apex for 16-bit ones",
    "tpu": "use --optimizer adam",
}
"""Options of fairseq's Adam that are not taken, and what to do instead."""


def parse_betas(betas: Any) -> tuple[float, float]:
    """``"(0.9, 0.98)"``, a list or a tuple -> (beta1, beta2), both in [0, 1); anything else raises ValueError."""
    try:
        beta1, beta2 = map(float, ast.literal_eval(betas) if isinstance(betas, str) else betas)
    except (ValueError, TypeError, SyntaxError):
        raise ValueError(f"ls_adam: --adam-betas must be two numbers such as '(0.9, 0.98)', got {betas!r}") from None
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"ls_adam: --adam-betas must lie in [0, 1), got {betas!r}")
    return beta1, beta2


@recorded_as(FairseqAdam)
@register_optimizer("ls_adam", dataclass=FairseqAdamConfig)
class LSAdam(FairseqAdam):
    """What the trainer sees; the arithmetic is FusedAdam's."""

    def __init__(self, cfg: FairseqAdamConfig, params: Any) -> None:
        FairseqOptimizer.__init__(self, cfg)
        for option, instead in REFUSED.items():
            if getattr(cfg, option, False):
                raise ValueError(f"ls_adam: --{option.replace('_', '-')} is not supported; {instead}")
        self._optimizer = FusedAdam(params, **self.optimizer_config)

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """Arguments of FusedAdam, which replace those found in a checkpoint."""
        lr = self.cfg.lr
        return {"lr": lr[0] if isinstance(lr, Sequence) else lr, "betas": parse_betas(self.cfg.adam_betas),
                "eps": self.cfg.adam_eps, "weight_decay": self.cfg.weight_decay}

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float, aggregate_norm_fn: Any = None) -> torch.Tensor:
        """Scale all gradients down to a common 2-norm of at most ``max_norm`` (0: leave them); returns the norm."""
        params = [param for param in self.params if param.grad is not None]
        if any(hasattr(param, "expert") for param in params):  # mixture of experts: not counted in the norm
            return super().clip_grad_norm(max_norm, aggregate_norm_fn)
        grads = [param.grad for param in params]
        norm = gradient_norm(grads)
        if aggregate_norm_fn is not None:
            norm = aggregate_norm_fn(norm)
        if max_norm > 0 and grads:
            torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1))
        return norm
