"""ls_transformer_lm with ls_cross_entropy is fairseq's language model: start, outputs, loss, generation, training."""

from __future__ import annotations

import contextlib
import io
import sys
from argparse import Namespace
from unittest import mock

import pytest
import torch

from tests import tolerances
from tests.conftest import scramble
from tests.plugin.monolingual import build_of_task

SMALL = ["--decoder-layers", "2", "--decoder-embed-dim", "24", "--decoder-ffn-embed-dim", "40",
         "--decoder-attention-heads", "4", "--decoder-input-dim", "24", "--decoder-output-dim", "24", "--dropout", "0"]
OPTIONS = {
    "plain": [],
    "tied": ["--share-decoder-input-output-embed"],
    "learned positions, gelu": ["--decoder-learned-pos", "--activation-fn", "gelu"],
    "pre-LN": ["--decoder-normalize-before"],
    "no final norm": ["--decoder-normalize-before", "--no-decoder-final-norm"],
    "other widths": ["--decoder-output-dim", "20", "--decoder-input-dim", "16"],
    "embedding norm": ["--layernorm-embedding"],
}


def build(data, arch, criterion, *flags):
    return build_of_task("language_modeling", data, arch, criterion, *SMALL, "--tokens-per-sample", "30", *flags)


def pair(data, *flags):
    _, stock, criterion = build(data, "transformer_lm", "cross_entropy", *flags)
    task, ours, fused = build(data, "ls_transformer_lm", "ls_cross_entropy", *flags)
    task.load_dataset("train")
    dataset = task.dataset("train")
    return task, (stock, criterion), (ours, fused), dataset.collater([dataset[i] for i in (3, 50, 7, 120, 33)])


@pytest.mark.parametrize("option", OPTIONS)
def test_one_seed_gives_one_model(option, text_bin):
    _, (stock, _), (ours, _), _ = pair(text_bin, *OPTIONS[option])
    expected, actual = stock.state_dict(), ours.state_dict()
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("option", OPTIONS)
def test_loss_and_gradients_are_fairseqs(option, text_bin):
    _, (stock, criterion), (ours, fused), sample = pair(text_bin, *OPTIONS[option])
    scramble(stock)
    ours.load_state_dict(stock.state_dict())
    assert sample["net_input"]["src_tokens"].eq(1).any(), "the batch must hold padding"
    expected, actual = (loss_of(model.train(), sample) for loss_of, model in ((criterion, stock), (fused, ours)))
    torch.testing.assert_close(actual[0], expected[0], **tolerances.LAYER)
    assert actual[1] == expected[1] and actual[2].keys() == expected[2].keys()
    expected[0].backward()
    actual[0].backward()
    for (name, theirs), mine in zip(stock.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, **tolerances.GRADIENT, msg=lambda m, n=name: f"{n}: {m}")
    logits = [model.eval()(**sample["net_input"])[0] for model in (stock, ours)]
    real = sample["target"].ne(1)
    torch.testing.assert_close(logits[1][real], logits[0][real], **tolerances.LAYER)


def test_generation_by_fairseqs_search(text_bin):
    task, (stock, _), (ours, _), sample = pair(text_bin)
    scramble(stock)
    ours.load_state_dict(stock.state_dict())
    prefix = sample["net_input"]["src_tokens"][:, :3]
    request = {"net_input": {"src_tokens": prefix, "src_lengths": torch.full((5,), 3)}}
    found = [task.build_generator([model.eval()], Namespace(beam=3, max_len_b=12)).generate(
        [model], request, prefix_tokens=prefix[:, 1:]) for model in (stock, ours)]
    for theirs, mine in zip(*found, strict=True):
        assert mine[0]["tokens"].tolist() == theirs[0]["tokens"].tolist()
        torch.testing.assert_close(mine[0]["positional_scores"], theirs[0]["positional_scores"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flags, named", [(["--adaptive-softmax-cutoff", "10,20"], "--adaptive-softmax-cutoff"),
                                          (["--adaptive-input"], "--adaptive-input"),
                                          (["--character-embeddings"], "--character-embeddings")])
def test_what_is_not_supported_is_named(flags, named, text_bin):
    with pytest.raises(ValueError, match=named):
        build(text_bin, "ls_transformer_lm", "ls_cross_entropy", *flags)


@pytest.mark.parametrize("arch", ["transformer_lm_gpt", "transformer_lm_gpt2_tiny"])
def test_updates_are_fairseqs(arch, text_bin, tmp_path):
    """The commands, three names swapped."""
    from fairseq_cli import train as stock_train

    from lightseq_fairseq.cli import train

    losses = []
    for prefix, main in (("", stock_train.cli_main), ("ls_", train.main)):
        folder = tmp_path / (prefix + arch)
        argv = ["train", str(text_bin), "--task", "language_modeling", "--arch", prefix + arch, "--criterion",
                prefix + "cross_entropy", "--optimizer", prefix + "adam", *SMALL, "--tokens-per-sample", "30",
                "--max-tokens", "200", "--max-update", "6", "--lr", "0.01", "--cpu", "--num-workers", "0",
                "--attention-dropout", "0",
                "--disable-validation", "--save-dir", str(folder), "--log-format", "none", "--seed", "2"]
        with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(io.StringIO()):
            main()
        losses.append(torch.load(folder / "checkpoint_last.pt", weights_only=False)["model"])
    for name, value in losses[0].items():
        if not name.endswith("k_proj.bias"):  # its true gradient is 0: Adam follows the sign of rounding errors
            torch.testing.assert_close(losses[1][name], value, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_sizes_of_gpt2_are_registered():
    from fairseq.models import ARCH_MODEL_REGISTRY

    import lightseq_fairseq.plugin  # noqa: F401

    for size in ("gpt", "gpt2_small", "gpt2_medium", "gpt2_big"):
        assert f"ls_transformer_lm_{size}" in ARCH_MODEL_REGISTRY
