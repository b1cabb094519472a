"""Which graph replays a batch: that of its own bucket, or that of a somewhat larger one which is there already.

Capturing takes some ten steps' time, and with several ranks all wait for it. So a bucket that is seldom used borrows a
graph, at the price of more padding.
"""

from __future__ import annotations

from collections import Counter

from lightseq_fairseq.plugin.packed_batch import Bucket, padding_sentences

LENIENT, STRICT = 1.25, 1.125
"""Tokens that a borrowed graph may have, relative to the batch's own bucket, for its first and for later uses."""
LENIENT_USES, BORROWED_USES = 8, 64
"""Uses of a bucket until the strict limit holds, and until it has a graph of its own in any case."""


class GraphChoice:
    """The buckets of one role that have graphs."""

    def __init__(self) -> None:
        self.captured: set[Bucket] = set()
        self.uses: Counter[Bucket] = Counter()

    def __call__(self, bucket: Bucket, real: Bucket) -> Bucket:
        """The bucket whose graph is to serve a batch; one that has none yet must be captured now."""
        self.uses[bucket] += 1
        if bucket in self.captured:
            return bucket
        limit = LENIENT if self.uses[bucket] <= LENIENT_USES else STRICT
        fit = [other for other in self.captured
               if other.source + other.target <= limit * (bucket.source + bucket.target)
               and other.width <= 2 * bucket.width and padding_sentences(other, real) is not None]
        if fit and self.uses[bucket] <= BORROWED_USES:
            return min(fit, key=lambda other: (other.source + other.target, other.width, other.sentences))
        self.captured.add(bucket)
        return bucket
