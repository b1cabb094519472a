"""``--task ls_translation``: fairseq's translation over data in shards, one or some of them an epoch.

Options and batches are those of ``translation``; only where an epoch's sentences come from differs. Shards are

    dir1:dir2:dir3   the directories, as fairseq has it
    dir              its folders that hold a training set each, dir/shard0, dir/shard1, ..., in the order of their names
    dir:             the files train, train1, train2, ... of one directory, as LightSeq has it

Epoch e reads ``--npick`` shards from number (e - 1) * npick on, round and round; what the next epoch needs is read
meanwhile. Dictionaries and other splits are those of the directory itself or, where it has none, of its first shard.
A directory without shards is fairseq's ``translation``.
"""

import copy
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from fairseq.data import ConcatDataset, LanguagePairDataset, data_utils
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask


def _bear_a_trailing_colon() -> None:
    """fairseq looks for further validation sets in each directory, and behind a colon in one without a name."""
    stock = data_utils._find_extra_valid_paths
    data_utils._find_extra_valid_paths = lambda data: stock(data.rstrip(os.pathsep))


if hasattr(data_utils, "_find_extra_valid_paths"):  # absent in older versions
    _bear_a_trailing_colon()


class Shard(NamedTuple):
    """A training set on disk."""

    directory: str
    split: str
    """``train``, or its number beside it."""


@dataclass
class LSTranslationConfig(TranslationConfig):
    """fairseq's options and two more, whose types fairseq wants as types: this module's annotations are no strings."""

    npick: int = field(default=1, metadata={"help": "shards that one epoch reads"})
    file_shards: bool = field(
        default=False,
        metadata={"help": "train, train1, ... of the data directory are shards, instead of one training set; data that "
                          "ends in a colon asks for the same"})


@register_task("ls_translation", dataclass=LSTranslationConfig)
class LSTranslationTask(TranslationTask):
    """fairseq's TranslationTask with shards."""

    cfg: LSTranslationConfig
    shards: list[Shard]
    _reading: tuple[tuple[Shard, ...], bool, Future[Any]] | None = None
    """The shards that are read ahead, whether each of them combines files, and what comes of it."""

    @classmethod
    def setup_task(cls, cfg: LSTranslationConfig, **kwargs: Any) -> "LSTranslationTask":
        """ValueError names data that cannot be read as shards."""
        if "://" in cfg.data:
            raise ValueError(f"ls_translation: data must be on a file system, got {cfg.data}; fetch the shards first")
        if cfg.data.endswith(os.pathsep):  # LightSeq's sign, at which fairseq would look for a directory without name
            cfg.data, cfg.file_shards = cfg.data.rstrip(os.pathsep), True
        home, shards = find_shards(cfg.data, cfg.train_subset, cfg.file_shards)
        if not 1 <= cfg.npick <= len(shards):
            raise ValueError(f"ls_translation: --npick must lie between 1 and the {len(shards)} shards of {cfg.data}, "
                             f"got {cfg.npick}")
        if cfg.npick > 1 and cfg.num_batch_buckets > 0:
            raise ValueError("ls_translation: --num-batch-buckets goes with --npick 1 only")
        data, cfg.data = cfg.data, home
        task = super().setup_task(cfg, **kwargs)
        cfg.data, task.shards = data, shards
        task.home = home
        return task

    def has_sharded_data(self, split: str) -> bool:
        """Whether epochs differ in what they read."""
        return len(self.shards) > self.cfg.npick

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> None:
        """``split`` of ``epoch`` (from 1), which only the training set depends on."""
        if split != self.cfg.train_subset:
            self.datasets[split] = self._read((Shard(self.home, split),), combine)
            return
        combine = combine and not self.cfg.file_shards
        shards = self.shards_of(epoch)
        ahead, self._reading = self._reading, None
        if ahead is not None and ahead[:2] == (shards, combine):
            self.datasets[split] = ahead[2].result()
        else:
            self.datasets[split] = self._read(shards, combine)
        if self.has_sharded_data(split):
            following = self.shards_of(epoch + 1)
            reader = ThreadPoolExecutor(1, "ls_translation")
            self._reading = following, combine, reader.submit(self._read, following, combine, True)
            reader.shutdown(wait=False)

    def shards_of(self, epoch: int) -> tuple[Shard, ...]:
        """What epoch ``epoch``, from 1, reads."""
        first, count = (epoch - 1) * self.cfg.npick, len(self.shards)
        return tuple(self.shards[(first + i) % count] for i in range(self.cfg.npick))

    def _read(self, shards: tuple[Shard, ...], combine: bool, ahead: bool = False) -> LanguagePairDataset:
        datasets = []
        for shard in shards:
            cfg = copy.copy(self.cfg)
            cfg.data, cfg.train_subset = shard.directory, shard.split
            task = TranslationTask(cfg, self.src_dict, self.tgt_dict)
            task.load_dataset(shard.split, combine=combine)
            datasets.append(task.dataset(shard.split))
            if ahead:
                _into_memory(shard)
        return datasets[0] if len(datasets) == 1 else _joined(datasets)


def find_shards(data: str, split: str, files: bool) -> tuple[str, list[Shard]]:
    """The directory of dictionaries and other splits, and the shards of the training set ``split``."""
    directories = data.split(os.pathsep)
    if files:
        if len(directories) > 1:
            raise ValueError(f"ls_translation: shards that are files lie in one directory, got {data}")
        numbers = sorted({int(match[1] or 0) for path in Path(data).glob("*.idx")
                          if (match := re.fullmatch(rf"{re.escape(split)}(\d*)\.[^.]+-[^.]+\.[^.]+\.idx", path.name))})
        if numbers != list(range(len(numbers))) or not numbers:
            raise ValueError(f"ls_translation: expected binarised {split}, {split}1, {split}2, ... in {data}, got "
                             f"{', '.join(split + str(number or '') for number in numbers) or 'none of them'}")
        return data, [Shard(data, f"{split}{number or ''}") for number in numbers]
    found = [shard for directory in directories for shard in _folders(directory, split)]
    home = directories[0] if any(Path(directories[0]).glob("dict.*.txt")) else found[0].directory
    return home, found


def _folders(directory: str, split: str) -> list[Shard]:
    """The directory itself if it holds a training set or none of its folders does, else those that do."""
    def holds(folder: Path) -> bool:
        return any(folder.glob(f"{split}.*-*.*.idx")) or any(folder.glob(f"{split}.*-*.*"))

    folders = [] if holds(Path(directory)) else [path for path in Path(directory).glob("*/") if holds(path)]
    folders.sort(key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)])
    return [Shard(str(folder), split) for folder in folders] or [Shard(directory, split)]


def _into_memory(shard: Shard) -> None:
    """Ask the system to read the shard's files, which fairseq only maps."""
    for path in Path(shard.directory).glob(f"{shard.split}.*-*.*.bin"):
        with open(path, "rb") as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _joined(datasets: list[LanguagePairDataset]) -> LanguagePairDataset:
    """The sentences of several datasets that differ in nothing else, one after the other."""
    first = datasets[0]
    sources, targets = ([getattr(dataset, side) for dataset in datasets] for side in ("src", "tgt"))
    aligned = [dataset.align_dataset for dataset in datasets if dataset.align_dataset is not None]
    if len(aligned) not in (0, len(datasets)):
        raise ValueError("ls_translation: alignments must be there for all shards of an epoch or for none")
    return LanguagePairDataset(
        ConcatDataset(sources), np.concatenate([dataset.src_sizes for dataset in datasets]), first.src_dict,
        ConcatDataset(targets), np.concatenate([dataset.tgt_sizes for dataset in datasets]), first.tgt_dict,
        left_pad_source=first.left_pad_source, left_pad_target=first.left_pad_target, shuffle=first.shuffle,
        align_dataset=ConcatDataset(aligned) if aligned else None, eos=first.eos,
        pad_to_multiple=first.pad_to_multiple)
