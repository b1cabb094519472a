"""Buckets are reduced once each, as soon as the products that fill them are there."""

from __future__ import annotations

import pytest
import torch

from lightseq_fairseq.plugin import gradient_reduction
from lightseq_fairseq.plugin.gradient_reduction import GradientReduction


class Work:
    def wait(self):
        self.waited = True


@pytest.fixture
def reduced(monkeypatch):
    """The ranges that were asked to be averaged, in order."""
    ranges = []

    def all_reduce(tensor, op, group, async_op):
        assert op == torch.distributed.ReduceOp.AVG and async_op
        ranges.append((tensor.storage_offset(), tensor.storage_offset() + tensor.numel()))
        return Work()

    monkeypatch.setattr(gradient_reduction.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(gradient_reduction, "_BUCKET_BYTES", 400)
    return ranges


def test_the_second_backward_pass_overlaps(reduced):
    param, grad = torch.zeros(400), torch.zeros(400)
    sizes = [60, 60, 40, 120, 100, 20]
    params, places = (list(flat.split(sizes)) for flat in (param, grad))
    reduction = GradientReduction(grad, params, places, None)
    a, b, c, d, e, f = params  # buckets: a b | c d | e | f
    order = [[f], [e], [d], [c, d], [b], [a]]

    def run():
        reduced.clear()
        reduction.begin()
        counts = []
        for written in order:
            reduction.written(written)
            counts.append(len(reduced))
        reduction.finish(late=[a])  # part of a's gradient comes last
        return counts

    assert run() == [0] * 6
    assert reduced == [(0, 120), (120, 280), (280, 380), (380, 400)]
    assert run() == [1, 2, 2, 3, 3, 3]
    assert reduced == [(380, 400), (280, 380), (120, 280), (0, 120)]
