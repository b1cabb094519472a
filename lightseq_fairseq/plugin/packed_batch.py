"""One batch of fairseq's, packed and rounded up to a bucket, in a single buffer that one copy takes to the device.

A whole-step graph is recorded for each bucket (numbers of source and target tokens, of sentences, longest length), so
buckets are coarse enough that some tens of them serve an epoch. What a bucket has too much of is filled with sentences
of padding whose targets count nothing; they cost their tokens and change no result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightseq_fairseq.layers import Packing

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


def round_up(count: int, least: int) -> int:
    """The next size of at most an eighth more, a multiple of ``least``."""
    step = max(least, 1 << max(count.bit_length() - 4, 0))
    return -(-count // step) * step


def round_up_to_power(count: int, least: int) -> int:
    """The next power of two, at least ``least``."""
    return max(least, 1 << (count - 1).bit_length())


@dataclass(frozen=True)
class PackedBatch:
    """A batch on the host and the bucket it fills."""

    bucket: Bucket
    buffer: Tensor
    """(words,) int64."""

    @classmethod
    def of(cls, sample: dict[str, Any], pad: int, ignore_prefix_size: int = 0) -> PackedBatch:
        """Pack a collated translation batch that is still on the CPU.

        The first ``ignore_prefix_size`` targets of each sentence do not count.
        """
        source = sample["net_input"]["src_tokens"]
        previous, target = sample["net_input"]["prev_output_tokens"], sample["target"]
        source_packing, target_packing = Packing.of(source, pad), Packing.of(previous, pad)
        targets = target_packing.pack(target)
        if ignore_prefix_size > 0:
            targets = targets.masked_fill(target_packing.positions < ignore_prefix_size, pad)

        bucket, fill = _bucket_for(source_packing, target_packing)
        buffer = torch.full((bucket.words,), pad, dtype=torch.int64)
        views = bucket.views(buffer)
        for packing, tokens, positions, offsets, lengths in (
                (source_packing, views.source_tokens, views.source_positions, views.cu_source, fill[0]),
                (target_packing, views.previous_tokens, views.target_positions, views.cu_target, fill[1])):
            count = packing.positions.numel()
            tokens[:count] = packing.pack(source if packing is source_packing else previous)
            positions[:count] = packing.positions
            positions[count:] = 0
            ends = torch.tensor(lengths, dtype=torch.int32).cumsum(0) + count
            offsets[:packing.batch + 1] = packing.cu_seqlens
            offsets[packing.batch + 1:packing.batch + 1 + len(lengths)] = ends
            offsets[packing.batch + 1 + len(lengths):] = count + sum(lengths)
        views.targets[:targets.numel()] = targets
        return cls(bucket, buffer)

    def uncounted(self, pad: int) -> PackedBatch:
        """The same batch with no target that counts."""
        buffer = self.buffer.clone()
        self.bucket.views(buffer).targets.fill_(pad)
        return PackedBatch(self.bucket, buffer)


@dataclass(frozen=True)
class PackingCollater:
    """fairseq's collater and the packing after it, for data-loader workers: one tensor leaves them for a batch."""

    collate: Any
    """Makes fairseq's sample of a list of examples; None where a sample is given."""
    pad: int
    ignore_prefix_size: int

    def __call__(self, examples: Any) -> dict[str, Any]:
        sample = examples if self.collate is None else self.collate(examples)
        if not sample:
            return sample
        batch = PackedBatch.of(sample, self.pad, self.ignore_prefix_size)
        return {"nsentences": sample["target"].size(0), "ntokens": sample["ntokens"],
                PACKED: (Bucket(*batch.bucket), batch.buffer)}


def _bucket_for(source: Packing, target: Packing) -> tuple[Bucket, tuple[list[int], list[int]]]:
    """The smallest bucket that holds both sides, and the lengths of the padding sentences of each.

    Where a padding sentence has a target it has a source too: attention over nothing is undefined.
    """
    width = round_up(max(int(source.cu_seqlens.diff().max()), int(target.cu_seqlens.diff().max())), 16)
    real_source, real_target = source.positions.numel(), target.positions.numel()
    sizes = [round_up(real_source, 64), round_up(real_target, 64)]
    while True:
        spare = sizes[0] - real_source, sizes[1] - real_target
        count = max(-(-spare[0] // width), -(-spare[1] // width))
        if spare[0] >= min(count, spare[1]):
            break
        sizes[0] = round_up(sizes[0] + 1, 64)
    fill = tuple([n // count + (i < n % count) for i in range(count)] if count else [] for n in spare)
    sentences = round_up_to_power(source.batch + count, 16)
    return Bucket(*sizes, sentences, width), fill  # type: ignore[return-value]
