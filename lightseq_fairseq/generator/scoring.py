"""Log-probabilities of given translations, all of their tokens in one pass of the decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightseq_fairseq.generator.generator import check_same_vocabulary
from lightseq_fairseq.generator.hypotheses import Hypothesis, align
from lightseq_fairseq.generator.model import load_layers
from lightseq_fairseq.generator.options import GenerationError
from lightseq_fairseq.layers import Packing, TransformerDecoder, TransformerEncoder
from lightseq_fairseq.model_file import ModelFile
from lightseq_fairseq.ops import linear_to_logits

_ROWS = 1024
"""Target tokens whose log-probabilities over the vocabulary exist at one time."""


class Scorer:
    """One model, or several as an ensemble, on one device."""

    def __init__(self, models: Sequence[ModelFile], device: torch.device | str = "cpu",
                 dtype: torch.dtype = torch.float32) -> None:
        """Raises GenerationError for members that do not speak the same two languages."""
        for member in models[1:]:
            check_same_vocabulary(models[0], member)
        self.config, self.device = models[0].config, torch.device(device)
        if self.config.stacks != "encoder-decoder":
            raise GenerationError("only an encoder-decoder model scores translations; "
                                  "lightseq_fairseq.inference.Gpt.ppl scores texts")
        if dtype == torch.int8:
            raise GenerationError("8-bit weights are for generation; score references in float32")
        self.models = [(encoder, decoder) for encoder, decoder in
                       (load_layers(model, self.device, dtype) for model in models)
                       if encoder is not None and decoder is not None]

    @torch.no_grad()
    def score(self, src_tokens: Sequence[Tensor], targets: Sequence[Tensor], attention: bool = False,
              alignment: bool = False) -> list[Hypothesis]:
        """Each target (T,) int64, eos last, as the translation of its source (S,) int64, eos included, no pads.

        A hypothesis scores the mean log-probability of its tokens; those of an ensemble are the logarithms of mean
        probabilities, as fairseq's SequenceScorer has them. ``attention`` and ``alignment`` as in GenerationOptions.
        Raises GenerationError for a source without a target, or an empty one.
        """
        self._check(src_tokens, targets)
        if not targets:
            return []
        source = Packing.of_lengths([len(tokens) for tokens in src_tokens], self.device)
        target = Packing.of_lengths([len(tokens) for tokens in targets], self.device)
        words = torch.cat(list(targets)).to(self.device)
        lprobs, weights = [], []
        for encoder, decoder in self.models:
            features, attended = self._decode(encoder, decoder, src_tokens, source, targets, target,
                                              attention or alignment)
            lprobs.append(torch.cat([_of_words(decoder, rows, some) for rows, some in
                                     zip(torch.split(features, _ROWS), torch.split(words, _ROWS), strict=True)]))
            weights.append(attended)
        scores = lprobs[0] if len(lprobs) == 1 else torch.stack(lprobs).exp().mean(0).log()
        mean = None if weights[0] is None else torch.stack([w for w in weights if w is not None]).mean(0).cpu()
        lengths = [len(tokens) for tokens in targets]
        return [self._hypothesis(src_tokens[i].cpu(), targets[i].cpu(), each, None if mean is None else mean[i],
                                 attention, alignment)
                for i, each in enumerate(torch.split(scores.cpu(), lengths))]

    def _decode(self, encoder: TransformerEncoder, decoder: TransformerDecoder, src_tokens: Sequence[Tensor],
                source: Packing, targets: Sequence[Tensor], target: Packing,
                need_attention: bool) -> tuple[Tensor, Tensor | None]:
        """What is in front of the output projection (N, C), and the last layer's attention (B, T, S)."""
        encoded = encoder.encode(torch.cat(list(src_tokens)).to(self.device), source)
        start = torch.tensor([self.config.start])
        previous = torch.cat([part for tokens in targets for part in (start, tokens[:-1].cpu())]).to(self.device)
        last = len(decoder.layers) - 1 if need_attention else None
        features, weights = decoder.decode(previous, target, encoded, source, weights_of_layer=last)
        return features, None if weights is None else weights.mean(1)

    def _hypothesis(self, source: Tensor, target: Tensor, scores: Tensor, weights: Tensor | None, attention: bool,
                    alignment: bool) -> Hypothesis:
        pairs = None
        if weights is not None:
            weights = weights[:len(target), :len(source)]
            if alignment:
                pairs = align(weights, self._words(source), self._words(target))
        return Hypothesis(target, float(scores.mean()), scores, weights if attention else None, pairs)

    def _words(self, tokens: Tensor) -> Tensor:
        """Which tokens are neither eos nor pad."""
        return (tokens != self.config.eos) & (tokens != self.config.pad)

    def _check(self, src_tokens: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        wrong = []
        if len(src_tokens) != len(targets):
            wrong.append(f"every source needs one target, got {len(src_tokens)} sources and {len(targets)} targets")
        for side, sentences, types in (("source", src_tokens, self.config.src_vocab_size),
                                       ("target", targets, self.config.tgt_vocab_size)):
            for index, tokens in enumerate(sentences):
                if not len(tokens):
                    wrong.append(f"{side} {index} has no tokens, not even eos")
                elif int(tokens.min()) < 0 or int(tokens.max()) >= types:
                    wrong.append(f"{side} {index} must be ids of the {types} {side} types")
        if wrong:
            raise GenerationError("; ".join(wrong))


def _of_words(decoder: TransformerDecoder, features: Tensor, words: Tensor) -> Tensor:
    """Log-probabilities (N,) fp32 of ``words`` (N,) after ``features`` (N, C)."""
    projection = decoder.output_projection
    logits = linear_to_logits(features, projection.weight, projection.bias).float()
    return -F.cross_entropy(logits, words, reduction="none")
