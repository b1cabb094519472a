"""Model file in, hypotheses out. Knows no fairseq and no training.

Decoding is a few small ideas, a file each: ``logits`` turns logits into log-probabilities and applies rules,
``search``, ``constrained_search`` (by the states of ``constraints``) and ``sampling`` propose continuations,
``beam_search`` is the loop around them, ``hypotheses`` reads the results off the loop's record. ``sequence_model`` says
what they need of a model, ``options`` what can be asked.
"""

from lightseq_fairseq.generator.beam_search import decode
from lightseq_fairseq.generator.generator import Generator
from lightseq_fairseq.generator.hypotheses import Hypothesis
from lightseq_fairseq.generator.options import GenerationError, GenerationOptions
from lightseq_fairseq.generator.scoring import Scorer

__all__ = ["GenerationError", "GenerationOptions", "Generator", "Hypothesis", "Scorer", "decode"]
