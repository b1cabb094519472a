"""``--criterion ls_masked_lm``: fairseq's loss of masked language models over one fused operator.

Options, values and log lines are those of ``masked_lm``; it serves every model that takes ``masked_tokens``.
"""

from __future__ import annotations

from typing import Any

import torch
from fairseq.criterions import register_criterion
from fairseq.criterions.masked_lm import MaskedLmConfig, MaskedLmLoss
from torch import Tensor

from lightseq_fairseq.fairseq_compat import recorded_as
from lightseq_fairseq.ops.cross_entropy import label_smoothed_cross_entropy


@recorded_as(MaskedLmLoss)
@register_criterion("ls_masked_lm", dataclass=MaskedLmConfig)
class LSMaskedLmLoss(MaskedLmLoss):
    """fairseq's criterion; only how the loss is computed differs."""

    def __init__(self, cfg: MaskedLmConfig, task: Any) -> None:
        super().__init__(cfg, task)
        if self.tpu:
            raise ValueError("ls_masked_lm does not support --tpu; use --criterion masked_lm")

    def forward(self, model: torch.nn.Module, sample: dict[str, Any],
                reduce: bool = True) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Loss summed over masked tokens, whether ``reduce`` or not as in fairseq, their number, values to log."""
        targets = sample["target"]
        masked = targets.ne(self.padding_idx)
        sample_size = masked.int().sum()
        if bool(masked.any()):  # nothing is masked only in the smallest of batches; then all is projected, for no loss
            logits, targets = model(**sample["net_input"], masked_tokens=masked)[0], targets[masked]
        else:
            logits = model(**sample["net_input"])[0]
        loss, _ = label_smoothed_cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), 0.0,
                                               self.padding_idx,
                                               overwrite_logits=getattr(model, "gives_logits_away", False))
        return loss, sample_size, {"loss": loss.detach(), "ntokens": sample["ntokens"],
                                   "nsentences": sample["nsentences"], "sample_size": sample_size}
