"""Ranks share out the sentences of each update evenly, and the same sentences as fairseq's."""

from __future__ import annotations

import numpy as np
import pytest
from fairseq.data import FairseqDataset
from fairseq.data.iterators import EpochBatchIterator

from lightseq_fairseq.plugin.balanced_shards import BalancedShards


class Pairs(FairseqDataset):
    """Numbers that stand for sentence pairs of random lengths."""

    def __init__(self, count, attributes):
        sizes = np.random.RandomState(5).randint(1, 80, (2, count))
        self.lengths = sizes
        if attributes:
            self.src_sizes, self.tgt_sizes = sizes

    def __getitem__(self, i):
        return i

    def __len__(self):
        return self.lengths.shape[1]

    def size(self, i):
        return tuple(self.lengths[:, i])

    def collater(self, samples):
        return samples


def shards(world, attributes=True, balanced=True, count=1003, epoch=1):
    """For each rank its batches of an epoch."""
    dataset, result = Pairs(count, attributes), []
    batches = [list(range(begin, min(begin + 17, count))) for begin in range(0, count, 17)]
    for rank in range(world):
        iterator = EpochBatchIterator(dataset, dataset.collater, batches, seed=3, num_shards=world, shard_id=rank,
                                      epoch=epoch)
        assert BalancedShards.suit(iterator) == (world > 1)
        if balanced:
            iterator.ordered_batches = BalancedShards(iterator)
        result.append(list(iterator.next_epoch_itr(shuffle=True)))
    return dataset, result


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("attributes", [True, False])
def test_updates_hold_the_same_sentences(world, attributes):
    _, stock = shards(world, attributes, balanced=False)
    _, ours = shards(world, attributes)
    assert len({len(batches) for batches in ours}) == 1
    for theirs, mine in zip(zip(*stock, strict=True), zip(*ours, strict=True), strict=True):
        assert sorted(sum(theirs, [])) == sorted(sum(mine, []))


def test_every_rank_has_as_many_tokens():
    dataset, stock = shards(4, balanced=False)
    _, ours = shards(4)
    worst = {}
    for name, ranks in (("stock", stock), ("ours", ours)):
        tokens = np.array([[dataset.lengths[:, batch].sum() for batch in batches] for batches in ranks])[:, :-1]
        worst[name] = (tokens.max(0) / tokens.mean(0)).max()
    assert worst["stock"] > 1.15
    assert worst["ours"] < 1.05


def test_epochs_differ_as_fairseqs_do():
    _, first = shards(2, epoch=1)
    _, second = shards(2, epoch=2)
    assert first != second
    assert shards(2, epoch=2)[1] == second
