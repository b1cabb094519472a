"""Truncated, mutated, foreign and newer files: a ModelFileError that says so, or a model that is consistent."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightseq_fairseq.model_file import ModelFile, ModelFileError, load, save
from lightseq_fairseq.model_file.protobuf import Transformer
from lightseq_fairseq.model_file.spec import validate
from tests.model_file.models import CONFIGS, PRE, TIED, random_model, small_config
from tests.model_file.test_lightseq import foreign_message, write_hdf5

SUFFIXES = (".pb", ".hdf5")
TINY = dict(src_vocab_size=5, tgt_vocab_size=5, encoder_layers=1, decoder_layers=1, encoder_embed_dim=2,
            decoder_embed_dim=2, encoder_ffn_embed_dim=2, decoder_ffn_embed_dim=2, encoder_attention_heads=1,
            decoder_attention_heads=1, max_source_positions=3, max_target_positions=3)


def rewrite(path: Path, change) -> Path:
    """Parse a protobuf file, change the message, write it back."""
    message = Transformer.FromString(path.read_bytes())
    change(message)
    path.write_bytes(message.SerializeToString())
    return path


@pytest.fixture
def pb(tmp_path) -> Path:
    save(random_model(CONFIGS["untied"]), tmp_path / "model.pb")
    return tmp_path / "model.pb"


@pytest.fixture
def lightseq_pb(tmp_path) -> Path:
    save(random_model(CONFIGS["pre-LN"]), tmp_path / "model.pb")
    return tmp_path / "model.pb"


@pytest.fixture
def hdf5(tmp_path) -> Path:
    save(random_model(CONFIGS["untied"]), tmp_path / "model.hdf5")
    return tmp_path / "model.hdf5"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_file_no_bytes_a_folder(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    with pytest.raises(ModelFileError, match=f"model{suffix}: cannot be read .No such file"):
        load(path)
    path.touch()
    with pytest.raises(ModelFileError, match="got an(other format or an)? empty"):
        load(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ModelFileError, match="cannot be read"):
        load(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", ["pre-LN", "untied"])
def test_every_truncation_is_an_error(tmp_path, kind, suffix):
    path = tmp_path / f"model{suffix}"
    save(random_model(small_config(**TINY | ({} if kind == "untied" else PRE | TIED))), path)
    whole = path.read_bytes()
    step = 5 if suffix == ".pb" else 37
    for length in (*range(0, len(whole), step), *range(len(whole) - 50, len(whole))):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelFileError):
            load(path)


def test_each_format_is_told_from_the_other_and_from_a_checkpoint(tmp_path, pb, hdf5):
    pb.rename(tmp_path / "wrong.hdf5")
    hdf5.rename(tmp_path / "wrong.pb")
    with pytest.raises(ModelFileError, match="expected an HDF5 file, got another format"):
        load(tmp_path / "wrong.hdf5")
    with pytest.raises(ModelFileError, match="got HDF5; name it .hdf5"):
        load(tmp_path / "wrong.pb")
    torch.save({"model": {}}, tmp_path / "checkpoint.pb")
    assert zipfile.is_zipfile(tmp_path / "checkpoint.pb")
    with pytest.raises(ModelFileError, match="got a PyTorch checkpoint; export it with lightseq-export"):
        load(tmp_path / "checkpoint.pb")


def test_files_of_version_1_still_load(pb, hdf5):
    """Their configuration lacks what version 2 added, which then has its default."""
    expected = load(pb)
    rewrite(pb, lambda m: (setattr(m.model_conf, "format_version", 1),
                           [m.extension.config.ClearField(name) for name in ("stacks", "type_vocab_size", "pooler")]))
    with h5py.File(hdf5, "r+") as file:
        file["lightseq_fairseq"].attrs["format_version"] = 1
        for name in ("stacks", "type_vocab_size", "pooler"):
            del file["lightseq_fairseq/config"].attrs[name]
    for path in (pb, hdf5):
        assert load(path).config == expected.config
        assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in load(path).tensors.items())


def test_a_newer_version_says_so(pb, hdf5):
    with pytest.raises(ModelFileError, match="expected format version 2 or older, got 3; install a newer"):
        load(rewrite(pb, lambda m: setattr(m.model_conf, "format_version", 3)))
    with h5py.File(hdf5, "r+") as file:
        file["lightseq_fairseq"].attrs["format_version"] = 7
    with pytest.raises(ModelFileError, match="expected format version 2 or older, got 7"):
        load(hdf5)


@pytest.mark.parametrize("change, message", [
    (lambda m: m.ClearField("extension"), "do not agree: the file is truncated or damaged"),
    (lambda m: m.ClearField("model_conf"), "do not agree"),
    (lambda m: setattr(m.model_conf, "format_version", -1), "do not agree"),
    (lambda m: setattr(m.extension.config, "encoder_layers", 2**31 - 1), "expected weights of 2147483647"),
    (lambda m: setattr(m.extension.config, "src_vocab_size", 2**31 - 1), "source dictionary must have 2147483647"),
    (lambda m: setattr(m.extension.config, "activation_fn", "sigmoid"), "activation_fn must be one of"),
    (lambda m: setattr(m.extension.config, "layer_norm_eps", -1.0), "layer_norm_eps must be positive"),
    (lambda m: setattr(m.extension.config, "eos", 13), "eos must lie in the vocabulary of 13 types"),
    (lambda m: m.extension.config.ClearField("tgt_vocab_size"), "tgt_vocab_size is missing"),
    (lambda m: m.extension.src_symbols.pop(), "source dictionary must have 11 types, got 10"),
    (lambda m: m.extension.tensors.add(name="x", dtype="float32", shape=[1], data=bytes(4)), "x is unexpected"),
    (lambda m: m.extension.tensors.append(m.extension.tensors[0]), "encoder.embed_tokens.weight is there twice"),
    (lambda m: m.extension.tensors.pop(), "decoder.output_projection.weight is missing"),
    (lambda m: setattr(m.extension.tensors[1], "dtype", "int8"), "must be of type float32, float16.* got 'int8'"),
    (lambda m: setattr(m.extension.tensors[1], "data", bytes(8)), "must have 576 bytes, got 8"),
    (lambda m: setattr(m.extension.tensors[1], "data", b""), "must have 576 bytes, got 0"),
    (lambda m: m.extension.tensors[1].shape.append(2**40), r"must have \d+ bytes, got 576"),
    (lambda m: m.extension.tensors[1].shape.extend((-1, -1)), r"must have 576 bytes"),
    (lambda m: m.extension.tensors[1].shape.append(1), r"must have shape \(12, 12\), got \(12, 12, 1\)"),
], ids=lambda value: value[:50] if isinstance(value, str) else "")
def test_contradictions_in_our_own_part(pb, change, message):
    with pytest.raises(ModelFileError, match=message):
        load(rewrite(pb, change))


@pytest.mark.parametrize("change, message", [
    (lambda m: m.encoder_stack.add(ffn_first_bias=bytes(80)), "encoder_stack/2/ffn_first_bias is unexpected"),
    (lambda m: m.decoder_stack.pop(), "decoder_stack/2/self_project_kernel_qkv is missing"),
    (lambda m: setattr(m.src_embedding, "norm_bias", bytes(7)), "must have 4 bytes, got 7"),
    (lambda m: setattr(m.src_embedding, "norm_bias", bytes(8)), r"must have shape \(12,\), got \(2,\)"),
    (lambda m: setattr(m.extension.config, "decoder_normalize_before", False), "is unexpected"),
], ids=lambda value: value[:50] if isinstance(value, str) else "")
def test_contradictions_in_lightseqs_part(lightseq_pb, change, message):
    with pytest.raises(ModelFileError, match=message):
        load(rewrite(lightseq_pb, change))


NAME = "lightseq_fairseq/tensors/encoder.layers.0.fc1.weight"


def replace(file: h5py.File, **dataset) -> None:
    """Another dataset in the place of NAME."""
    del file[NAME]
    file.create_dataset(NAME, dtype="f4", **dataset).attrs["dtype"] = np.bytes_("float32")


def configure(file: h5py.File, key: str, value) -> None:
    file["lightseq_fairseq/config"].attrs[key] = value



@pytest.mark.parametrize("change, message", [
    (lambda f: replace(f, shape=(2**40,), chunks=(1024,)), "must have 4398046511104 bytes in this file"),
    (lambda f: replace(f, data=np.zeros((20, 12)), compression="gzip"), "compressed and external data are not read"),
    (lambda f: replace(f, shape=(20, 12), external=[("/etc/passwd", 0, 960)]), "external data are not read"),
    (lambda f: f.__setitem__("trg_embedding", h5py.ExternalLink("other.hdf5", "/")), "link to another place"),
    (lambda f: f.__setitem__("trg_embedding", h5py.SoftLink("/lightseq_fairseq")), "link to another place"),
    (lambda f: [f.__setitem__(f"trg_embedding/{i}", f[NAME]) for i in range(2000)], "more than the file has left"),
    (lambda f: f.__setitem__("trg_embedding/norm_scale", h5py.Empty("f4")), "must be an array of numbers"),
    (lambda f: f.__setitem__("trg_embedding/norm_scale", "text"), "must be an array of numbers"),
    (lambda f: f.__setitem__("trg_embedding", 3), "must be a group"),
    (lambda f: f.__setitem__("trg_embedding/norm_scale", f["lightseq_fairseq"]), "must be an array of numbers"),
    (lambda f: configure(f, "eos", np.arange(3)), "attribute eos .* must be one number"),
    (lambda f: configure(f, "eos", "2"), "attribute eos .* must be one number"),
    (lambda f: configure(f, "eos", 2.0), "eos must be of type int, got 2.0"),
    (lambda f: configure(f, "colour", 2), "colour is not known here"),
    (lambda f: f[NAME].attrs.__setitem__("dtype", np.bytes_("bfloat16")), "must be of type float32"),
    (lambda f: f.__delitem__("lightseq_fairseq/config"), "got one that HDF5 cannot read"),
    (lambda f: f.__delitem__("lightseq_fairseq"), "expected the weights of a LightSeq encoder-decoder Transformer"),
    (lambda f: f["lightseq_fairseq"].attrs.__setitem__("format_version", np.bytes_("1")), "format version 2 or older"),
], ids=lambda value: value[:50] if isinstance(value, str) else "")
def test_hdf5_that_this_package_never_writes(hdf5, change, message):
    with h5py.File(hdf5, "r+") as file:
        change(file)
    with pytest.raises(ModelFileError, match=message):
        load(hdf5)


@cache
def whole_file(kind: str, suffix: str) -> bytes:
    """A tiny file of each kind to damage."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{suffix}"
        if kind == "made by LightSeq":
            _, message = foreign_message("post-LN")
            path.write_bytes(message.SerializeToString()) if suffix == ".pb" else write_hdf5(message, path)
        else:
            changes = TINY | (PRE | TIED if kind == "for LightSeq" else dict(encoder_positions="learned"))
            save(random_model(small_config(**changes)), path)
        return path.read_bytes()


KINDS = ("for LightSeq", "not for LightSeq", "made by LightSeq")
PLACE = st.floats(0, 1, exclude_max=True)
DAMAGE = st.one_of(
    st.tuples(st.just("cut"), PLACE),
    st.tuples(st.just("set"), PLACE, st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("move"), PLACE, PLACE, st.integers(1, 64)),
    st.tuples(st.just("insert"), PLACE, st.binary(min_size=1, max_size=8)),
)


def damaged(whole: bytes, steps: list[tuple]) -> bytes:
    data = bytearray(whole)
    for kind, *how in steps:
        at = int(how[0] * len(data))
        if kind == "cut":
            del data[at:]
        elif kind == "set":
            data[at:at + len(how[1])] = how[1]
        elif kind == "move":
            source = int(how[1] * len(data))
            data[at:at + how[2]] = data[source:source + how[2]]
        else:
            data[at:at] = how[1]
    return bytes(data)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(DAMAGE, min_size=1, max_size=4))
def test_any_damage_ends_in_the_one_error_or_a_consistent_model(tmp_path, kind, suffix, steps):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(damaged(whole_file(kind, suffix), steps))
    try:
        model = load(path)
    except ModelFileError as error:
        assert str(error).startswith(str(path))
        return
    assert isinstance(model, ModelFile)
    validate(model)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_at_all(tmp_path_factory, data):
    for suffix, magic in ((".pb", b""), (".hdf5", b"\x89HDF\r\n\x1a\n")):
        path = tmp_path_factory.getbasetemp() / f"any{suffix}"
        path.write_bytes(magic + data)
        with pytest.raises(ModelFileError):
            load(path)


def test_a_lying_file_does_not_make_the_reader_allocate(tmp_path):
    """In a process that may only use 4 GiB: absurd sizes in every field of the configuration."""
    model = random_model(small_config(**PRE, **TIED))
    save(dataclasses.replace(model, src_symbols=None, tgt_symbols=None), tmp_path / "model.pb")
    numbers = [name for name, value in dataclasses.asdict(model.config).items() if type(value) is int]
    for name in numbers:
        lie = rewrite(tmp_path / "model.pb", lambda m, name=name: setattr(m.extension.config, name, 2**31 - 4))
        lie.rename(tmp_path / f"{name}.pb")
        save(dataclasses.replace(model, src_symbols=None, tgt_symbols=None), tmp_path / "model.pb")
    program = f"""
import resource, pathlib
from lightseq_fairseq.model_file import load, ModelFileError
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
for path in pathlib.Path({str(tmp_path)!r}).glob("*.pb"):
    try:
        load(path)
        print("loaded", path.stem)
    except ModelFileError:
        print("refused", path.stem)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    # limits on positions of a model that computes its sinusoids are no sizes of anything in the file
    allowed = {"model", "max_source_positions", "max_target_positions"}
    assert {line.split()[1] for line in result.stdout.splitlines() if line.startswith("loaded")} <= allowed
    assert len(result.stdout.splitlines()) == len(numbers) + 1
