"""Packed attention is softmax(q k^T / sqrt(D)) v sentence by sentence, whatever else is in the batch."""

from __future__ import annotations

import math

import pytest
import torch

from lightseq_fairseq import ops
from tests import tolerances

CASES = [  # query lengths, key lengths, heads, head size
    ([1], [1], 1, 1),
    ([5, 1, 7], [5, 1, 7], 2, 8),
    ([3, 3], [3, 3], 4, 16),
    ([1, 1, 1, 1], [9, 2, 33, 5], 3, 7),
    ([4, 6, 1], [6, 6, 13], 2, 65),
]


def cumulative(lengths, device):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def one_by_one(q, k, v, q_lens, k_lens, causal):
    """The definition, a sentence at a time, in fp64."""
    outs = []
    for qs, ks, vs in zip(q.double().split(q_lens), k.double().split(k_lens), v.double().split(k_lens), strict=True):
        scores = torch.einsum("ihd,jhd->hij", qs, ks) / math.sqrt(q.size(-1))
        if causal:
            ahead = ks.size(0) - qs.size(0)
            hidden = torch.ones(qs.size(0), ks.size(0), device=q.device).triu(1 + ahead).bool()
            scores = scores.masked_fill(hidden, float("-inf"))
        outs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), vs))
    return torch.cat(outs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("q_lens,k_lens,heads,dim", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_and_backward(q_lens, k_lens, heads, dim, causal, dtype, device):
    q, k, v = (torch.randn(sum(n), heads, dim, dtype=dtype, device=device, requires_grad=True)
               for n in (q_lens, k_lens, k_lens))
    out = ops.attention(q, k, v, cumulative(q_lens, device), cumulative(k_lens, device), max(q_lens), max(k_lens) + 2,
                        causal)
    expected = one_by_one(q, k, v, q_lens, k_lens, causal)
    torch.testing.assert_close(out.double(), expected, **tolerances.OP[dtype])
    probe = torch.randn_like(out)
    grads = torch.autograd.grad((out * probe).sum(), (q, k, v))
    expected_grads = torch.autograd.grad((expected * probe).sum(), (q, k, v))
    for grad, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, other.to(dtype), **tolerances.OP[dtype])


def test_a_sentence_without_tokens_harms_no_other():
    q, k, v = (torch.randn(n, 2, 4, requires_grad=True) for n in (3, 4, 4))
    out = ops.attention(q, k, v, cumulative([3, 0], "cpu"), cumulative([4, 0], "cpu"), 3, 4)
    out.sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))
    torch.testing.assert_close(out.double(), one_by_one(q, k, v, [3], [4], False), **tolerances.OP[torch.float32])


def test_dropout_keeps_the_expected_share():
    q, k, v = (torch.randn(64, 2, 8) for _ in range(3))
    ones = torch.ones_like(v)
    lens = cumulative([64], "cpu")
    out = torch.stack([ops.attention(q, k, ones, lens, lens, 64, 64, dropout_p=0.25) for _ in range(64)])
    assert abs(out.mean().item() - 1.0) < 0.01  # scaled by 1 / (1 - p), so the mean stays
    assert out.std() > 0.01


@pytest.mark.parametrize("causal", [False, True])
def test_weights_are_the_softmax_that_attention_uses(causal):
    q_lens, k_lens = [4, 6, 1], [6, 6, 13]
    q, k = torch.randn(11, 2, 8), torch.randn(25, 2, 8)
    one_hot = torch.cat([torch.eye(13)[:n] for n in k_lens])[:, None].expand(-1, 2, -1)  # o then is the weights
    lens = cumulative(q_lens, "cpu"), cumulative(k_lens, "cpu")
    weights = ops.attention_weights(q, k, *lens, 6, 13, causal)
    out = ops.attention(q, k, one_hot.contiguous(), *lens, 6, 13, causal)
    for index, (n, rows) in enumerate(zip(q_lens, out.split(q_lens), strict=True)):
        torch.testing.assert_close(weights[index, :, :n].transpose(0, 1), rows, **tolerances.OP[torch.float32])
