"""The wire: numbers of fields, bytes for floats, the 2 GiB limit."""

from __future__ import annotations

import pytest
import torch
from google.protobuf import json_format

from lightseq_fairseq.config import exported_fields
from lightseq_fairseq.model_file import ModelFileError, load, protobuf, save
from lightseq_fairseq.model_file.protobuf import message_class, put
from tests.model_file.models import CONFIGS, FOR_LIGHTSEQ, random_model, small_config

AsFloats, AsBytes = message_class("Transformer", floats_as_bytes=False), message_class("Transformer")

LIGHTSEQ = {
    "EncoderLayer": "multihead_norm_scale multihead_norm_bias multihead_project_kernel_qkv multihead_project_bias_qkv "
                    "multihead_project_kernel_output multihead_project_bias_output ffn_norm_scale ffn_norm_bias "
                    "ffn_first_kernel ffn_first_bias ffn_second_kernel ffn_second_bias",
    "DecoderLayer": "self_norm_scale self_norm_bias self_project_kernel_qkv self_project_bias_qkv "
                    "self_project_kernel_output self_project_bias_output encdec_norm_scale encdec_norm_bias "
                    "encdec_project_kernel_q encdec_project_bias_q encdec_project_kernel_output "
                    "encdec_project_bias_output ffn_norm_scale ffn_norm_bias ffn_first_kernel ffn_first_bias "
                    "ffn_second_kernel ffn_second_bias",
    "EmbeddingLayer": "token_embedding position_embedding norm_scale norm_bias encode_output_project_kernel_kv "
                      "encode_output_project_bias_kv shared_bias lang_emb",
    "ModelConf": "head_num beam_size extra_decode_length length_penalty src_padding_id trg_start_id diverse_lambda "
                 "sampling_method topp topk trg_end_id is_post_ln no_scale_embedding use_gelu multilg_type",
    "Transformer": "src_embedding encoder_stack trg_embedding decoder_stack model_conf",
}
"""Fields of LightSeq's messages, in the order of their numbers from 1."""


@pytest.mark.parametrize("message", LIGHTSEQ)
def test_lightseqs_field_numbers(message):
    fields = message_class(message, floats_as_bytes=False).DESCRIPTOR.fields
    numbers = {field.name: field.number for field in fields if field.number < 1000}
    assert numbers == {name: number for number, name in enumerate(LIGHTSEQ[message].split(), 1)}


def test_every_field_of_the_configuration_has_one_in_the_file():
    names = [field.name for field in message_class("Config").DESCRIPTOR.fields]
    assert sorted(names) == sorted(exported_fields(small_config())), "raise FORMAT_VERSION if old readers need to know"


@pytest.mark.parametrize("kind", FOR_LIGHTSEQ)
def test_floats_and_bytes_are_the_same_on_the_wire(tmp_path, kind):
    save(random_model(FOR_LIGHTSEQ[kind]), tmp_path / "model.pb")
    written = (tmp_path / "model.pb").read_bytes()
    as_floats = AsFloats.FromString(written)
    assert as_floats.SerializeToString() == written == AsBytes.FromString(written).SerializeToString()
    values = torch.tensor(list(as_floats.encoder_stack[0].ffn_first_bias)) if as_floats.encoder_stack else None
    if values is not None:
        assert torch.equal(values, random_model(FOR_LIGHTSEQ[kind]).tensors["encoder.layers.0.fc1.bias"])


def test_put_fills_either_message():
    values = torch.randn(3, 4, dtype=torch.float64)
    floats, as_bytes = AsFloats(), AsBytes()
    for message in (floats, as_bytes):
        put(message, "decoder_stack/1/ffn_first_kernel", values.t())
        put(message, "src_embedding/norm_scale", values[0])
    assert floats.SerializeToString() == as_bytes.SerializeToString()
    assert list(floats.decoder_stack[1].ffn_first_kernel) == values.t().float().flatten().tolist()


def test_a_model_without_a_place_in_lightseqs_fields_leaves_them_empty(tmp_path):
    save(random_model(CONFIGS["untied"]), tmp_path / "model.pb")
    message = AsBytes.FromString((tmp_path / "model.pb").read_bytes())
    assert [field.name for field, _ in message.ListFields()] == ["model_conf", "extension"]
    assert json_format.MessageToDict(message.model_conf) == {"formatVersion": 2}


def test_decoding_options_for_lightseqs_engine(tmp_path):
    model = random_model(CONFIGS["pre-LN"])
    model.decoding.update(beam_size=16, sampling_method="topp")
    save(model, tmp_path / "model.pb")
    conf = AsFloats.FromString((tmp_path / "model.pb").read_bytes()).model_conf
    assert (conf.beam_size, conf.sampling_method, conf.extra_decode_length) == (16, "topp", 50)
    assert (conf.head_num, conf.src_padding_id, conf.trg_start_id, conf.trg_end_id) == (3, 1, 2, 2)
    assert load(tmp_path / "model.pb").decoding == {}


def test_too_large_for_protobuf_is_refused_before_anything_is_built(tmp_path, monkeypatch):
    model = random_model(CONFIGS["untied"])
    monkeypatch.setattr(protobuf, "LIMIT", 10_000)
    monkeypatch.setattr(protobuf, "put", None)
    with pytest.raises(ModelFileError, match=r"must not exceed 10000 bytes, got \d+; write HDF5 instead"):
        save(model, tmp_path / "model.pb")
    save(model, tmp_path / "model.hdf5")
    assert protobuf.LIMIT < (tmp_path / "model.hdf5").stat().st_size


def test_vocabularies_count_towards_the_limit(tmp_path, monkeypatch):
    model = random_model(CONFIGS["untied"])
    weights = sum(tensor.nbytes for tensor in model.tensors.values())
    monkeypatch.setattr(protobuf, "LIMIT", weights + 100)
    with pytest.raises(ModelFileError, match="must not exceed"):
        save(model, tmp_path / "model.pb")
