"""The specification names exactly what a stock fairseq model has, and tells everything that is wrong at once."""

import dataclasses

import pytest
import torch

from lightseq_fairseq.model_file import ModelFileError
from lightseq_fairseq.model_file.spec import tensor_shapes, tied_tensors, validate
from tests.conftest import build_model
from tests.model_file.models import PRE, TIED, random_model, small_config

SMALL = ("--encoder-embed-dim", "12", "--encoder-ffn-embed-dim", "20", "--encoder-attention-heads", "3",
         "--decoder-attention-heads", "3", "--encoder-layers", "2", "--decoder-layers", "3",
         "--max-source-positions", "9", "--max-target-positions", "7")


@pytest.mark.parametrize("flags, changes", [
    ((), {}),
    (("--encoder-normalize-before", "--decoder-normalize-before", "--share-decoder-input-output-embed"), PRE | TIED),
    (("--encoder-normalize-before",), dict(encoder_normalize_before=True)),
    (("--decoder-normalize-before", "--no-decoder-final-norm"),
     dict(decoder_normalize_before=True, no_decoder_final_norm=True)),
    (("--layernorm-embedding", "--encoder-learned-pos"), dict(layernorm_embedding=True, encoder_positions="learned")),
    (("--decoder-learned-pos",), dict(decoder_positions="learned")),
    (("--no-token-positional-embeddings",), dict(encoder_positions="none", decoder_positions="none")),
    (("--decoder-embed-dim", "18", "--decoder-ffn-embed-dim", "10"),
     dict(decoder_embed_dim=18, decoder_ffn_embed_dim=10)),
    (("--decoder-output-dim", "8"), dict(decoder_output_dim=8)),
    (("--cross-self-attention", "--no-cross-attention"), dict(cross_self_attention=True, no_cross_attention=True)),
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_names_and_shapes_are_those_of_a_stock_model(data_bin, flags, changes):
    task, model = build_model(data_bin, "--arch", "transformer", *SMALL, *flags)
    config = small_config(**{"src_vocab_size": len(task.source_dictionary),
                             "tgt_vocab_size": len(task.target_dictionary)} | changes)
    markers = ("version", "_float_tensor")
    stock = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if not name.endswith(markers)}
    shapes = tensor_shapes(config)
    ours = shapes | {alias: shapes[name] for alias, name in tied_tensors(config).items()}
    assert ours == stock


def test_share_all_embeddings_ties_three_names_to_one_tensor():
    config = small_config(**PRE, tgt_vocab_size=11, share_all_embeddings=True)
    assert tied_tensors(config) == {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight",
                                    "decoder.output_projection.weight": "encoder.embed_tokens.weight"}
    assert not tied_tensors(config).keys() & tensor_shapes(config).keys()


def test_everything_wrong_is_named_at_once():
    model = random_model(small_config(**PRE, **TIED))
    del model.tensors["encoder.layers.1.fc1.bias"]
    model.tensors["decoder.project_in_dim.weight"] = torch.zeros(3)
    model.tensors["decoder.layer_norm.weight"] = torch.zeros(5)
    model.tensors["decoder.layer_norm.bias"] = torch.zeros(12, dtype=torch.int64)
    with pytest.raises(ModelFileError) as error:
        validate(model)
    for part in ("encoder.layers.1.fc1.bias is missing, expected shape (20,)",
                 "decoder.project_in_dim.weight is unexpected",
                 "decoder.layer_norm.weight must have shape (12,), got (5,)",
                 "decoder.layer_norm.bias must be a floating-point tensor, got torch.int64"):
        assert part in str(error.value)


def test_a_flood_of_problems_is_cut_short():
    model = random_model(small_config(**PRE, **TIED))
    model.tensors.clear()
    with pytest.raises(ModelFileError, match=r"and \d+ more$"):
        validate(model)


@pytest.mark.parametrize("changes, message", [
    (dict(pad=11), "pad must lie in the vocabulary of 11 types, got 11"),
    (dict(decoder_start=13), "start must lie in the vocabulary of 13 types"),
    (dict(eos=-1), "eos must lie"),
    (dict(layer_norm_eps=float("nan")), "layer_norm_eps must be positive"),
])
def test_tokens_outside_the_vocabulary_are_refused(changes, message):
    model = random_model(small_config(**PRE, **TIED))
    with pytest.raises(ModelFileError, match=message):
        validate(dataclasses.replace(model, config=dataclasses.replace(model.config, **changes)))


def test_dictionaries_must_fit_the_embeddings():
    model = dataclasses.replace(random_model(small_config(**TIED)), tgt_symbols=("a", "b\nc"))
    with pytest.raises(ModelFileError, match="target dictionary must have 13 types, got 2; .*line break"):
        validate(model)


def test_tied_names_may_be_left_out_but_not_differ():
    model = random_model(small_config(**TIED))
    del model.tensors["decoder.output_projection.weight"]
    validate(model)
    model.tensors["decoder.output_projection.weight"] = torch.zeros(13, 12)
    with pytest.raises(ModelFileError, match="output_projection.weight differs from decoder.embed_tokens.weight"):
        validate(model)
