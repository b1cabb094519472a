"""Dictionaries are numbered as fairseq numbers them, and refused where fairseq refuses them."""

import pytest

from lightseq_fairseq.export import ExportError
from lightseq_fairseq.export.dictionary import load_symbols, merge_symbols

DICTIONARIES = {
    "plain": "the 10\nof 5\nmadeupword0000 0\n",
    "no line break at the end": "the 10\nof 5",
    "windows": "the 10\r\nof 5\r\n",
    "old mac": "the 10\rof 5\r",
    "odd symbols": "ein\u00a0wort 3\n\u2028 2\n\x85x 1\na b c 4\n# 1\n\u00fc 9\n  7\n",
    "trailing blanks": "the 10  \t\nof 5 \n",
    "overwrite": "the 10\nof 5\nthe 7 #fairseq:overwrite\n<s> 2 #fairseq:overwrite\n",
    "overwrite of a new word": "the 10 #fairseq:overwrite\n",
    "signed counts": "the -1\nof +3\nto 1_000\n",
    "empty": "",
}
BROKEN = {
    "no count": "the 10\nof\n",
    "count is a word": "the ten\n",
    "empty line": "the 10\n\nof 5\n",
    "twice": "the 10\nthe 5\n",
    "a special symbol": "<unk> 10\n",
    "overwrite alone": "#fairseq:overwrite\n",
    "overwrite without a count": "the #fairseq:overwrite\n",
}


@pytest.mark.parametrize("kind", DICTIONARIES)
def test_symbols_are_fairseqs(tmp_path, kind):
    from fairseq.data import Dictionary

    path = tmp_path / "dict.en.txt"
    path.write_bytes(DICTIONARIES[kind].encode())
    assert list(load_symbols(path)) == Dictionary.load(str(path)).symbols


@pytest.mark.parametrize("kind", BROKEN)
def test_what_fairseq_refuses_is_refused_with_the_line(tmp_path, kind):
    from fairseq.data import Dictionary

    path = tmp_path / "dict.en.txt"
    path.write_bytes(BROKEN[kind].encode())
    with pytest.raises((ValueError, RuntimeError)):
        Dictionary.load(str(path))
    with pytest.raises(ExportError, match=r"dict.en.txt, line [12]: "):
        load_symbols(path)


def test_real_dictionaries(data_bin):
    from fairseq.data import Dictionary

    for language in ("xx", "yy"):
        path = data_bin / f"dict.{language}.txt"
        assert list(load_symbols(path)) == Dictionary.load(str(path)).symbols


def test_other_files(tmp_path):
    with pytest.raises(ExportError, match="dict.en.txt: no such dictionary; name the folder"):
        load_symbols(tmp_path / "dict.en.txt")
    with pytest.raises(ExportError, match="cannot be read"):
        load_symbols(tmp_path)
    (tmp_path / "dict.de.txt").write_bytes(b"\xff\xfe 3\n")
    with pytest.raises(ExportError, match="expected a dictionary in UTF-8"):
        load_symbols(tmp_path / "dict.de.txt")


def test_merging_is_fairseqs_update(tmp_path):
    from fairseq.data import Dictionary

    dictionaries = []
    for name, text in (("a", "x 1\ny 2\nmadeupword0000 0\n"), ("b", "z 1\ny 5\nmadeupword0000 0\n")):
        (tmp_path / name).write_text(text)
        dictionaries.append(Dictionary.load(str(tmp_path / name)))
    merged = merge_symbols(load_symbols(tmp_path / "a"), load_symbols(tmp_path / "b"))
    dictionaries[0].update(dictionaries[1])
    assert list(merged) == dictionaries[0].symbols
