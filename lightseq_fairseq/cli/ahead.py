"""fairseq-generate's batches in slots: sentences of later batches are decoded before their batch is asked for.

fairseq asks for one batch after the other. Here its batches are read ahead, and their sentences wait in the slots of a
:class:`~lightseq_fairseq.generator.refill.Refill`; a batch is answered when all of its own are finished.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from lightseq_fairseq.generator.beam_search import check_found
from lightseq_fairseq.generator.generator import MANY, Generator
from lightseq_fairseq.generator.hypotheses import Hypothesis
from lightseq_fairseq.generator.options import GenerationError, GenerationOptions
from lightseq_fairseq.generator.refill import Refill

_SLOTFULS = 3
"""Sentences that are read ahead, in slots: as many as are under way, and what they make room for."""


class Ahead:
    """A test set on its way through the slots."""

    def __init__(self, generator: Generator, options: GenerationOptions, refill: Refill, prefix_size: int) -> None:
        self.generator, self.options, self.refill, self.prefix_size = generator, options, refill, prefix_size
        self.tickets: dict[tuple[int, ...], list[int]] = {}
        """Of batches, by the numbers of their sentences."""
        self.found: dict[int, list[Hypothesis]] = {}

    @classmethod
    def of(cls, generator: Generator, options: GenerationOptions, dataset: Any, prefix_size: int,
           wanted: bool | None) -> Ahead | None:
        """For ``dataset``, fairseq's; None if its batches are better answered one by one. GenerationError if ``wanted``
        is True all the same."""
        sizes = getattr(dataset, "src_sizes", None)
        refill = None
        if sizes is not None and len(dataset) and wanted is not False and (wanted or len(dataset) >= MANY):
            longest = int(sizes.max())
            limit = min(int(options.max_len_a * longest + options.max_len_b),
                        generator.config.max_target_positions - 1)
            refill = generator.slots(options, len(dataset), longest, limit)
        if refill is None and wanted:
            raise GenerationError("--refill is for the search of one encoder-decoder model on a GPU, without "
                                  "alignments, constraints and the like: leave it out")
        return None if refill is None else cls(generator, options, refill, prefix_size)

    def expect(self, sample: dict[str, Any], sentences: list[Tensor], limits: list[int]) -> None:
        """A batch that will be asked for; one with a sentence that has no place in a slot is left alone."""
        if any(self.refill.refusal(len(sentence), self.options, limit) is not None
               for sentence, limit in zip(sentences, limits, strict=True)):
            return
        prefixes = sample["target"][:, :self.prefix_size].tolist() if self.prefix_size > 0 else [None] * len(sentences)
        self.tickets[_numbers(sample)] = [
            self.refill.submit(sentence, self.options, limit, prefix)
            for sentence, limit, prefix in zip(sentences, limits, prefixes, strict=True)]

    @property
    def enough(self) -> bool:
        """Whether no more need be read ahead for now."""
        return sum(map(len, self.tickets.values())) >= _SLOTFULS * self.refill.slots.count

    def hypotheses(self, sample: dict[str, Any]) -> list[list[Hypothesis]] | None:
        """Those of a batch; None if it was not expected."""
        tickets = self.tickets.pop(_numbers(sample), None)
        if tickets is None:
            return None
        self.found |= self.refill.collect([ticket for ticket in tickets if ticket not in self.found])
        found = [self.found.pop(ticket) for ticket in tickets]
        check_found(found)
        return found


class Batches:
    """In place of fairseq's EpochBatchIterator: its batches, each a while after ``expect`` has seen it."""

    def __init__(self, stock: Any, expect: Callable[[dict[str, Any]], bool]) -> None:
        self.stock, self.expect = stock, expect

    def next_epoch_itr(self, *args: Any, **kwargs: Any) -> Batches:
        """Begin with the first."""
        return Batches(self.stock.next_epoch_itr(*args, **kwargs), self.expect)

    def __len__(self) -> int:
        return len(self.stock)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """``expect`` says of each batch whether that is enough for now."""
        read: deque[dict[str, Any]] = deque()
        for sample in self.stock:
            read.append(sample)
            if self.expect(sample):
                yield read.popleft()
        yield from read


def _numbers(sample: dict[str, Any]) -> tuple[int, ...]:
    return tuple(sample["id"].tolist()) if "id" in sample else ()
