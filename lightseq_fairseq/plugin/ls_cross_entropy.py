"""``--criterion ls_cross_entropy``: fairseq's cross entropy over one fused operator.

Options, values and log lines are those of ``cross_entropy``. A model with ``supports_packed_output`` is asked for its
logits at real tokens only.
"""

from __future__ import annotations

from typing import Any

import torch
from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig
from torch import Tensor

from lightseq_fairseq.fairseq_compat import recorded_as
from lightseq_fairseq.ops.cross_entropy import label_smoothed_cross_entropy


@recorded_as(CrossEntropyCriterion)
@register_criterion("ls_cross_entropy", dataclass=CrossEntropyCriterionConfig)
class LSCrossEntropyCriterion(CrossEntropyCriterion):
    """fairseq's criterion; only where logits come from and how the loss is computed differ."""

    def forward(self, model: torch.nn.Module, sample: dict[str, Any],
                reduce: bool = True) -> tuple[Tensor, int, dict[str, Any]]:
        """Loss summed over tokens (one for each token unless ``reduce``), sample size, values to log."""
        if not (reduce and getattr(model, "supports_packed_output", False)):
            return super().forward(model, sample, reduce)
        fed = sample["net_input"].get("prev_output_tokens", sample["net_input"]["src_tokens"])
        logits, _ = model(**sample["net_input"], packed_output=True)
        loss, _ = label_smoothed_cross_entropy(logits, sample["target"][fed != self.padding_idx], 0.0,
                                               self.padding_idx, overwrite_logits=True)
        sample_size = sample["target"].size(0) if self.sentence_avg else sample["ntokens"]
        return loss, sample_size, {"loss": loss.detach(), "ntokens": sample["ntokens"],
                                   "nsentences": sample["target"].size(0), "sample_size": sample_size}
