"""From logits to the log-probabilities that a search may choose from.

Rules edit a table of log-probabilities (B, R, V) in place; R is K beams, or 1 at the first step. Tokens that the
caller or the length limit forces win over every rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightseq_fairseq.generator.search import Candidates
from lightseq_fairseq.ops.cpu import compiled_operators


def log_probabilities(logits: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature), averaged over models as probabilities; overwrites the logits.

    ``logits`` are (B, R, V) fp32 of each model of the ensemble; returns (B, R, V).
    """
    tables = []
    for table in logits:
        if temperature != 1.0:
            table.div_(temperature)
        tables.append(_log_softmax(table))
    if len(tables) == 1:
        return tables[0]
    return torch.stack(tables).logsumexp(0).sub_(math.log(len(tables)))


def _log_softmax(table: Tensor) -> Tensor:
    """In place, (B, R, V)."""
    if table.device.type == "cpu" and table.dtype == torch.float32 and table.is_contiguous():
        operators = compiled_operators()
        if operators is not None:
            operators.log_softmax_.default(table, 0)
            return table
    return torch.log_softmax(table, dim=-1, out=table)


class TokenPenalties:
    """pad is never chosen and unk pays ``unkpen``."""

    def __init__(self, pad: int, unk: int, unkpen: float, device: torch.device) -> None:
        self.first, self.last = min(pad, unk), max(pad, unk)
        self.bias = torch.zeros(self.last - self.first + 1, device=device)
        self.bias[unk - self.first] = -unkpen
        self.bias[pad - self.first] = -torch.inf

    def __call__(self, lprobs: Tensor) -> None:
        """(B, R, V), in place."""
        lprobs[..., self.first:self.last + 1].add_(self.bias)


class Rule:
    """Something that forbids tokens; subclasses override what concerns them."""

    def __call__(self, step: int, lprobs: Tensor) -> None:
        """Forbid tokens in (B, R, V), in place."""
        raise NotImplementedError

    def advance(self, tokens: Tensor, parents: Tensor) -> None:
        """Beam k of sentence b now is its former beam ``parents[b, k]`` and ``tokens[b, k]``; (B, K) int64 each."""

    def keep(self, sentences: Tensor) -> None:
        """(B',) int64: only these sentences go on."""


class MinLength(Rule):
    """No eos at the first ``min_len`` steps, of which sentences may have done some ``already`` (B,)."""

    def __init__(self, min_len: int, eos: int, already: Sequence[int] | None = None,
                 device: torch.device | str = "cpu") -> None:
        self.eos, self.most = eos, min_len - min(already or [0])
        self.least = None if already is None else torch.tensor([min_len - done for done in already], device=device)

    def __call__(self, step: int, lprobs: Tensor) -> None:
        """See :class:`Rule`."""
        if step >= self.most:
            return
        if self.least is None:
            lprobs[..., self.eos] = -torch.inf
        else:
            lprobs[..., self.eos].masked_fill_((self.least > step)[:, None], -torch.inf)

    def keep(self, sentences: Tensor) -> None:
        """See :class:`Rule`."""
        if self.least is not None:
            self.least = self.least[sentences]


class NoRepeatNgram(Rule):
    """No sequence of ``size`` generated tokens comes twice, those of ``contexts`` in front of them included.

    The rule of fairseq's CUDA extension; fairseq's Python version compares with the padding at the end of its
    buffer and forbids nothing.
    """

    def __init__(self, size: int, pad: int, contexts: Sequence[Tensor] = (),
                 device: torch.device | str = "cpu") -> None:
        self.size, self.pad = size, pad
        self.history: Tensor | None = None  # (B, K, tokens so far), K = 1 before the first
        longest = max(map(len, contexts), default=0)
        if longest:  # pads in front equal no token that a sequence could end with
            padded = [F.pad(text.to(device), (longest - len(text), 0), value=pad) for text in contexts]
            self.history = torch.stack(padded).unsqueeze(1)

    def __call__(self, step: int, lprobs: Tensor) -> None:
        """See :class:`Rule`."""
        if self.history is None or self.history.size(2) < self.size:
            return
        history = self.history
        starts = history.size(2) - self.size + 1
        banned = history[..., self.size - 1:]  # what followed each earlier context, (B, K, starts)
        for place in range(self.size - 1):
            same = history[..., place:place + starts] == history[..., starts + place, None]
            banned = banned.where(same, self.pad)  # pad is forbidden anyway
        lprobs.scatter_(2, banned, -torch.inf)

    def advance(self, tokens: Tensor, parents: Tensor) -> None:
        """See :class:`Rule`."""
        newest = tokens.unsqueeze(2)
        if self.history is None:
            self.history = newest
        else:
            past = self.history.gather(1, parents.unsqueeze(2).expand(-1, -1, self.history.size(2)))
            self.history = torch.cat((past, newest), dim=2)

    def keep(self, sentences: Tensor) -> None:
        """See :class:`Rule`."""
        if self.history is not None:
            self.history = self.history[sentences]


class ForcedTokens:
    """What each sentence must say at each step: its prefix, and eos at its length limit if that is ``force_eos``."""

    def __init__(self, max_lens: Tensor, prefix: Tensor | None, pad: int, eos: int, force_eos: bool = True,
                 score_prefix: bool = True, score_forced_eos: bool = True) -> None:
        """``max_lens`` (B,) int64 and ``prefix`` (B, P) int64, pad where free, both on the decoding device."""
        steps = torch.arange(int(max_lens.max()) + 1, device=max_lens.device)
        self.tokens = torch.full((max_lens.numel(), steps.numel()), pad, device=max_lens.device)  # (B, T)
        if prefix is not None:
            width = min(prefix.size(1), steps.numel())
            self.tokens[:, :width] = prefix[:, :width]
        at_limit = steps >= max_lens[:, None]
        self.ends = (self.tokens == eos) & ~at_limit  # the prefix itself ends here, (B, T)
        self.unscored = None if score_prefix or prefix is None else self.tokens != pad
        if force_eos:
            self.tokens.masked_fill_(at_limit, eos)
            if not score_forced_eos:
                self.unscored = at_limit if self.unscored is None else self.unscored | at_limit
        self.free = pad
        self.forces_at = (self.tokens != pad).any(0).tolist()
        self.ends_at = self.ends.any(0).tolist()

    def take(self, step: int, lprobs: Tensor) -> Tensor | None:
        """(B, R, 1): log-probabilities of the forced tokens before any rule; None if this step forces nothing."""
        if not self.forces_at[step]:
            return None
        return lprobs.gather(2, self._tokens(step, lprobs))

    def put(self, step: int, lprobs: Tensor, taken: Tensor) -> None:
        """Leave only the forced token, at the log-probability ``taken``, to the sentences that have one."""
        forced = self.tokens[:, step] != self.free
        if self.unscored is not None:
            taken = taken.masked_fill(self.unscored[:, step, None, None], 0.0)
        lprobs.masked_fill_(forced[:, None, None], -torch.inf)
        lprobs.scatter_(2, self._tokens(step, lprobs), taken)

    def _tokens(self, step: int, lprobs: Tensor) -> Tensor:
        """(B, R, 1): the token of this step for every beam, pad where free."""
        return self.tokens[:, step, None, None].expand(-1, lprobs.size(1), 1)

    def close(self, step: int, candidates: Candidates) -> Candidates:
        """A sentence whose prefix ends with eos has one way on, its first candidate: all candidates become that."""
        if not self.ends_at[step]:
            return candidates
        ends = self.ends[:, step, None]
        return Candidates(*(column.where(~ends, column[:, :1]) for column in candidates))

    def keep(self, sentences: Tensor) -> None:
        """(B',) int64: only these sentences go on."""
        self.tokens, self.ends = self.tokens[sentences], self.ends[sentences]
        if self.unscored is not None:
            self.unscored = self.unscored[sentences]
