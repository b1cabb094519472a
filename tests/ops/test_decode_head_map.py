"""Maps of each head against the same in fp64."""

from __future__ import annotations

import pytest
import torch

from lightseq_fairseq.ops.decode_attention import decode_cross_attention
from lightseq_fairseq.ops.decode_head_map import decode_head_map
from tests import tolerances


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "heads", "dim", "outer"), [
    (1, 16, 64, 1024), (67, 12, 64, 768), (128, 8, 64, 512), (300, 3, 64, 64), (5, 4, 32, 96),
    (9, 2, 64, 100)], ids=str)
def test_as_a_product_of_each_head(rows, heads, dim, outer, dtype, device):
    draw = torch.Generator().manual_seed(rows + outer)
    x = torch.randn(rows, heads * dim, generator=draw).to(device, dtype)
    weight = (torch.randn(heads, dim, outer, generator=draw) * dim**-0.5).to(device, dtype)
    out = decode_head_map(x, weight)
    want = torch.einsum("rhd,hdo->rho", x.double().view(rows, heads, dim), weight.double())
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, **tolerances.OP[dtype])


def test_between_others(device):
    """Launched early, it waits for what it reads, and those behind it for what it writes. Every turn counts: at a fixed
    point nobody could tell whether one had read what the turn before had left."""
    kind, heads, rows = torch.float16 if device.type == "cuda" else torch.float32, 8, 70
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(heads, 64, 64, generator=draw).to(device, kind)
    source = torch.randn(rows * 9, 2, heads, 64, generator=draw).to(device, kind)
    cu_seqlens = torch.arange(0, rows * 9 + 1, 9, dtype=torch.int32, device=device)
    x = torch.randn(rows, heads * 64, generator=draw).to(device, kind)

    def run(pause):
        turns = [x]
        for _ in range(30):
            mapped = decode_head_map(turns[-1], weight).flatten(1)
            if pause and device.type == "cuda":
                torch.cuda.synchronize()
            turns += [mapped, decode_cross_attention(mapped, source, cu_seqlens, 1)]
        return turns
    turns = run(False)
    assert all(torch.equal(one, other) for one, other in zip(turns, run(True), strict=True))
    assert all((one - other).abs().max() > 0.1 for one, other in zip(turns[2:-2:2], turns[4::2], strict=True))


def test_what_does_not_fit_is_named(device):
    weight = torch.zeros(2, 64, 128, device=device)
    with pytest.raises(ValueError, match=r"x must be \(R, 128\), got \(3, 64\)"):
        decode_head_map(torch.zeros(3, 64, device=device), weight)
    with pytest.raises(ValueError, match=r"weight must be \(H, D, O\), got \(128, 128\)"):
        decode_head_map(torch.zeros(3, 128, device=device), weight.view(128, 128))
    with pytest.raises(ValueError, match=r"weight must be torch.float16 as x is, got torch.float32"):
        decode_head_map(torch.zeros(3, 128, device=device, dtype=torch.float16), weight)


def test_contract(device):
    if device.type == "cpu":
        torch.library.opcheck(torch.ops.lightseq.decode_head_map.default, (torch.randn(3, 24), torch.randn(2, 12, 8)))
