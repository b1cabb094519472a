"""The compiled encoder and decoder do what the layers do, in every instruction set that this machine has."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from lightseq_fairseq.layers import Packing
from lightseq_fairseq.layers.compiled import CompiledDecoder, CompiledEncoder
from lightseq_fairseq.layers.incremental import IncrementalDecoder
from lightseq_fairseq.ops import cpu
from tests import tolerances
from tests.layers.test_incremental import BASE, LENGTHS, build_config, check_steps, sources

SIZES = dataclasses.replace(  # 3 heads of 16; no size but the heads' is a multiple of a panel of 32 columns
    BASE, encoder_embed_dim=48, decoder_embed_dim=48, encoder_ffn_embed_dim=80, decoder_ffn_embed_dim=112,
    encoder_attention_heads=3, decoder_attention_heads=3)
CONFIGS = {
    "post-LN": {},
    "pre-LN": dict(encoder_normalize_before=True, decoder_normalize_before=True),
    "embedding norm, learned": dict(layernorm_embedding=True, decoder_positions="learned"),
    "no positions": dict(decoder_positions="none", encoder_positions="none", no_scale_embedding=True),
    "no cross": dict(no_cross_attention=True),
    "output bias, other widths": dict(output_bias=True, encoder_embed_dim=32, encoder_attention_heads=2),
}


@pytest.fixture(autouse=True)
def compiled():
    assert cpu.compiled_operators() is not None, "the compiled CPU operators do not load; see the warning above"


def build(name):
    return build_config(dataclasses.replace(SIZES, **CONFIGS[name]))


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_encoder_is_its_layers(name, lanes):
    encoder, _ = build(name)
    tokens, packing = sources(encoder.config)
    assert CompiledEncoder.serves(encoder)
    torch.testing.assert_close(CompiledEncoder(encoder, lanes)(tokens, packing), encoder.encode(tokens, packing),
                               **tolerances.LAYER)


@torch.no_grad()
def test_encoder_takes_many_sentences_and_a_long_one():
    """More rows than go through at once, and more keys than any vector."""
    encoder, _ = build("pre-LN")
    packing = Packing.of_lengths([3, 200, 1, *[7] * 40])
    tokens = torch.randint(4, encoder.config.src_vocab_size, (packing.positions.numel(),))
    torch.testing.assert_close(CompiledEncoder(encoder)(tokens, packing), encoder.encode(tokens, packing),
                               **tolerances.LAYER)


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_steps_equal_the_whole(name, beam, lanes, monkeypatch):
    monkeypatch.setattr("lightseq_fairseq.layers.compiled._FIRST_CAPACITY", 2)  # the cache must grow on the way
    encoder, decoder = build(name)
    tokens, packing = sources(encoder.config)
    assert CompiledDecoder.serves(decoder)
    check_steps(CompiledDecoder(decoder, lanes), decoder, encoder.encode(tokens, packing), packing, beam)


@torch.no_grad()
def test_many_rows_are_the_uncompiled_decoder_s():
    """Several blocks of rows, and a last one that is smaller."""
    encoder, decoder = build("pre-LN")
    packing = Packing.of_lengths([1 + i % 9 for i in range(77)])
    source = encoder.encode(torch.randint(4, 31, (packing.positions.numel(),)), packing)
    compiled, plain = CompiledDecoder(decoder), IncrementalDecoder(decoder)
    states = [model.start(source, packing, 77, 4) for model in (compiled, plain)]
    for step in range(4):
        tokens = torch.randint(4, 37, (77, 4 if step else 1))
        parents = torch.randint(0, tokens.size(1), (77, 4))
        logits = [model.next_logits(state, tokens).view(77, -1, 37)
                  for model, state in zip((compiled, plain), states, strict=True)]
        torch.testing.assert_close(*logits, **tolerances.LAYER)
        for state in states:
            state.reorder(parents)


@torch.no_grad()
def test_attention_is_the_last_layers_mean_over_heads():
    encoder, decoder = build("post-LN")
    tokens, packing = sources(encoder.config)
    source = encoder.encode(tokens, packing)
    compiled = CompiledDecoder(decoder)
    state = compiled.start(source, packing, len(LENGTHS), beam=2)
    first = torch.tensor([[4], [5], [6], [7]])
    compiled.next_logits(state, first, need_attention=True)
    _, expected = decoder.decode(first.flatten(), Packing.of_lengths([1] * 4), source, packing,
                                 weights_of_layer=len(decoder.layers) - 1)
    torch.testing.assert_close(state.attention, expected.mean(1), **tolerances.LAYER)


@pytest.mark.parametrize("changes", [
    dict(activation_fn="gelu"), dict(decoder_ffn_embed_dim=40), dict(decoder_attention_heads=6),
    dict(cross_self_attention=True), dict(decoder_input_dim=16)],
    ids=lambda changes: next(iter(changes)))
def test_other_decoders_are_left_to_pytorch(changes):
    _, decoder = build_config(dataclasses.replace(SIZES, **changes))
    assert not CompiledDecoder.serves(decoder)


def test_many_threads_share_the_gemms_of_a_large_model(monkeypatch):
    encoder, decoder = build_config(dataclasses.replace(SIZES, tgt_vocab_size=200_000))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert CompiledEncoder.serves(encoder) and not CompiledDecoder.serves(decoder)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert CompiledDecoder.serves(decoder)


def test_other_types_are_left_to_pytorch():
    encoder, decoder = build("post-LN")
    assert not CompiledDecoder.serves(decoder.double()) and not CompiledEncoder.serves(encoder.bfloat16())


FALLBACK = """
import logging, os, sys, torch
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from lightseq_fairseq import _build
_build.built_library = lambda *args: None
os.environ["CXX"] = "no-such-compiler"
from lightseq_fairseq.ops import cpu
print(cpu.compiled_operators(), cpu.compiled_operators())
"""


def test_without_a_compiler_one_line_says_so():
    said = subprocess.run([sys.executable, "-c", FALLBACK], capture_output=True, text=True, check=True).stdout
    warning, found = said.splitlines()
    assert found == "None None"
    assert "not in use" in warning and "no-such-compiler" in warning and "plain PyTorch does their work" in warning
