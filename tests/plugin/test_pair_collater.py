"""PairCollater's batches, once packed, are those that fairseq's collater makes, bit for bit."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from lightseq_fairseq.plugin.ls_trainer import LSTrainer
from lightseq_fairseq.plugin.packed_batch import PACKED, PackingCollater
from lightseq_fairseq.plugin.pair_collater import PairCollater
from tests.conftest import build_model, training_args

PAD, EOS = 1, 2


def sentence_pairs(count: int, seed: int, longest: int = 30) -> list[dict]:
    """Sentences of 1 to ``longest`` tokens, of which many have the same length; the last token is eos."""
    rng = random.Random(seed)

    def sentence() -> torch.Tensor:
        return torch.tensor([*(rng.randrange(4, 50) for _ in range(rng.randrange(longest))), EOS])

    return [{"id": i, "source": sentence(), "target": sentence()} for i in range(count)]


@pytest.fixture
def dataset():
    from fairseq.data import LanguagePairDataset

    dictionary = SimpleNamespace(pad=lambda: PAD, eos=lambda: EOS, unk=lambda: 3)
    sentences = [pair["source"] for pair in sentence_pairs(5, seed=1)]
    return LanguagePairDataset(sentences, [5] * 5, dictionary, sentences, [5] * 5, dictionary)


def packed(collate, examples: list[dict]) -> tuple:
    sample = PackingCollater(collate, PAD, ignore_prefix_size=2)(examples)
    bucket, buffer, real = sample[PACKED]
    return sample["nsentences"], sample["ntokens"], bucket, real, buffer


@pytest.mark.parametrize("count, longest", [(1, 1), (1, 9), (2, 1), (37, 12), (300, 40)])
def test_packed_batches_are_fairseqs(count, longest, dataset):
    ours = PairCollater.instead_of(dataset.collater)
    assert isinstance(ours, PairCollater)
    ours = PairCollater(None, ours.pad, ours.eos)  # must not fall back
    examples = sentence_pairs(count, seed=count, longest=longest)
    *want, want_buffer = packed(dataset.collater, examples)
    *got, got_buffer = packed(ours, examples)
    controls = 4  # the last words are left for the trainer to fill
    assert got == want and torch.equal(got_buffer[:-controls], want_buffer[:-controls])


def test_padding_inside_a_sentence_is_left_to_fairseq(dataset):
    examples = sentence_pairs(4, seed=2)
    examples[1]["source"] = torch.tensor([7, PAD, 8, EOS])
    *_, want = packed(dataset.collater, examples)
    *_, got = packed(PairCollater.instead_of(dataset.collater), examples)
    assert torch.equal(got[:-4], want[:-4])


def test_no_examples_make_no_batch(dataset):
    assert PairCollater.instead_of(dataset.collater)([]) == {}


@pytest.mark.parametrize("change", [{"input_feeding": False}, {"buckets": [10, 20]}, {"tgt": None}], ids=str)
def test_other_batches_are_left_to_fairseq(change, dataset):
    for name, value in change.items():
        setattr(dataset, name, value)
    assert PairCollater.instead_of(dataset.collater) == dataset.collater


def test_other_collaters_are_left_alone():
    def collate(examples):
        return examples

    assert PairCollater.instead_of(collate) is collate


def test_whole_steps_use_it(data_bin, monkeypatch):
    """From the data loader on; nothing else notices if they do not."""
    monkeypatch.setattr(LSTrainer, "whole_step_devices", ("cpu",))
    flags = ["--arch", "ls_transformer", "--criterion", "ls_label_smoothed_cross_entropy", "--optimizer", "ls_adam",
             "--max-tokens", "250", "--encoder-layers", "1", "--decoder-layers", "1", "--encoder-embed-dim", "8",
             "--decoder-embed-dim", "8"]
    task, model = build_model(data_bin, *flags)
    task.load_dataset("train")
    args = training_args(data_bin, *flags)
    iterator = LSTrainer(args, task, model, task.build_criterion(args)).get_train_iterator(1, load_dataset=False)
    assert isinstance(iterator.collate_fn.collate, PairCollater)
