"""ls_translation reads shards as fairseq's translation reads directories, and goes on in the right one."""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
from fairseq.trainer import Trainer

from lightseq_fairseq.plugin.ls_trainer import LSTrainer
from lightseq_fairseq.plugin.ls_translation import LSTranslationTask, Shard, find_shards
from tests.conftest import preprocess, training_args, write_parallel_text
from tests.plugin.test_ls_trainer import OURS, STOCK, Run, assert_same_curve

COUNTS = (30, 50, 20)


@pytest.fixture(scope="module")
def shards(toy_text, data_bin, tmp_path_factory) -> list[Path]:
    """Three directories of one dictionary, each complete."""
    folders = []
    for number, count in enumerate(COUNTS):
        text = tmp_path_factory.mktemp(f"text{number}")
        write_parallel_text(text, "train", count, seed=number)
        for name in ("valid.xx", "valid.yy", "test.xx", "test.yy"):
            shutil.copy(toy_text / name, text)
        folders.append(preprocess(text, tmp_path_factory.mktemp(f"shard{number}"), "--srcdict",
                                  str(data_bin / "dict.xx.txt"), "--tgtdict", str(data_bin / "dict.yy.txt")))
    return folders


@pytest.fixture(scope="module")
def as_folders(shards, tmp_path_factory) -> Path:
    """One directory of dictionaries and valid set, with a folder for each training set."""
    whole = tmp_path_factory.mktemp("folders")
    for path in shards[0].iterdir():
        if not path.name.startswith("train"):
            shutil.copy(path, whole)
    for number, shard in enumerate(shards):
        folder = whole / f"shard{number + 9}"  # 9, 10, 11: by number, not by letter
        folder.mkdir()
        for path in shard.glob("train.*"):
            shutil.copy(path, folder)
    return whole


@pytest.fixture(scope="module")
def as_files(shards, tmp_path_factory) -> Path:
    """LightSeq's: train, train1, train2 in one directory."""
    whole = tmp_path_factory.mktemp("files")
    for number, shard in enumerate(shards):
        for path in shard.iterdir():
            if number == 0 or path.name.startswith("train"):
                shutil.copy(path, whole / path.name.replace("train.", f"train{number or ''}.", 1))
    return whole


def build(data, task="ls_translation", *flags) -> LSTranslationTask:
    from fairseq import tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    args = training_args(Path("unused"), "--task", task, "--arch", "ls_transformer_tiny", *flags)
    args.data = str(data)
    return tasks.setup_task(convert_namespace_to_omegaconf(args).task)


def joined(*folders) -> str:
    return ":".join(map(str, folders))


def epochs(task, count=5):
    """What each epoch's batches are, as fairseq's trainer makes them."""
    found = []
    for epoch in range(1, count + 1):
        if epoch == 1 or task.has_sharded_data("train"):
            task.load_dataset("train", epoch=epoch, combine=True)
        batches = task.get_batch_iterator(task.dataset("train"), max_tokens=150, seed=3, epoch=epoch,
                                          disable_iterator_cache=True).next_epoch_itr(shuffle=True)
        found.append([{"id": batch["id"], "target": batch["target"], **batch["net_input"]} for batch in batches])
    return found


def assert_same(found, expected):
    assert [len(batches) for batches in found] == [len(batches) for batches in expected]
    for mine, theirs in zip(sum(found, []), sum(expected, []), strict=True):
        for name in theirs:
            assert torch.equal(mine[name], theirs[name]), name


def test_one_shard_is_fairseqs_translation(data_bin):
    task = build(data_bin)
    assert not task.has_sharded_data("train")
    assert_same(epochs(task, 3), epochs(build(data_bin, "translation"), 3))


@pytest.mark.parametrize("kind", ["list", "folders", "files"])
def test_shards_are_fairseqs_directories(kind, shards, as_folders, as_files):
    data = {"list": joined(*shards), "folders": as_folders, "files": f"{as_files}:"}[kind]
    task = build(data)
    assert task.has_sharded_data("train")
    found = epochs(task)
    assert_same(found, epochs(build(joined(*shards), "translation")))
    assert [sum(len(batch["id"]) for batch in batches) for batches in found] == [*COUNTS, *COUNTS[:2]]
    task.load_dataset("valid", epoch=2)
    assert len(task.dataset("valid")) == 40


def test_several_shards_an_epoch(shards, as_files):
    task = build(joined(*shards), "ls_translation", "--npick", "2")
    found = epochs(task, 3)
    assert [sum(len(batch["id"]) for batch in batches) for batches in found] == [80, 50, 70]
    whole = build(joined(*shards), "ls_translation", "--npick", "3")
    assert not whole.has_sharded_data("train")
    stock = build(as_files, "translation", "--upsample-primary", "1")  # which combines train, train1, train2
    assert_same(epochs(whole, 2), epochs(stock, 2))


def test_the_next_shard_is_read_meanwhile(shards, monkeypatch):
    read, readers = LSTranslationTask._read, []

    def note(self, wanted, *args):
        readers.append((wanted, threading.current_thread() is threading.main_thread()))
        return read(self, wanted, *args)

    monkeypatch.setattr(LSTranslationTask, "_read", note)
    task = build(joined(*shards))
    for epoch in (1, 2, 3):
        task.load_dataset("train", epoch=epoch, combine=True)
        assert len(task.dataset("train")) == COUNTS[epoch - 1]
    task._reading[2].result()
    order = [(Shard(str(shards[number]), "train"),) for number in (0, 1, 2, 0)]
    assert readers == list(zip(order, (True, False, False, False), strict=True))
    task.load_dataset("train", epoch=3, combine=True)  # as after a resume: what was read ahead is not it
    assert len(task.dataset("train")) == COUNTS[2]


def test_what_fails_in_the_background_is_raised(shards, tmp_path):
    copies = [shutil.copytree(shard, tmp_path / shard.name) for shard in shards[:2]]
    task = build(joined(*copies))
    for path in copies[1].glob("train.*"):
        path.unlink()
    task.load_dataset("train", epoch=1)
    with pytest.raises(FileNotFoundError, match="train"):
        task.load_dataset("train", epoch=2)


def train(data, save_dir, updates, *flags):
    from lightseq_fairseq.cli import train as lightseq_train

    argv = ["train", str(data), "--task", "ls_translation", "-s", "xx", "-t", "yy", "--arch", "ls_transformer_tiny",
            "--criterion", "ls_label_smoothed_cross_entropy", "--optimizer", "ls_adam", "--lr", "0.003", "--max-tokens",
            "120", "--max-update", str(updates), "--cpu", "--num-workers", "0", "--save-dir", str(save_dir),
            "--log-format", "none", "--seed", "2", "--no-epoch-checkpoints", *flags]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(io.StringIO()):
        lightseq_train.main()
    return torch.load(save_dir / "checkpoint_last.pt", weights_only=False)


@pytest.mark.parametrize("kind", ["folders", "files"])
def test_training_goes_on_in_the_shard_where_it_stopped(kind, as_folders, as_files, tmp_path):
    data = {"folders": as_folders, "files": f"{as_files}:"}[kind]
    whole = train(data, tmp_path / "whole", 14)
    assert whole["extra_state"]["train_iterator"]["epoch"] >= 3
    for updates in (6, 14):  # within the second epoch, whose shard is not the first
        resumed = train(data, tmp_path / "resumed", updates)
        if updates == 6:
            assert resumed["extra_state"]["train_iterator"]["epoch"] == 2
    assert resumed["extra_state"]["train_iterator"] == whole["extra_state"]["train_iterator"]
    for name, value in whole["model"].items():
        assert torch.equal(resumed["model"][name], value), name


def test_whole_steps_over_shards_are_fairseqs_updates(shards, as_folders, tmp_path, monkeypatch, device):
    """lightseq-train's own loop, and fairseq's over the same directories: 20 updates are more than four epochs."""
    stock = Run(joined(*shards), tmp_path / "stock", monkeypatch, device, Trainer, *STOCK)
    ours = Run(as_folders, tmp_path / "ours", monkeypatch, device, LSTrainer, *OURS, "--task", "ls_translation")
    assert ours.trainer._step is not None, ours.trainer.obstacle
    assert_same_curve(ours, stock)
    assert len({log["ntokens"] for log in ours.logs}) > 5


def test_what_cannot_be_read_is_named(shards, tmp_path):
    with pytest.raises(ValueError, match="--npick must lie between 1 and the 3 shards.*got 4"):
        build(joined(*shards), "ls_translation", "--npick", "4")
    with pytest.raises(ValueError, match="--num-batch-buckets goes with --npick 1"):
        build(joined(*shards), "ls_translation", "--npick", "2", "--num-batch-buckets", "4")
    with pytest.raises(ValueError, match="hdfs://host/data:; fetch the shards first"):
        build("hdfs://host/data:")
    with pytest.raises(ValueError, match="expected binarised train, train1.*got none of them"):
        build(f"{tmp_path}:")
    with pytest.raises(ValueError, match="lie in one directory"):
        find_shards(joined(*shards), "train", True)
