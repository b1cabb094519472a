"""Which elements a seed drops: Philox as published, the same mask in every op, the share that p asks for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightseq_fairseq import ops
from lightseq_fairseq.ops import _dropout
from tests.ops.dropout_masks import multiplier, new_seed, philox

KNOWN = [  # counter, key, words: the vectors published with Random123
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize("counter,key,words", KNOWN)
def test_the_generator_these_tests_compare_with_is_philox(counter, key, words):
    assert tuple(philox(np.array([counter], dtype=np.uint64), key)[0]) == words


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (65, 40), (257, 512)], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_ops_draw_the_mask_of_their_seed(shape, p, device):
    seed = new_seed(device)
    zero = torch.zeros(shape, device=device)
    y = ops.bias_dropout_residual(zero + 1, torch.zeros(shape[1], device=device), zero, p, seed)
    torch.testing.assert_close(y.double(), multiplier(shape, p, seed), rtol=1e-6, atol=0)


def test_shares_and_neighbours(device):
    """The share of kept elements, and that neighbours and seeds have nothing to do with each other."""
    shape, p = (1000, 1000), 0.3
    seeds = [torch.tensor([value], device=device) for value in (0, 1, 1 << 32)]
    zero = torch.zeros(shape, device=device)
    kept = [ops.bias_dropout_residual(zero + 1, zero[0], zero, p, seed) > 0 for seed in seeds]
    for mask in kept:
        assert abs(mask.double().mean().item() - 0.7) < 0.003
        assert abs((mask[:, 1:] & mask[:, :-1]).double().mean().item() - 0.49) < 0.003
        assert abs((mask[1:] & mask[:-1]).double().mean().item() - 0.49) < 0.003
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs((kept[one] & kept[other]).double().mean().item() - 0.49) < 0.003


def test_ends_of_the_range_of_p(device):
    x, seed = torch.ones(3, 16, device=device), new_seed(device)
    zero = torch.zeros_like(x)
    assert torch.equal(ops.bias_dropout_residual(x, zero[0], zero, 0.0), x)
    assert torch.equal(ops.bias_dropout_residual(x, zero[0], zero, 1e-9, seed), x)
    assert torch.equal(ops.bias_dropout_residual(x, zero[0], zero, 1.0, seed), zero)
    assert _dropout.threshold(0.5) == 32768 and _dropout.scale(0.5) == 2 and _dropout.scale(1.0) == 0


def test_what_is_wrong_with_p_and_seed_is_said():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\], got 1.5; seed must be given where p is not 0"):
        ops.bias_dropout_residual(x, x[0], x, 1.5)
    with pytest.raises(ValueError, match=r"seed must be \(1,\) int64 on cpu, got \(\) torch.int64 on cpu"):
        ops.bias_dropout_residual(x, x[0], x, 0.5, torch.tensor(3))
