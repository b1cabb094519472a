"""lightseq-interactive reads lines and prints what fairseq-interactive prints."""

from __future__ import annotations

import re

import pytest

from lightseq_fairseq import fairseq_compat
from lightseq_fairseq.cli import interactive
from tests.cli.conftest import run_command
from tests.cli.test_generate import assert_same_lines

LINES = "w1 w2 w3\nw4\n\nw5 nonsense w6\n   \nw7 w8 w9 w10 w11 w12\n"
LANGUAGES = ("-s", "xx", "-t", "yy", "--cpu")


def ours(*arguments: object, stdin: str = LINES) -> list[str]:
    status, lines, errors = run_command(interactive.main, *arguments, *LANGUAGES, stdin=stdin)
    assert status == 0, errors
    return lines


def theirs(*arguments: object, stdin: str = LINES) -> list[str]:
    fairseq_compat.apply()
    from fairseq_cli import interactive as stock

    return run_command(stock.cli_main, *arguments, *LANGUAGES, stdin=stdin)[1]


def timeless(lines: list[str]) -> list[str]:
    return [line for line in lines if re.match("[STHDPAC]-", line)]


@pytest.mark.parametrize("options", ["", "--beam 4 --nbest 3", "--buffer-size 4 --batch-size 3 --lenpen 0.6",
                                     "--buffer-size 9 --max-tokens 20", "--print-alignment",
                                     "--buffer-size 6 --batch-size 6 --beam 6 --nbest 6 --diverse-beam-groups 3"])
def test_lines_equal_fairseqs(options, data_bin, checkpoint):
    arguments = (data_bin, "--path", checkpoint, *options.split())
    found = ours(*arguments)
    assert_same_lines(timeless(found), timeless(theirs(*arguments)))
    assert [line[:4] for line in found if line.startswith("W-")] == [f"W-{i}\t" for i in range(6)]


@pytest.mark.parametrize("options", ["--constraints", "--constraints unordered --beam 4 --nbest 3 --max-len-b 60",
                                     "--constraints ordered --buffer-size 9 --batch-size 3 --print-alignment"])
def test_constraints_behind_a_line(options, data_bin, checkpoint):
    stdin = "w1 w2 w3\tv9 v8\tv7\nw4\n\nw5 w6\tv3\tv3 v4\tv3\nw6 w7\tv1 nonsense\n"
    arguments = (data_bin, "--path", checkpoint, *options.split())
    found = ours(*arguments, stdin=stdin)
    assert_same_lines(timeless(found), timeless(theirs(*arguments, stdin=stdin)))
    assert [line for line in found if line.startswith("C-")] == [
        "C-0\tv9 v8", "C-0\tv7", "C-3\tv3", "C-3\tv3 v4", "C-3\tv3", "C-4\tv1 <unk>"]
    said = [line.split("\t")[2] for line in found if line.startswith("H-0")]
    assert said and all("v9 v8" in line and "v7" in line for line in said)


def test_constraints_that_do_not_fit_are_an_error(data_bin, checkpoint):
    status, _, errors = run_command(interactive.main, data_bin, "--path", checkpoint, *LANGUAGES, "--constraints",
                                    "--max-len-b", "2", stdin="w1\tv2 v3\tv4\n")
    assert status == 2 and "the constraints of sentence 0 have 3 tokens, more than its longest output, 2" in errors


def test_speed_is_reported_at_the_end(data_bin, checkpoint, caplog):
    with caplog.at_level("INFO", "lightseq_fairseq.cli.interactive"):
        ours(data_bin, "--path", checkpoint)
    assert re.fullmatch(r"Translated 6 sentences \(\d+ tokens\) in [\d.]+s \([\d.]+ sentences/s, [\d.]+ tokens/s\)",
                        caplog.messages[-1])


def test_empty_lines_have_a_translation_of_their_own(data_bin, checkpoint):
    found = ours(data_bin, "--path", checkpoint, stdin="\n\n")
    assert [line for line in found if line.startswith("S-")] == ["S-0\t", "S-1\t"]
    assert len([line for line in found if line.startswith("H-")]) == 2


def test_no_lines_no_output(data_bin, checkpoint):
    assert timeless(ours(data_bin, "--path", checkpoint, stdin="")) == []


def test_a_line_beyond_the_models_limit_is_an_error_or_left_out(data_bin, checkpoint):
    stdin = "w1 " * 5000 + "\nw2 w3\n"
    arguments = (data_bin, "--path", checkpoint, *LANGUAGES)
    status, _, errors = run_command(interactive.main, *arguments, stdin=stdin)
    said = [line for line in errors.splitlines() if line.startswith("lightseq-interactive: error: ")]
    assert status == 2 and len(said) == 1 and "max_positions=(1024, 1024)" in said[0]
    skipped = ours(data_bin, "--path", checkpoint, "--skip-invalid-size-inputs-valid-test", "--buffer-size", "2",
                   "--batch-size", "2", stdin=stdin)
    assert [line[:4] for line in skipped if line.startswith("H-")] == ["H-1\t"]


def test_unknown_words_are_replaced(data_bin, checkpoint):
    lines = ours(data_bin, "--path", checkpoint, "--replace-unk", "--unkpen", "-9", "--beam", "2")
    said = {line[2]: line.split("\t")[2].split() for line in lines if line.startswith("H-")}
    assert set(said["0"]) <= {"w1", "w2", "w3"} and set(said["2"]) <= {"<eos>"}


@pytest.mark.parametrize("arguments, message", [
    ("--print-alignment soft", "--print-alignment soft (hard works)"),
    ("--replace-unk --remove-bpe", "--replace-unk together with --remove-bpe"),
    ("--constraints --sampling", "sampling and constraints exclude each other"),
    ("--batch-size 4", "--batch-size cannot be larger than --buffer-size"),
])
def test_what_is_not_taken_is_named(arguments, message, data_bin, checkpoint):
    status, _, errors = run_command(interactive.main, data_bin, "--path", checkpoint, *LANGUAGES, *arguments.split(),
                                    stdin=LINES)
    said = [line for line in errors.splitlines() if line.startswith("lightseq-interactive: error: ")]
    assert status == 2 and len(said) == 1 and message in said[0]
