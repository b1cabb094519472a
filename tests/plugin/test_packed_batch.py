"""A bucketed batch holds every real token once, and nothing in it attends to nothing."""

from __future__ import annotations

import pytest
import torch

from lightseq_fairseq.layers.packing import round_up
from lightseq_fairseq.plugin.packed_batch import Bucket, PackedBatch, padding_sentences

PAD = 1


def collated(src_lens, tgt_lens, seed=0):
    """Left-padded sources, right-padded targets, as fairseq collates them."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.full((len(src_lens), max(src_lens)), PAD)
    previous = torch.full((len(tgt_lens), max(tgt_lens)), PAD)
    target = previous.clone()
    for b, (s, t) in enumerate(zip(src_lens, tgt_lens, strict=True)):
        source[b, source.size(1) - s:] = torch.randint(4, 99, (s,), generator=generator)
        words = torch.randint(4, 99, (t - 1,), generator=generator)
        previous[b, :t] = torch.cat((torch.tensor([2]), words))
        target[b, :t] = torch.cat((words, torch.tensor([2])))
    return {"net_input": {"src_tokens": source, "prev_output_tokens": previous}, "target": target}


CASES = {
    "few": ([5, 1, 9], [4, 7, 2]),
    "one": ([1], [1]),
    "full": ([32] * 4, [32] * 4),
    "source full, target not": ([64] * 2, [5] * 2),
    "many": (list(range(1, 60)), list(range(60, 1, -1))),
}


@pytest.mark.parametrize("case", CASES)
def test_every_token_is_there_in_its_sentence(case):
    src_lens, tgt_lens = CASES[case]
    sample = collated(src_lens, tgt_lens)
    batch = PackedBatch.of(sample, PAD)
    views = batch.bucket.views(batch.buffer)
    for tokens, positions, offsets, padded, lens in (
            (views.source_tokens, views.source_positions, views.cu_source, sample["net_input"]["src_tokens"], src_lens),
            (views.previous_tokens, views.target_positions, views.cu_target,
             sample["net_input"]["prev_output_tokens"], tgt_lens),
            (views.targets, views.target_positions, views.cu_target, sample["target"], tgt_lens)):
        for b, length in enumerate(lens):
            begin, end = offsets[b].item(), offsets[b + 1].item()
            assert tokens[begin:end].tolist() == padded[b][padded[b] != PAD].tolist()
            assert positions[begin:end].tolist() == list(range(length))
        assert tokens[sum(lens):].eq(PAD).all()
        assert offsets[-1] == tokens.numel() and offsets.diff().ge(0).all()


@pytest.mark.parametrize("case", CASES)
def test_a_larger_bucket_holds_the_same(case):
    batch = PackedBatch.of(collated(*CASES[case]), PAD)
    own = batch.bucket
    larger = own._replace(source=own.source + 448, target=own.target + 128, width=2 * own.width)
    moved = batch.moved(larger, PAD)
    assert moved.bucket == larger and moved.real == batch.real
    old, new = batch.bucket.views(batch.buffer), larger.views(moved.buffer)
    for name, count in (("source_tokens", batch.real.source), ("source_positions", batch.real.source),
                        ("previous_tokens", batch.real.target), ("target_positions", batch.real.target),
                        ("targets", batch.real.target), ("cu_source", batch.real.sentences + 1),
                        ("cu_target", batch.real.sentences + 1)):
        assert torch.equal(getattr(new, name)[:count], getattr(old, name)[:count]), name
    assert new.targets[batch.real.target:].eq(PAD).all()
    for offsets, size in ((new.cu_source, larger.source), (new.cu_target, larger.target)):
        lengths = offsets.diff()
        assert offsets[-1] == size and lengths.ge(0).all() and lengths.max() <= larger.width
    assert new.cu_source.diff()[new.cu_target.diff() > 0].gt(0).all()


def test_what_a_bucket_cannot_hold():
    real = Bucket(source=100, target=90, sentences=10, width=20)
    assert padding_sentences(Bucket(128, 128, 16, 32), real) == ([14, 14], [19, 19])
    assert padding_sentences(Bucket(128, 64, 16, 32), real) is None, "too few tokens"
    assert padding_sentences(Bucket(128, 128, 11, 32), real) is None, "too few sentences"
    assert padding_sentences(Bucket(128, 128, 16, 16), real) is None, "too narrow"
    assert padding_sentences(Bucket(101, 128, 16, 32), real) is None, "a target without a source"
    with pytest.raises(ValueError, match="does not fit"):
        PackedBatch.of(collated(*CASES["many"]), PAD).moved(Bucket(64, 64, 64, 64), PAD)


@pytest.mark.parametrize("case", CASES)
def test_whoever_asks_finds_a_key(case):
    batch = PackedBatch.of(collated(*CASES[case]), PAD)
    views = batch.bucket.views(batch.buffer)
    source, target = views.cu_source.diff(), views.cu_target.diff()
    assert source[target > 0].gt(0).all()
    assert source.max() <= batch.bucket.width and target.max() <= batch.bucket.width


def test_what_does_not_count_has_padding_for_target():
    sample = collated([5, 6], [4, 6])
    whole = PackedBatch.of(sample, PAD)
    prefixed, dummy = PackedBatch.of(sample, PAD, ignore_prefix_size=2), whole.uncounted(PAD)
    targets = [b.bucket.views(b.buffer).targets[:10].tolist() for b in (whole, prefixed, dummy)]
    assert targets[1] == [PAD, PAD, *targets[0][2:4], PAD, PAD, *targets[0][6:10]]
    assert set(targets[2]) == {PAD}


def test_views_of_a_buffer_do_not_overlap():
    bucket = Bucket(64, 128, 16, 32)
    buffer = torch.zeros(bucket.words, dtype=torch.int64)
    for number, view in enumerate(bucket.views(buffer), start=1):
        assert view.eq(0).all()
        view.fill_(number)
    assert [int(view[0]) for view in bucket.views(buffer)] == list(range(1, 9))


def test_a_bucket_wastes_at_most_an_eighth():
    for count in range(64, 5000, 7):
        assert count <= round_up(count, 8) <= count + max(8, count / 8)
