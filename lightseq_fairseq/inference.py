"""LightSeq's inference classes: ``import lightseq_fairseq.inference as lsi``.

    lsi.Transformer("transformer.pb", 8).infer([[1, 2, 3], [4, 5, 6]])

Scores and search are fairseq's (see generator/options.py), not LightSeq's; what a LightSeq file says of beam, lengths
and sampling is taken as the default and may be changed by keyword.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lightseq_fairseq.generator.generator import Generator
from lightseq_fairseq.generator.options import GenerationOptions

__all__ = ["GenerationOptions", "Generator", "Transformer"]


class Transformer:
    """An encoder-decoder model file behind LightSeq's interface."""

    def __init__(self, weight_path: str | os.PathLike[str], max_batch_size: int, **options: Any) -> None:
        """``max_batch_size`` sentences are decoded at a time; ``options`` are fields of GenerationOptions.

        ModelFileError if the file cannot be read, GenerationError for an option that does not exist.
        """
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, got {max_batch_size}")
        self.generator, self.max_batch_size = Generator.load(weight_path), max_batch_size
        self.extra_decode_length = int(self.generator.decoding.get("extra_decode_length", 50))
        self.options = GenerationOptions.from_dict({**_suggested(self.generator.decoding), **options})
        self.limited_by_source = not {"max_len_a", "max_len_b", "match_source_len"} & options.keys()

    def infer(self, input_seq: Sequence[Sequence[int]] | npt.NDArray[np.integer[Any]]
              ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Source ids (B, S), padded on the right or ragged, -> target ids (B, K, L) int32 and scores (B, K) float32.

        K hypotheses a sentence, best first; ids behind the end are eos. Scores are log-probabilities divided by
        ``length ** lenpen``. At most source length + extra_decode_length ids are made unless ``max_len_*`` was given.
        """
        config = self.generator.config
        rows = [[int(token) for token in row if token != config.pad] for row in input_seq]
        options = self.options
        if self.limited_by_source:
            options = replace(options, max_len_a=1.0, max_len_b=self.extra_decode_length)
        found = self.generator.infer(rows, options, max_sentences=self.max_batch_size)
        width = max((len(h.tokens) for hypotheses in found for h in hypotheses), default=0)
        tokens = np.full((len(rows), options.nbest, width), config.eos, dtype=np.int32)
        scores = np.full((len(rows), options.nbest), -np.inf, dtype=np.float32)
        for b, hypotheses in enumerate(found):
            for k, hypothesis in enumerate(hypotheses):
                tokens[b, k, :len(hypothesis.tokens)] = torch.as_tensor(hypothesis.tokens).numpy()
                scores[b, k] = float(hypothesis.score)
        return tokens, scores


def _suggested(decoding: dict[str, Any]) -> dict[str, Any]:
    """GenerationOptions for what a LightSeq file suggests: all hypotheses of a search, one of sampling."""
    method = decoding.get("sampling_method") or "beam_search"
    if method in ("topk", "topp"):
        chosen = {"sampling_topk": int(decoding.get("topk", 1))} if method == "topk" else \
            {"sampling_topp": float(decoding.get("topp", 0.75))}
        return {"beam": 1, "nbest": 1, "sampling": True, **chosen}
    beam = 1 if method == "greedy" else int(decoding.get("beam_size") or 4)
    suggested = {"beam": beam, "nbest": beam, "lenpen": float(decoding.get("length_penalty", 0.6))}
    if decoding.get("diverse_lambda"):
        suggested["diversity_rate"] = float(decoding["diverse_lambda"])
    return suggested
