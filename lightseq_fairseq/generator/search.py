"""Search strategies: which continuations of a sentence's beams are worth looking at.

A strategy takes one step over a table of log-probabilities (B, R, V); R is K, the beams of a sentence, or 1 at the
first step, when all beams are still one. It returns C candidates per sentence. It may overwrite the table.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightseq_fairseq.generator.top_k import LONG_ROW, top_k
from lightseq_fairseq.ops.cpu import compiled_operators


class Candidates(NamedTuple):
    """Continuations of one step, (B, C) each."""

    scores: Tensor
    """Sum of log-probabilities up to and including this token, fp32."""
    tokens: Tensor
    """The token, int64."""
    beams: Tensor
    """The beam it continues, int64."""


class SearchStrategy(Protocol):
    """One step of search."""

    def __call__(self, step: int, lprobs: Tensor, scores: Tensor | None) -> Candidates:
        """lprobs (B, R, V) fp32, ``scores`` (B, K) of the beams so far (None at step 0)."""

    def advance(self, tokens: Tensor, parents: Tensor) -> None:
        """Beam k of sentence b now is its former beam ``parents[b, k]`` and ``tokens[b, k]``; (B, K) int64 each."""

    def keep(self, sentences: Tensor) -> None:
        """(B',) int64: only these sentences go on."""


class BeamSearch:
    """The 2K best of all continuations: enough that K go on even if every beam could end. Best first.

    With ``diversity_rate`` the r-th best continuation of a beam, from the second step on, loses ``rate * r``
    (diverse siblings, arXiv:1611.08562).
    """

    def __init__(self, beam: int, diversity_rate: float = 0.0, candidates: int | None = None) -> None:
        self.candidates = 2 * beam if candidates is None else candidates
        self.diversity_rate = diversity_rate

    def __call__(self, step: int, lprobs: Tensor, scores: Tensor | None) -> Candidates:
        """See :class:`SearchStrategy`; fewer candidates where the vocabulary has not so many, pad being never one."""
        _, rows, vocab = lprobs.shape
        count = min(self.candidates, rows * vocab - 1)
        if lprobs.device.type == "cpu" and lprobs.dtype == torch.float32 and not self.diversity_rate:
            operators = compiled_operators()
            if operators is not None:
                return Candidates(*operators.best_continuations.default(lprobs.contiguous(), scores, count, 0))
        if rows == 1:
            values, tokens = top_k(lprobs[:, 0], count)
            values = _no_nan(values if scores is None else values.add_(scores))
            return Candidates(self._rewritten(step, values), tokens, torch.zeros_like(tokens))
        assert scores is not None
        if vocab < LONG_ROW and not self.diversity_rate:  # as fairseq does it, so that ties are broken alike
            values, places = _no_nan(lprobs.add_(scores.unsqueeze(-1))).flatten(1).topk(count)
            return Candidates(values, places % vocab, places // vocab)
        each = min(count, vocab)
        values, tokens = top_k(lprobs, each)  # (B, R, each)
        values = self._rewritten(step, _no_nan(values.add_(scores.unsqueeze(-1))))
        values, places = values.flatten(1).topk(count)  # (B, R * each) -> (B, count)
        return Candidates(values, tokens.flatten(1).gather(1, places), places // each)

    def _rewritten(self, step: int, values: Tensor) -> Tensor:
        """Scores (..., each), best first, less what siblings lose by rank."""
        if not self.diversity_rate or step == 0:
            return values
        return values.sub_(self.diversity_rate * torch.arange(1, values.size(-1) + 1, device=values.device))

    def advance(self, tokens: Tensor, parents: Tensor) -> None:
        """Nothing is remembered."""

    def keep(self, sentences: Tensor) -> None:
        """Nothing is remembered."""


def _no_nan(values: Tensor) -> Tensor:
    """-inf for NaN, in place; a logit that is no number has spoilt the whole row of its beam."""
    return values.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


class LengthMatchedSearch(BeamSearch):
    """Beam search whose hypotheses are as long as their source: eos is impossible before, and free from then on."""

    def __init__(self, beam: int, eos: int, src_lens: Tensor) -> None:
        """``src_lens`` (B,) int64, eos included."""
        super().__init__(beam)
        self.eos, self.src_lens = eos, src_lens

    def __call__(self, step: int, lprobs: Tensor, scores: Tensor | None) -> Candidates:
        """See :class:`SearchStrategy`."""
        eos_scores = torch.zeros_like(self.src_lens, dtype=lprobs.dtype)
        eos_scores.masked_fill_(self.src_lens > step, -torch.inf)
        lprobs[..., self.eos] = eos_scores[:, None]
        return super().__call__(step, lprobs, scores)

    def keep(self, sentences: Tensor) -> None:
        """See :class:`SearchStrategy`."""
        self.src_lens = self.src_lens[sentences]


class DiverseBeamSearch:
    """Diverse beam search (arXiv:1610.02424) with fairseq's cumulative penalty.

    Beam k belongs to group k mod G. Groups choose one after another, K / G candidates each; a token that an earlier
    group chose at this step loses ``strength`` times one plus the number of tokens that the two groups, place by
    place, had in common at earlier steps.
    """

    def __init__(self, beam: int, groups: int, strength: float) -> None:
        self.groups, self.strength = groups, strength
        self.search = BeamSearch(beam // groups, candidates=beam // groups)
        self.overlap: Tensor | None = None  # (B, G, G): tokens in common so far

    def __call__(self, step: int, lprobs: Tensor, scores: Tensor | None) -> Candidates:
        """See :class:`SearchStrategy`; K candidates, those of the groups interleaved."""
        chosen: list[Candidates] = []
        for group in range(self.groups):
            table = lprobs if scores is None else lprobs[:, group::self.groups]
            if group > 0:
                penalty = self._penalty(lprobs, [c.tokens for c in chosen])
                table = torch.add(table, penalty.unsqueeze(1), alpha=-self.strength)
            found = self.search(step, table, None if scores is None else scores[:, group::self.groups])
            beams = found.beams if scores is None else found.beams * self.groups + group
            chosen.append(Candidates(found.scores, found.tokens, beams))
        joint = [torch.stack(column, dim=2) for column in zip(*chosen, strict=True)]  # (B, K / G, G) each
        tokens = joint[1]
        shared = (tokens.unsqueeze(2) == tokens.unsqueeze(3)).sum(1)  # (B, G, G)
        self.overlap = shared if self.overlap is None else self.overlap + shared
        scores, tokens, beams = (column.flatten(1) for column in joint)
        return Candidates(scores, tokens, beams)

    def _penalty(self, lprobs: Tensor, tokens: list[Tensor]) -> Tensor:
        """(B, V): one plus the overlap with each earlier group, on the tokens (B, K / G) that it chose."""
        penalty = lprobs.new_zeros(lprobs.size(0), lprobs.size(2))
        for earlier, theirs in enumerate(tokens):
            weight = torch.ones_like(theirs, dtype=lprobs.dtype)
            if self.overlap is not None:
                weight += self.overlap[:, len(tokens), earlier, None]
            penalty.scatter_add_(1, theirs, weight)
        return penalty

    def advance(self, tokens: Tensor, parents: Tensor) -> None:
        """Nothing to follow: the group of a beam is its place."""

    def keep(self, sentences: Tensor) -> None:
        """See :class:`SearchStrategy`."""
        if self.overlap is not None:
            self.overlap = self.overlap[sentences]
