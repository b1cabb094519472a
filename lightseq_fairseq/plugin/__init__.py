"""What fairseq sees of us: models, criterion and optimizer under ``ls_`` names. Imported once, it registers them."""

from lightseq_fairseq import fairseq_compat

fairseq_compat.apply()

from lightseq_fairseq.plugin import (  # noqa: E402  the mending comes first
    ls_adam,
    ls_bart,
    ls_cross_entropy,
    ls_label_smoothed_cross_entropy,
    ls_masked_lm,
    ls_roberta,
    ls_transformer,
    ls_transformer_lm,
    ls_translation,
)

__all__ = ["ls_adam", "ls_bart", "ls_cross_entropy", "ls_label_smoothed_cross_entropy", "ls_masked_lm",
           "ls_roberta", "ls_transformer", "ls_transformer_lm", "ls_translation"]
