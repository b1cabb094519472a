"""What fairseq's RoBERTa computes, stock or ours, its exported encoder computes too."""

from __future__ import annotations

import contextlib
import io
import sys
from unittest import mock

import pytest
import torch

from lightseq_fairseq.export import ExportError, from_checkpoints
from lightseq_fairseq.generator.text_encoder import TextEncoder
from lightseq_fairseq.model_file import load, save
from tests import tolerances
from tests.plugin.test_ls_roberta import KINDS, SMALL, build


def train(data, folder, prefix, kind):
    """The last checkpoint of three updates."""
    from lightseq_fairseq.cli import train

    arch, options = KINDS[kind]
    argv = ["train", str(data), "--task", "masked_lm", "--arch", prefix + arch, "--criterion", f"{prefix}masked_lm",
            "--optimizer", f"{prefix}adam", *SMALL, *options, "--tokens-per-sample", "40", "--max-tokens", "200",
            "--max-update", "3", "--lr", "0.03", "--cpu", "--num-workers", "0", "--disable-validation", "--save-dir",
            str(folder), "--log-format", "none"]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(io.StringIO()):
        train.main()
    return folder / "checkpoint_last.pt"


@pytest.mark.parametrize("prefix", ["", "ls_"], ids=["stock", "ours"])
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_fairseqs(kind, prefix, text_bin, tmp_path, device):
    checkpoint = train(text_bin, tmp_path, prefix, kind)
    arch, options = KINDS[kind]
    _, stock, _ = build(text_bin, arch, "masked_lm", *options)
    stock.load_state_dict(torch.load(checkpoint, weights_only=False)["model"])
    save(from_checkpoints([checkpoint]), tmp_path / "roberta.pb")
    model = load(tmp_path / "roberta.pb")
    assert model.src_symbols[-1] == "<mask>" and model.config.max_source_positions == 40
    tokens = torch.randint(4, 40, (4, 9))
    tokens[1, 5:] = tokens[2, 1:] = 1
    real = tokens.ne(1)
    with torch.no_grad():
        expected, _ = stock.eval()(tokens, features_only=True)
    found = TextEncoder(model, device)(tokens).hidden.cpu()
    torch.testing.assert_close(found[real], expected[real], **tolerances.LAYER)


def test_another_dictionary_is_refused(text_bin, data_bin, tmp_path):
    checkpoint = train(text_bin, tmp_path, "ls_", "base")
    (tmp_path / "dict.txt").write_text("w1 1\nw2 1\n")
    with pytest.raises(ExportError, match=r"expected a dictionary of \d+ types, got 6"):
        from_checkpoints([checkpoint], tmp_path)
