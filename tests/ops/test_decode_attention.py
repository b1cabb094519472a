"""Attention of a decoding step against torch's over each beam's own history, gathered."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightseq_fairseq.ops.decode_attention import decode_cross_attention, decode_self_attention
from tests import tolerances

HEAD_DIMS = [8, 24, 64, 72, 128, 256]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def close(mine, want, dtype):
    """16 bits: the result is rounded once, so its error is that of one rounding."""
    bound = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert (mine.double() - want).abs().max() <= bound * max(1, want.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize(("beam", "most"), [(5, 33), (1, 100), (4, 200), (8, 70), (16, 66)], ids=str)
def test_self_attention(beam, most, dim, dtype, device):
    """Sentences that are at their first, second, last step and between."""
    heads, steps = 2, [0, 1, most // 3, most - 1]
    batch, draw = len(steps), torch.Generator().manual_seed(most * dim)
    qkv = torch.randn(batch * beam, 3, heads, dim, generator=draw)
    qkv[:, 0] *= 3 * dim**-0.5
    qkv = qkv.to(device, dtype)
    cache = torch.randn(2, batch, heads, most * beam, dim, generator=draw).to(device, dtype)
    ancestors = torch.randint(beam, (batch, beam, most), generator=draw, dtype=torch.uint8).to(device)
    for b, now in enumerate(steps):
        cache[:, b, :, now * beam:] = 100.0  # not written yet, and would be seen
    before = cache.clone()
    context = decode_self_attention(qkv, cache, ancestors, torch.tensor(steps, dtype=torch.int32, device=device))
    written = qkv.view(batch, beam, 3, heads, dim)[:, :, 1:].permute(2, 0, 3, 1, 4)  # (2, B, H, K, D)
    for b, now in enumerate(steps):
        own = slice(now * beam, (now + 1) * beam)
        before[:, b, :, own] = written[:, b]
        histories = [[p * beam + int(ancestors[b, k, p]) for p in range(now)] + [now * beam + k] for k in range(beam)]
        keys, values = cache[:, b][:, :, histories].double()  # (H, K, t, D) each
        q = qkv[b * beam:(b + 1) * beam, 0].double().transpose(0, 1).unsqueeze(2)  # (H, K, 1, D)
        want = F.scaled_dot_product_attention(q, keys, values, scale=1.0)[:, :, 0].transpose(0, 1)
        close(context[b * beam:(b + 1) * beam].view(beam, heads, dim), want, dtype)
    assert torch.equal(cache, before)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 64, 72])
@pytest.mark.parametrize(("beam", "most"), [(1, 20), (4, 70), (11, 9)], ids=str)
def test_self_attention_behind_a_text(beam, most, dim, dtype, apart, device):
    """Texts of one token, which is the first step's own, of none (a place that nobody takes) and of many."""
    heads, steps, lengths = 3, [0, most - 1, 2, 0, 5], [1, 40, 7, 0, 150]
    batch, draw = len(steps), torch.Generator().manual_seed(most * dim)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    qkv = torch.randn(batch * beam, 3, heads, dim, generator=draw)
    qkv[:, 0] *= 3 * dim**-0.5
    qkv = qkv.to(device, dtype)
    cache = torch.randn(2, batch, heads, most * beam, dim, generator=draw).to(device, dtype)
    before = torch.randn(bounds[-1] + 3, 2, heads, dim, generator=draw).to(device, dtype)
    ancestors = torch.randint(beam, (batch, beam, most), generator=draw, dtype=torch.uint8).to(device)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    if apart:
        cu_seqlens = cu_seqlens.unfold(0, 2, 1).contiguous()
    step = torch.tensor(steps, dtype=torch.int32, device=device)
    context = decode_self_attention(qkv, cache, ancestors, step, before, cu_seqlens)
    for b, now in enumerate(steps):
        text = before[bounds[b]:max(bounds[b + 1] - 1, bounds[b])].double().permute(1, 2, 0, 3)  # (2, H, S, D)
        for k in range(beam):
            history = [p * beam + int(ancestors[b, k, p]) for p in range(now)] + [now * beam + k]
            keys, values = torch.cat((text, cache[:, b][:, :, history].double()), 2)
            q = qkv[b * beam + k, 0].double().unsqueeze(1)  # (H, 1, D)
            want = F.scaled_dot_product_attention(q, keys, values, scale=1.0)[:, 0]
            close(context[b * beam + k].view(heads, dim), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("beam", [1, 2, 3, 4, 5, 11])
def test_cross_attention(beam, dim, dtype, device):
    heads, lengths = 3, [1, 0, 7, 33, 150] * (20 if beam == 4 and dim == 64 else 1)  # many sentences, few warps each
    draw = torch.Generator().manual_seed(beam * dim)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    keys_values = torch.randn(bounds[-1] + 3, 2, heads, dim, generator=draw).to(device, dtype)
    keys_values[bounds[-1]:] = torch.nan
    q = (torch.randn(len(lengths) * beam, heads * dim, generator=draw) * 3 * dim**-0.5).to(device, dtype)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    context = decode_cross_attention(q, keys_values, cu_seqlens, beam)
    apart = torch.stack((cu_seqlens[:-1], cu_seqlens[1:]), 1).flip(0).contiguous()  # in any order
    backwards = q.view(-1, beam, heads * dim).flip(0).reshape(q.shape)
    turned = decode_cross_attention(backwards, keys_values, apart, beam)
    assert torch.equal(turned.view(-1, beam, heads * dim).flip(0).reshape(q.shape), context)
    for b, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        own = slice(b * beam, (b + 1) * beam)
        if first == last:
            assert not context[own].any()
            continue
        keys, values = keys_values[first:last].double().permute(1, 2, 0, 3)  # (H, S, D) each
        rows = q[own].double().view(beam, heads, dim).transpose(0, 1)
        want = F.scaled_dot_product_attention(rows, keys, values, scale=1.0).transpose(0, 1).flatten(1)
        close(context[own], want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [24, 64, 72, 128])
@pytest.mark.parametrize(("sentences", "heads", "lengths"), [
    (130, 8, [1, 0, 7, 33]), (20, 16, [300, 0, 1, 150, 70]), (70, 16, [100, 64, 0, 130]), (100, 16, [61, 129])],
    ids=str)
def test_cross_attention_of_many_heads(sentences, heads, lengths, dim, dtype, device):
    """Heads of one beam are read side by side where there are many; three heads, as above, never were."""
    lengths = (lengths * sentences)[:sentences]
    draw = torch.Generator().manual_seed(sentences * dim)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    keys_values = torch.randn(bounds[-1] + 3, 2, heads, dim, generator=draw).to(device, dtype)
    keys_values[bounds[-1]:] = torch.nan
    q = (torch.randn(sentences, heads * dim, generator=draw) * 3 * dim**-0.5).to(device, dtype)
    context = decode_cross_attention(q, keys_values, torch.tensor(bounds, dtype=torch.int32, device=device), 1)
    for own, first, last in zip(range(sentences), bounds, bounds[1:], strict=False):
        if first == last:
            assert not context[own].any()
            continue
        keys, values = keys_values[first:last].double().permute(1, 2, 0, 3)  # (H, S, D) each
        want = F.scaled_dot_product_attention(q[own].double().view(heads, 1, dim), keys, values, scale=1.0)
        close(context[own].view(heads, 1, dim), want, dtype)


def test_large_scores(device):
    """exp(score) would overflow, its difference from the largest does not."""
    qkv = torch.full((2, 3, 1, 8), 40.0, device=device)
    cache, ancestors = torch.zeros(2, 1, 1, 8, 8, device=device), torch.zeros(1, 2, 4, dtype=torch.uint8, device=device)
    context = decode_self_attention(qkv, cache, ancestors, torch.ones(1, dtype=torch.int32, device=device))
    torch.testing.assert_close(context, torch.full_like(context, 40.0), **tolerances.OP[torch.float32])


def test_what_does_not_fit_is_named(device):
    step = torch.zeros(2, dtype=torch.int32, device=device)
    ancestors = torch.zeros(2, 3, 4, dtype=torch.uint8, device=device)
    qkv = torch.zeros(6, 3, 2, 8, device=device)
    with pytest.raises(ValueError, match=r"cache must have shape \(2, 2, 2, 12, 8\)"):
        decode_self_attention(qkv, torch.zeros(2, 2, 2, 11, 8, device=device), ancestors, step)
    with pytest.raises(ValueError, match="multiple of 8 up to 256, got 12"):
        decode_self_attention(torch.zeros(6, 3, 2, 12, device=device), torch.zeros(2, 2, 2, 12, 12, device=device),
                              ancestors, step)
    with pytest.raises(ValueError, match=r"q must have shape \(6, 16\)"):
        decode_cross_attention(torch.zeros(5, 16, device=device), torch.zeros(9, 2, 2, 8, device=device),
                               torch.tensor([0, 4, 9], dtype=torch.int32, device=device), 3)
    cache = torch.zeros(2, 2, 2, 12, 8, device=device)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="before and cu_seqlens need each other"):
        decode_self_attention(qkv, cache, ancestors, step, None, bounds)
    with pytest.raises(ValueError, match=r"before must be \(N, 2, 2, 8\).* cu_seqlens must be \(3,\) or"):
        decode_self_attention(qkv, cache, ancestors, step, torch.zeros(9, 2, 3, 8, device=device), bounds[:2])


def test_contract(device):
    if device.type == "cpu":
        step = torch.ones(2, dtype=torch.int32)
        torch.library.opcheck(torch.ops.lightseq.decode_self_attention.default, (
            torch.randn(6, 3, 2, 8), torch.randn(2, 2, 2, 12, 8), torch.zeros(2, 3, 4, dtype=torch.uint8), step))
        torch.library.opcheck(torch.ops.lightseq.decode_self_attention.default, (
            torch.randn(6, 3, 2, 8), torch.randn(2, 2, 2, 12, 8), torch.zeros(2, 3, 4, dtype=torch.uint8), step,
            torch.randn(9, 2, 2, 8), torch.tensor([0, 4, 9], dtype=torch.int32)))
        torch.library.opcheck(torch.ops.lightseq.decode_cross_attention.default, (
            torch.randn(6, 16), torch.randn(9, 2, 2, 8), torch.tensor([0, 4, 9], dtype=torch.int32), 3))
