"""``--criterion ls_label_smoothed_cross_entropy``: fairseq's label-smoothed loss over one fused operator.

Options, values and log lines are those of ``label_smoothed_cross_entropy``; it serves every fairseq model. A model
with ``supports_packed_output`` is asked for its logits at real tokens only, so that pads cost no projection. On CUDA
forward and backward are replayed as graphs where they can be (graphed_criterion.py).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
    label_smoothed_nll_loss,
)
from torch import Tensor

from lightseq_fairseq.fairseq_compat import recorded_as
from lightseq_fairseq.ops.cross_entropy import label_smoothed_cross_entropy
from lightseq_fairseq.plugin.graphed_criterion import GraphedCriterion


@recorded_as(LabelSmoothedCrossEntropyCriterion)
@register_criterion("ls_label_smoothed_cross_entropy", dataclass=LabelSmoothedCrossEntropyCriterionConfig)
class LSLabelSmoothedCrossEntropyCriterion(LabelSmoothedCrossEntropyCriterion):
    """fairseq's criterion; only where logits come from and how the loss is computed differ."""

    def forward(self, model: torch.nn.Module, sample: dict[str, Any],
                reduce: bool = True) -> tuple[Tensor, int, dict[str, Any]]:
        """Loss summed over tokens (one for each token unless ``reduce``), sample size, values to log."""
        replayed = self._graphed(model, sample) if reduce and self._graphed is not None else None
        if replayed is not None:
            return self._result(sample, replayed.loss, replayed.nll_loss, replayed.n_correct, replayed.total)
        logits, targets = self.logits_and_targets(model, sample)
        n_correct = self.count_correct(logits, targets) if self.report_accuracy else None  # before they are overwritten
        if reduce:
            packed = getattr(model, "supports_packed_output", False)  # no one else sees these logits
            loss, nll_loss = label_smoothed_cross_entropy(logits, targets, self.eps, self.padding_idx,
                                                          overwrite_logits=packed)
        else:
            loss, nll_loss = label_smoothed_nll_loss(torch.log_softmax(logits, -1, dtype=torch.float32), targets,
                                                     self.eps, ignore_index=self.padding_idx, reduce=False)
        total = None if n_correct is None else (targets != self.padding_idx).sum()
        return self._result(sample, loss, nll_loss, n_correct, total)

    @functools.cached_property
    def _graphed(self) -> GraphedCriterion | None:
        """None for a criterion that gets its logits, or counts them, in a way of its own."""
        ours, mine = LSLabelSmoothedCrossEntropyCriterion, type(self)
        if any(getattr(mine, name) is not getattr(ours, name) for name in ("logits_and_targets", "count_correct")):
            return None
        return GraphedCriterion(self.eps, self.padding_idx, self.ignore_prefix_size, self.report_accuracy)

    def _result(self, sample: dict[str, Any], loss: Tensor, nll_loss: Tensor, n_correct: Tensor | None,
                total: Tensor | None) -> tuple[Tensor, int, dict[str, Any]]:
        """What fairseq takes from a criterion."""
        sample_size = sample["target"].size(0) if self.sentence_avg else sample["ntokens"]
        logging_output = {"loss": loss.detach(), "nll_loss": nll_loss.detach(), "ntokens": sample["ntokens"],
                          "nsentences": sample["target"].size(0), "sample_size": sample_size}
        if self.report_accuracy:
            logging_output.update(n_correct=n_correct, total=total)
        return loss, sample_size, logging_output

    def count_correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """How many of the (N,) targets that count are the most probable type of their (N, V) logits."""
        return ((logits.argmax(-1) == targets) & (targets != self.padding_idx)).sum()

    def logits_and_targets(self, model: torch.nn.Module, sample: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(N, V) logits and (N,) targets; N counts real tokens of a packed model, else all B * T positions."""
        if not getattr(model, "supports_packed_output", False):
            # log-probabilities are logits of the same distribution, and all that every model can give
            return self.get_lprobs_and_target(model, model(**sample["net_input"]), sample)
        logits, _ = model(**sample["net_input"], packed_output=True)
        targets = sample["target"]
        if self.ignore_prefix_size > 0:
            position = torch.arange(targets.size(1), device=targets.device)
            targets = targets.masked_fill(position < self.ignore_prefix_size, self.padding_idx)
        fed = sample["net_input"].get("prev_output_tokens", sample["net_input"]["src_tokens"])
        return logits, targets[fed != self.padding_idx]  # (B, T) -> (N,)
