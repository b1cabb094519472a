"""What decoding returns, and how it is read off the record of the steps.

During decoding nothing is copied: each step leaves its small tensors behind. At the end they are stacked, moved to
the host once, and the best hypotheses are followed back from their last token to their first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Hypothesis:
    """One way to say it, on the CPU; T counts its tokens, eos included, S those of the source."""

    tokens: Tensor
    """(T,) int64, eos last."""
    score: float
    """What hypotheses are ranked by, see ``GenerationOptions.lenpen``."""
    positional_scores: Tensor
    """(T,) fp32: log-probability of each token, the search's penalties included."""
    attention: Tensor | None = None
    """(T, S) fp32: the last decoder layer's, averaged over heads and models."""
    alignment: list[tuple[int, int]] | None = None
    """(source word, target word) where each target word's attention is largest; special tokens are no words."""


class Step(NamedTuple):
    """What one step decided for the live sentences, (B', K) each."""

    ended: Tensor
    """bool: which of the K best candidates are complete hypotheses,"""
    totals: Tensor
    """their cumulative scores, fp32,"""
    beams: Tensor
    """and the beams that they end, int64."""
    tokens: Tensor
    """int64: the new token of each beam that goes on,"""
    parents: Tensor
    """the beam that it continues, int64,"""
    scores: Tensor
    """and its cumulative score, fp32."""


@dataclass(frozen=True)
class Ranking:
    """How complete hypotheses are scored; see :class:`GenerationOptions`."""

    lenpen: float = 1.0
    normalize: bool = True
    longest: Ints | None = None
    """(B,): a hypothesis whose last step lies beyond is a stopgap and scores -inf."""
    context_lens: Ints | None = None
    """(B,): tokens in front that count, and"""
    context_totals: Floats | None = None
    """the sum of their log-probabilities."""
    cut: Ints | None = None
    """(B,): the step at which hypotheses go without eos."""
    first_only: bool = True
    """Whether only the first hypotheses of a sentence count, as many as it has beams, and not all of them."""

    def scores(self, pool: Pool) -> Floats:
        """(N,) fp32, of N hypotheses."""
        scores, lengths = pool.totals, pool.steps + 1.0
        if self.context_lens is not None and self.context_totals is not None:
            lengths = lengths + self.context_lens[pool.sentences]
            scores = scores + self.context_totals[pool.sentences]
        if self.normalize:
            scores = scores / np.power(lengths, self.lenpen).astype(np.float32)
        if self.longest is not None:
            scores = np.where(pool.steps > self.longest[pool.sentences], np.float32(-np.inf), scores)
        return scores


class Pool(NamedTuple):
    """N complete hypotheses, in the order of sentences and, within one, of completion."""

    sentences: Ints
    steps: Ints
    """Index of the last token."""
    beams: Ints
    """The beam that it ends."""
    totals: Floats
    """Sum of log-probabilities."""
    ends: Ints
    """The last token."""

    def chosen(self, order: npt.NDArray[np.intp]) -> Pool:
        """These rows."""
        return Pool(self.sentences[order], self.steps[order], self.beams[order], self.totals[order], self.ends[order])

    def best(self, scores: Floats, nbest: int) -> npt.NDArray[np.intp]:
        """Rows of the ``nbest`` of each sentence, best first; the earlier first where scores are equal."""
        order: npt.NDArray[np.intp] = np.lexsort((np.arange(scores.size), -scores, self.sentences))
        chosen: npt.NDArray[np.intp] = order[_rank_within(self.sentences) < nbest]
        return chosen


class History:
    """The steps of one batch of B sentences with K beams. Sentences may leave; they have no later steps."""

    def __init__(self, batch: int, beam: int, device: torch.device) -> None:
        self.batch, self.beam = batch, beam
        self.live = torch.arange(batch, device=device)
        self.steps: list[Step] = []
        self.attention: list[Tensor] = []
        self._closed: list[tuple[Tensor, list[Step], list[Tensor]]] = []

    def append(self, step: Step, attention: Tensor | None) -> None:
        """Remember a step, and the attention (B', R, S) of the beams as they were before it."""
        self.steps.append(step)
        if attention is not None:
            self.attention.append(attention.expand(-1, self.beam, -1))

    def keep(self, sentences: Tensor) -> None:
        """Of the live sentences only these, (B',) int64, go on."""
        self._closed.append((self.live, self.steps, self.attention))
        self.live, self.steps, self.attention = self.live[sentences], [], []

    def best(self, last_steps: Sequence[int], ranking: Ranking, nbest: int,
             eos: int) -> list[list[Hypothesis]]:
        """The ``nbest`` hypotheses of each sentence, best first; nothing after its ``last_steps`` counts."""
        self.keep(self.live[:0])
        record = [self._table([[step[i] for step in steps] for _, steps, _ in self._closed]).cpu().numpy()
                  for i in range(len(Step._fields))]
        return read(record, last_steps, ranking, nbest, eos, self._attention_along)

    def _table(self, columns: list[list[Tensor]]) -> Tensor:
        """Tensors (B', K, ...) of each stretch of steps -> (T, B, K, ...), 0 where a sentence had left."""
        first = next(column[0] for column in columns if column)
        table = first.new_zeros(sum(map(len, columns)), self.batch, *first.shape[1:])
        start = 0
        for column, (live, _, _) in zip(columns, self._closed, strict=True):
            if column:
                table[start:start + len(column), live] = torch.stack(column)
                start += len(column)
        return table

    def _attention_along(self, path: Ints, sentences: Ints) -> Tensor | None:
        """(N, T, S): the attention of the beams that each hypothesis went through."""
        columns = [attention for _, _, attention in self._closed]
        if not any(columns):
            return None
        table = self._table(columns)  # (T, B, K, S)
        steps, rows, beams = (torch.from_numpy(index).to(table.device)
                              for index in (np.arange(path.shape[1]), sentences[:, None], path))
        return table[steps, rows, beams].float().cpu()


def read(record: list[Array], last_steps: Sequence[int], ranking: Ranking, nbest: int, eos: int,
         attention_along: Callable[[Ints, Ints], Tensor | None] = lambda path, sentences: None
         ) -> list[list[Hypothesis]]:
    """The ``nbest`` hypotheses of each sentence, best first; nothing after its ``last_steps`` counts.

    ``record`` holds the columns of :class:`Step`, (T, B, K) each; ``attention_along`` (path, sentences) the attention
    of the beams that hypotheses went through.
    """
    _, batch, beam = record[0].shape
    pool = _pool(record, np.asarray(last_steps), beam, eos, ranking)
    scores = ranking.scores(pool)
    order = pool.best(scores, nbest)
    pool, scores = pool.chosen(order), scores[order]
    tokens, positional, path = _follow_back(pool, record)
    attention = attention_along(path, pool.sentences)
    attentions = [None] * len(scores) if attention is None else [
        rows[:step + 1] for rows, step in zip(attention, pool.steps, strict=True)]
    found: list[list[Hypothesis]] = [[] for _ in range(batch)]
    for sentence, *hypothesis in zip(pool.sentences.tolist(), tokens, scores.tolist(), positional, attentions,
                                     strict=True):
        found[sentence].append(Hypothesis(*hypothesis))
    return found


def without_forced(record: list[Array], prefixes: Sequence[int] | None,
                   limits: Sequence[int | None] | None) -> list[Array]:
    """The record of :func:`read` as if what was forced had been certain: the first ``prefixes`` (B,) tokens, which all
    hypotheses of a sentence have, and eos at step ``limits`` (B,), where all beams end; None for what counts."""
    if prefixes is not None and any(prefixes):
        record = _without_prefix(record, prefixes)
    if limits is not None and any(limit is not None for limit in limits):
        record = _without_forced_eos(record, limits)
    return record


def _without_prefix(record: list[Array], lengths: Sequence[int]) -> list[Array]:
    ended, totals, beams, tokens, parents, scores = record
    free = np.minimum(lengths, len(scores))
    before = np.where(free > 0, scores[free - 1, np.arange(len(free)), 0], np.float32(0))  # of all that goes on
    inside = (np.arange(len(scores))[:, None] < free)[..., None]
    lost = np.where(inside, np.float32(0), before[:, None])
    totals, scores = (np.where(inside & np.isfinite(column), np.float32(0), column - lost)
                      for column in (totals, scores))
    return [ended, totals, beams, tokens, parents, scores]


def _without_forced_eos(record: list[Array], limits: Sequence[int | None]) -> list[Array]:
    steps = np.array([len(record[0]) if limit is None else limit for limit in limits], np.int64)
    cut = np.flatnonzero(steps < len(record[0]))
    ended, totals, beams, tokens, parents, scores = record
    at, rows = steps[cut], cut[:, None]
    last = [column[at, cut] for column in (ended, totals, beams)]  # (B', K) each
    before = np.where(at[:, None] > 0, scores[np.maximum(at - 1, 0)[:, None], rows, last[2]], np.float32(0))
    counts = last[0] & np.isfinite(last[1])
    last[1] = np.where(counts, before, last[1])
    order = np.argsort(np.where(counts, -last[1], np.inf), axis=1, kind="stable")  # the best complete first
    for column, values in zip((changed := [ended.copy(), totals.copy(), beams.copy()]), last, strict=True):
        column[at, cut] = np.take_along_axis(values, order, 1)
    return [*changed, tokens, parents, scores]


def _pool(record: list[Array], last_steps: Ints, beam: int, eos: int, ranking: Ranking) -> Pool:
    """The hypotheses that count, which end no later than their sentence's last step.

    Those that are cut end with whatever token they have; all of that step compete with what came before.
    """
    ended, totals, beams, tokens = record[:4]  # (T, B, K) each
    in_time = np.arange(ended.shape[0])[:, None] <= last_steps
    sentences, steps, ranks = (ended & in_time[..., None]).transpose(1, 0, 2).nonzero()
    cut = np.zeros(steps.shape, bool) if ranking.cut is None else steps == ranking.cut[sentences]
    ends = np.where(cut, tokens[steps, sentences, ranks], eos)
    pool = Pool(sentences, steps, beams[steps, sentences, ranks], totals[steps, sentences, ranks], ends)
    if not ranking.first_only:
        return pool
    places = _rank_within(sentences)
    before = np.where(cut, places - ranks, places)  # those of one step are counted together
    return pool.chosen((before < beam).nonzero()[0])


def _rank_within(groups: Ints) -> Ints:
    """0, 1, 2... within each run of equal values: [4, 4, 7] -> [0, 1, 0]."""
    return np.arange(groups.size) - np.searchsorted(groups, groups)


def _follow_back(pool: Pool, record: list[Array]) -> tuple[Sequence[Tensor], Sequence[Tensor], Ints]:
    """Of each of N hypotheses its tokens and their own scores, and the beam that each token was chosen for, (N, T),
    which is meaningless after the last step."""
    _, _, _, tokens, parents, scores = (column.reshape(len(column), -1) for column in record)  # (T, B * K) each
    count, beam = int(pool.steps.max(initial=-1)) + 1, record[0].shape[2]
    first = pool.sentences * beam
    slots = np.empty((count, pool.steps.size), np.int64)  # of each step the row behind it
    rows = first + pool.beams
    if beam == 1:
        slots[:] = first
    else:
        before = parents[:count] + np.arange(parents.shape[1]) // beam * beam  # rows, too
        last = int(pool.steps.min(initial=count))  # up to which all hypotheses go
        for step in reversed(range(count)):
            slots[step] = rows
            back = before[step].take(rows)
            rows = back if step < last else np.where(pool.steps > step, back, rows)
    found = np.take_along_axis(tokens[:count], slots, 1).astype(np.int64)
    totals = np.take_along_axis(scores[:count], slots, 1)
    ends = np.arange(pool.steps.size)
    found[pool.steps, ends], totals[pool.steps, ends] = pool.ends, pool.totals
    with np.errstate(invalid="ignore"):  # idle beams, followed beyond the last step
        totals[1:] -= totals[:-1].copy()
    real, lengths = np.arange(count) <= pool.steps[:, None], (pool.steps + 1).tolist()
    ours, theirs = (torch.split(torch.from_numpy(column.T[real]), lengths) for column in (found, totals))
    return ours, theirs, (np.concatenate((rows[None], slots[:-1]))[:count] - first).T


def align(attention: Tensor, source_words: Tensor, target_words: Tensor) -> list[tuple[int, int]]:
    """For each target word the source word of largest attention; words are counted from 0 on each side.

    ``attention`` (T, S); ``source_words`` (S,) and ``target_words`` (T,) bool tell words from special tokens.
    """
    if not source_words.any():
        return []
    nearest = attention[target_words][:, source_words].argmax(1).tolist()
    return [(source, target) for target, source in enumerate(nearest)]
