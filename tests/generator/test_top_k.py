"""Two-stage top-k is torch.topk."""

import pytest
import torch

from lightseq_fairseq.generator.top_k import chunked_top_k, top_k


@pytest.mark.parametrize("shape", [(3, 2048), (1, 5, 4099), (2, 3, 28672)])
@pytest.mark.parametrize("k", [1, 2, 10, 101])
def test_matches_torch(shape, k):
    table = torch.randn(shape)
    values, columns = top_k(table, k)
    expected = torch.topk(table, k)
    assert torch.equal(values, expected.values) and torch.equal(columns, expected.indices)


@pytest.mark.parametrize("columns, k, chunk", [(7, 2, 3), (8, 2, 4), (13, 3, 4), (64, 4, 16)])
def test_chunks_of_every_fit(columns, k, chunk):
    table = torch.stack([torch.randperm(columns).float() for _ in range(50)])
    values, found = chunked_top_k(table, k, chunk)
    assert torch.equal(values, table.topk(k).values) and torch.equal(table.gather(1, found), values)


def test_winners_that_share_a_chunk_or_are_left_over_at_the_end():
    table = torch.zeros(1, 2050)
    table[0, [0, 128, 2049]] = torch.tensor([3.0, 2.0, 1.0])  # 0 and 128 lie in one chunk, 2049 in none
    values, columns = top_k(table, 3)
    assert columns.tolist() == [[0, 128, 2049]] and values.tolist() == [[3.0, 2.0, 1.0]]


def test_equal_values_and_minus_infinity_are_each_found_once():
    table = torch.full((2, 3000), -torch.inf)
    table[:, 1500:1508] = 1.0
    values, columns = top_k(table, 10)
    assert values.tolist() == [[1.0] * 8 + [-torch.inf] * 2] * 2
    assert all(len(set(row)) == 10 for row in columns.tolist())


def test_rows_of_a_strided_view():
    table = torch.randn(4, 6, 4096)
    assert torch.equal(top_k(table[:, 1::2], 5)[1], table[:, 1::2].topk(5).indices)
