"""fairseq's ``dict.<lang>.txt`` without fairseq."""

from __future__ import annotations

import os
from pathlib import Path

from lightseq_fairseq.export.checkpoint import ExportError

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
"""The first symbols of every dictionary; their places are TransformerConfig's bos, pad, eos and unk."""


DATA_ADVICE = ("name the folder that the model was trained on, which is --data-bin of lightseq-export and the first "
               "argument of lightseq-generate")
"""What to do about dictionaries that are not the model's, or not there."""


def load_symbols(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Symbols in index order, as ``fairseq.data.Dictionary.load`` numbers them.

    A line is ``<symbol> <count>``, or ``<symbol> <count> #fairseq:overwrite`` for a symbol that stands there already
    and is to be found under its new index. ExportError names the line that is anything else.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise ExportError(f"{path}: no such dictionary; {DATA_ADVICE}") from None
    except OSError as error:
        raise ExportError(f"{path}: the dictionary cannot be read ({error.strerror})") from error
    except UnicodeError:
        raise ExportError(f"{path}: expected a dictionary in UTF-8, got other bytes; preprocess the data "
                          "again") from None
    if lines[-1] == "":
        lines.pop()
    symbols = list(SPECIAL)
    known = set(symbols)
    for number, line in enumerate(lines, 1):
        *words, last = line.rstrip().rsplit(" ", 1)
        overwrite = last == "#fairseq:overwrite" and bool(words)
        if overwrite:
            *words, last = words[0].rsplit(" ", 1)
        if not words or not _is_count(last):
            raise ExportError(f"{path}, line {number}: expected '<symbol> <count>', got {line!r}; "
                              "preprocess the data again")
        if words[0] in known and not overwrite:
            raise ExportError(f"{path}, line {number}: {words[0]!r} is there already; end the line with "
                              "#fairseq:overwrite to let it replace the earlier one")
        known.add(words[0])
        symbols.append(words[0])
    return tuple(symbols)


def _is_count(text: str) -> bool:
    try:
        int(text)
    except ValueError:
        return False
    return True


def merge_symbols(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    """What ``Dictionary.update`` makes of two: ``first``, then what ``second`` has besides."""
    known = set(first)
    return (*first, *(symbol for symbol in dict.fromkeys(second) if symbol not in known))
