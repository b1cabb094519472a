"""lightseq-generate prints what fairseq-generate prints, from checkpoints and from model files."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightseq_fairseq import fairseq_compat
from lightseq_fairseq.cli import export, generate, interactive
from lightseq_fairseq.generator.options import refused_options
from tests.cli.conftest import run_command

ROOT = Path(__file__).parents[2]
HERE = ("--cpu", "--num-workers", "0")
ALL = ("--required-batch-size-multiple", "1")
"""Without this fairseq drops the last batch if its size is no multiple of 8."""


def ours(*arguments: object) -> list[str]:
    status, lines, errors = run_command(generate.main, *arguments, *HERE)
    assert status == 0, errors
    return lines


def theirs(*arguments: object) -> list[str]:
    fairseq_compat.apply()
    from fairseq_cli import generate as stock

    return run_command(stock.cli_main, *arguments, *HERE)[1]


def compare(data: Path, path: object, *arguments: object) -> list[str]:
    """Run both; every line must agree but for the last digits of scores. Returns ours."""
    found = ours(data, "--path", path, *ALL, *arguments)
    expected = theirs(data, "--path", path, *ALL, *arguments)
    assert_same_lines(found, expected)
    return found


def assert_same_lines(found: list[str], expected: list[str]) -> None:
    assert len(found) == len(expected) > 0
    for line, reference in zip(found, expected, strict=True):
        if line != reference:
            assert words(line) == words(reference)
            assert numbers(line) == pytest.approx(numbers(reference), abs=2e-4)


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+|-inf|nan", line)] if line[:2] in NUMBERED else []


def words(line: str) -> str:
    return re.sub(r"-?\d+\.\d+|-inf|nan", "#", line) if line[:2] in NUMBERED else line


NUMBERED = ("H-", "D-", "P-", "A-")


@pytest.fixture(scope="module")
def model_files(checkpoint, data_bin, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("model-files")
    files = {suffix: folder / f"model.{suffix}" for suffix in ("pb", "hdf5")}
    for path in files.values():
        assert export.main([str(checkpoint), "-o", str(path), "--data-bin", str(data_bin)]) == 0
    return files


@pytest.mark.parametrize("options", [
    "--beam 1", "--beam 4", "--beam 5", "--beam 4 --lenpen 0.6", "--beam 5 --lenpen 0.6 --batch-size 7",
    "--beam 5 --nbest 3", "--beam 9 --nbest 12", "--beam 4 --unkpen -3", "--beam 4 --unnormalized",
    "--beam 4 --min-len 5 --max-len-b 6", "--beam 4 --max-len-a 0.7 --max-len-b 1 --batch-size 16",
    "--beam 4 --prefix-size 1", "--beam 4 --prefix-size 3 --min-len 4", "--beam 3 --temperature 1.7",
    "--beam 4 --match-source-len", "--beam 4 --diversity-rate 0.4", "--beam 4 --skip-invalid-size-inputs-valid-test",
    "--beam 4 --print-alignment", "--beam 4 --print-alignment soft --nbest 2", "--beam 4 --quiet",
    "--beam 4 --scoring chrf", "--beam 4 --sacrebleu --remove-bpe", "--beam 4 --max-tokens 100",
])
def test_lines_equal_fairseqs(options, data_bin, checkpoint):
    compare(data_bin, checkpoint, *options.split())


@pytest.mark.parametrize("options", ["--beam 4", "--beam 5 --lenpen 0.6 --nbest 2"])
def test_an_ensemble(options, data_bin, checkpoint, second_checkpoint, model_files):
    compare(data_bin, f"{checkpoint}:{second_checkpoint}", *options.split())
    mixed = ours(data_bin, "--path", f"{model_files['pb']}:{second_checkpoint}", *options.split())
    assert mixed == ours(data_bin, "--path", f"{checkpoint}:{second_checkpoint}", *options.split())


@pytest.mark.parametrize("suffix", ["pb", "hdf5"])
def test_model_files_give_the_checkpoints_lines(suffix, data_bin, checkpoint, model_files):
    assert ours(data_bin, "--path", model_files[suffix]) == ours(data_bin, "--path", checkpoint)


def test_no_repeated_bigrams(data_bin, checkpoint):
    """fairseq's Python blocker compares with padding and blocks nothing, so there is nothing to compare with."""
    for line in ours(data_bin, "--path", checkpoint, "--beam", "4", "--no-repeat-ngram-size", "2"):
        if line.startswith("H-"):
            said = line.split("\t")[2].split()
            assert max(Counter(zip(said, said[1:], strict=False)).values(), default=1) == 1


def test_diverse_groups_do_not_depend_on_the_batch(data_bin, checkpoint):
    """fairseq takes a sentence's group overlaps from whichever sentence has its id as place in the batch, or fails;
    fairseq-interactive, whose sentences have no ids, is compared with ours in test_generate_interactive.py."""
    options = (data_bin, "--path", checkpoint, "--beam", "6", "--nbest", "6", "--diverse-beam-groups", "3")
    alone, together = (by_sentence(ours(*options, "--batch-size", size)) for size in (1, 64))
    for sentence, lines in alone.items():
        assert_same_lines(together[sentence], lines)


def by_sentence(lines: list[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for line in lines:
        if not line.startswith("Generate "):
            groups.setdefault(line.split("\t")[0][2:], []).append(line)
    return groups


@pytest.mark.parametrize("options", ["", "--sampling-topk 3", "--sampling-topp 0.6"])
def test_samples_have_fairseqs_frequencies(options, data_bin, checkpoint):
    arguments = [data_bin, "--path", checkpoint, *ALL, "--sampling", *options.split(), "--beam", "100", "--nbest",
                 "100", "--max-len-b", "1", "--batch-size", "10"]
    counts = [first_words(lines) for lines in (ours(*arguments), theirs(*arguments))]
    assert counts[0].keys() == counts[1].keys() and len(counts[0]) == 60
    for sentence, drawn in counts[0].items():
        reference = counts[1][sentence]
        for word in drawn | reference:
            assert abs(drawn[word] - reference[word]) <= 30  # of 100: four deviations of the difference, at p = 1/2


def first_words(lines: list[str]) -> dict[str, Counter[str]]:
    drawn: dict[str, Counter[str]] = {}
    for line in lines:
        if line.startswith("H-"):
            sentence, _, text = line.split("\t")
            drawn.setdefault(sentence, Counter())[text] += 1
    return drawn


def test_a_seed_repeats_samples(data_bin, checkpoint):
    arguments = [data_bin, "--path", checkpoint, "--sampling", "--beam", "3", "--nbest", "3"]
    runs = [ours(*arguments, "--seed", seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_no_sentence_is_lost(data_bin, checkpoint):
    """fairseq drops the last four of sixty, which are no batch of 8; where it translates, the lines are the same."""
    found, expected = (run(data_bin, "--path", checkpoint, "--batch-size", "16")[:-1] for run in (ours, theirs))
    assert (len(by_sentence(found)), len(by_sentence(expected))) == (60, 56)
    assert_same_lines([line for line in found if line.split("\t")[0][2:] in by_sentence(expected)], expected)


@pytest.fixture(scope="module")
def raw_data(data_bin, toy_text, tmp_path_factory) -> Path:
    """Text and dictionaries side by side, for --dataset-impl raw; two source words are unknown."""
    folder = tmp_path_factory.mktemp("raw")
    for language in ("xx", "yy"):
        shutil.copy(data_bin / f"dict.{language}.txt", folder)
        shutil.copy(toy_text / f"test.{language}", folder / f"test.xx-yy.{language}")
    return folder


def test_unknown_words_are_replaced_by_the_word_they_look_at(raw_data, checkpoint):
    options = (raw_data, "--path", checkpoint, "--dataset-impl", "raw", "--beam", "3", "--unkpen", "-6", *ALL)
    plain, replaced = by_sentence(theirs(*options, "--print-alignment")), by_sentence(ours(*options, "--replace-unk"))
    seen = 0
    for sentence, (source, _, hypothesis, *_, alignment) in plain.items():
        words = source.split("\t")[1].split()
        pairs = [pair.split("-") for pair in alignment.split("\t")[1].split()]
        text = hypothesis.split("\t")[2].split()
        expected = [words[int(pairs[i][0])] if word == "<unk>" else word for i, word in enumerate(text)]
        assert replaced[sentence][2].split("\t")[2].split() == expected
        seen += "<unk>" in text
    assert seen > 3


def test_replacing_nothing_changes_nothing(raw_data, checkpoint):
    compare(raw_data, checkpoint, "--dataset-impl", "raw", "--unkpen", "100", "--replace-unk", "")


def test_dtype_is_taken(data_bin, checkpoint):
    """Names of what --fp16 asks for, too; the test's model is small enough for 8 bits to be no gain."""
    exact = ours(data_bin, "--path", checkpoint, *ALL)
    assert ours(data_bin, "--path", checkpoint, *ALL, "--dtype", "fp32") == exact
    assert len(ours(data_bin, "--path", checkpoint, *ALL, "--dtype", "int8")) == len(exact)
    status, _, errors = run_command(generate.main, data_bin, "--path", checkpoint, "--fp16", "--dtype", "bf16", *HERE)
    assert status == 2 and "bf16 and fp16 were all asked for" in errors


@pytest.mark.parametrize("options", ["", "--prefix-size 2", "--score-reference", "--print-alignment"])
def test_on_a_gpu_batches_stay_on_the_host(options, data_bin, checkpoint, monkeypatch):
    """fairseq moves them, and then asks the GPU for each word that it prints. Its ``main`` takes any machine to have a
    GPU here, and ours searches on the CPU. (Where there is a GPU, its data loader's thread asks which one: with a wrong
    answer, which this test gave at first, it dies, and the command waits for ever.)"""
    def moved(*args, **kwargs):
        raise AssertionError("a batch was moved")

    arguments = (data_bin, "--path", checkpoint, *ALL, *options.split(), "--num-workers", "0")
    expected = run_command(generate.main, *arguments, "--cpu")
    for name in ("_generator", "_scorer"):
        stock = getattr(generate.Substitute, name)
        monkeypatch.setattr(generate.Substitute, name,
                            staticmethod(lambda files, device, dtype, stock=stock: stock(files, "cpu", dtype)))
    monkeypatch.setattr("fairseq_cli.generate.torch", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True)))
    monkeypatch.setattr("fairseq.utils.move_to_cuda", moved)
    found = run_command(generate.main, *arguments)
    assert found[0] == expected[0] == 0, found[2]
    assert_same_lines(found[1], expected[1])


def test_sentences_are_looked_up_by_number_as_fairseq_looks_them_up():
    fairseq_compat.import_fairseq()
    from fairseq.data import Dictionary

    words = Dictionary()
    for index in range(50):
        words.add_symbol(f"word{index}" + "@@" * (index % 3 == 0))
    rows = torch.randint(0, len(words), (9, 12), generator=torch.Generator().manual_seed(5))
    ours, asked = generate.of_numbers(Dictionary.string), []
    for sentence in (*rows, rows[0].int(), rows[:3], rows[0, :0], rows[1].tolist()):
        for options in ({}, {"bpe_symbol": "@@ "}, {"escape_unk": True, "extra_symbols_to_ignore": {2, 7}},
                        {"include_eos": True, "unk_string": "?"}):
            assert ours(words, sentence, **options) == Dictionary.string(words, sentence, **options)
    with pytest.MonkeyPatch.context() as patch:  # stock asks a tensor, ours a number
        patch.setattr(Dictionary, "__getitem__", lambda self, index: asked.append(type(index)) or "word")
        ours(words, rows[0])
    assert set(asked) == {int}


@pytest.mark.parametrize("flag", ["--fp16", "--bf16"])
def test_half_precision_translates_alike(flag, data_bin, checkpoint):
    single, half = (by_sentence(ours(data_bin, "--path", checkpoint, *more)) for more in ((), (flag,)))
    same = [half[s][2].split("\t")[2] == single[s][2].split("\t")[2] for s in single]
    assert sum(same) > 0.7 * len(same)


@pytest.mark.parametrize("more", ["", "--batch-size 7", "--print-alignment", "--nbest 3 --beam 4", "--remove-bpe"])
def test_references_are_scored_as_fairseq_does(more, data_bin, checkpoint):
    lines = compare(data_bin, checkpoint, "--score-reference", *more.split())
    found, targets = ({line.split("\t")[0][2:]: line.split("\t")[-1] for line in lines if line.startswith(kind)}
                      for kind in ("H-", "T-"))
    assert len(found) == len(targets) > 20
    if not more:
        assert found == targets


def test_references_are_scored_by_an_ensemble(data_bin, checkpoint, second_checkpoint):
    compare(data_bin, f"{checkpoint}:{second_checkpoint}", "--score-reference")


def test_references_without_a_target_side(data_bin, checkpoint, tmp_path):
    for path in data_bin.iterdir():
        if not path.name.startswith("test.xx-yy.yy."):
            shutil.copy(path, tmp_path)
    status, _, errors = run_command(generate.main, tmp_path, "--path", checkpoint, "--score-reference", "-s", "xx",
                                    "-t", "yy", *HERE)
    assert status == 2 and "needs references" in errors


@pytest.mark.parametrize("arguments, message", [
    ("--constraints", "--constraints needs constraints, and a test set has none: give them to lightseq-interactive"),
    ("--retain-dropout", "--retain-dropout (dropout at inference)"),
    ("--lm-path lm.pt", "--lm-path (fusion with a language model)"),
    ("--iter-decode-with-beam 3", "--iter-decode-with-beam (iterative refinement)"),
    ("--print-step", "--print-step (iterative refinement)"),
    ("--model-overrides {'dropout':0.1}", "--model-overrides"),
    ("--iter-decode-max-iter 3", "--iter-decode-max-iter (iterative refinement)"),
    ("--beam-mt 2", "--beam-mt (the first pass of speech translation)"),
    ("--eos-token <x>", "--eos-token (the language tag of speech translation)"),
    ("--num-shards 2 --shard-id 1", "--distributed-world-size and --distributed-rank share"),
    ("--fp16 --bf16", "error: --fp16 and --bf16 exclude each other: give one of them"),
    ("--memory-efficient-fp16 --bf16", "error: --fp16 and --bf16 exclude each other: give one of them"),
    ("--beam 0", "beam must be at least 1, got 0"),
    ("--beam 4 --diverse-beam-groups 3", "diverse_beam_groups must divide beam, got 3 and 4"),
    ("--sampling-topk 4", "sampling_topk needs sampling"),
    ("--sampling --nbest 2", "--sampling requires --nbest to be equal to --beam"),
    ("--replace-unk", "--replace-unk requires a raw text dataset"),
    ("--min-len 9 --max-len-b 3", "min_len 9 exceeds the longest output"),
    ("--gen-subset nonsense", "Dataset not found: nonsense"),
    ("-s zz -t yy", "dict.zz.txt"),
    ("--max-source-positions 3", "exceeds max_source_positions|Size of sample"),
])
def test_what_is_not_taken_is_named(arguments, message, data_bin, checkpoint):
    assert_refused((data_bin, "--path", checkpoint, *arguments.split()), message)


@pytest.mark.parametrize(("asked", "workers"), [((), 0), (("--num-workers", "2"), 2)])
def test_a_worker_process_is_started_only_if_asked_for(asked, workers, data_bin):
    from fairseq import options

    with generate._own_options(reads_ahead=True):
        parser = options.get_generation_parser()
    assert options.parse_args_and_arch(parser, [str(data_bin), *asked]).num_workers == workers


def test_every_option_of_generation_is_taken_or_refused():
    """A new one of fairseq's must not be ignored; what stands here fairseq's own main sees to, or fairseq ignores."""
    from fairseq.dataclass.configs import GenerationConfig

    of_main = {"nbest", "unnormalized", "prefix_size", "print_alignment", "replace_unk", "no_seed_provided",
               "score_reference"}
    translated = {"constraints"}
    without_effect = {"no_early_stop", "no_beamable_mm", "sacrebleu"}
    taken = {*generate._SAME_NAME, *generate._ZERO_FOR_NONE, *translated, *of_main, *without_effect}
    known = {field.name for field in dataclasses.fields(GenerationConfig) if not field.name.startswith("_")}
    assert taken <= known
    changed = {name: object() for name in known - taken}
    refused = {words.split()[0].removeprefix("--").replace("-", "_") for words in refused_options(changed, {})}
    assert refused == known - taken


def test_advice_on_dictionaries_names_what_there_is(tmp_path, checkpoint, data_bin):
    (tmp_path / "data").mkdir()
    for side in ("xx", "yy"):
        (tmp_path / "data" / f"dict.{side}.txt").write_text("w1 1\n")
    arguments = (tmp_path / "data", "--path", checkpoint, "-s", "xx", "-t", "yy")
    assert_refused(arguments, "got 5; name the folder that the model was trained on, which is --data-bin of "
                              "lightseq-export and the first argument of lightseq-generate")


def assert_refused(arguments: tuple[object, ...], message: str) -> None:
    status, lines, errors = run_command(generate.main, *arguments, *HERE)
    said = [line for line in errors.splitlines() if line.startswith("lightseq-generate: error: ")]
    assert status == 2 and len(said) == 1 and not any(line.startswith("H-") for line in lines)
    assert any(part in said[0] for part in message.split("|")), said[0]


def test_an_unknown_value_is_a_usage_error(data_bin, checkpoint):
    status, _, errors = run_command(generate.main, data_bin, "--path", checkpoint, "--beam", "five")
    assert status == 2 and errors.splitlines()[-1].endswith("error: argument --beam: invalid int value: 'five'")


def test_missing_and_broken_files(tmp_path, data_bin, model_files):
    truncated, nonsense = tmp_path / "model.pb", tmp_path / "checkpoint.pt"
    truncated.write_bytes(model_files["pb"].read_bytes()[:5000])
    nonsense.write_bytes(b"nonsense")
    assert_refused((data_bin, "--path", truncated), str(truncated))
    assert_refused((data_bin, "--path", nonsense), str(nonsense))
    assert_refused((data_bin, "--path", tmp_path / "absent.pb"), "absent.pb")
    assert_refused((tmp_path / "absent", "--path", model_files["pb"]), "absent")
    assert_refused((data_bin,), "--path required for generation!")


def test_dictionaries_that_are_missing_or_others(tmp_path, data_bin, checkpoint, model_files):
    shutil.copytree(data_bin, tmp_path / "data")
    words = (tmp_path / "data" / "dict.xx.txt").read_text().splitlines()
    (tmp_path / "data" / "dict.xx.txt").write_text("\n".join(reversed(words)) + "\n")
    assert_refused((tmp_path / "data", "--path", model_files["pb"]), "as source type 4, but the data's dictionary has")
    (tmp_path / "data" / "dict.xx.txt").write_text("\n".join(words[:-1]) + "\n")
    for path in (model_files["pb"], checkpoint):
        assert_refused((tmp_path / "data", "--path", path), f"{len(words) + 3}")
    (tmp_path / "data" / "dict.xx.txt").unlink()
    assert_refused((tmp_path / "data", "--path", model_files["pb"], "-s", "xx", "-t", "yy"), "dict.xx.txt")


@pytest.mark.parametrize("more", [(), ("--log-format", "json", "--log-interval", "1")], ids=["bar", "json"])
def test_the_command_in_a_process_of_its_own(more, data_bin, model_files, checkpoint):
    result = subprocess.run(
        [sys.executable, "-m", "lightseq_fairseq.cli.generate", str(data_bin), "--path", str(model_files["pb"]),
         "--cpu", "--batch-size", "8", *more], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert re.search(r"Translated 60 sentences \([\d,]+ tokens\) in [\d.]+s \([\d.]+ sentences/s, [\d.]+ tokens/s\)",
                     result.stdout + result.stderr)
    assert ('"wps"' in result.stdout + result.stderr) == bool(more)
    printed = [line for line in result.stdout.splitlines() if re.match(r"[STHDP]-\d|Generate ", line)]
    assert_same_lines(printed, ours(data_bin, "--path", checkpoint, "--batch-size", "8"))


@pytest.fixture
def searches_on_the_device(monkeypatch):
    """lightseq-generate as on a GPU, with few slots; the fixture is the list of those that were taken."""
    from lightseq_fairseq.generator import device_search, generator
    from lightseq_fairseq.layers.compiled import CompiledDecoder

    made, slots = [], generator.Generator.slots

    def counted(self, *arguments):
        made.append(slots(self, *arguments))
        return made[-1]

    def on_device(*arguments):
        built = generator.Generator(*arguments)
        built.device_search = device_search.DeviceSearch(built.models[0])
        return built

    monkeypatch.setattr(generator.Generator, "slots", counted)
    monkeypatch.setattr("lightseq_fairseq.ops.linear._PREPACKED", None)
    monkeypatch.setattr(CompiledDecoder, "serves", lambda *arguments: False)
    monkeypatch.setattr(device_search, "_MOST_SLOTS", 9)
    monkeypatch.setattr("lightseq_fairseq.cli.ahead.MANY", 20)
    monkeypatch.setattr(generate.Substitute, "_generator", staticmethod(on_device))
    return made


@pytest.mark.parametrize("options", [
    "--beam 3 --batch-size 7", "--beam 2 --max-len-a 0.7 --max-len-b 1 --prefix-size 2",
    "--beam 4 --nbest 2 --max-tokens 100 --max-len-b 15"])
def test_refill_changes_no_line(options, data_bin, checkpoint, searches_on_the_device):
    arguments = (data_bin, "--path", checkpoint, *ALL, *options.split())
    expected = ours(*arguments, "--no-refill")
    assert not searches_on_the_device
    found = ours(*arguments)
    assert_same_lines(found, expected)
    refill, = searches_on_the_device
    assert refill.slots.count == 9 and refill.idle and refill.tickets == 60, "all sentences of the test set"


def test_refill_is_refused_by_name(data_bin, checkpoint):
    status, _, errors = run_command(generate.main, data_bin, "--path", checkpoint, "--refill", *HERE)
    assert status == 2 and "--refill is for the search of one encoder-decoder model on a GPU" in errors
    status, _, errors = run_command(generate.main, data_bin, "--path", checkpoint, "--refill", "--score-reference",
                                    *HERE)
    assert status == 2 and "--score-reference does none" in errors
    status, _, errors = run_command(interactive.main, data_bin, "--path", checkpoint, "--refill", "--cpu")
    assert status == 2 and "unrecognized arguments: --refill" in errors
