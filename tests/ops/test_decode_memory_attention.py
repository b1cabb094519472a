"""Attention over rows that are keys and values at once against torch's, and as cross-attention's other form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightseq_fairseq.ops.decode_attention import decode_cross_attention
from lightseq_fairseq.ops.decode_memory_attention import WIDTHS, decode_memory_attention
from tests import tolerances

LENGTHS = {"a block each": [1, 0, 7, 33, 32, 64, 150] * 20, "two": [300, 1, 0, 64, 97, 400] * 8,
           "four": [300, 1, 0, 64, 97, 400, 129] * 4, "eight": [700, 31, 0]}


@pytest.fixture(autouse=True)
def kernel_for_this_gpu(device):
    if device.type == "cuda" and torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("the kernel is for compute capability 9.0")


def draw(lengths, heads, width, dtype, device):
    """q with scores of some spread, memory with something behind it that is not to be read, and cu_seqlens."""
    draw = torch.Generator().manual_seed(len(lengths) * width + heads)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    memory = torch.randn(bounds[-1] + 3, width, generator=draw).to(device, dtype)
    memory[bounds[-1]:] = torch.nan
    q = (torch.randn(len(lengths), heads, width, generator=draw) * 3 * width**-0.5).to(device, dtype)
    return q, memory, torch.tensor(bounds, dtype=torch.int32, device=device), bounds


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "width"), [(16, 1024), (12, 768), (8, 512), (5, 1024), (16, 512), (24, 768)],
                         ids=str)
@pytest.mark.parametrize("blocks", LENGTHS)
def test_as_torchs(blocks, heads, width, dtype, device):
    q, memory, cu_seqlens, bounds = draw(LENGTHS[blocks], heads, width, dtype, device)
    context = decode_memory_attention(q, memory, cu_seqlens)
    apart = torch.stack((cu_seqlens[:-1], cu_seqlens[1:]), 1).flip(0).contiguous()  # in any order
    assert torch.equal(decode_memory_attention(q.flip(0), memory, apart).flip(0), context)
    for b, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if first == last:
            assert not context[b].any()
            continue
        rows = memory[first:last].double()
        want = F.scaled_dot_product_attention(q[b].double(), rows, rows, scale=1.0)
        # the probabilities are rounded, and then the result
        assert (context[b].double() - want).abs().max() <= 2 * torch.finfo(dtype).eps * max(1, want.abs().max().item())


def test_is_cross_attention(device):
    """With the maps of keys and values, biases included, moved over to the query and the context."""
    heads, dim, width, kind = 8, 64, 512, torch.float16 if device.type == "cuda" else torch.float64
    lengths = [5, 40, 1]
    draw = torch.Generator().manual_seed(3)
    maps = [torch.randn(heads * dim, width, generator=draw) * width**-0.5 for _ in "kv"]
    biases = [torch.randn(heads * dim, generator=draw) for _ in "kv"]
    memory, q = torch.randn(sum(lengths), width, generator=draw), torch.randn(3, heads * dim, generator=draw) * 0.2
    cu_seqlens = torch.tensor([0, 5, 45, 46], dtype=torch.int32, device=device)
    keys_values = torch.stack([F.linear(memory.double(), w.double(), b.double()) for w, b in
                               zip(maps, biases, strict=True)], 1).view(-1, 2, heads, dim)
    want = decode_cross_attention(q.double(), keys_values, cu_seqlens.cpu(), 1)
    k, v = (w.view(heads, dim, width).to(device, kind) for w in maps)
    absorbed = torch.einsum("bhd,hdc->bhc", q.view(3, heads, dim).to(device, kind), k)
    context = decode_memory_attention(absorbed, memory.to(device, kind), cu_seqlens)
    mine = torch.einsum("bhc,hdc->bhd", context, v).flatten(1).cpu().double() + biases[1]
    torch.testing.assert_close(mine, want, **tolerances.OP[kind])


def test_large_scores(device):
    """exp(score) would overflow, its difference from the largest does not."""
    kind = torch.float16 if device.type == "cuda" else torch.float32
    memory = torch.full((40, 512), 8.0, device=device, dtype=kind)
    bounds = torch.tensor([0, 40], dtype=torch.int32, device=device)
    context = decode_memory_attention(memory[:3].unsqueeze(0), memory, bounds)
    torch.testing.assert_close(context, memory[:3].unsqueeze(0), **tolerances.OP[kind])


def test_what_does_not_fit_is_named(device):
    memory = torch.zeros(9, 512, device=device, dtype=torch.float16)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"q must have shape \(2, 3, 512\), got \(3, 3, 512\)"):
        decode_memory_attention(torch.zeros(3, 3, 512, device=device, dtype=torch.float16), memory, bounds)
    with pytest.raises(ValueError, match="q must be torch.float16 as memory is"):
        decode_memory_attention(torch.zeros(2, 3, 512, device=device), memory, bounds)
    if device.type == "cuda":
        with pytest.raises(ValueError, match=f"{WIDTHS[0]}, .* columns in 16 bits .* got 520 of torch.float32"):
            decode_memory_attention(torch.zeros(2, 3, 520, device=device), torch.zeros(9, 520, device=device), bounds)
