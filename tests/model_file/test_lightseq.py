"""LightSeq's format from its own side: what its exporters write loads here, what is written here computes there."""

from __future__ import annotations

import dataclasses
import math

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightseq_fairseq.model_file import ModelFile, ModelFileError, load, save
from lightseq_fairseq.model_file.lightseq import infer_config, layout, sinusoids
from lightseq_fairseq.model_file.protobuf import message_class
from tests.conftest import build_model, scramble
from tests.model_file.models import FOR_LIGHTSEQ, LEARNED, PRE, TIED, random_model, small_config
from tests.model_file.test_spec import SMALL

LightSeqTransformer = message_class("Transformer", floats_as_bytes=False)
"""The message as LightSeq declares it, with lists of floats."""


class Engine:
    """LightSeq's engine in plain torch, on one sentence: norm, sublayer, residual, in the order of its C++."""

    def __init__(self, message):
        self.message, self.conf = message, message.model_conf
        self.width = len(message.trg_embedding.norm_scale)

    def array(self, values, *shape):
        return torch.tensor(list(values)).view(*shape)

    def block(self, x, layer, norm, sublayer):
        y = F.layer_norm(x, (self.width,), self.array(getattr(layer, f"{norm}_scale"), -1),
                         self.array(getattr(layer, f"{norm}_bias"), -1))
        return (y if self.conf.is_post_ln else x) + sublayer(y)

    def linear(self, layer, kernel, bias):
        return lambda x: x @ self.array(getattr(layer, kernel), x.size(-1), -1) + self.array(getattr(layer, bias), -1)

    def attend(self, q, k, v, causal=False):
        heads = self.conf.head_num
        q, k, v = (x.view(x.size(0), heads, -1).transpose(0, 1) for x in (q, k, v))  # [T, H] -> [heads, T, D]
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(0, 1).flatten(1)

    def self_attention(self, layer, prefix, causal):
        out = self.linear(layer, f"{prefix}_project_kernel_output", f"{prefix}_project_bias_output")
        qkv = self.linear(layer, f"{prefix}_project_kernel_qkv", f"{prefix}_project_bias_qkv")
        return lambda x: out(self.attend(*qkv(x).chunk(3, dim=-1), causal))

    def feed_forward(self, layer):
        first = self.linear(layer, "ffn_first_kernel", "ffn_first_bias")
        second = self.linear(layer, "ffn_second_kernel", "ffn_second_bias")
        activation = (lambda x: F.gelu(x, approximate="tanh")) if self.conf.use_gelu else F.relu
        return lambda x: second(activation(first(x)))

    def final_norm(self, x, embedding):
        return F.layer_norm(x, (self.width,), self.array(embedding.norm_scale, -1), self.array(embedding.norm_bias, -1))

    def encode(self, tokens):
        embedding = self.message.src_embedding
        x = self.array(embedding.token_embedding, -1, self.width)[tokens]
        x = x + self.array(embedding.position_embedding, -1, self.width)[:len(tokens)]
        for layer in self.message.encoder_stack:
            x = self.block(x, layer, "multihead_norm", self.self_attention(layer, "multihead", False))
            x = self.block(x, layer, "ffn_norm", self.feed_forward(layer))
        return self.final_norm(x, embedding)

    def logits(self, source, target):
        """(S,) and (T,) token ids -> (T, V)."""
        memory, embedding, layers = self.encode(source), self.message.trg_embedding, self.message.decoder_stack
        keys_values = memory @ self.array(embedding.encode_output_project_kernel_kv, self.width, -1)
        keys_values += self.array(embedding.encode_output_project_bias_kv, -1)
        keys_values = keys_values.view(len(source), len(layers), 2, self.width)
        table = self.array(embedding.token_embedding, self.width, -1)
        x = table.t()[target] + self.array(embedding.position_embedding, -1, self.width)[:len(target)]
        for i, layer in enumerate(layers):
            query = self.linear(layer, "encdec_project_kernel_q", "encdec_project_bias_q")
            out = self.linear(layer, "encdec_project_kernel_output", "encdec_project_bias_output")
            keys, values = keys_values[:, i].unbind(1)
            x = self.block(x, layer, "self_norm", self.self_attention(layer, "self", True))
            x = self.block(x, layer, "encdec_norm",
                           lambda y, query=query, out=out, k=keys, v=values: out(self.attend(query(y), k, v)))
            x = self.block(x, layer, "ffn_norm", self.feed_forward(layer))
        scale = 1 if self.conf.no_scale_embedding else self.width**-0.5
        return self.final_norm(x, embedding) @ table * scale + self.array(embedding.shared_bias, -1)


def stock_logits(model, source, target):
    """Stock fairseq's logits (T, V) for one sentence."""
    with torch.no_grad():
        out, _ = model.eval()(source[None], torch.tensor([len(source)]), target[None])
    return out[0]


def weights_of(model):
    markers = ("version", "_float_tensor")
    return {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(markers)}


PRE_FLAGS = ("--encoder-normalize-before", "--decoder-normalize-before", "--share-decoder-input-output-embed")


@pytest.mark.parametrize("flags, changes", [
    (PRE_FLAGS, PRE | TIED),
    ((*PRE_FLAGS, "--encoder-learned-pos", "--decoder-learned-pos"), PRE | TIED | LEARNED),
    ((*PRE_FLAGS, "--no-scale-embedding", "--activation-fn", "gelu_accurate"),
     PRE | TIED | dict(no_scale_embedding=True, activation_fn="gelu_accurate")),
    ((*PRE_FLAGS, "--no-token-positional-embeddings"),
     PRE | TIED | dict(encoder_positions="none", decoder_positions="none")),
    (("--layernorm-embedding", "--share-decoder-input-output-embed"), TIED | dict(layernorm_embedding=True)),
], ids=["pre-LN", "learned positions", "unscaled gelu", "no positions", "post-LN with embedding norm"])
def test_lightseqs_engine_computes_what_fairseq_computes(data_bin, tmp_path, flags, changes):
    task, stock = build_model(data_bin, "--arch", "transformer", *SMALL, *flags)
    scramble(stock)
    config = small_config(**{"src_vocab_size": len(task.source_dictionary),
                             "tgt_vocab_size": len(task.target_dictionary)} | changes)
    save(ModelFile(config, weights_of(stock)), tmp_path / "model.pb")
    source, target = torch.tensor([7, 4, 9, 30, 2]), torch.tensor([2, 8, 5, 11])
    engine = Engine(LightSeqTransformer.FromString((tmp_path / "model.pb").read_bytes()))
    torch.testing.assert_close(engine.logits(source, target), stock_logits(stock, source, target),
                               rtol=1e-4, atol=1e-5)


def by_lightseqs_exporter(weights, layers, post_ln=False, positions=6, learned=False):
    """The message that LightSeq's exporter for fairseq fills from ``weights``; post-LN as its BART exporter does."""
    message = LightSeqTransformer()

    def fill(part, field, *names, scale=None, transpose=True):
        arrays = [weights[name].numpy() for name in names]
        arrays = [array.transpose() if transpose else array for array in arrays]
        value = np.concatenate(arrays, axis=-1)
        getattr(part, field)[:] = (value if scale is None else value * scale).flatten().tolist()

    def norm(part, field, name):
        fill(part, f"{field}_scale", f"{name}.weight")
        fill(part, f"{field}_bias", f"{name}.bias")

    for side, stack, count, prefix in (("encoder", message.encoder_stack, layers[0], "multihead"),
                                       ("decoder", message.decoder_stack, layers[1], "self")):
        embedding = message.src_embedding if side == "encoder" else message.trg_embedding
        width = weights[f"{side}.embed_tokens.weight"].size(1)
        fill(embedding, "token_embedding", f"{side}.embed_tokens.weight", scale=width**0.5,
             transpose=side == "decoder")
        table = weights[f"{side}.embed_positions.weight"][2:] if learned else sinusoids(2, positions, width)
        embedding.position_embedding[:] = table.flatten().tolist()
        last = f"{side}.layernorm_embedding" if post_ln else None
        for i in range(count):
            layer, name = stack.add(), f"{side}.layers.{i}"
            for part in ("weight", "bias"):
                kind = "kernel" if part == "weight" else "bias"
                fill(layer, f"{prefix}_project_{kind}_qkv", *(f"{name}.self_attn.{key}_proj.{part}" for key in "qkv"))
                fill(layer, f"{prefix}_project_{kind}_output", f"{name}.self_attn.out_proj.{part}")
                fill(layer, f"ffn_first_{kind}", f"{name}.fc1.{part}")
                fill(layer, f"ffn_second_{kind}", f"{name}.fc2.{part}")
                if side == "decoder":
                    fill(layer, f"encdec_project_{kind}_q", f"{name}.encoder_attn.q_proj.{part}")
                    fill(layer, f"encdec_project_{kind}_output", f"{name}.encoder_attn.out_proj.{part}")
            for field, own in ((f"{prefix}_norm", "self_attn_layer_norm"), ("encdec_norm", "encoder_attn_layer_norm"),
                               ("ffn_norm", "final_layer_norm")):
                if field == "encdec_norm" and side == "encoder":
                    continue
                norm(layer, field, last or f"{name}.{own}")
                last = f"{name}.{own}" if post_ln else None
        norm(embedding, "norm", last or f"{side}.layer_norm")
    for part, kind in (("weight", "kernel"), ("bias", "bias")):
        fill(message.trg_embedding, f"encode_output_project_{kind}_kv",
             *(f"decoder.layers.{i}.encoder_attn.{key}_proj.{part}" for i in range(layers[1]) for key in "kv"))
    message.trg_embedding.shared_bias[:] = [0.0] * weights["decoder.embed_tokens.weight"].size(0)
    conf = dict(head_num=3, src_padding_id=1, trg_start_id=2, trg_end_id=2, beam_size=8, extra_decode_length=17,
                length_penalty=0.75, sampling_method="topk", topk=4, topp=0.5, is_post_ln=post_ln)
    for key, value in conf.items():
        setattr(message.model_conf, key, value)
    return message


def write_hdf5(message, path):
    """As LightSeq's pb-to-hdf5 converter does, float64 lists and character codes included."""
    with h5py.File(path, "w") as file:
        for prefix, part in (("src_embedding", message.src_embedding), ("trg_embedding", message.trg_embedding),
                             *((f"encoder_stack/{i}", layer) for i, layer in enumerate(message.encoder_stack)),
                             *((f"decoder_stack/{i}", layer) for i, layer in enumerate(message.decoder_stack))):
            for field, values in part.ListFields():
                file.create_dataset(f"{prefix}/{field.name}", data=list(values))
        for field in message.model_conf.DESCRIPTOR.fields:
            value = getattr(message.model_conf, field.name)
            if field.name != "format_version":
                file.create_dataset(f"model_conf/{field.name}", data=np.array([ord(c) for c in value]).astype(np.int8)
                                    if isinstance(value, str) else value)
        file.create_dataset("model_conf/n_encoder_stack", data=len(message.encoder_stack))
        file.create_dataset("model_conf/n_decoder_stack", data=len(message.decoder_stack))


FOREIGN = {"pre-LN": (small_config(**PRE, **TIED), False),
           "post-LN": (small_config(**TIED, layernorm_embedding=True, **LEARNED), True)}


def foreign_message(kind):
    config, post_ln = FOREIGN[kind]
    model = random_model(dataclasses.replace(config, **LEARNED))
    model.tensors["encoder.embed_positions.weight"] = model.tensors["encoder.embed_positions.weight"][:9]  # 7 rows
    return model.tensors, by_lightseqs_exporter(model.tensors, (2, 3), post_ln, learned=True)


@pytest.mark.parametrize("suffix", [".pb", ".hdf5"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_files_of_lightseqs_exporters_load(tmp_path, kind, suffix):
    weights, message = foreign_message(kind)
    path = tmp_path / f"transformer{suffix}"
    path.write_bytes(message.SerializeToString()) if suffix == ".pb" else write_hdf5(message, path)
    model = load(path)
    post_ln = kind == "post-LN"
    assert model.config == small_config(
        **TIED, **LEARNED, max_source_positions=7, layernorm_embedding=post_ln, encoder_normalize_before=not post_ln,
        decoder_normalize_before=not post_ln, bos=2, decoder_start=2)
    assert model.src_symbols is None and model.source_lang is None
    assert model.decoding == pytest.approx(dict(beam_size=8, extra_decode_length=17, length_penalty=0.75,
                                                sampling_method="topk", topk=4, topp=0.5))
    for name, tensor in model.tensors.items():
        expected = weights[name].clone()
        if "embed_positions" in name:
            expected[:2] = 0  # rows that no token ever uses
        torch.testing.assert_close(tensor, expected, rtol=2e-7, atol=0)


def test_a_table_of_sinusoids_loads_as_learned_positions(tmp_path):
    weights = random_model(FOREIGN["pre-LN"][0]).tensors
    (tmp_path / "t.pb").write_bytes(by_lightseqs_exporter(weights, (2, 3), positions=6).SerializeToString())
    model = load(tmp_path / "t.pb")
    assert model.config.encoder_positions == "learned" and model.config.max_source_positions == 6
    torch.testing.assert_close(model.tensors["encoder.embed_positions.weight"][2:], sinusoids(2, 6, 12))


def test_a_foreign_file_can_be_saved_as_our_own(tmp_path):
    _, message = foreign_message("pre-LN")
    (tmp_path / "t.pb").write_bytes(message.SerializeToString())
    foreign = load(tmp_path / "t.pb")
    save(foreign, tmp_path / "own.hdf5")
    own = load(tmp_path / "own.hdf5")
    assert own.config == foreign.config
    for name, tensor in foreign.tensors.items():
        torch.testing.assert_close(own.tensors[name], tensor, rtol=2e-7, atol=0)


def test_defaults_and_bias_of_foreign_files(tmp_path):
    _, message = foreign_message("pre-LN")
    message.model_conf.trg_end_id = 0
    message.model_conf.use_gelu = True
    message.trg_embedding.shared_bias[3] = 0.5
    (tmp_path / "t.pb").write_bytes(message.SerializeToString())
    model = load(tmp_path / "t.pb")
    assert model.config.eos == 12 and model.config.activation_fn == "gelu_accurate" and model.config.output_bias
    assert model.tensors["decoder.output_projection.bias"].tolist() == [0, 0, 0, 0.5] + 9 * [0]


def test_foreign_files_that_are_no_translation_model(tmp_path):
    path = tmp_path / "t.pb"
    _, message = foreign_message("pre-LN")
    message.src_embedding.lang_emb[:] = [1.0] * 24
    path.write_bytes(message.SerializeToString())
    with pytest.raises(ModelFileError, match="multilingual LightSeq models .* are not supported"):
        load(path)
    _, message = foreign_message("pre-LN")
    message.ClearField("trg_embedding")
    message.ClearField("decoder_stack")  # what is left of a BERT file under this schema
    path.write_bytes(message.SerializeToString())
    with pytest.raises(ModelFileError, match="expected the weights of a LightSeq encoder-decoder Transformer"):
        load(path)


@pytest.mark.parametrize("change, message", [
    (lambda m: m.encoder_stack[1].ClearField("ffn_first_bias"), "encoder_stack/1/ffn_first_bias is missing"),
    (lambda m: m.decoder_stack[2].self_norm_scale.append(1.0), "decoder_stack/2/self_norm_scale must have shape"),
    (lambda m: m.src_embedding.token_embedding.append(1.0), "must be rows of 12 values, got 133 values"),
    (lambda m: m.trg_embedding.ClearField("shared_bias"), "trg_embedding/shared_bias is missing"),
    (lambda m: m.model_conf.ClearField("head_num"), "encoder_attention_heads must be at least 1, got 0"),
    (lambda m: setattr(m.model_conf, "src_padding_id", 2**31 - 1), "pad must lie in the vocabulary of 11 types"),
    (lambda m: m.src_embedding.shared_bias.append(1.0), "src_embedding/shared_bias is unexpected"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_incomplete_foreign_files(tmp_path, change, message):
    _, foreign = foreign_message("pre-LN")
    change(foreign)
    (tmp_path / "t.pb").write_bytes(foreign.SerializeToString())
    with pytest.raises(ModelFileError, match=message):
        load(tmp_path / "t.pb")


def test_sinusoids_are_fairseqs(data_bin):
    from fairseq.modules import SinusoidalPositionalEmbedding

    for width in (12, 13):
        table = SinusoidalPositionalEmbedding.get_embedding(30, width, 1)
        torch.testing.assert_close(sinusoids(2, 28, width), table[2:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", FOR_LIGHTSEQ)
def test_the_layout_says_how_large_each_array_is(kind):
    model = random_model(FOR_LIGHTSEQ[kind])
    for path, piece in layout(model.config).items():
        array = piece.pack(model.tensors)
        assert array.shape == (piece.size,) and array.dtype == torch.float32, path


def test_words_where_numbers_belong():
    sizes = {path: piece.size for path, piece in layout(small_config(**PRE, **TIED), foreign=True).items()}
    with pytest.raises(ModelFileError, match="model_conf/head_num must be an integer, got 'many'"):
        infer_config(sizes, {"head_num": "many"}, False)
    with pytest.raises(ModelFileError, match="model_conf/trg_end_id must be an integer, got nan"):
        infer_config(sizes, {"head_num": 3, "trg_end_id": math.nan}, False)
