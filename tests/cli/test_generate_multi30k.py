"""Real text: lightseq-generate prints fairseq-generate's lines for the 1000 sentences of Multi30k's test_2016_flickr.

The model is fairseq's, trained here for a minute: far from good, but its mistakes are as sharp a test as any.
"""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path

import pytest

from lightseq_fairseq.cli import export
from tests.cli.conftest import train_stock
from tests.cli.test_generate import assert_same_lines, by_sentence, ours, theirs, words

MULTI30K = Path(__file__).parents[3] / "shared" / "data" / "multi30k"
BATCHES = ("--batch-size", "100", "--required-batch-size-multiple", "1", "--max-len-b", "40")
SPLITS = {"train": ("train", 8000), "valid": ("val", 100), "test": ("test_2016_flickr", 1000)}
pytestmark = pytest.mark.skipif(not MULTI30K.is_dir(), reason=f"no Multi30k text in {MULTI30K}")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Subwords of the first sentences, English as .xx and German as .yy."""
    from subword_nmt.apply_bpe import BPE
    from subword_nmt.learn_bpe import learn_bpe

    folder = tmp_path_factory.mktemp("multi30k")
    lines = {}
    for split, (name, count) in SPLITS.items():
        for ours_, language in (("xx", "en"), ("yy", "de")):
            with open(MULTI30K / f"{name}.{language}") as file:
                lines[split, ours_] = list(islice(file, count))
    with open(folder / "codes", "w") as codes:
        learn_bpe(lines["train", "xx"] + lines["train", "yy"], codes, 1500)
    with open(folder / "codes") as codes:
        bpe = BPE(codes)
    for (split, language), sentences in lines.items():
        (folder / f"{split}.{language}").write_text("".join(bpe.process_line(line) for line in sentences))
    return folder


@pytest.fixture(scope="module")
def data(text) -> Path:
    from tests.conftest import preprocess

    return preprocess(text, text / "data-bin", "--joined-dictionary")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    sizes = [flag for side in ("encoder", "decoder") for flag in (
        f"--{side}-layers", "2", f"--{side}-embed-dim", "64", f"--{side}-ffn-embed-dim", "128",
        f"--{side}-attention-heads", "4")]
    return train_stock(data, tmp_path_factory.mktemp("stock"), *sizes, "--share-all-embeddings", "--max-tokens",
                       "1500", "--max-update", "500", "--dropout", "0")


@pytest.fixture(scope="module")
def model_file(data, trained) -> Path:
    path = trained.with_suffix(".pb")
    assert export.main([str(trained), "-o", str(path), "--data-bin", str(data)]) == 0
    return path


@pytest.mark.parametrize("options", [
    "--beam 1", "--beam 4", "--beam 4 --lenpen 0.6", "--beam 5 --lenpen 0.6 --remove-bpe", "--beam 5 --nbest 5",
    "--beam 4 --prefix-size 2", "--beam 4 --unkpen 2 --max-len-a 1.2 --max-len-b 5", "--beam 4 --print-alignment",
    "--beam 4 --print-alignment soft",
])
def test_lines_of_the_whole_test_set(options, data, trained, model_file):
    arguments = (*BATCHES, *options.split())
    assert_nearly_all_same(ours(data, "--path", model_file, *arguments), theirs(data, "--path", trained, *arguments))


def assert_nearly_all_same(found: list[str], expected: list[str]) -> None:
    """Both round differently, by 1e-6, so that of 30 000 choices between candidates one may fall otherwise."""
    found_lines, expected_lines = by_sentence(found), by_sentence(expected)
    assert list(found_lines) == list(expected_lines) and len(found_lines) == 1000
    other = [s for s, lines in expected_lines.items() if list(map(words, lines)) != list(map(words, found_lines[s]))]
    assert len(other) <= 1, [(found_lines[s], expected_lines[s]) for s in other]
    for sentence in expected_lines.keys() - set(other):
        assert_same_lines(found_lines[sentence], expected_lines[sentence])
    assert other or found[-1] == expected[-1]  # BLEU


def test_blocked_ngrams(data, trained, model_file, monkeypatch):
    """Against fairseq's rule without its mistake, which is to look for the n-gram in the padding after the tokens."""
    from fairseq.ngram_repeat_block import NGramRepeatBlock

    forbid = NGramRepeatBlock._no_repeat_ngram
    monkeypatch.setattr(NGramRepeatBlock, "_no_repeat_ngram", lambda self, tokens, lprobs, batch, beam, step: forbid(
        self, tokens[:, :step + 1], lprobs, batch, beam, step))
    arguments = (*BATCHES, "--beam", "4", "--no-repeat-ngram-size", "2")
    assert_nearly_all_same(ours(data, "--path", model_file, *arguments), theirs(data, "--path", trained, *arguments))


def test_replaced_unknown_words(text, data, trained, tmp_path):
    for language in ("xx", "yy"):
        shutil.copy(data / f"dict.{language}.txt", tmp_path)
        shutil.copy(text / f"test.{language}", tmp_path / f"test.xx-yy.{language}")
    arguments = (tmp_path, "--path", trained, "--dataset-impl", "raw", "--replace-unk", "", "--unkpen", "50",
                 *BATCHES, "--beam", "4")
    assert_nearly_all_same(ours(*arguments), theirs(*arguments))
