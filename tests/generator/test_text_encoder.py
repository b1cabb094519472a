"""An encoder alone: batches in buckets of fixed shapes are batches of their own size, and padding is nothing."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch

from lightseq_fairseq.config import TransformerConfig
from lightseq_fairseq.generator import text_encoder
from lightseq_fairseq.generator.options import GenerationError
from lightseq_fairseq.generator.text_encoder import TextEncoder
from lightseq_fairseq.model_file import ModelFile
from lightseq_fairseq.model_file.spec import tensor_shapes

KINDS = {
    "post-LN, types, pooler": dict(layernorm_embedding=True, type_vocab_size=2, pooler=True, activation_fn="gelu",
                                   encoder_positions="learned", position_offset=0),
    "pre-LN, sinusoids": dict(encoder_normalize_before=True, activation_fn="gelu_accurate"),
    "pre-LN, no positions, pooler": dict(encoder_normalize_before=True, encoder_positions="none", pooler=True),
}


def random_model(seed=2, **changes) -> ModelFile:
    config = TransformerConfig(**{**dict(
        stacks="encoder", src_vocab_size=61, tgt_vocab_size=61, encoder_layers=2, encoder_embed_dim=24,
        encoder_ffn_embed_dim=40, encoder_attention_heads=3, max_source_positions=45), **changes})
    generator = torch.Generator().manual_seed(seed)
    return ModelFile(config, {name: torch.randn(shape, generator=generator) * 0.3
                              for name, shape in tensor_shapes(config).items()})


def batch(lengths, width, side="right", seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 61, (len(lengths), width), generator=generator)
    for row, length in zip(ids, lengths, strict=True):
        if side == "right":
            row[length:] = 1
        else:
            row[:width - length] = 1
    return ids, torch.randint(2, ids.shape, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_buckets_change_nothing(kind, device):
    model = random_model(**KINDS[kind])
    plain, bucketed = TextEncoder(model, device), TextEncoder(model, device)
    plain.graphs = None
    if bucketed.graphs is None:
        bucketed.graphs = OrderedDict()  # without CUDA the same memory and operators, one by one
    for lengths, width in (([3, 20, 1, 7, 12], 20), ([45], 45), ([1] * 9, 3), ([0, 5, 0], 60), ([3, 20, 1, 7, 12], 20)):
        for side in ("right", "left"):
            ids, types = batch(lengths, width, side)
            types = types if model.config.type_vocab_size else None
            one, other = plain(ids, token_type_ids=types), bucketed(ids, token_type_ids=types)
            torch.testing.assert_close(other.hidden, one.hidden, rtol=1e-5, atol=1e-5)
            assert (one.pooled is None) == (other.pooled is None) == (not model.config.pooler)
            real = torch.tensor(lengths) > 0
            if one.pooled is not None:
                torch.testing.assert_close(other.pooled[real], one.pooled[real], rtol=1e-5, atol=1e-5)
    assert len(bucketed.graphs) == 4


def test_results_of_a_batch_stay(device):
    """What is handed out is not the memory that the next batch is computed in."""
    encoder = TextEncoder(random_model(**KINDS["post-LN, types, pooler"]), device)
    if encoder.graphs is None:
        encoder.graphs = OrderedDict()
    first = encoder(batch([5, 9], 9)[0])
    kept = first.hidden.clone(), first.pooled.clone()
    encoder(batch([5, 9], 9, seed=8)[0])
    assert torch.equal(first.hidden, kept[0]) and torch.equal(first.pooled, kept[1])


def test_buckets_are_forgotten(device, monkeypatch):
    monkeypatch.setattr(text_encoder, "_MOST_GRAPHS", 2)
    encoder = TextEncoder(random_model(), device)
    encoder.graphs = OrderedDict()
    for count in (1, 2, 4, 1):
        encoder(batch([9] * count, 9)[0])
    assert [bucket.batch for bucket in encoder.graphs] == [4, 1]


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 1000, 1025, 8192, 8193])
def test_little_is_computed_in_vain(tokens):
    bucket = text_encoder._Bucket.around(tokens, 5, 40)
    assert tokens <= bucket.tokens <= max(64, 1.13 * tokens) and (bucket.batch, bucket.width) == (8, 64)


def test_models_that_are_more(device):
    model = random_model()
    config = TransformerConfig(stacks="decoder", no_cross_attention=True, src_vocab_size=9, tgt_vocab_size=9)
    with pytest.raises(GenerationError, match="expected an encoder alone, got stacks 'decoder'"):
        TextEncoder(ModelFile(config, {}), device)
    assert TextEncoder(model, device)([[5, 6], [7]]).hidden.shape == (2, 2, 24)
