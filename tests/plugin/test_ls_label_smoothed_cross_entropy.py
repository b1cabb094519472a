"""--criterion ls_label_smoothed_cross_entropy against fairseq's label_smoothed_cross_entropy."""

from __future__ import annotations

import inspect

import pytest
import torch
from fairseq.criterions import build_criterion
from fairseq.data import Dictionary
from fairseq.logging import metrics
from fairseq.models import FairseqDecoder, FairseqEncoderDecoderModel
from omegaconf import OmegaConf

import lightseq_fairseq.plugin  # noqa: F401
from tests import tolerances

OURS, STOCK = "ls_label_smoothed_cross_entropy", "label_smoothed_cross_entropy"
PAD, V = 1, 11


class Task:
    target_dictionary = Dictionary()


class TableModel(FairseqEncoderDecoderModel):
    """A stock-shaped model whose logits are one parameter (B, T, V); ``packed`` makes it offer packed output."""

    def __init__(self, logits: torch.Tensor, packed: bool) -> None:
        torch.nn.Module.__init__(self)
        self.decoder = FairseqDecoder(None)
        self.logits = torch.nn.Parameter(logits)
        self.supports_packed_output = packed
        self.asked_for_packed_output = False

    def forward(self, src_tokens, prev_output_tokens, packed_output=False):
        self.asked_for_packed_output = packed_output
        return (self.logits[prev_output_tokens != PAD] if packed_output else self.logits), {}


def sample(left_pad: bool = False) -> dict:
    """Three targets of 5, 3 and 1 tokens, in a batch of 5 columns."""
    generator = torch.Generator().manual_seed(1)
    target = torch.full((3, 5), PAD)
    prev = target.clone()
    for row, length in enumerate((5, 3, 1)):
        at = slice(5 - length, 5) if left_pad else slice(0, length)
        target[row, at] = torch.randint(4, V, (length,), generator=generator)
        target[row, at.stop - 1] = 2
        prev[row, at] = torch.cat([torch.tensor([2]), target[row, at][:-1]])
    return {"net_input": {"src_tokens": None, "prev_output_tokens": prev}, "target": target, "ntokens": 9}


def run(name: str, batch: dict, packed: bool = False, reduce: bool = True, **options):
    """(loss, sample_size, logging_output), gradient of the logits."""
    generator = torch.Generator().manual_seed(2)
    model = TableModel(torch.randn(3, 5, V, generator=generator), packed)
    with torch.no_grad():  # some right answers
        model.logits[0].scatter_(-1, batch["target"][0, :, None], 9.0)
    defaults = {"label_smoothing": 0.1, "report_accuracy": True, "ignore_prefix_size": 0, "sentence_avg": False}
    criterion = build_criterion(OmegaConf.create({"_name": name} | defaults | options), Task())
    result = criterion(model, batch, reduce=reduce)
    result[0].sum().backward()
    assert model.asked_for_packed_output == packed
    return result, model.logits.grad


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("left_pad", [False, True])
@pytest.mark.parametrize("options", [
    {}, {"label_smoothing": 0.0}, {"sentence_avg": True}, {"ignore_prefix_size": 2}, {"ignore_prefix_size": 4},
], ids=str)
def test_loss_gradient_and_log_are_fairseqs(packed, left_pad, options):
    batch = sample(left_pad)
    (loss, size, log), grad = run(OURS, batch, packed, **options)
    (want_loss, want_size, want_log), want_grad = run(STOCK, batch, **options)
    torch.testing.assert_close(loss, want_loss, **tolerances.OP[torch.float32])
    torch.testing.assert_close(grad, want_grad, **tolerances.OP[torch.float32])
    assert size == want_size and set(log) == set(want_log)
    for key, value in want_log.items():
        assert float(log[key]) == pytest.approx(float(value), rel=1e-5), key
    assert log["n_correct"] > 0


@pytest.mark.parametrize("packed", [False, True])
def test_logged_values_stay_on_the_device(packed):
    """A Python number made of a GPU tensor would stop the stream in every update."""
    (_, _, log), _ = run(OURS, sample(), packed)
    for key in ("loss", "nll_loss", "n_correct", "total"):
        assert torch.is_tensor(log[key]) and log[key].dim() == 0 and not log[key].requires_grad


@pytest.mark.parametrize("packed", [False, True])
def test_unreduced_losses_sum_to_the_loss(packed):
    (losses, _, _), grad = run(OURS, sample(), packed, reduce=False)
    (loss, _, _), want_grad = run(OURS, sample(), packed)
    assert losses.shape == (9 if packed else 15, 1)
    torch.testing.assert_close(losses.sum(), loss)
    torch.testing.assert_close(grad, want_grad)


def test_reported_metrics_are_fairseqs():
    reported = []
    for name in (OURS, STOCK):
        logs = [run(name, sample(), **options)[0][2] for options in ({}, {"ignore_prefix_size": 1})]
        criterion = build_criterion(OmegaConf.create({"_name": name, "sentence_avg": False}), Task())
        with metrics.aggregate(new_root=True) as aggregated:
            criterion.reduce_metrics(logs)
        reported.append(aggregated.get_smoothed_values())
        assert criterion.logging_outputs_can_be_summed()
    assert set(reported[0]) == set(reported[1]) >= {"loss", "nll_loss", "ppl", "accuracy"}
    for key, value in reported[1].items():
        assert float(reported[0][key]) == pytest.approx(float(value), rel=1e-4), key


def test_options_are_fairseqs():
    ours, stock = (build_criterion(OmegaConf.create({"_name": name, "sentence_avg": False}), Task())
                   for name in (OURS, STOCK))
    assert inspect.signature(type(ours)) == inspect.signature(type(stock))
    assert type(ours) is not type(stock)
    assert type(ours).__name__ == type(stock).__name__, "what checkpoints record"
