"""One batch of fairseq's, packed and rounded up to a bucket, in a single buffer that one copy takes to the device.

A whole-step graph is recorded for each bucket (numbers of source and target tokens, of sentences, longest length), so
buckets are coarse enough that some tens of them serve an epoch. What a bucket has too much of is filled with sentences
of padding whose targets count nothing; they cost their tokens and change no result.

    batches of      source              target
    translation     source tokens       target tokens, the previous ones being read and they themselves predicted
    a text          nothing             its tokens, the previous ones being read
    a masked text   its tokens          masked tokens; in place of previous ones their rows among the source's
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightseq_fairseq.layers import Packing
from lightseq_fairseq.layers.packing import round_up

PACKED = "packed"
"""Key of a sample's (bucket, buffer)."""

CONTROLS = 8
"""fp32 numbers for the device that travel with the batch."""


class Bucket(NamedTuple):
    """Sizes that the device sees."""

    source: int
    """Packed source tokens."""
    target: int
    """Packed target tokens."""
    sentences: int
    """Sentences, those of padding and empty ones included."""
    width: int
    """Upper bound of the sentences' lengths."""
    crosses: bool = True
    """Whether targets attend to the source of their sentence."""

    @property
    def words(self) -> int:
        """int64 words of the buffer."""
        return 2 * self.source + 3 * self.target + 2 * self._offsets_words + CONTROLS // 2

    @property
    def _offsets_words(self) -> int:
        return (self.sentences + 2) // 2

    def views(self, buffer: Tensor) -> BatchViews:
        """The parts of a buffer (words,) int64."""
        sizes = [self.source, self.source, self.target, self.target, self.target, self._offsets_words,
                 self._offsets_words, CONTROLS // 2]
        *tokens, cu_source, cu_target, controls = buffer.split(sizes)
        offsets = [part.view(torch.int32)[:self.sentences + 1] for part in (cu_source, cu_target)]
        return BatchViews(*tokens, *offsets, controls.view(torch.float32))


class BatchViews(NamedTuple):
    """The parts of one buffer, on the host or on the device."""

    source_tokens: Tensor
    source_positions: Tensor
    previous_tokens: Tensor
    target_positions: Tensor
    targets: Tensor
    cu_source: Tensor
    cu_target: Tensor
    controls: Tensor

    def packings(self, bucket: Bucket) -> tuple[Packing, Packing]:
        """Of source and target; without rows, as nothing here was ever padded."""
        return (Packing(None, self.cu_source, self.source_positions, bucket.sentences, bucket.width),
                Packing(None, self.cu_target, self.target_positions, bucket.sentences, bucket.width))


@dataclass(frozen=True)
class PackedBatch:
    """A batch on the host and the bucket it fills."""

    bucket: Bucket
    buffer: Tensor
    """(words,) int64."""
    real: Bucket
    """What of the bucket is no padding."""

    @classmethod
    def of(cls, sample: dict[str, Any], pad: int, ignore_prefix_size: int = 0, masked: bool = False) -> PackedBatch:
        """Pack a collated batch that is still on the CPU: of a translation task, or of texts where nothing is said of
        previous output tokens, which are ``masked`` or continued.

        The first ``ignore_prefix_size`` targets of each sentence do not count.
        """
        tokens, target = sample["net_input"]["src_tokens"], sample["target"]
        previous = sample["net_input"].get("prev_output_tokens")
        read = tokens if previous is None else previous
        packing = Packing.of(read, pad)
        targets = packing.pack(target)
        if masked:
            rows = (targets != pad).nonzero().squeeze(1)
            ends = torch.searchsorted(rows, packing.cu_seqlens.long()).int()
            parts = BatchViews(packing.pack(read), packing.positions, rows, packing.positions[rows], targets[rows],
                               packing.cu_seqlens, ends, torch.zeros(CONTROLS))
        else:
            if ignore_prefix_size > 0:
                targets = targets.masked_fill(packing.positions < ignore_prefix_size, pad)
            source = tokens if previous is not None else tokens.new_full((packing.batch, 1), pad)
            source_packing = Packing.of(source, pad)
            parts = BatchViews(source_packing.pack(source), source_packing.positions,
                               packing.pack(read), packing.positions, targets, source_packing.cu_seqlens,
                               packing.cu_seqlens, torch.zeros(CONTROLS))
        longest = max(int(ends.diff().max()) for ends in (parts.cu_source, parts.cu_target))
        real = Bucket(parts.source_tokens.numel(), parts.targets.numel(), packing.batch, longest, previous is not None)
        return cls._in_bucket(_smallest_bucket(real), real, pad, parts)

    @classmethod
    def _in_bucket(cls, bucket: Bucket, real: Bucket, pad: int, parts: BatchViews) -> PackedBatch:
        """A buffer of the real beginnings of ``parts``, filled up with padding."""
        fill = padding_sentences(bucket, real)
        if fill is None:
            raise ValueError(f"{real} does not fit into {bucket}")
        buffer = torch.full((bucket.words,), pad, dtype=torch.int64)
        views = bucket.views(buffer)
        for count, names in ((real.source, ("source_tokens", "source_positions")),
                             (real.target, ("previous_tokens", "target_positions", "targets"))):
            for name in names:
                getattr(views, name)[:count] = getattr(parts, name)[:count]
        views.source_positions[real.source:] = 0
        views.target_positions[real.target:] = 0
        end = real.sentences + 1
        for offsets, own, lengths in ((views.cu_source, parts.cu_source, fill[0]),
                                      (views.cu_target, parts.cu_target, fill[1])):
            offsets[:end] = own[:end]
            ends = torch.tensor(lengths, dtype=torch.int32).cumsum(0) + own[real.sentences]
            offsets[end:end + len(lengths)] = ends
            offsets[end + len(lengths):] = own[real.sentences] + sum(lengths)
        return cls(bucket, buffer, real)

    def moved(self, bucket: Bucket, pad: int) -> PackedBatch:
        """The same batch in another bucket that :func:`padding_sentences` finds fit for it."""
        return self._in_bucket(bucket, self.real, pad, self.bucket.views(self.buffer))

    def uncounted(self, pad: int) -> PackedBatch:
        """The same batch with no target that counts."""
        buffer = self.buffer.clone()
        self.bucket.views(buffer).targets.fill_(pad)
        return PackedBatch(self.bucket, buffer, self.real)


@dataclass(frozen=True)
class PackingCollater:
    """fairseq's collater and the packing after it, for data-loader workers: one tensor leaves them for a batch."""

    collate: Any
    """Makes fairseq's sample of a list of examples; None where a sample is given."""
    pad: int
    ignore_prefix_size: int
    masked: bool = False

    def __call__(self, examples: Any) -> dict[str, Any]:
        """Examples, or fairseq's sample, -> a packed batch and what fairseq counts of it; an empty sample as it is."""
        sample = examples if self.collate is None else self.collate(examples)
        if not sample:
            return sample
        batch = PackedBatch.of(sample, self.pad, self.ignore_prefix_size, self.masked)
        return {"nsentences": sample["target"].size(0), "ntokens": sample["ntokens"],
                PACKED: (batch.bucket, batch.buffer, batch.real)}


def padding_sentences(bucket: Bucket, real: Bucket) -> tuple[list[int], list[int]] | None:
    """Lengths of the source and target sides of sentences that fill ``bucket`` up; None where that cannot be.

    Where such a sentence has a target it has a source too if targets attend to it: over nothing is undefined.
    """
    spare = bucket.source - real.source, bucket.target - real.target
    count = max(-(-n // bucket.width) for n in spare)
    if (min(spare) < 0 or real.width > bucket.width or real.sentences + count > bucket.sentences
            or (bucket.crosses and spare[0] < min(count, spare[1]))):
        return None
    source, target = ([n // count + (i < n % count) for i in range(count)] if count else [] for n in spare)
    return source, target


def _smallest_bucket(real: Bucket) -> Bucket:
    """Tokens to an eighth, the width to a half, sentences to a power of four: the latter two cost little."""
    width, source, sentences = round_up(real.width, 32, steps=2), round_up(real.source, 64), 64
    target = round_up(max(real.target, 1), 64)
    while padding_sentences(bucket := Bucket(source, target, sentences, width, real.crosses), real) is None:
        if sentences < real.sentences + max(source - real.source, target - real.target) // width + 1:
            sentences *= 4
        else:
            source = round_up(source + 1, 64)
    return bucket
