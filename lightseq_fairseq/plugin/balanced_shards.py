"""The sentences of an update dealt out to the ranks so that each has as many tokens.

fairseq gives each rank a batch of its own. Batches of equal padded size differ in their real tokens, which is all that
packed batches compute, and every rank waits for the slowest: on WMT sentences at --max-tokens 4096, 23 % of the time of
4 ranks. An update sums over all its sentences whichever rank computes them, so they may as well change places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from fairseq.data.iterators import EpochBatchIterator


class BalancedShards:
    """Takes the place of an EpochBatchIterator's ``ordered_batches``: one shard's batches, for one epoch.

    The n-th batches of all shards together hold the sentences that they would hold in fairseq.
    """

    def __init__(self, iterator: Any) -> None:
        self.iterator, self.stock = iterator, iterator.ordered_batches
        self.sizes = _sentence_sizes(iterator.dataset)

    @staticmethod
    def suit(iterator: Any) -> bool:
        """Whether there are shards to balance, of a dataset that does not load its shard's batches in advance."""
        return (isinstance(iterator, EpochBatchIterator) and iterator.num_shards > 1
                and not iterator._supports_prefetch)

    def __call__(self, epoch: int, fix_batches_to_gpus: bool, shuffle: bool) -> list[Sequence[int]]:
        """This shard's batches, each the numbers of its sentences; arguments are fairseq's, to its own function."""
        iterator, shard = self.iterator, self.iterator.shard_id
        shards = []
        for number in range(iterator.num_shards):
            iterator.shard_id = number
            shards.append(self.stock(epoch, fix_batches_to_gpus, shuffle))
        iterator.shard_id = shard
        return [self._share(group, shard) for group in zip(*shards, strict=True)]

    def _share(self, batches: Sequence[Sequence[int]], shard: int) -> Sequence[int]:
        """The sentences of ``batches`` that belong to ``shard``: by size, there and back over the shards."""
        sentences = np.concatenate([np.asarray(batch, dtype=np.int64) for batch in batches])
        sentences = sentences[np.argsort(-self.sizes(sentences), kind="stable")]
        turn, place = np.divmod(np.arange(len(sentences)), len(batches))
        return sentences[np.where(turn % 2 == 0, place, len(batches) - 1 - place) == shard].tolist()


def _sentence_sizes(dataset: Any) -> Any:
    """A function from sentence numbers (n,) to tokens of source and target together (n,)."""
    source, target = getattr(dataset, "src_sizes", None), getattr(dataset, "tgt_sizes", None)
    if source is not None and target is not None:
        source, target = np.asarray(source), np.asarray(target)
        return lambda sentences: source[sentences] + target[sentences]
    return lambda sentences: np.array([np.sum(dataset.size(i)) for i in sentences])
