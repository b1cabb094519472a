"""Updates of language models and of masked ones, taken as whole steps, are fairseq's updates.

On the CPU the steps run without a graph, everything else being the same; --device cuda replays graphs.
"""

from __future__ import annotations

import pytest
import torch
from fairseq.trainer import Trainer

import lightseq_fairseq.plugin  # noqa: F401
from lightseq_fairseq.plugin.ls_trainer import LSTrainer
from lightseq_fairseq.plugin.packed_batch import Bucket, PackedBatch
from tests.plugin import recorded_run
from tests.plugin.test_ls_trainer import assert_same_training

RECIPE = [flag for flag in recorded_run.RECIPE if flag not in ("--label-smoothing", "0.1")]
DECODER = ["--decoder-layers", "2", "--decoder-embed-dim", "24", "--decoder-ffn-embed-dim", "40",
           "--decoder-attention-heads", "4", "--decoder-input-dim", "24", "--decoder-output-dim", "24",
           "--dropout", "0", "--attention-dropout", "0"]
ENCODER = ["--encoder-layers", "2", "--encoder-embed-dim", "24", "--encoder-ffn-embed-dim", "40",
           "--encoder-attention-heads", "4", "--dropout", "0", "--attention-dropout", "0", "--mask-prob", "0.3"]
SENTENCES, BLOCKS = ["--sample-break-mode", "eos"], ["--sample-break-mode", "none", "--tokens-per-sample", "32"]
CASES = {
    "sentences": ("language_modeling", "transformer_lm", "cross_entropy", [*DECODER, *SENTENCES]),
    "blocks": ("language_modeling", "transformer_lm", "cross_entropy", [*DECODER, *BLOCKS]),
    "gpt, update-freq": ("language_modeling", "transformer_lm_gpt", "cross_entropy",
                         [*DECODER, *SENTENCES, "--update-freq", "2"]),
    "sentence-avg": ("language_modeling", "transformer_lm", "cross_entropy", [*DECODER, *SENTENCES, "--sentence-avg"]),
    "label smoothing": ("language_modeling", "transformer_lm", "label_smoothed_cross_entropy",
                        [*DECODER, *SENTENCES, "--label-smoothing", "0.1"]),
    "masked": ("masked_lm", "roberta_base", "masked_lm", [*ENCODER, *SENTENCES]),
    "masked blocks": ("masked_lm", "roberta_base", "masked_lm", [*ENCODER, *BLOCKS]),
    "masked, untied": ("masked_lm", "roberta", "masked_lm", [*ENCODER, *SENTENCES, "--untie-weights-roberta"]),
}


class Run(recorded_run.Run):
    recipe = RECIPE

    @staticmethod
    def parse(data, *flags):
        from fairseq import options

        return options.parse_args_and_arch(options.get_training_parser(), input_args=[str(data), "--cpu", *flags])


def run(case, prefix, data, folder, monkeypatch, device, *flags):
    task, arch, criterion, options = CASES[case]
    return Run(data, folder, monkeypatch, device, LSTrainer if prefix else Trainer, "--task", task, "--arch",
               prefix + arch, "--criterion", prefix + criterion, "--optimizer", prefix + "adam", *options, *flags)


@pytest.mark.parametrize("case", CASES)
def test_updates_are_fairseqs(case, text_bin, tmp_path, monkeypatch, device):
    stock, ours = (run(case, prefix, text_bin, tmp_path / f"-{prefix}", monkeypatch, device) for prefix in ("", "ls_"))
    assert_same_training(ours, stock)


@pytest.mark.parametrize("case", ["sentences", "masked"])
def test_resuming_changes_nothing(case, text_bin, tmp_path, monkeypatch, device):
    given = case, "ls_", text_bin
    whole = run(*given, tmp_path / "whole", monkeypatch, device, "--dropout", "0.2")
    run(*given, tmp_path / "parts", monkeypatch, device, "--dropout", "0.2", "--max-update", "7")
    rest = run(*given, tmp_path / "parts", monkeypatch, device, "--dropout", "0.2")
    assert rest.logs == whole.logs[7:]
    for name, value in whole.state.items():
        assert torch.equal(rest.state[name], value), name


def text_sample(lengths, width):
    tokens = torch.full((len(lengths), width), 1)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.arange(4, 4 + length)
    return {"net_input": {"src_tokens": tokens}, "target": tokens.roll(-1, 1).where(tokens.ne(1), 1)}


def test_a_text_has_targets_alone():
    batch = PackedBatch.of(text_sample([3, 70, 1], 70), 1)
    assert batch.real == Bucket(0, 74, 3, 70, crosses=False)
    assert batch.bucket.source == 0 and batch.bucket.target == 128 and batch.bucket.width == 96
    views = batch.bucket.views(batch.buffer)
    assert views.previous_tokens[:74].tolist() == [4, 5, 6, *range(4, 74), 4]
    assert views.cu_target[:4].tolist() == [0, 3, 73, 74] and views.cu_target[-1] == 128
    assert views.targets[74:].eq(1).all()
    bucket = batch.bucket._replace(target=192, width=192)
    moved = bucket.views(batch.moved(bucket, 1).buffer)
    assert torch.equal(moved.previous_tokens[:74], views.previous_tokens[:74]) and moved.cu_target[-1] == 192


@pytest.mark.parametrize("places", [[[0, 2], [], [4]], [[], [], []]], ids=["some", "none"])
def test_masked_tokens_are_rows_of_their_text(places):
    sample = text_sample([3, 9, 5], 9)
    sample["target"] = torch.full_like(sample["target"], 1)
    for row, own in enumerate(places):
        sample["target"][row, own] = sample["net_input"]["src_tokens"][row, own] + 100
    batch = PackedBatch.of(sample, 1, masked=True)
    begins, count = [0, 3, 12], sum(map(len, places))
    rows = [begin + place for begin, own in zip(begins, places, strict=True) for place in own]
    views = batch.bucket.views(batch.buffer)
    assert batch.real == Bucket(17, count, 3, 9, crosses=False) and batch.bucket.target == 64
    assert views.previous_tokens[:count].tolist() == rows
    assert views.targets[:count].tolist() == [int(views.source_tokens[row]) + 100 for row in rows]
    assert views.targets[count:].eq(1).all() and views.previous_tokens.max() < batch.bucket.source


def test_a_bucket_that_texts_fill_is_not_widened():
    """Targets that attend to nothing need no source beside them."""
    sample = text_sample([64] * 8, 64)
    sample["target"] = sample["target"].where(torch.arange(64) % 7 == 0, 1)
    assert PackedBatch.of(sample, 1, masked=True).bucket.source == 512
