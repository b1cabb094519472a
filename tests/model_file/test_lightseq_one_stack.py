"""LightSeq's BERT and GPT files, as its exporters for Hugging Face make them, compute here what the originals do."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch

import lightseq_fairseq.inference as lsi
from lightseq_fairseq.generator.generator import Generator
from lightseq_fairseq.generator.options import GenerationOptions
from lightseq_fairseq.generator.text_encoder import TextEncoder
from lightseq_fairseq.model_file import ModelFileError, load, save
from lightseq_fairseq.model_file.protobuf import message_class
from tests.export.hugging_face_models import VOCAB, random_model

CUT = GenerationOptions(beam=1, max_len_b=12, min_len=0, force_eos=False)
SUFFIXES = [".pb", ".hdf5"]


def bert_arrays(stock):
    """LightSeq's arrays by their HDF5 names: each norm in the place of the one behind it, one token type added in."""
    weights, layers = stock.bert.state_dict(), stock.config.num_hidden_layers
    embeddings = "embeddings.LayerNorm"
    norms = [embeddings]
    arrays = {
        "src_embedding/token_embedding": weights["embeddings.word_embeddings.weight"]
        + weights["embeddings.token_type_embeddings.weight"][0],
        "src_embedding/position_embedding": weights["embeddings.position_embeddings.weight"]}
    places = []
    for i in range(layers):
        theirs, ours = f"encoder.layer.{i}", f"encoder_stack/{i}"
        for part, kind in (("weight", "kernel"), ("bias", "bias")):
            parts = [weights[f"{theirs}.attention.self.{key}.{part}"].t() for key in ("query", "key", "value")]
            arrays[f"{ours}/multihead_project_{kind}_qkv"] = torch.cat(parts, -1)
            for field, name in (("multihead_project_{}_output", "attention.output.dense"),
                                ("ffn_first_{}", "intermediate.dense"), ("ffn_second_{}", "output.dense")):
                arrays[f"{ours}/{field.format(kind)}"] = weights[f"{theirs}.{name}.{part}"].t()
        norms += [f"{theirs}.attention.output.LayerNorm", f"{theirs}.output.LayerNorm"]
        places += [f"{ours}/multihead_norm", f"{ours}/ffn_norm"]
    for place, norm in zip([*places, "src_embedding/norm"], norms, strict=True):
        arrays[f"{place}_scale"], arrays[f"{place}_bias"] = weights[f"{norm}.weight"], weights[f"{norm}.bias"]
    return arrays, dict(head_num=stock.config.num_attention_heads, src_padding_id=stock.config.pad_token_id,
                        is_post_ln=True, use_gelu=True)


def gpt_arrays(stock, pad, positions=20, **conf):
    """LightSeq's arrays by their HDF5 names; Hugging Face's Conv1D is [in, out] already."""
    weights = stock.transformer.state_dict()
    arrays = {"src_embedding/token_embedding": weights["wte.weight"],
              "src_embedding/position_embedding": weights["wpe.weight"][:positions],
              "src_embedding/norm_scale": weights["ln_f.weight"], "src_embedding/norm_bias": weights["ln_f.bias"]}
    for i in range(stock.config.n_layer):
        for part, kind, norm in (("weight", "kernel", "scale"), ("bias", "bias", "bias")):
            for field, name in ((f"multihead_project_{kind}_qkv", "attn.c_attn"), (f"ffn_norm_{norm}", "ln_2"),
                                (f"multihead_project_{kind}_output", "attn.c_proj"), (f"ffn_first_{kind}", "mlp.c_fc"),
                                (f"ffn_second_{kind}", "mlp.c_proj"), (f"multihead_norm_{norm}", "ln_1")):
                arrays[f"encoder_stack/{i}/{field}"] = weights[f"h.{i}.{name}.{part}"]
    return arrays, dict(head_num=stock.config.n_head, src_padding_id=pad, sampling_method="topk", topp=0.75, topk=1,
                        eos_id=stock.config.eos_token_id, extra_decode_length=7) | conf


def write(path, kind, arrays, conf):
    """A file as LightSeq's exporters leave it: lists of floats, or flat datasets."""
    if path.suffix == ".hdf5":
        with h5py.File(path, "w") as file:
            for name, values in arrays.items():
                file.create_dataset(name, data=values.flatten().tolist(), dtype="f4")
            for key, value in conf.items():
                file[f"model_conf/{key}"] = np.frombuffer(value.encode(), "i1") if isinstance(value, str) else value
            file["model_conf/n_encoder_stack"] = len({n.split("/")[1] for n in arrays if "stack" in n})
        return path
    message = message_class(kind, floats_as_bytes=False)()
    for name, values in arrays.items():
        stack, *number, field = name.split("/")
        part = getattr(message, stack)
        if number:
            while len(part) <= int(number[0]):
                part.add()
            part = part[int(number[0])]
        getattr(part, field)[:] = values.flatten().tolist()
    for key, value in conf.items():
        setattr(message.model_conf, key, value)
    path.write_bytes(message.SerializeToString())
    return path


@pytest.fixture(scope="module")
def bert():
    return random_model("bert, masked language model")  # whose gelu is the tanh form, as LightSeq's


@pytest.fixture(scope="module")
def gpt():
    return random_model("gpt2")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bert(suffix, bert, tmp_path, device):
    model = load(write(tmp_path / f"bert{suffix}", "Bert", *bert_arrays(bert)))
    assert model.config.stacks == "encoder" and model.config.max_source_positions == 31
    ids = torch.randint(8, VOCAB - 1, (4, 9))
    mask = torch.arange(9) < torch.tensor([9, 1, 4, 6])[:, None]
    ids[~mask] = bert.config.pad_token_id
    with torch.no_grad():
        expected = bert.bert(ids, attention_mask=mask.long()).last_hidden_state
    found = TextEncoder(model, device)(ids).hidden.cpu()
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pad", [VOCAB, 7], ids=["pad behind the vocabulary", "pad of the vocabulary"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_gpt(suffix, pad, gpt, tmp_path, device):
    model = load(write(tmp_path / f"gpt{suffix}", "Gpt", *gpt_arrays(gpt, pad)))
    assert model.config.stacks == "decoder" and model.config.max_target_positions == 20
    assert model.decoding == pytest.approx(dict(sampling_method="topk", topp=0.75, topk=1, extra_decode_length=7))
    contexts = [torch.randint(8, VOCAB - 1, (length,)) for length in (5, 1, 3, 7, 2, 4)]
    found = Generator([model], device).generate(contexts, CUT)
    said = []
    for context, hypotheses in zip(contexts, found, strict=True):
        with torch.no_grad():
            ids = gpt.generate(context[None], attention_mask=torch.ones_like(context[None]), do_sample=False,
                               max_new_tokens=12, pad_token_id=VOCAB - 1,
                               suppress_tokens=None if pad == VOCAB else [pad])
        said.append(ids[0, len(context):].tolist())
        assert hypotheses[0].tokens.tolist() == said[-1]
    assert len(set(map(tuple, said))) == 6


def test_behind_lightseqs_classes(bert, gpt, tmp_path):
    """With the file's own way to sample and its extra_decode_length."""
    ids = torch.randint(8, VOCAB - 1, (3, 4))
    hidden = lsi.Bert(write(tmp_path / "bert.hdf5", "Bert", *bert_arrays(bert)), 2, device="cpu").infer(ids.numpy())
    with torch.no_grad():
        expected = bert.bert(ids).last_hidden_state
    torch.testing.assert_close(torch.from_numpy(hidden), expected, rtol=1e-4, atol=1e-4)
    path = write(tmp_path / "gpt.pb", "Gpt", *gpt_arrays(gpt, VOCAB))  # topk of 1 type
    said = lsi.Gpt(path, 2, device="cpu").sample(ids.tolist())
    with torch.no_grad():
        expected = gpt.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=7,
                                pad_token_id=VOCAB - 1)
    assert said.tolist() == expected.tolist()
    assert lsi.Gpt(path, 2, device="cpu", max_len_b=3).sample(ids.tolist()).shape == (3, 7)
    path = write(tmp_path / "drawn.pb", "Gpt", *gpt_arrays(gpt, VOCAB, sampling_method="topp", topp=0.9))
    options = lsi.Gpt(path, 2, device="cpu").options
    assert options.sampling and options.sampling_topp == pytest.approx(0.9) and options.max_len_b == 7


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_they_can_be_saved_as_our_own(suffix, bert, gpt, tmp_path):
    for kind, (arrays, conf) in (("Bert", bert_arrays(bert)), ("Gpt", gpt_arrays(gpt, VOCAB))):
        foreign = load(write(tmp_path / f"{kind}{suffix}", kind, arrays, conf))
        save(foreign, tmp_path / f"own{suffix}")
        own = load(tmp_path / f"own{suffix}")
        assert own.config == foreign.config
        for name, tensor in foreign.tensors.items():
            assert torch.equal(own.tensors[name], tensor), name


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_pre_ln_bert_of_relu(suffix, bert, tmp_path):
    arrays, conf = bert_arrays(bert)
    model = load(write(tmp_path / f"bert{suffix}", "Bert", arrays, conf | dict(is_post_ln=False, use_gelu=False)))
    assert model.config.encoder_normalize_before and not model.config.layernorm_embedding
    assert model.config.activation_fn == "relu" and model.config.stacks == "encoder"
    assert torch.equal(model.tensors["encoder.layers.0.self_attn_layer_norm.weight"],
                       arrays["encoder_stack/0/multihead_norm_scale"])


def test_other_models_are_not_taken_for_one(bert, tmp_path):
    """A field that neither BERT nor GPT has: of a CRF, say."""
    path = write(tmp_path / "bert.pb", "Bert", *bert_arrays(bert))
    path.write_bytes(path.read_bytes() + bytes([6 << 3 | 2, 4, 0, 0, 0, 0]))
    with pytest.raises(ModelFileError, match="only BERT and GPT are supported"):
        load(path)
    path = write(tmp_path / "bert.hdf5", "Bert", *bert_arrays(bert))
    with h5py.File(path, "a") as file:
        file["crf/transitions"] = [1.0, 2.0]
    with pytest.raises(ModelFileError, match="crf/transitions is unexpected"):
        load(path)


@pytest.mark.parametrize("method", ["topp", "ppl", "beam_search"])
def test_the_longer_gpt_files_of_lightseq_3(method, gpt, tmp_path):
    conf = dict(sampling_method=method, beam_size=4, length_penalty=0.5, use_gelu=True)
    model = load(write(tmp_path / "gpt.pb", "Gpt", *gpt_arrays(gpt, VOCAB, **conf)))
    assert model.decoding["beam_size"] == 4 and model.decoding["sampling_method"] == method
    assert model.config.activation_fn == "gelu_accurate"


@pytest.mark.parametrize("change, message", [
    (lambda arrays, conf: arrays.pop("encoder_stack/1/ffn_first_bias"), "encoder_stack/1/ffn_first_bias is missing"),
    (lambda arrays, conf: arrays.update({"src_embedding/shared_bias": torch.ones(3)}), "shared_bias is unexpected"),
    (lambda arrays, conf: arrays.update({"src_embedding/lang_emb": torch.ones(3)}), "multilingual LightSeq models"),
    (lambda arrays, conf: arrays.update({"src_embedding/token_embedding": torch.ones(25)}), "rows of 24 values"),
    (lambda arrays, conf: conf.update(head_num=5), "must be a multiple of encoder_attention_heads, got 24 and 5"),
    (lambda arrays, conf: conf.update(src_padding_id=VOCAB), "pad must lie in the vocabulary of 53 types, got 53"),
], ids=range(6))
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_does_not_fit_is_named(suffix, change, message, bert, tmp_path):
    arrays, conf = bert_arrays(bert)
    change(arrays, conf)
    with pytest.raises(ModelFileError, match=message):
        load(write(tmp_path / f"bert{suffix}", "Bert", arrays, conf))
