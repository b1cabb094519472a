"""label_smoothed_cross_entropy: (1 - eps - eps_i) * nll + eps_i * smooth, summed over tokens (Szegedy et al. 2016).

With logp = log_softmax(logits): nll = -logp[target], smooth = -sum_v logp[v], eps_i = eps / (V - 1), so that the
target keeps the weight 1 - eps and each other type gets eps_i. The gradient is one pass over the softmax:
dlogits = dloss * (softmax(logits) - eps_i - (1 - eps - eps_i) * one_hot(target)), 0 in ignored rows.

    logits    (N, V)  fp32, fp16, bf16 or fp64
    targets   (N,)    int64; rows whose target is ignore_index count nothing
    loss_sum  ()      nll_sum ()   fp32 (fp64 for fp64); nll_sum carries no gradient
    dlogits   (N, V)  as logits

Saved for backward: logits and targets; the (N, V) log-probabilities live only inside forward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums over the vocabulary and over tokens are taken in fp32, in fp64 for fp64 logits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reference_forward(logits: Tensor, targets: Tensor, epsilon: float, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(N, V), (N,) -> loss_sum (), nll_sum ()."""
    kept = targets != ignore_index
    rows = targets.where(kept, 0).unsqueeze(-1)  # (N,) -> (N, 1), every index in range
    logp = torch.log_softmax(logits, -1, dtype=statistics_dtype(logits.dtype))
    nll_sum = -(logp.gather(-1, rows).squeeze(-1) * kept).sum()  # (N, 1) -> (N,) -> ()
    smooth_sum = -(logp.sum(-1) * kept).sum()
    eps_i = epsilon / (logits.size(-1) - 1)
    return (1 - epsilon - eps_i) * nll_sum + eps_i * smooth_sum, nll_sum


def reference_backward(dloss: Tensor, logits: Tensor, targets: Tensor, epsilon: float, ignore_index: int) -> Tensor:
    """(), (N, V), (N,) -> dlogits (N, V)."""
    kept = targets != ignore_index
    rows = targets.where(kept, 0).unsqueeze(-1)  # (N,) -> (N, 1)
    eps_i = epsilon / (logits.size(-1) - 1)
    dlogits = torch.softmax(logits, -1, dtype=statistics_dtype(logits.dtype)).sub_(eps_i)
    dlogits.scatter_add_(-1, rows, dlogits.new_full(rows.shape, eps_i + epsilon - 1))
    dlogits.mul_((dloss * kept).unsqueeze(-1))
    return dlogits.to(logits.dtype)


class _LabelSmoothedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, epsilon, ignore_index):
        loss_sum, nll_sum = reference_forward(logits, targets, epsilon, ignore_index)
        ctx.save_for_backward(logits, targets)
        ctx.constants = (epsilon, ignore_index)
        ctx.mark_non_differentiable(nll_sum)
        return loss_sum, nll_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, _):
        return reference_backward(dloss, *ctx.saved_tensors, *ctx.constants), None, None, None


def label_smoothed_cross_entropy(logits: Tensor, targets: Tensor, epsilon: float,
                                 ignore_index: int) -> tuple[Tensor, Tensor]:
    """Label-smoothed and plain cross entropy of ``logits`` (N, V), each summed over the tokens not ignored.

    ``epsilon`` in [0, 1] is the probability that smoothing takes from the target. See the head of this file;
    raises ValueError for shapes or types that do not fit.
    """
    wrong = []
    if logits.dim() != 2 or logits.size(-1) < 2:
        wrong.append(f"logits must have shape (N, V) with V of 2 or more, got {tuple(logits.shape)}")
    if targets.shape != logits.shape[:-1]:
        wrong.append(f"targets must have shape {tuple(logits.shape[:-1])}, got {tuple(targets.shape)}")
    if targets.dtype != torch.int64:
        wrong.append(f"targets must be int64, got {targets.dtype}")
    if not 0 <= epsilon <= 1:
        wrong.append(f"epsilon must lie in [0, 1], got {epsilon}")
    if wrong:
        raise ValueError("label_smoothed_cross_entropy: " + "; ".join(wrong))
    return _LabelSmoothedCrossEntropy.apply(logits, targets, epsilon, ignore_index)
