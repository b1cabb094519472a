"""The k largest of each row, in two stages where rows are long."""

from __future__ import annotations

import torch
from torch import Tensor

LONG_ROW = 2048
"""Columns from which two stages win on CPU (measured: 32 x 28672, k = 8, 0.2 ms instead of 1.7; equal near 1000)."""
_CHUNK = 16
"""Elements of a chunk; 8 and 32 were slower at 28672 columns."""


def top_k(table: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, largest first: (..., V) -> values (..., k), columns (..., k) int64.

    As torch.topk, save that equal values may come in another order.
    """
    if table.device.type != "cpu" or table.size(-1) < max(LONG_ROW, _CHUNK * k):
        return torch.topk(table, k, dim=-1)
    return chunked_top_k(table, k, _CHUNK)


def chunked_top_k(table: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Only the k chunks of largest maximum can hold one of the k largest.

    Chunk j is every n-th column from j on, n = V // chunk, so that maxima are taken over contiguous runs; the
    columns left over at the end compete with the winners.
    """
    columns = table.size(-1)
    n = columns // chunk
    maxima = table[..., :n * chunk].view(*table.shape[:-1], chunk, n).amax(-2)  # (..., n)
    winners = maxima.topk(k, dim=-1, sorted=False)[1]  # (..., k)
    members = torch.arange(0, n * chunk, n, device=table.device)
    ids = (winners.unsqueeze(-1) + members).flatten(-2)  # (..., k * chunk)
    if n * chunk < columns:
        rest = torch.arange(n * chunk, columns, device=table.device)
        ids = torch.cat((ids, rest.expand(*ids.shape[:-1], -1)), dim=-1)
    values, places = table.gather(-1, ids).topk(k, dim=-1)
    return values, ids.gather(-1, places)
