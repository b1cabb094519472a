"""Position tables: fairseq's rows, and tables that begin elsewhere."""

from __future__ import annotations

import math
import weakref

import pytest
import torch

from lightseq_fairseq.layers.embedding import PositionalEmbedding


@pytest.mark.parametrize("offset", [None, 0, 1, 2, 5])
def test_sinusoids_of_every_token_are_there(offset):
    """The row of the padding is 0 only where it is no token's."""
    positions = PositionalEmbedding(7, 12, pad=1, learned=False, offset=offset)
    first = 2 if offset is None else offset
    table = positions.upto(7, torch.zeros(1))
    rows = positions.rows(torch.arange(7))
    assert rows.tolist() == list(range(first, first + 7))
    frequencies = torch.exp(torch.arange(6) * -(math.log(10000) / 5))
    angles = rows[:, None] * frequencies
    torch.testing.assert_close(table[rows], torch.cat((angles.sin(), angles.cos()), 1))
    if first > 1:
        assert not table[1].any()


def test_a_table_shorter_than_the_padding_s_row():
    positions = PositionalEmbedding(3, 4, pad=50, learned=False, offset=0)
    assert positions.upto(3, torch.zeros(1)).shape == (3, 4)


def test_graphs_go_on_reading_the_table_they_were_captured_with():
    """A longer sentence used to free it, unnoticed while nobody else's tensors came to lie in its place."""
    positions = PositionalEmbedding(7, 12, pad=1, learned=False)
    kept = weakref.ref(positions.upto(5, torch.zeros(1)))
    rows = kept()[:7].clone()
    longer = positions.upto(50, torch.zeros(1))
    assert longer is not kept() and torch.equal(longer[:7], rows)
    assert kept() is not None and torch.equal(kept()[:7], rows)
