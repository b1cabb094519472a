"""Checkpoints of every age are read, and nothing that they name is run."""

from __future__ import annotations

import argparse
import collections
import os

import numpy as np
import pytest
import torch

from lightseq_fairseq.export import ExportError
from lightseq_fairseq.export.checkpoint import Record, load_checkpoint, plain

WEIGHTS = {"encoder.embed_tokens.weight": torch.arange(6.0).view(2, 3)}


class Dangerous:
    """Unpickling this would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def save(path, state, **kwargs):
    torch.save({"model": WEIGHTS, **state}, path, **kwargs)
    return path


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_namespaces_meters_and_numpy(tmp_path, zipped):
    from fairseq.logging.meters import AverageMeter, StopwatchMeter

    meter = AverageMeter(round=3)
    meter.update(np.float64(2.5))
    extra = {"train_meters": {"loss": meter, "wall": StopwatchMeter()}, "bleu": np.array([1, 2, 3]),
             "best": np.float32(0.5), "counts": collections.defaultdict(list, a=[1]),
             "flags": np.array([True]), "sizes": np.zeros((2, 2), dtype=np.float64)}
    args = argparse.Namespace(arch="transformer", data=["a", "b"], dropout=0.1)
    path = save(tmp_path / "c.pt", {"args": args, "extra_state": extra}, _use_new_zipfile_serialization=zipped)
    state = load_checkpoint(path)
    assert torch.equal(state["model"]["encoder.embed_tokens.weight"], WEIGHTS["encoder.embed_tokens.weight"])
    assert plain(state["args"]) == {"arch": "transformer", "data": ["a", "b"], "dropout": 0.1}
    assert type(state["args"]) is Record and type(state["extra_state"]["bleu"]) is Record


def test_omegaconf_nodes_become_plain_values(tmp_path):
    from omegaconf import OmegaConf

    values = {"model": {"_name": "transformer", "encoder": {"layers": 3, "layerdrop": 0.5}, "flag": True,
                        "nothing": None, "link": "${model._name}"},
              "task": {"data": "x", "list": [1, "b"]}}
    state = load_checkpoint(save(tmp_path / "c.pt", {"cfg": OmegaConf.create(values)}))
    assert plain(state["cfg"]) == values


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, zipped):
    path = save(tmp_path / "c.pt", {"args": Dangerous(tmp_path / "made")}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ExportError, match=r"c.pt: expected a fairseq checkpoint .* refuses to load safely .*system"):
        load_checkpoint(path)
    assert not (tmp_path / "made").exists()


def test_the_advice_to_load_unsafely_is_not_passed_on(tmp_path):
    with pytest.raises(ExportError) as error:
        load_checkpoint(save(tmp_path / "c.pt", {"args": Dangerous("x")}))
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)


def test_what_this_process_allowed_before_stays_allowed_and_is_not_used(tmp_path):
    torch.serialization.add_safe_globals([argparse.Namespace])
    before = set(map(str, torch.serialization.get_safe_globals()))
    state = load_checkpoint(save(tmp_path / "c.pt", {"args": argparse.Namespace(a=1)}))
    assert type(state["args"]) is Record
    assert set(map(str, torch.serialization.get_safe_globals())) == before


def test_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(ExportError, match="none.pt: no such file"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(ExportError, match="cannot be read"):
        load_checkpoint(tmp_path)
    for number, data in enumerate((b"", b"hello", b"PK\x03\x04 broken", b"\x80\x02broken")):
        (tmp_path / f"{number}.pt").write_bytes(data)
        with pytest.raises(ExportError, match=rf"{number}.pt: expected a fairseq checkpoint"):
            load_checkpoint(tmp_path / f"{number}.pt")
    for value, message in (([1, 2], "with a 'model' of named tensors"),
                           ({"weights": {}}, "with a 'model' of named tensors"),
                           ({"model": {"a": 3}}, "a must be a tensor")):
        torch.save(value, tmp_path / "other.pt")
        with pytest.raises(ExportError, match=message):
            load_checkpoint(tmp_path / "other.pt")


def test_a_truncated_checkpoint(tmp_path):
    path = save(tmp_path / "c.pt", {})
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:length])
        with pytest.raises(ExportError, match="c.pt: expected a fairseq checkpoint"):
            load_checkpoint(path)
