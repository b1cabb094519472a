"""``lightseq-export`` on real checkpoints: what it writes, what it says, how it fails."""

from __future__ import annotations

import pytest
import torch

from lightseq_fairseq.cli.export import main
from lightseq_fairseq.model_file import load
from tests.export.checkpoints import TINY, state_of, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(data_bin, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "checkpoint.pt"
    write_checkpoint(path, data_bin, *TINY)
    return path


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("name, format", [("model.pb", "protobuf"), ("model.hdf5", "hdf5")])
def test_exports_with_nothing_but_the_checkpoint(checkpoint, tmp_path, capsys, name, format):
    status, out, err = run(capsys, checkpoint, "-o", tmp_path / name)
    assert (status, err) == (0, "") and out.count("\n") == 1
    assert f"{name}: {format}, 0." in out and "tensors in fp32" in out and "xx-yy" in out
    assert "not for LightSeq: post-LN needs layernorm_embedding" in out
    model = load(tmp_path / name)
    assert model.config.encoder_layers == 2 and model.source_lang == "xx" and len(model.src_symbols) == 48


def test_a_pre_ln_model_serves_lightseq_too(data_bin, tmp_path, capsys):
    write_checkpoint(tmp_path / "c.pt", data_bin, *TINY, "--encoder-normalize-before", "--decoder-normalize-before")
    assert "LightSeq reads it too" in run(capsys, tmp_path / "c.pt", "-o", tmp_path / "m.pb")[1]


@pytest.mark.parametrize("name, dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_types_of_weights(checkpoint, tmp_path, capsys, name, dtype):
    status, out, _ = run(capsys, checkpoint, "-o", tmp_path / "m.bin", "--format", "hdf5", "--dtype", name)
    assert status == 0 and f"not for LightSeq: weights in {name}" in out
    assert {tensor.dtype for tensor in load(tmp_path / "m.bin", format="hdf5").tensors.values()} == {dtype}


def test_average(checkpoint, data_bin, tmp_path, capsys):
    other = write_checkpoint(tmp_path / "b.pt", data_bin, *TINY, seed=9)
    assert run(capsys, checkpoint, tmp_path / "b.pt", "--average", "-o", tmp_path / "m.pb")[0] == 0
    first = torch.load(checkpoint, weights_only=False)["model"]["decoder.layers.0.fc1.weight"]
    mean = (first + other.decoder.layers[0].fc1.weight) / 2
    torch.testing.assert_close(load(tmp_path / "m.pb").tensors["decoder.layers.0.fc1.weight"], mean)


def test_data_bin_and_languages(data_bin, tmp_path, capsys):
    state, _ = state_of(data_bin, *TINY)
    vars(state["cfg"]["model"]).update(data="/nowhere", source_lang=None, target_lang=None)
    state["cfg"]["task"].update(data="/nowhere", source_lang=None, target_lang=None)
    torch.save(state, tmp_path / "c.pt")
    arguments = (tmp_path / "c.pt", "-o", tmp_path / "m.pb", "--data-bin", data_bin)
    for languages in (("-s", "xx", "-t", "yy"), ()):
        status, out, _ = run(capsys, *arguments, *languages)
        assert status == 0 and "xx-yy" in out
    assert run(capsys, *arguments, "-s", "yy")[0] == 2


@pytest.mark.parametrize("arguments, message", [
    (("{tmp}/none.pt", "-o", "{tmp}/m.pb"), "none.pt: no such file"),
    (("{checkpoint}", "-o", "{tmp}/m.onnx"), "must end in one of .pb, .proto, .hdf5, .h5"),
    (("{checkpoint}", "{checkpoint}", "-o", "{tmp}/m.pb"), "expected one checkpoint, or several with --average, got 2"),
    (("{checkpoint}", "-o", "{tmp}/m.pb", "--data-bin", "{tmp}"), "expected dict.xx.txt and dict.yy.txt in"),
    (("{checkpoint}", "-o", "{tmp}/none/m.pb"), "cannot be written"),
])
def test_errors_are_one_sentence(checkpoint, tmp_path, capsys, arguments, message):
    places = {"tmp": tmp_path, "checkpoint": checkpoint}
    status, out, err = run(capsys, *(argument.format(**places) for argument in arguments))
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("lightseq-export: error: ") and message in err
    assert not list(tmp_path.glob("m*"))


def test_an_unknown_option_value(checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main([str(checkpoint), "-o", str(tmp_path / "m.pb"), "--dtype", "int8"])
    assert error.value.code == 2 and "invalid choice: 'int8'" in capsys.readouterr().err


def test_a_folder_is_one_folder(checkpoint, tmp_path, capsys):
    for arguments, message in (
            ((tmp_path, tmp_path), "--from huggingface takes one folder, got 2"),
            ((tmp_path, "--average", "-s", "en"), "--average, --source-lang cannot be given with --from huggingface"),
            ((tmp_path / "absent",), "expected a folder with config.json and weights")):
        status, _, err = run(capsys, "--from", "huggingface", *arguments, "-o", tmp_path / "m.pb")
        assert status == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "m.pb").exists()
