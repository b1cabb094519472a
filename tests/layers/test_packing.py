"""Packing and back loses nothing, on whichever side the padding stands."""

from __future__ import annotations

import pytest
import torch

from lightseq_fairseq.layers import Packing

PAD = 1
BATCHES = {
    "right": [[5, 6, 7, PAD], [8, PAD, PAD, PAD], [9, 4, 3, 2]],
    "left": [[PAD, 5, 6, 7], [PAD, PAD, PAD, 8], [9, 4, 3, 2]],
    "full": [[5, 6], [7, 8]],
    "inside": [[5, PAD, 6, PAD], [PAD, PAD, 7, 8]],
    "one empty": [[PAD, PAD], [3, 4]],
}


@pytest.mark.parametrize("side", BATCHES)
def test_round_trip(side):
    tokens = torch.tensor(BATCHES[side])
    packing = Packing.of(tokens, PAD)
    real = tokens.ne(PAD)
    assert packing.pack(tokens).tolist() == tokens[real].tolist()
    assert packing.cu_seqlens.tolist() == [0, *real.sum(1).cumsum(0).tolist()]
    assert packing.positions.tolist() == [i for row in real for i in range(int(row.sum()))]
    states = torch.randn(*tokens.shape, 3)
    back = packing.unpack(packing.pack(states), fill=-7.0)
    assert torch.equal(back[real], states[real]) and back[~real].eq(-7).all()


def test_full_is_the_packing_of_sentences_without_padding():
    expected, full = Packing.of(torch.full((3, 4), 5), pad=1), Packing.full(3, 4)
    assert full.rows is None and expected.rows is None
    assert (full.batch, full.width, full.count) == (expected.batch, expected.width, expected.count) == (3, 4, 12)
    for name in ("cu_seqlens", "positions"):
        assert torch.equal(getattr(full, name), getattr(expected, name))
        assert getattr(full, name).dtype == getattr(expected, name).dtype


def test_of_lengths_is_the_packing_of_right_padded_sentences():
    packing, other = Packing.of_lengths([3, 1, 4]), Packing.of(torch.tensor(BATCHES["right"]), PAD)
    for field in ("rows", "cu_seqlens", "positions"):
        assert getattr(packing, field).tolist() == getattr(other, field).tolist()
    assert Packing.of_lengths([2, 2]).rows is None


@pytest.mark.parametrize("side", BATCHES)
def test_flush_left_and_place_are_inverse(side):
    tokens = torch.tensor(BATCHES[side])
    packing = Packing.of(tokens, PAD)
    left = packing.flush_left().unpack(packing.pack(tokens), fill=PAD)
    assert [[t for t in row if t != PAD] for row in left.tolist()] == \
        [[t for t in row if t != PAD] for row in tokens.tolist()]
    assert packing.flush_left().positions.tolist() == packing.positions.tolist()
    real = tokens.ne(PAD)
    assert torch.equal(packing.place(left)[real], tokens[real])


def test_followed_by_joins_sentence_by_sentence():
    first, second = Packing.of(torch.tensor(BATCHES["left"]), PAD), Packing.of_lengths([2, 3, 1])
    joint, order = first.followed_by(second)
    values = torch.cat((torch.arange(8), torch.arange(100, 106)))[order]
    assert values.tolist() == [0, 1, 2, 100, 101, 3, 102, 103, 104, 4, 5, 6, 7, 105]
    assert joint.cu_seqlens.tolist() == [0, 5, 9, 14]
    assert joint.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert joint.unpack(values)[1].tolist()[:4] == [3, 102, 103, 104]
