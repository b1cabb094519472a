"""Language models of fairseq are exported, and continue lines as fairseq-interactive and fairseq-generate do."""

from __future__ import annotations

import pytest
import torch

from lightseq_fairseq import fairseq_compat, model_file
from lightseq_fairseq.cli import export, generate, interactive
from lightseq_fairseq.generator.generator import Generator
from tests.cli.conftest import run_command
from tests.cli.test_generate import assert_same_lines
from tests.cli.test_generate_interactive import timeless
from tests.conftest import scramble
from tests.plugin.test_ls_transformer_lm import OPTIONS, SMALL, build

LINES = "w1 w2 w3\nw4\n\nw5 nonsense w6\nw7 w8 w9 w10 w11 w12\n"


def checkpoint(folder, data, arch, *flags):
    """What the trainer would save of a scrambled model."""
    from fairseq import options as fairseq_options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from omegaconf import OmegaConf

    _, model, _ = build(data, arch, "cross_entropy", *flags)
    scramble(model, scale=0.3)
    args = fairseq_options.parse_args_and_arch(
        fairseq_options.get_training_parser("language_modeling"),
        [str(data), "--task", "language_modeling", "--arch", arch, "--criterion", "cross_entropy", *SMALL,
         "--tokens-per-sample", "30", "--sample-break-mode", "eos", "--cpu", *flags])
    history = {"criterion_name": "CrossEntropyCriterion", "optimizer_name": "FairseqAdam", "lr_scheduler_state": {},
               "num_updates": 3}
    cfg = OmegaConf.to_container(convert_namespace_to_omegaconf(args), resolve=True, enum_to_str=True)
    torch.save({"args": None, "cfg": cfg, "model": model.state_dict(), "optimizer_history": [history],
                "extra_state": {"train_iterator": {"epoch": 1}}, "last_optimizer_state": {}}, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


def stock_lines(command, *arguments, stdin=""):
    fairseq_compat.apply()
    from fairseq_cli import generate as stock_generate
    from fairseq_cli import interactive as stock_interactive

    stock = stock_interactive if command is interactive else stock_generate
    return run_command(stock.cli_main, *arguments, stdin=stdin)[1]


@pytest.mark.parametrize("batch", ["--buffer-size 9 --batch-size 3 --min-len 0", "--buffer-size 1"])
@pytest.mark.parametrize("option", OPTIONS)
def test_lines_are_continued_as_fairseq_does(option, batch, text_bin, tmp_path):
    """In a batch fairseq lifts --min-len from a line as long as any line has a prefix, so that is left out there."""
    path = checkpoint(tmp_path, text_bin, "transformer_lm", *OPTIONS[option])
    arguments = (text_bin, "--path", path, "--task", "language_modeling", "--cpu", *batch.split(), "--beam", 4,
                 "--nbest", 2, "--max-len-b", 20)
    status, found, errors = run_command(interactive.main, *arguments, stdin=LINES)
    assert status == 0, errors
    assert_same_lines(timeless(found), timeless(stock_lines(interactive, *arguments, stdin=LINES)))


@pytest.mark.parametrize("options", ["--beam 1", "--beam 3 --lenpen 0.5 --min-len 9", "--beam 2 --unkpen 3"])
def test_a_model_file_continues_a_test_set(options, text_bin, tmp_path):
    path = checkpoint(tmp_path, text_bin, "ls_transformer_lm", "--share-decoder-input-output-embed")
    status, lines, errors = run_command(lambda: export.main([str(path), "-o", str(tmp_path / "lm.pb")]))
    assert status == 0, errors
    assert "not for LightSeq: a model of stacks 'decoder'" in lines[-1]
    common = (text_bin, "--task", "language_modeling", "--cpu", "--gen-subset", "valid", "--sample-break-mode", "eos",
              "--batch-size", 5, "--prefix-size", 2, "--max-len-b", 15, "--tokens-per-sample", 30,
              "--user-dir", "lightseq_fairseq", "--required-batch-size-multiple", 1, *options.split())
    status, found, errors = run_command(generate.main, *common, "--path", tmp_path / "lm.pb")
    assert status == 0, errors
    assert_same_lines(timeless(found), timeless(stock_lines(generate, *common, "--path", path)))


def test_the_dictionary_comes_along(text_bin, tmp_path):
    path = checkpoint(tmp_path, text_bin, "transformer_lm_gpt2_tiny")
    assert export.main([str(path), "-o", str(tmp_path / "lm.hdf5")]) == 0
    model = model_file.load(tmp_path / "lm.hdf5")
    assert model.config.stacks == "decoder" and model.config.max_target_positions == 30
    assert model.src_symbols == model.tgt_symbols and model.tgt_symbols[:4] == ("<s>", "<pad>", "</s>", "<unk>")
    generator = Generator([model], "cpu")
    first, second = model.tgt_symbols[4:6]
    assert generator.encode_line(f"{first} {second} nobody") == [2, 4, 5, 3]


def test_models_of_another_task_are_refused(text_bin, data_bin, tmp_path):
    path = checkpoint(tmp_path, text_bin, "transformer_lm")
    status, _, errors = run_command(interactive.main, text_bin, "--path", path, "--task", "translation_lev", "--cpu",
                                    stdin="w1\n")
    assert status == 2
    status, _, errors = run_command(interactive.main, text_bin, "--path", path, "--task", "language_modeling", "--cpu",
                                    "--max-len-b", "2", stdin="w1 w2 w3\n")
    assert status == 2 and "leaves nothing to say before the limit of 2; raise --max-len-b" in errors
