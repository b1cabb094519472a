"""What is saved is what is loaded, in both formats and every type of weight."""

import dataclasses

import pytest
import torch

from lightseq_fairseq.model_file import ModelFileError, format_of, load, save
from lightseq_fairseq.model_file.lightseq import obstacles
from lightseq_fairseq.model_file.spec import tied_tensors
from tests.model_file.models import CONFIGS, FOR_LIGHTSEQ, PRE, TIED, random_model, small_config

SUFFIXES = (".pb", ".hdf5")
EMBEDDINGS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.output_projection.weight")


def assert_same(loaded, saved, dtype):
    assert dataclasses.replace(loaded, tensors={}) == dataclasses.replace(saved, tensors={})
    assert list(loaded.tensors) == list(saved.tensors)
    for name, tensor in loaded.tensors.items():
        expected = saved.tensors[name].to(dtype)
        assert tensor.dtype == dtype and tensor.is_contiguous(), name
        if name in EMBEDDINGS and dtype == torch.float32:  # times sqrt(H) and back
            ulps = tensor.view(torch.int32).long() - expected.view(torch.int32).long()
            assert ulps.abs().max() <= 1, name
        else:
            assert torch.equal(tensor, expected), name
    for alias, name in tied_tensors(loaded.config).items():
        assert loaded.tensors[alias] is loaded.tensors[name]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CONFIGS)
def test_round_trip(tmp_path, kind, dtype, suffix):
    model = random_model(CONFIGS[kind])
    save(model, tmp_path / f"model{suffix}", dtype=dtype)
    assert_same(load(tmp_path / f"model{suffix}"), model, dtype)


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_lightseq_can_express(kind):
    assert bool(obstacles(CONFIGS[kind])) == (kind not in FOR_LIGHTSEQ)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_unscaled_and_power_of_four_widths_are_exact(tmp_path, suffix):
    sizes = dict(encoder_embed_dim=16, decoder_embed_dim=16, encoder_attention_heads=4, decoder_attention_heads=4)
    model = random_model(small_config(**PRE, **TIED, **sizes))
    save(model, tmp_path / f"model{suffix}")
    for name, tensor in load(tmp_path / f"model{suffix}").tensors.items():
        assert torch.equal(tensor, model.tensors[name]), name


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_without_dictionaries_and_languages(tmp_path, suffix):
    model = dataclasses.replace(random_model(CONFIGS["untied"]), src_symbols=None, tgt_symbols=None,
                                source_lang=None, target_lang=None)
    save(model, tmp_path / f"model{suffix}")
    assert_same(load(tmp_path / f"model{suffix}"), model, torch.float32)


def test_saving_again_gives_the_same_protobuf_file(tmp_path):
    model = random_model(CONFIGS["one learned side"])
    save(model, tmp_path / "first.pb")
    save(model, tmp_path / "second.pb")
    assert (tmp_path / "first.pb").read_bytes() == (tmp_path / "second.pb").read_bytes()


def test_tensors_of_any_layout_are_saved(tmp_path):
    model = random_model(CONFIGS["untied"])
    layouts = {name: torch.nn.Parameter(tensor.double().t().contiguous().t()) for name, tensor in model.tensors.items()
               if tensor.dim() == 2}
    save(dataclasses.replace(model, tensors=model.tensors | layouts), tmp_path / "model.pb")
    assert_same(load(tmp_path / "model.pb"), model, torch.float32)


def test_loaded_tensors_may_be_written_to(tmp_path):
    save(random_model(CONFIGS["untied"]), tmp_path / "model.pb")
    for tensor in load(tmp_path / "model.pb").tensors.values():
        tensor.add_(1)


def test_format_overrides_the_suffix(tmp_path):
    model = random_model(CONFIGS["pre-LN"])
    save(model, tmp_path / "model.bin", format="hdf5")
    assert_same(load(tmp_path / "model.bin", format="hdf5"), model, torch.float32)
    assert format_of("a.PB") == "protobuf" and format_of("a.h5") == "hdf5"
    with pytest.raises(ModelFileError, match="must end in one of .pb, .proto, .hdf5, .h5; rename it"):
        load(tmp_path / "model.bin")
    with pytest.raises(ModelFileError, match="format must be one of protobuf, hdf5, got 'onnx'"):
        save(model, tmp_path / "model.pb", format="onnx")


def test_values_beyond_fp16_are_refused(tmp_path):
    model = random_model(CONFIGS["untied"])
    model.tensors["encoder.layers.0.fc1.bias"][3] = 1e6
    with pytest.raises(ModelFileError, match="encoder.layers.0.fc1.bias has values up to 1e.06.*use bfloat16"):
        save(model, tmp_path / "model.pb", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_other_types_are_refused(tmp_path):
    with pytest.raises(ModelFileError, match="dtype must be one of float32, float16, bfloat16, got torch.float64"):
        save(random_model(CONFIGS["untied"]), tmp_path / "model.pb", dtype=torch.float64)


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.pb"
    save(random_model(CONFIGS["untied"]), path)
    before = path.read_bytes()
    broken = random_model(CONFIGS["untied"])
    del broken.tensors["encoder.layers.0.fc1.bias"]
    with pytest.raises(ModelFileError, match=r"model.pb: encoder.layers.0.fc1.bias is missing"):
        save(broken, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ModelFileError, match="cannot be written"):
        save(random_model(CONFIGS["untied"]), tmp_path / "none" / "model.pb")
