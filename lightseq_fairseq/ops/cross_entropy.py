"""label_smoothed_cross_entropy: (1 - eps - eps_i) * nll + eps_i * smooth, summed over tokens (Szegedy et al. 2016).

With logp = log_softmax(logits): nll = -logp[target], smooth = -sum_v logp[v], eps_i = eps / (V - 1), so that the
target keeps the weight 1 - eps and each other type gets eps_i. The gradient is one pass over the softmax:
dlogits = dloss * (softmax(logits) - eps_i - (1 - eps - eps_i) * one_hot(target)), 0 in ignored rows.

    logits    (N, V)  fp32, fp16, bf16 or (reference only) fp64
    targets   (N,)    int64; rows whose target is ignore_index count nothing
    loss_sum  ()      nll_sum ()   fp32 (fp64 for fp64); nll_sum carries no gradient
    dlogits   (N, V)  as logits

Saved for backward: logits, targets and lse (N,), the log of the sum of exp(logits) of each row, in fp32. With
``overwrite_logits`` the gradient takes the logits' own memory, which nothing may read after backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightseq_fairseq.ops import _extension
from lightseq_fairseq.ops._library import accumulate_dtype, check, register, register_autograd, shape


def _forward(logits: Tensor, targets: Tensor, epsilon: float, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """(N, V), (N,) -> loss_sum (), nll_sum (), lse (N,)."""
    kept = targets != ignore_index
    rows = targets.where(kept, 0).unsqueeze(-1)  # (N,) -> (N, 1), every index in range
    top = logits.max(-1, keepdim=True).values.to(accumulate_dtype(logits.dtype))
    below = logits.to(top.dtype) - top  # a confident row's nll is small: it must not be a difference of large numbers
    log_sum = below.exp().sum(-1).log()
    nll = log_sum - below.gather(-1, rows).squeeze(-1)
    smooth = logits.size(-1) * log_sum - below.sum(-1)
    eps_i = epsilon / (logits.size(-1) - 1)
    loss = (1 - epsilon - eps_i) * nll + eps_i * smooth
    return (loss * kept).sum(), (nll * kept).sum(), top.squeeze(-1) + log_sum


def _backward(dloss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, epsilon: float,
              ignore_index: int) -> Tensor:
    """(), (N, V), (N,), (N,) -> dlogits (N, V)."""
    kept = targets != ignore_index
    rows = targets.where(kept, 0).unsqueeze(-1)
    eps_i = epsilon / (logits.size(-1) - 1)
    dlogits = (logits.to(lse.dtype) - lse.unsqueeze(-1)).exp_().sub_(eps_i)
    dlogits.scatter_add_(-1, rows, dlogits.new_full(rows.shape, eps_i + epsilon - 1))
    return dlogits.mul_((dloss * kept).unsqueeze(-1)).to(logits.dtype)


def _backward_over(logits: Tensor, dloss: Tensor, targets: Tensor, lse: Tensor, epsilon: float,
                   ignore_index: int) -> None:
    logits.copy_(_backward(dloss, logits, targets, lse, epsilon, ignore_index))


def _shapes(logits: Tensor, targets: Tensor, epsilon: float, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulate_dtype(logits.dtype)
    return (logits.new_empty((), dtype=wide), logits.new_empty((), dtype=wide),
            logits.new_empty(logits.shape[:1], dtype=wide))


_cross_entropy = register(
    "label_smoothed_cross_entropy(Tensor logits, Tensor targets, float epsilon, int ignore_index)"
    " -> (Tensor, Tensor, Tensor)", _forward, _shapes)
_cross_entropy_backward = register(
    "label_smoothed_cross_entropy_backward(Tensor dloss, Tensor logits, Tensor targets, Tensor lse, float epsilon,"
    " int ignore_index) -> Tensor", _backward, lambda dloss, logits, *rest: torch.empty_like(logits))
_cross_entropy_backward_over = register(
    "label_smoothed_cross_entropy_backward_(Tensor(a!) logits, Tensor dloss, Tensor targets, Tensor lse,"
    " float epsilon, int ignore_index) -> ()", _backward_over, None)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, *ctx.constants = inputs
    _, nll_sum, lse = output
    ctx.save_for_backward(logits, targets, lse)
    ctx.mark_non_differentiable(nll_sum, lse)


def _differentiate(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    logits, targets, lse = ctx.saved_tensors
    return _cross_entropy_backward(dloss, logits, targets, lse, *ctx.constants), None, None, None


register_autograd("label_smoothed_cross_entropy", _differentiate, _setup_context)


class _OverwritingCrossEntropy(torch.autograd.Function):
    """The op with a backward that spends no memory: outside the op's own formula, which may not mutate."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, epsilon: float, ignore_index: int) -> tuple[Tensor, ...]:
        loss_sum, nll_sum, lse = _cross_entropy(logits, targets, epsilon, ignore_index)
        ctx.kept, ctx.constants = (logits.detach(), targets, lse), (epsilon, ignore_index)
        ctx.mark_non_differentiable(nll_sum)
        return loss_sum, nll_sum

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        logits, targets, lse = ctx.kept
        del ctx.kept
        _cross_entropy_backward_over(logits, dloss, targets, lse, *ctx.constants)
        return logits, None, None, None


def label_smoothed_cross_entropy(logits: Tensor, targets: Tensor, epsilon: float, ignore_index: int,
                                 overwrite_logits: bool = False) -> tuple[Tensor, Tensor]:
    """Label-smoothed and plain cross entropy of ``logits`` (N, V), each summed over the tokens not ignored.

    ``epsilon`` in [0, 1] is the probability that smoothing takes from the target. ``overwrite_logits``: backward, to
    be called once, writes the gradient over the logits. See the head of this file; raises ValueError for shapes or
    types that do not fit.
    """
    check("label_smoothed_cross_entropy",
          (logits.dim() == 2 and logits.size(-1) > 1,
           lambda: f"logits must have shape (N, V) with V of 2 or more, got {shape(logits)}"),
          (targets.shape == logits.shape[:-1],
           lambda: f"targets must have shape {tuple(logits.shape[:-1])}, got {shape(targets)}"),
          (targets.dtype == torch.int64, lambda: f"targets must be int64, got {targets.dtype}"),
          (0 <= epsilon <= 1, lambda: f"epsilon must lie in [0, 1], got {epsilon}"))
    if logits.is_cuda:
        _extension.loaded()
        if logits.dtype == torch.float64:  # no kernel: torch differentiates the reference
            loss_sum, nll_sum, _ = _forward(logits, targets, epsilon, ignore_index)
            return loss_sum, nll_sum.detach()
    logits, targets = logits.contiguous(), targets.contiguous()
    if overwrite_logits and logits.requires_grad and torch.is_grad_enabled():
        return _OverwritingCrossEntropy.apply(logits, targets, epsilon, ignore_index)
    return _cross_entropy(logits, targets, epsilon, ignore_index)[:2]
