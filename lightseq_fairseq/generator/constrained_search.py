"""Beam search for hypotheses that contain given phrases: dynamic beam allocation (arXiv:1804.06609, N19-1090)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightseq_fairseq.generator.constraints import START, ConstraintState
from lightseq_fairseq.generator.search import Candidates
from lightseq_fairseq.generator.top_k import top_k

_BANK = 100
"""What a token of a constraint weighs against log-probability when candidates are put into banks; fairseq's."""


class ConstrainedBeamSearch:
    """The beams of a sentence are shared among banks: hypotheses that have said equally much of their constraints.

    Candidates are the 2K best continuations, the best of each beam and those that a constraint asks for; 2K of them
    go on, by turns the best of each bank. A hypothesis ends only when its constraints are met; sentences without
    constraints are searched as by BeamSearch.

    Hypotheses are those of fairseq's LexicallyConstrainedBeamSearch, except where its own depend on how an unstable
    sort leaves equal keys, or do not contain the constraints:

    - Candidates of one turn (see :func:`by_turns`) keep the order of their keys.
    - A candidate of probability 0 (at the length limit, or because of a prefix or of blocked n-grams) comes last. In
      fairseq it takes a place of its bank before candidates that can be said, so that fewer hypotheses are found.
    - A candidate comes once. fairseq keeps it twice if another with the same score was sorted between the two.
    - eos needs the constraints at the first step, too, where fairseq forgets them (``min_len`` 0).
    - A sentence that reaches its length limit keeps the hypotheses that it has; fairseq fails if none ends there.
    """

    def __init__(self, beam: int, eos: int, kind: str, constraints: Sequence[Sequence[Sequence[int]]]) -> None:
        """``kind`` "ordered" or "unordered"; ``constraints`` are the phrases of each sentence, token ids."""
        self.beam, self.eos = beam, eos
        tokens = [[token for phrase in phrases for token in phrase] for phrases in constraints]
        self.sizes = [len(own if kind == "ordered" else set(own)) for own in tokens]  # what fairseq measures banks by
        self.states: list[list[ConstraintState]] = [[START[kind](phrases)] for phrases in constraints]  # (B, R)

    def __call__(self, step: int, lprobs: Tensor, scores: Tensor | None) -> Candidates:
        """See :class:`~lightseq_fairseq.generator.search.SearchStrategy`; in the order in which banks take turns."""
        batch, rows, vocab = lprobs.shape
        unmet = [(b, k) for b, beams in enumerate(self.states) for k, state in enumerate(beams) if not state.met]
        if unmet:
            sentences, beams = torch.tensor(unmet, device=lprobs.device).unbind(1)
            lprobs[sentences, beams, self.eos] = -torch.inf
        if scores is not None:
            lprobs.add_(scores.unsqueeze(-1))
        table = lprobs.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).flatten(1)  # (B, R * V)
        best, columns = top_k(lprobs, min(2 * self.beam, vocab))  # (B, R, each)
        columns += torch.arange(0, rows * vocab, vocab, device=columns.device)[:, None]
        values, picks = best.flatten(1).topk(min(2 * self.beam, rows * vocab - 1))
        places = columns.flatten(1).gather(1, picks)  # (B, C): beam * V + token
        if any(self.sizes):
            values, places = self._by_turns(table, vocab, places, columns[..., 0])
        return Candidates(values, places % vocab, places // vocab)

    def _by_turns(self, table: Tensor, vocab: int, places: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """Of the best ``places`` (B, C), the ``first`` of each beam (B, R) and those that constraints ask for, C."""
        wanted = [[beam * vocab + token for beam, state in enumerate(beams) for token in state.next_tokens()]
                  for beams in self.states]
        width = max(map(len, wanted))
        padded = torch.tensor([[*own, *[0] * (width - len(own))] for own in wanted], dtype=torch.int64)
        found = torch.cat((places, first, padded.to(places.device)), dim=1)
        values, host = table.gather(1, found).cpu().numpy(), found.cpu().numpy()
        order = np.tile(np.arange(places.size(1)), (len(host), 1))
        real = places.size(1) + first.size(1)
        for sentence, states in enumerate(self.states):
            if self.sizes[sentence]:
                own = host[sentence, :real + len(wanted[sentence])]
                once = np.sort(np.unique(own, return_index=True)[1])
                progress = [states[place // vocab].read(place % vocab).progress for place in own[once].tolist()]
                turns = by_turns(values[sentence, once], np.array(progress), self.sizes[sentence])
                order[sentence] = once[turns[:order.shape[1]]]
        chosen = torch.from_numpy(order).to(found.device)
        return table.gather(1, found.gather(1, chosen)), found.gather(1, chosen)

    def advance(self, tokens: Tensor, parents: Tensor) -> None:
        """See :class:`~lightseq_fairseq.generator.search.SearchStrategy`."""
        if any(self.sizes):
            self.states = [[beams[parent].read(token) for token, parent in zip(*pairs, strict=True)]
                           for beams, *pairs in zip(self.states, tokens.tolist(), parents.tolist(), strict=True)]

    def keep(self, sentences: Tensor) -> None:
        """See :class:`~lightseq_fairseq.generator.search.SearchStrategy`."""
        rows = sentences.tolist()
        self.states, self.sizes = [self.states[row] for row in rows], [self.sizes[row] for row in rows]


def by_turns(scores: npt.NDArray[np.float32], progress: npt.NDArray[np.int64], size: int) -> npt.NDArray[Any]:
    """The order of N candidates: the best of each bank, the furthest bank first, then the second of each...

    ``scores`` (N,) fp32, ``progress`` (N,) the banks; ``size`` changes no more than how keys are rounded. As fairseq
    has it, a candidate 100 worse than one of the bank behind is sorted in or behind that bank, where its bank begins
    again with a first turn; and with banks further apart than there are candidates, the later of a far bank precede
    the first of one behind.
    """
    keys = ((progress - size) * _BANK).astype(np.float32) + scores
    sort = np.argsort(-keys, kind="stable")
    sort, dead = sort[scores[sort] > -np.inf], sort[scores[sort] == -np.inf]
    banks = progress[sort]
    begins = np.append(True, banks[1:] != banks[:-1])[:len(banks)]
    ranks = np.arange(len(banks)) - np.maximum.accumulate(np.where(begins, np.arange(len(banks)), 0))
    stripes = ranks * (len(scores) + 1) - banks
    return np.append(sort[np.argsort(stripes, kind="stable")], dead)
