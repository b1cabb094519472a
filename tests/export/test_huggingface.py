"""What Hugging Face's models compute, the exported ones compute too; every tensor is used or named as dropped."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from lightseq_fairseq import model_file
from lightseq_fairseq.cli.export import main
from lightseq_fairseq.export import ExportError
from lightseq_fairseq.export.huggingface import FAMILIES, from_huggingface
from lightseq_fairseq.generator.model import load_layers
from lightseq_fairseq.generator.text_encoder import TextEncoder
from lightseq_fairseq.layers import Packing
from tests.export.hugging_face_models import MODELS, VOCAB, folder_of, random_model

HIDDEN = dict(rtol=1e-4, atol=1e-4)
LENGTHS = [9, 1, 14, 5]
NAMES = {"encoder": [name for name in MODELS if "bert" in name],
         "decoder": [name for name in MODELS if name.startswith("gpt2")]}
NAMES["encoder-decoder"] = [name for name in MODELS if name not in NAMES["encoder"] + NAMES["decoder"]]


def texts(lengths=LENGTHS, seed=3, low=8, high=VOCAB - 1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(low, high, (n,), generator=generator) for n in lengths]


def padded(rows, pad):
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    mask = torch.zeros_like(ids)
    for row, text in zip(mask, rows, strict=True):
        row[:len(text)] = 1
    return ids, mask


@pytest.mark.parametrize("types", [False, True], ids=["one sentence", "pairs"])
@pytest.mark.parametrize("name", NAMES["encoder"])
def test_hidden_states_and_pooled_output(name, types, tmp_path, device):
    stock = random_model(name)
    exported = from_huggingface(folder_of(stock, tmp_path)).model
    base = getattr(stock, "bert", stock)
    ids, mask = padded(texts(), stock.config.pad_token_id)
    token_types = torch.randint(stock.config.type_vocab_size, ids.shape) * mask if types else None
    with torch.no_grad():
        expected = base(ids, attention_mask=mask, token_type_ids=token_types)
    found = TextEncoder(exported, device)(ids, token_type_ids=token_types)
    torch.testing.assert_close(found.hidden[mask.bool()].cpu(), expected.last_hidden_state[mask.bool()], **HIDDEN)
    assert not found.hidden[~mask.bool()].any()
    if expected.pooler_output is None:
        assert found.pooled is None
    else:
        torch.testing.assert_close(found.pooled.cpu(), expected.pooler_output, **HIDDEN)


@pytest.mark.parametrize("name", NAMES["encoder-decoder"])
def test_logits_of_encoder_decoder_models(name, tmp_path, device):
    stock = random_model(name)
    exported = from_huggingface(folder_of(stock, tmp_path)).model
    sources, targets = texts(), texts([7, 3, 1, 11], seed=9)
    ids, mask = padded(sources, stock.config.pad_token_id)
    before, _ = padded(targets, stock.config.pad_token_id)
    with torch.no_grad():
        expected = stock(input_ids=ids, attention_mask=mask, decoder_input_ids=before).logits
    encoder, decoder = load_layers(exported, device, torch.float32)
    source = Packing.of_lengths([len(text) for text in sources], device)
    target = Packing.of_lengths([len(text) for text in targets], device)
    encoded = encoder.encode(torch.cat(sources).to(device), source)
    features, _ = decoder.decode(torch.cat(targets).to(device), target, encoded, source)
    logits = decoder.output_projection(features).cpu()
    expected = torch.cat([rows[:len(text)] for rows, text in zip(expected, targets, strict=True)])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=5e-4)


@pytest.mark.parametrize("name", NAMES["decoder"])
def test_logits_of_language_models(name, tmp_path, device):
    stock = random_model(name)
    exported = from_huggingface(folder_of(stock, tmp_path)).model
    rows = texts()
    _, decoder = load_layers(exported, device, torch.float32)
    packing = Packing.of_lengths(LENGTHS, device)
    features, _ = decoder.decode(torch.cat(rows).to(device), packing)
    logits = decoder.output_projection(features).cpu()
    with torch.no_grad():
        expected = torch.cat([stock(row[None]).logits[0] for row in rows])
    torch.testing.assert_close(logits[:, :VOCAB], expected, rtol=1e-4, atol=5e-4)
    assert (logits[:, VOCAB:] < -1e4).all(), "the type that pads is never said"


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_used_or_named(name, tmp_path):
    from safetensors.torch import load_file

    exported = from_huggingface(folder_of(random_model(name), tmp_path))
    used = sum(tensor.numel() for tensor in {id(t): t for t in exported.model.tensors.values()}.values())
    stored = load_file(tmp_path / "model.safetensors")
    given = sum(tensor.numel() for name, tensor in stored.items() if name not in exported.dropped)
    assert set(exported.dropped) <= set(stored)
    config = exported.model.config
    extra = 0
    if name.startswith("gpt2") and config.pad == VOCAB:
        extra = 24 + (not config.tied_output) * 24 + VOCAB + 1
    elif name.startswith("marian"):
        extra = 2 * 31 * 24
    elif "final_logits_bias" in stored and not stored["final_logits_bias"].any():
        extra = -VOCAB
    assert used == given + extra


@pytest.mark.parametrize("suffix", [".pb", ".hdf5"])
def test_the_command_writes_a_file_and_carries_the_tokenizer(suffix, tmp_path, capsys):
    folder = folder_of(random_model("bert, masked language model"), tmp_path / "model")
    (folder / "vocab.txt").write_text("a\nb\n")
    path = tmp_path / f"out{suffix}"
    assert main(["--from", "huggingface", str(folder), "-o", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "dropped cls.predictions.bias" in printed and str(tmp_path / "out.tokenizer") in printed
    assert (tmp_path / "out.tokenizer" / "vocab.txt").read_text() == "a\nb\n"
    assert json.loads((tmp_path / "out.tokenizer" / "config.json").read_text())["model_type"] == "bert"
    loaded, direct = model_file.load(path), from_huggingface(folder).model
    assert loaded.config == direct.config
    assert all(torch.equal(tensor, direct.tensors[name]) for name, tensor in loaded.tensors.items())


def test_old_names_and_shards_and_pickles(tmp_path):
    """BERT's norms of 2018 (gamma, beta), weights in two files, and weights that torch pickled."""
    from safetensors.torch import load_file, save_file

    folder = folder_of(random_model("bert"), tmp_path / "model")
    expected = from_huggingface(folder).model
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
           for name, tensor in state.items()} | {"embeddings.position_ids": torch.arange(31)[None]}
    torch.save(old, folder / "pytorch_model.bin")
    found = from_huggingface(folder)
    assert found.dropped == ("embeddings.position_ids",)
    assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in found.model.tensors.items())
    (folder / "pytorch_model.bin").unlink()
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[:7], "model-00002-of-00002.safetensors": names[7:]}
    for shard, members in shards.items():
        save_file({name: state[name] for name in members}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {name: shard for shard, members in shards.items() for name in members}}))
    assert all(torch.equal(tensor, expected.tensors[name])
               for name, tensor in from_huggingface(folder).model.tensors.items())


@pytest.mark.parametrize(("changes", "message"), [
    (dict(model_type="t5"), "models of type 't5' cannot be exported .relative position biases"),
    (dict(model_type="llama"), "rotary positions.; supported are bert"),
    (dict(model_type=None), "models of type None"),
    (dict(is_decoder=True), "is_decoder=True .a BERT that decodes. cannot be exported"),
    (dict(position_embedding_type="relative_key"), "relative positions"),
    (dict(hidden_act="quick_gelu"), "activation 'quick_gelu' cannot be exported"),
    (dict(num_hidden_layers=1), "encoder.layers.1.self_attn.*is unexpected"),
    (dict(num_hidden_layers=3), "encoder.layers.2.self_attn.*is missing"),
    (dict(num_attention_heads=5), "must be a multiple of encoder_attention_heads"),
])
def test_what_cannot_be_exported_is_named(changes, message, tmp_path):
    folder = folder_of(random_model("bert"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ExportError, match=message):
        from_huggingface(folder)


def test_a_bart_without_embedding_norm_is_refused(tmp_path):
    folder = folder_of(random_model("bart"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(normalize_embedding=False, normalize_before=True)))
    with pytest.raises(ExportError, match="normalize_before=True .pre-LN., normalize_embedding=False .embeddings"):
        from_huggingface(folder)


def test_tokenizer_files_that_cannot_be_copied(tmp_path, capsys):
    folder = folder_of(random_model("gpt2"), tmp_path / "model")
    (folder / "merges.txt").write_text("")
    (tmp_path / "out.tokenizer").write_text("in the way")
    assert main(["--from", "huggingface", str(folder), "-o", str(tmp_path / "out.pb")]) == 2
    assert "out.tokenizer: tokenizer files cannot be copied there" in capsys.readouterr().err


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(ExportError, match="expected a folder with config.json"):
        from_huggingface(tmp_path / "absent")
    folder = folder_of(random_model("gpt2"), tmp_path / "model")
    shutil.copytree(folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ExportError, match="cannot be read"):
        from_huggingface(tmp_path / "damaged")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ExportError, match="expected model.safetensors or pytorch_model.bin"):
        from_huggingface(folder)


def test_unexpected_tensors_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = folder_of(random_model("gpt2"), tmp_path)
    state = load_file(folder / "model.safetensors")
    save_file(state | {"transformer.h.0.adapter.weight": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(ExportError, match="unexpected tensors transformer.h.0.adapter.weight"):
        from_huggingface(folder)


def test_families_are_those_of_the_table():
    assert {"bert", "roberta", "bart", "mbart", "marian", "m2m_100", "gpt2"} <= set(FAMILIES)
