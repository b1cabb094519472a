"""An encoder's few rows through sublayers that leave sums and moments are its many rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from lightseq_fairseq.layers import Packing
from lightseq_fairseq.layers import inference as inference_module
from lightseq_fairseq.layers import sublayers as sublayers_module
from lightseq_fairseq.layers.inference import InferenceEncoder
from lightseq_fairseq.layers.sublayers import InferenceNorm, Stream, Sublayers
from lightseq_fairseq.ops import InferenceLinear
from lightseq_fairseq.ops.decode_linear import MAX_ROWS
from tests import tolerances
from tests.layers.test_incremental import BASE, build_config

SIZES = dataclasses.replace(BASE, encoder_embed_dim=48, encoder_ffn_embed_dim=80, encoder_attention_heads=3)
CONFIGS = {
    "post-LN": {},
    "pre-LN": dict(encoder_normalize_before=True),
    "pre-LN, gelu": dict(encoder_normalize_before=True, activation_fn="gelu"),
    "embedding norm": dict(layernorm_embedding=True, activation_fn="swish"),
}


def build(name, dtype, device):
    encoder, _ = build_config(dataclasses.replace(SIZES, **CONFIGS[name]))
    return encoder.to(device, dtype)


def given(lengths, device):
    packing = Packing.of_lengths(lengths)
    tokens = torch.randint(4, SIZES.src_vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    return tokens.to(device), Packing(None, packing.cu_seqlens.to(device), packing.positions.to(device),
                                      len(lengths), max(lengths))


@pytest.fixture
def few(monkeypatch):
    """How many times the few rows' way was taken."""
    taken, real = [], inference_module._read_few
    monkeypatch.setattr(inference_module, "_read_few", lambda *args: taken.append(1) or real(*args))
    return taken


@pytest.mark.parametrize("lengths", [[1], [5, 1, 9], [17, 3, 30]], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_formulas(name, lengths, few):
    """In fp64, but for the moments, which are fp32."""
    encoder = build(name, torch.float64, "cpu")
    tokens, packing = given(lengths, "cpu")
    inference = InferenceEncoder(encoder)
    assert inference.sublayers is None  # on the CPU other kernels are faster
    inference.sublayers = Sublayers(encoder.config.encoder_normalize_before)
    for _ in range(2):  # the folded weights are made once
        torch.testing.assert_close(inference(tokens, packing), encoder.encode(tokens, packing), rtol=1e-5, atol=1e-5)
    assert len(few) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_kernels(name, dtype, device, few):
    """As far from fp64 as the many rows' way, within a factor."""
    if device.type == "cpu":
        pytest.skip("few rows are for GPUs; run with --device cuda")
    lengths = [17, 3, 30]
    encoder = build(name, torch.float64, "cpu")
    exact = encoder.encode(*given(lengths, "cpu")).to(device)  # kernels have no fp64
    tokens, packing = given(lengths, device)
    inference = InferenceEncoder(encoder.to(device, dtype))
    error = (inference(tokens, packing).double() - exact).abs().max()
    inference.sublayers, taken = None, len(few)
    assert taken == 1
    assert error <= 2 * (inference(tokens, packing).double() - exact).abs().max()


@torch.no_grad()
def test_many_rows_take_torchs_products(few):
    encoder = build("post-LN", torch.float64, "cpu")
    inference = InferenceEncoder(encoder)
    inference.sublayers = Sublayers(False)
    inference(*given([MAX_ROWS, 1], "cpu"))
    assert not few


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pre", [True, False])
@pytest.mark.parametrize(("rows", "inner", "outer", "parts"), [
    (65, 4096, 1024, 4), (64, 4096, 1024, 8), (130, 1024, 520, 2), (500, 2048, 512, 2), (600, 4096, 1024, 1),
    (300, 1024, 1024, 1), (128, 768, 768, 1)], ids=str)
@torch.no_grad()
def test_products_in_parts(rows, inner, outer, parts, pre, dtype, device):
    """Parts are fp32 and added up where the norm is made: nothing is rounded on the way."""
    if device.type == "cpu":
        pytest.skip("products are made in parts on GPUs; run with --device cuda")
    draw = torch.Generator().manual_seed(rows)

    def normal(*size, scale=1.0):
        return (torch.randn(*size, generator=draw) * scale).to(device, dtype)

    x, total = normal(rows, inner), normal(rows, outer)
    linear = InferenceLinear(normal(outer, inner, scale=inner**-0.5), normal(outer))
    norms = [torch.nn.LayerNorm(outer).to(device, dtype) for _ in range(2)]
    for norm in norms:
        norm.weight.copy_(1 + normal(outer, scale=0.1))
        norm.bias.copy_(normal(outer))
    made = sublayers_module._parts(x, linear.weight)
    assert (1 if made is None else made.size(0)) == parts
    stream = Stream(total, InferenceNorm(norms[0]))
    joined = Sublayers(pre).join(x, linear, stream, InferenceNorm(norms[1]))
    residual = total if pre else stream.normed
    want = residual.double() + F.linear(x.double(), linear.weight.double(), linear.bias.double())
    torch.testing.assert_close(joined.sum.double(), want, **tolerances.OP[dtype])
    want = F.layer_norm(joined.sum.double(), (outer,), norms[1].weight.double(), norms[1].bias.double(), norms[1].eps)
    torch.testing.assert_close(joined.normed.double(), want, **tolerances.OP[dtype])
