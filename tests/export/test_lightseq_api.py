"""Scripts written for LightSeq's export functions: fairseq's names or packed layers in, a LightSeq file out."""

from __future__ import annotations

import inspect

import h5py
import pytest
import torch

from lightseq_fairseq import export
from lightseq_fairseq.export import (
    ExportError,
    export_fs_weights,
    export_ls_config,
    export_ls_decoder,
    export_ls_embedding,
    export_ls_encoder,
    unpack_ls_layers,
)
from lightseq_fairseq.model_file import load
from lightseq_fairseq.model_file.lightseq import sinusoids
from lightseq_fairseq.model_file.protobuf import message_class
from tests.model_file.models import LEARNED, PRE, TIED, random_model, small_config

HIDDEN, INNER, LAYERS = 12, 20, (2, 3)


def weights(**changes):
    return random_model(small_config(**PRE, **TIED, **changes)).tensors


def side(state_dict, name):
    """As LightSeq's scripts split a state_dict."""
    return {key: tensor for key, tensor in state_dict.items() if key.startswith(name)}


def export_all(file, state_dict, save_pb=True, positions=6):
    encoder, decoder = side(state_dict, "encoder."), side(state_dict, "decoder.")
    export_ls_embedding(file, encoder, positions, HIDDEN, True, save_pb=save_pb)
    export_ls_embedding(file, decoder, positions, HIDDEN, False, save_pb=save_pb)
    export_ls_encoder(file, encoder, HIDDEN, INNER, save_pb=save_pb)
    export_ls_decoder(file, decoder, HIDDEN, INNER, LAYERS[1], save_pb=save_pb)
    export_fs_weights(file, state_dict, None, save_pb=save_pb)
    export_ls_config(file, 3, 1, 2, 2, *LAYERS, beam_size=5, save_pb=save_pb)


def pack(state_dict, limits):
    """LightSeq's own checkpoint of the same model: one flat ``para`` a layer, with clipping limits since version 3."""
    packed = {name: tensor for name, tensor in state_dict.items() if "layers." not in name and "embed" not in name}
    for side_name in ("encoder", "decoder"):
        table = state_dict[f"{side_name}.embed_tokens.weight"].flatten()
        packed[f"{side_name}.embed_tokens.para"] = torch.cat((table, torch.full((int(limits),), 9.0)))
    for i in range(LAYERS[0]):
        packed[f"encoder.layers.{i}.para"] = flat(state_dict, f"encoder.layers.{i}", 12 * limits)
    for i in range(LAYERS[1]):
        packed[f"decoder.layers.{i}.para"] = flat(state_dict, f"decoder.layers.{i}", 24 * limits)
    keys_values = [state_dict[f"decoder.layers.{i}.encoder_attn.{key}_proj.{part}"].flatten()
                   for part in ("weight", "bias") for i in range(LAYERS[1]) for key in "kv"]
    packed["decoder.layers.0.para"] = torch.cat((packed["decoder.layers.0.para"], *keys_values))
    return packed


def flat(state_dict, layer, limits):
    """One layer in LightSeq's order."""
    parts = [f"self_attn.{key}_proj.{part}" for part in ("weight", "bias") for key in "qkv"]
    for part in ("self_attn.out_proj", "self_attn_layer_norm", "encoder_attn.q_proj", "encoder_attn.out_proj",
                 "encoder_attn_layer_norm", "fc1", "fc2", "final_layer_norm"):
        parts += [f"{part}.weight", f"{part}.bias"]
    values = [state_dict[f"{layer}.{part}"].flatten() for part in parts if f"{layer}.{part}" in state_dict]
    return torch.cat((*values, torch.full((limits,), 9.0)))


def assert_loads(path, expected, first_position):
    model = load(path)
    assert model.decoding["beam_size"] == 5 and model.decoding["length_penalty"] == pytest.approx(0.6)
    assert (model.config.pad, model.config.start, model.config.eos) == (1, 2, 2)
    table = model.tensors.pop("encoder.embed_positions.weight")
    torch.testing.assert_close(table[2:], sinusoids(first_position, 6, HIDDEN))
    model.tensors.pop("decoder.embed_positions.weight")
    assert model.tensors.keys() == expected.keys()
    for name, tensor in model.tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-7, atol=0)


@pytest.mark.parametrize("floats_as_bytes", [True, False], ids=["our message", "LightSeq's message"])
def test_protobuf_from_fairseqs_names(tmp_path, floats_as_bytes):
    file = message_class("Transformer", floats_as_bytes)()
    export_all(file, weights())
    (tmp_path / "t.pb").write_bytes(file.SerializeToString())
    assert_loads(tmp_path / "t.pb", weights(), first_position=2)


def test_hdf5_from_fairseqs_names(tmp_path):
    with h5py.File(tmp_path / "t.hdf5", "w") as file:
        export_all(file, weights(), save_pb=False)
        assert file["model_conf/n_decoder_stack"][()] == 3
        assert bytes(file["model_conf/sampling_method"][()]) == b"beam_search"
    assert_loads(tmp_path / "t.hdf5", weights(), first_position=2)


@pytest.mark.parametrize("limits", [True, False], ids=["version 3", "version 2"])
def test_protobuf_from_lightseqs_packed_layers(tmp_path, limits):
    file = message_class("Transformer")()
    export_all(file, pack(weights(), limits))
    (tmp_path / "t.pb").write_bytes(file.SerializeToString())
    assert_loads(tmp_path / "t.pb", weights(), first_position=0)


@pytest.mark.parametrize("limits", [True, False], ids=["version 3", "version 2"])
def test_packed_layers_go_on_training(limits):
    """In the layers of LightSeq's names, whose state is not packed."""
    from lightseq_fairseq.training import LSTransformer

    state_dict, width = weights(tgt_vocab_size=11), 12
    packed = pack(state_dict, limits) | {"encoder.layers.0.para_16": torch.zeros(3)}
    del packed["decoder.output_projection.weight"]  # LightSeq's is no parameter
    model = LSTransformer(LSTransformer.get_config(
        model="transformer-base", hidden_size=width, intermediate_size=INNER, nhead=3, num_encoder_layer=LAYERS[0],
        num_decoder_layer=LAYERS[1], vocab_size=11, padding_idx=1, max_seq_len=9))
    model.load_state_dict(unpack_ls_layers(packed, width, INNER, LAYERS[1]))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state_dict[name.replace("tokens.embeddings", "tokens.weight")]), name
    with pytest.raises(ExportError, match=r"encoder.layers.0.para: expected \d+ or \d+ values for hidden_size=24"):
        unpack_ls_layers(packed, 24, INNER, LAYERS[1])


def test_learned_positions(tmp_path):
    file = message_class("Transformer")()
    state_dict = weights(**LEARNED)
    export_all(file, state_dict)
    (tmp_path / "t.pb").write_bytes(file.SerializeToString())
    table = load(tmp_path / "t.pb").tensors["decoder.embed_positions.weight"]
    assert torch.equal(table[2:], state_dict["decoder.embed_positions.weight"][2:8])


def test_signatures_are_lightseqs():
    positional = {
        "export_ls_config": "file head_num src_padding_id trg_start_id trg_end_id n_encoder_stack n_decoder_stack "
                            "is_post_ln no_scale_embedding use_gelu beam_size length_penalty extra_decode_length "
                            "sampling_method topk topp diverse_lambda save_pb",
        "export_ls_embedding": "file state_dict max_length emb_dim is_encoder save_pb",
        "export_ls_encoder": "file state_dict hidden_size intermediate_size save_pb",
        "export_ls_decoder": "file state_dict hidden_size intermediate_size nlayer save_pb",
        "export_fs_weights": "transformer state_dict args save_pb",
    }
    for name, parameters in positional.items():
        assert list(inspect.signature(getattr(export, name)).parameters) == parameters.split()


def without(part):
    return {name: tensor for name, tensor in weights().items() if part not in name}


def call_embedding(file, state_dict, width=HIDDEN):
    export_ls_embedding(file, state_dict, 6, width, True)


def call_encoder(file, state_dict, inner=INNER):
    export_ls_encoder(file, state_dict, HIDDEN, inner)


@pytest.mark.parametrize("call, message", [
    (lambda file: call_embedding(file, without("embed_tokens")), "embed_tokens in its name, got none"),
    (lambda file: call_embedding(file, weights(), 13), r"expected rows of emb_dim=13 values, got shape \(11, 12\)"),
    (lambda file: call_encoder(file, without("layers")), "expected encoder layers named"),
    (lambda file: call_encoder(file, without("fc1.bias")), "expected fc1.bias, got a layer without"),
    (lambda file: call_encoder(file, pack(weights(), True), 8), r"expected \d+ or \d+ values for hidden_size=12"),
    (lambda file: export_ls_decoder(file, weights(), HIDDEN, INNER, 4), "expected nlayer=4 layers, got 3"),
    (lambda file: export_fs_weights(file, without("decoder.layer_norm")), "norm behind each stack.*lightseq-export"),
], ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ExportError, match=message):
        call(message_class("Transformer")())
