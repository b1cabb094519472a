"""Decoding token by token gives what the whole sentence at once gives, for every beam's own history."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lightseq_fairseq.config import TransformerConfig
from lightseq_fairseq.layers import Packing, TransformerDecoder, TransformerEncoder
from lightseq_fairseq.layers.embedding import token_embedding
from lightseq_fairseq.layers.incremental import IncrementalDecoder
from lightseq_fairseq.layers.inference import InferenceEncoder
from lightseq_fairseq.ops.linear import has_int8
from tests import tolerances
from tests.conftest import scramble

BASE = TransformerConfig(
    src_vocab_size=31, tgt_vocab_size=37, encoder_layers=2, decoder_layers=3, encoder_embed_dim=20,
    decoder_embed_dim=24, encoder_ffn_embed_dim=28, decoder_ffn_embed_dim=44, encoder_attention_heads=2,
    decoder_attention_heads=3)
CONFIGS = {
    "post-LN": {},
    "pre-LN": dict(encoder_normalize_before=True, decoder_normalize_before=True),
    "embedding norm, learned": dict(layernorm_embedding=True, decoder_positions="learned"),
    "no positions": dict(decoder_positions="none", encoder_positions="none"),
    "cross+self": dict(cross_self_attention=True, encoder_embed_dim=24),
    "cross+self alone": dict(cross_self_attention=True, no_cross_attention=True, encoder_embed_dim=24),
    "no cross": dict(no_cross_attention=True),
    "projections": dict(decoder_input_dim=16, decoder_output_dim=12, activation_fn="gelu"),
    "output bias": dict(output_bias=True, activation_fn="swish"),
}
LENGTHS = [5, 1, 9, 5]


def build(name):
    return build_config(dataclasses.replace(BASE, **CONFIGS[name]))


def build_config(config):
    encoder = TransformerEncoder(config, token_embedding(config.src_vocab_size, config.encoder_embed_dim, 1))
    decoder = TransformerDecoder(config, token_embedding(config.tgt_vocab_size, config.input_dim, 1))
    return scramble(encoder.eval()), scramble(decoder.eval())


def sources(config):
    packing = Packing.of_lengths(LENGTHS)
    return torch.randint(4, config.src_vocab_size, (sum(LENGTHS),)), packing


@torch.no_grad()
def whole(decoder, history, source, source_packing):
    """Logits of the last position of each sentence's history, teacher-forced."""
    packing = Packing.of_lengths([len(h) for h in history])
    features, _ = decoder.decode(torch.cat(history), packing, source, source_packing)
    return decoder.output_projection(features[packing.cu_seqlens[1:].long() - 1])


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_steps_equal_the_whole(name, beam, monkeypatch):
    monkeypatch.setattr("lightseq_fairseq.layers.incremental._FIRST_CAPACITY", 2)  # the cache must grow on the way
    encoder, decoder = build(name)
    tokens, packing = sources(encoder.config)
    source = encoder.encode(tokens, packing)
    torch.testing.assert_close(InferenceEncoder(encoder)(tokens, packing), source, **tolerances.LAYER)
    check_steps(IncrementalDecoder(decoder), decoder, source, packing, beam)


def check_steps(incremental, decoder, source, packing, beam):
    """``incremental``, made of ``decoder``, step by step; beams change parents and sentences leave on the way."""
    state = incremental.start(source, packing, len(LENGTHS), beam)
    alive = torch.arange(len(LENGTHS))
    history = [[torch.empty(0, dtype=torch.int64)] for _ in LENGTHS]
    for step in range(7):
        fed = 1 if step == 0 else beam
        newest = torch.randint(4, decoder.config.tgt_vocab_size, (len(alive), fed))
        history = [[torch.cat((h, newest[b, k, None])) for k, h in enumerate(beams)] for b, beams in enumerate(history)]
        logits = incremental.next_logits(state, newest).view(len(alive), fed, -1)
        lengths = [LENGTHS[i] for i in alive]
        sub_source = torch.cat([source.split(LENGTHS)[i] for i in alive])
        for k in range(fed):
            expected = whole(decoder, [beams[k] for beams in history], sub_source, Packing.of_lengths(lengths))
            torch.testing.assert_close(logits[:, k], expected, **tolerances.LAYER)
        parents = torch.randint(0, fed, (len(alive), beam))
        state.reorder(parents)
        history = [[beams[p] for p in row] for beams, row in zip(history, parents.tolist(), strict=True)]
        if step in (2, 4):
            kept = torch.tensor([0, 2, 3][:len(alive) - 1])
            state.keep(kept)
            alive, history = alive[kept], [history[i] for i in kept.tolist()]


@torch.no_grad()
def test_attention_is_the_last_layers_mean_over_heads():
    encoder, decoder = build("pre-LN")
    tokens, packing = sources(encoder.config)
    source = encoder.encode(tokens, packing)
    incremental = IncrementalDecoder(decoder)
    state = incremental.start(source, packing, len(LENGTHS), beam=2)
    first = torch.tensor([[4], [5], [6], [7]])
    incremental.step(state, first, need_attention=True)
    _, expected = decoder.decode(first.flatten(), Packing.of_lengths([1] * 4), source, packing,
                                 weights_of_layer=len(decoder.layers) - 1)
    torch.testing.assert_close(state.attention, expected.mean(1), **tolerances.LAYER)


def test_a_sentence_past_the_learned_positions_is_refused_in_words():
    config = dataclasses.replace(BASE, encoder_positions="learned", max_source_positions=6)
    encoder = TransformerEncoder(config, token_embedding(config.src_vocab_size, config.encoder_embed_dim, 1))
    with pytest.raises(ValueError, match="7 tokens is longer than the 6"):
        encoder.encode(torch.full((7,), 5), Packing.of_lengths([7]))


def test_sinusoidal_positions_have_no_limit():
    encoder, _ = build("post-LN")
    tokens = torch.randint(4, 31, (2500,))
    assert encoder.encode(tokens, Packing.of_lengths([2500])).isfinite().all()


@pytest.mark.skipif(not has_int8(), reason="this build of torch lacks oneDNN's 8-bit operators")
@pytest.mark.parametrize("name", ["post-LN", "pre-LN", "cross+self", "projections"])
def test_8_bits_change_little(name):
    """Each GEMM adds a hundredth or so; a wrong scale, or a bias twice, would be of another order."""
    encoder, decoder = build(name)
    tokens, packing = sources(encoder.config)
    histories = torch.randint(4, 37, (5, len(LENGTHS), 1))
    logits = {}
    for int8 in (False, True):
        source = InferenceEncoder(encoder, int8)(tokens, packing)
        incremental = IncrementalDecoder(decoder, int8)
        state = incremental.start(source, packing, len(LENGTHS), 1)
        logits[int8] = torch.stack([incremental.next_logits(state, step) for step in histories])
    difference = (logits[True] - logits[False]).norm() / logits[False].norm()
    assert 1e-5 < difference < 0.05
