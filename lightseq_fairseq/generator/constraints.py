"""How far a hypothesis has come with the phrases that it must contain.

A state never changes; reading a token gives another one. Both kinds read as fairseq's do: a phrase that is given twice
must be said twice, and a token said counts for one phrase only. A phrase of no tokens asks for nothing; in fairseq it
is an error, or shifts where the ordered phrases end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

Phrase = tuple[int, ...]
"""Token ids; of the trie below also the beginning of one, () being its root."""


class ConstraintState(Protocol):
    """What one hypothesis has said of its constraints."""

    @property
    def met(self) -> bool:
        """Whether the hypothesis may end."""

    @property
    def progress(self) -> int:
        """Tokens of constraints said so far."""

    def next_tokens(self) -> list[int]:
        """Tokens worth trying next, each once."""

    def read(self, token: int) -> ConstraintState:
        """The state after one more token."""


@dataclass(frozen=True)
class OrderedState:
    """Phrases in their order, anything between two of them.

    A token that does not belong inside a phrase loses all phrases, the finished ones too, as in fairseq.
    """

    tokens: Phrase
    """All phrases joined."""
    ends: frozenset[int]
    """Lengths of ``tokens`` at which a phrase is complete, and 0."""
    progress: int = 0
    """How many of ``tokens`` are said."""

    @classmethod
    def start(cls, phrases: Sequence[Sequence[int]]) -> OrderedState:
        """Nothing is said yet."""
        ends, tokens = [0], list[int]()
        for phrase in phrases:
            tokens += phrase
            ends.append(len(tokens))
        return cls(tuple(tokens), frozenset(ends))

    @property
    def met(self) -> bool:
        """See :class:`ConstraintState`."""
        return self.progress == len(self.tokens)

    def next_tokens(self) -> list[int]:
        """The next one, and the first of all, from which to begin again."""
        again = self.tokens[:1] if self.progress > 1 else ()
        return sorted({*again, *self.tokens[self.progress:self.progress + 1]})

    def read(self, token: int) -> OrderedState:
        """See :class:`ConstraintState`."""
        if self.met:
            return self
        if token == self.tokens[self.progress]:
            return replace(self, progress=self.progress + 1)
        if self.progress in self.ends:
            return self
        return replace(self, progress=int(token == self.tokens[0]))


@dataclass(frozen=True)
class Trie:
    """Phrases by their beginnings."""

    phrases: Counter[Phrase]
    """How often each must be said."""

    @cached_property
    def through(self) -> Counter[Phrase]:
        """How many phrases begin so."""
        counts: Counter[Phrase] = Counter()
        for phrase, times in self.phrases.items():
            for length in range(len(phrase) + 1):
                counts[phrase[:length]] += times
        return counts

    @cached_property
    def following(self) -> dict[Phrase, set[int]]:
        """Tokens that continue each beginning."""
        tokens: dict[Phrase, set[int]] = {beginning: set() for beginning in (*self.through, ())}
        for beginning in self.through:
            if beginning:
                tokens[beginning[:-1]].add(beginning[-1])
        return tokens


@dataclass(frozen=True)
class UnorderedState:
    """Phrases in any order, anything between two of them; within one, only what continues it.

    A phrase that begins a longer one counts as said once the hypothesis has left the longer one.
    """

    trie: Trie
    place: Phrase = ()
    """The beginning of phrases that the last tokens are."""
    said: Counter[Phrase] = field(default_factory=Counter)
    """How often each beginning was said and has not been given up."""
    left: Counter[Phrase] = field(default_factory=Counter)
    """How often each phrase was said before ``place`` began."""

    @classmethod
    def start(cls, phrases: Sequence[Sequence[int]]) -> UnorderedState:
        """Nothing is said yet."""
        return cls(Trie(Counter(tuple(phrase) for phrase in phrases if len(phrase))))

    @property
    def met(self) -> bool:
        """See :class:`ConstraintState`."""
        return self.left.total() + self._completes(self.place) == self.trie.phrases.total()

    @property
    def progress(self) -> int:
        """See :class:`ConstraintState`."""
        return self.said.total()

    def next_tokens(self) -> list[int]:
        """Those that begin a phrase or continue the present one."""
        return sorted(self.trie.following[()] | self.trie.following[self.place])

    def read(self, token: int) -> UnorderedState:
        """See :class:`ConstraintState`."""
        further = (*self.place, token)
        if self._open(further):
            return replace(self, place=further, said=self.said + Counter([further]))
        said, left, place = self.said.copy(), self.left.copy(), self.place
        while place and not self._completes(place):  # give up what leads to no phrase
            said[place] -= 1
            place = place[:-1]
        if place:
            left[place] += 1
        begun = (token,) if self._open((token,)) else ()
        if begun:
            said[begun] += 1
        return UnorderedState(self.trie, begun, said, left)

    def _completes(self, place: Phrase) -> bool:
        """Whether a phrase that is still wanted ends here."""
        return self.left[place] < self.trie.phrases[place]

    def _open(self, beginning: Phrase) -> bool:
        """Whether a phrase that is still wanted begins so."""
        return self.said[beginning] < self.trie.through[beginning]


START: dict[str, Callable[[Sequence[Sequence[int]]], ConstraintState]] = {
    "ordered": OrderedState.start, "unordered": UnorderedState.start}
"""The first state of each kind, by its name in GenerationOptions."""
