"""Few graphs serve many batches, at a bounded price."""

from __future__ import annotations

import random

from lightseq_fairseq.plugin.graph_choice import BORROWED_USES, LENIENT, LENIENT_USES, STRICT, GraphChoice
from lightseq_fairseq.plugin.packed_batch import Bucket, padding_sentences


def test_a_new_bucket_borrows_the_next_larger_graph():
    choose = GraphChoice()
    large, next_larger = Bucket(1280, 1280, 256, 64), Bucket(1152, 1152, 256, 64)
    own, real = Bucket(1088, 1088, 256, 64), Bucket(1080, 1080, 40, 50)
    choose.captured.update((large, next_larger))
    assert choose(own, real) == next_larger
    assert choose.captured == {large, next_larger}


def test_what_is_too_large_too_wide_or_too_small_is_not_borrowed():
    own, real = Bucket(1024, 1024, 64, 32), Bucket(1000, 1000, 40, 30)
    for other in (Bucket(2048, 1024, 64, 32), Bucket(1024, 1024, 64, 128), Bucket(1024, 960, 64, 32)):
        choose = GraphChoice()
        choose.captured.add(other)
        assert choose(own, real) == own


def test_a_bucket_that_is_used_often_gets_its_own():
    choose = GraphChoice()
    choose.captured.add(Bucket(1152, 1152, 64, 32))
    own, real = Bucket(1024, 1024, 64, 32), Bucket(1000, 1000, 40, 30)
    chosen = [choose(own, real) for _ in range(BORROWED_USES + 2)]
    assert chosen[:BORROWED_USES] == [Bucket(1152, 1152, 64, 32)] * BORROWED_USES
    assert chosen[BORROWED_USES:] == [own, own]


def test_the_price_is_bounded():
    generator, choose = random.Random(4), GraphChoice()
    for _ in range(2000):
        tokens = generator.randrange(17, 60) * 64
        bucket = Bucket(tokens, generator.choice([tokens, tokens + 64]), 256, generator.choice([32, 64, 96]))
        real = Bucket(bucket.source - 30, bucket.target - 30, 100, bucket.width - 5)
        chosen = choose(bucket, real)
        limit = LENIENT if choose.uses[bucket] <= LENIENT_USES else STRICT
        assert chosen.source + chosen.target <= limit * (bucket.source + bucket.target)
        assert padding_sentences(chosen, real) is not None
    assert len(choose.captured) < len(choose.uses) / 2
