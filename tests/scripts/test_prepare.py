"""Corpora from a local folder to what fairseq-train reads; downloads and their checksums."""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MULTI30K = ROOT.parent / "shared" / "data" / "multi30k"


def first_lines(source: Path, target: Path, count: int) -> None:
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)[:count]
    opener = gzip.open if target.suffix == ".gz" else open
    with opener(target, "wt", encoding="utf-8") as out:
        out.writelines(lines)


def sentences(data_bin: Path, split: str, language: str, pair: str) -> list[str]:
    """What was binarised, BPE undone."""
    from fairseq.data import Dictionary, data_utils

    dictionary = Dictionary.load(str(data_bin / f"dict.{language}.txt"))
    dataset = data_utils.load_indexed_dataset(str(data_bin / f"{split}.{pair}.{language}"), dictionary)
    return [dictionary.string(tokens, "@@ ") for tokens in dataset]


@pytest.mark.skipif(not MULTI30K.exists(), reason="Multi30k is not beside this checkout (../shared/data/multi30k)")
def test_multi30k_from_a_local_folder(run_script, tmp_path):
    for split, count in (("train", 600), ("val", 50), ("test_2016_flickr", 60)):
        for language in ("en", "de"):
            suffix = ".gz" if split == "val" else ""
            first_lines(MULTI30K / f"{split}.{language}", tmp_path / f"{split}.{language}{suffix}", count)
    out = tmp_path / "out"
    status, stdout, stderr = run_script("prepare_multi30k.sh", str(tmp_path), OUT=str(out), TOKENISED="1", WORKERS="1")
    assert (status, stdout.splitlines()[-1]) == (0, f"prepared {out}/data-bin"), stderr
    assert (out / "data-bin" / "dict.en.txt").read_text() == (out / "data-bin" / "dict.de.txt").read_text()
    expected = (tmp_path / "test_2016_flickr.de").read_text(encoding="utf-8").splitlines()
    assert len(sentences(out / "data-bin", "test", "de", "en-de")) == len(expected) == 60
    assert (out / "data-bin" / "codes").exists()

    again = run_script("prepare_multi30k.sh", str(tmp_path), OUT=str(out))
    assert again == (0, f"{out}/data-bin is there already; remove it to prepare it again\n", "")


def test_wmt14_from_a_local_folder_is_tokenised_and_cleaned(run_script, tmp_path):
    pairs = [("The dog doesn't sleep.", "Der Hund schläft nicht."), ("A well-known cat", "Eine sehr bekannte Katze"),
             ("too long for its other side", "kurz")]
    for split in ("train", "valid", "test"):
        for language, lines in zip(("en", "de"), zip(*pairs, strict=True), strict=True):
            (tmp_path / f"{split}.{language}").write_text("\n".join(lines * 4) + "\n", encoding="utf-8")
    status, stdout, stderr = run_script("prepare_wmt14_en_de.sh", str(tmp_path), OUT=str(tmp_path / "out"), WORKERS="1")
    assert status == 0, stderr
    assert "kept 8 of 12 training pairs" in stdout
    train = sentences(tmp_path / "out" / "data-bin", "train", "en", "en-de")
    assert train == ["The dog doesn &apos;t sleep .", "A well @-@ known cat"] * 4


def test_iwslt14_reads_the_distribution_s_markup(run_script, tmp_path):
    for language, word in (("de", "Satz"), ("en", "sentence")):
        lines = ["<url>http://x</url>", "<title>A Title</title>", "<talkid>1</talkid>"]
        lines += [f" {word}" * (1 + number % 5) + " ." for number in range(1, 46)]
        (tmp_path / f"train.tags.de-en.{language}").write_text("\n".join(lines) + "\n")
        for name in ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012"):
            (tmp_path / f"IWSLT14.{name}.de-en.{language}.xml").write_text(
                f'<refset>\n<doc docid="1">\n<seg id="1"> {word} {name} </seg>\n</doc>\n')
    out = tmp_path / "out"
    status, _, stderr = run_script("prepare_iwslt14.sh", str(tmp_path), OUT=str(out), WORKERS="1")
    assert status == 0, stderr
    assert sentences(out / "data-bin", "valid", "de", "de-en") == ["satz satz satz .", "satz ."]  # title first
    assert len(sentences(out / "data-bin", "train", "en", "de-en")) == 44
    assert len(sentences(out / "data-bin", "test", "en", "de-en")) == 5


def test_what_is_missing_or_not_parallel_is_named(run_script, tmp_path):
    out = str(tmp_path / "out")
    status, _, stderr = run_script("prepare_wmt14_en_de.sh", str(tmp_path), OUT=out)
    assert status == 1 and stderr.startswith(f"prepare_wmt14_en_de.sh: {tmp_path}/train.en(.gz) is missing")
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.en").write_text("one\ntwo\n")
        (tmp_path / f"{split}.de").write_text("eins\n")
    status, _, stderr = run_script("prepare_wmt14_en_de.sh", str(tmp_path), OUT=out)
    assert status == 1 and "has 2 lines" in stderr and "must be parallel" in stderr


def download(folder: Path, *urls: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / "download.py", folder, *urls]
    return subprocess.run(command, capture_output=True, text=True)


def test_download_trusts_once_and_then_holds(tmp_path):
    served, folder = tmp_path / "corpus.gz", tmp_path / "download"
    served.write_bytes(b"first")
    url = served.as_uri()
    digest = hashlib.sha256(b"first").hexdigest()

    first = download(folder, url)
    assert first.returncode == 0 and digest in first.stderr
    assert (folder / "SHA256SUMS").read_text() == f"{digest}  corpus.gz\n"
    served.write_bytes(b"other")
    assert download(folder, url).returncode == 0, "what is there is not fetched again"
    (folder / "corpus.gz").unlink()
    changed = download(folder, url)
    assert changed.returncode == 1 and f"expected {digest}" in changed.stderr


def test_download_refuses_what_differs_from_a_published_checksum(tmp_path):
    served = tmp_path / "corpus.gz"
    served.write_bytes(b"content")
    assert download(tmp_path / "good", f"{served.as_uri()}={hashlib.sha256(b'content').hexdigest()}").returncode == 0
    wrong = download(tmp_path / "wrong", f"{served.as_uri()}={'0' * 64}")
    assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1
    gone = download(tmp_path / "gone", (tmp_path / "absent.gz").as_uri())
    assert gone.returncode == 1 and "could not be fetched" in gone.stderr
    assert not list((tmp_path / "gone").glob("*.gz"))
