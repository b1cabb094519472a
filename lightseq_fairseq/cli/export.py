"""``lightseq-export``: fairseq checkpoints or a Hugging Face folder in, one model file out."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lightseq_fairseq.export import ExportError, from_checkpoints
from lightseq_fairseq.export.huggingface import copy_tokenizer, from_huggingface
from lightseq_fairseq.model_file import FORMATS, ModelFile, ModelFileError, format_of, save
from lightseq_fairseq.model_file.lightseq import obstacles

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def argument_parser() -> argparse.ArgumentParser:
    """The parser of ``lightseq-export``."""
    parser = argparse.ArgumentParser(
        prog="lightseq-export", description="Turn a fairseq checkpoint (transformer*, transformer_lm*, bart*, mbart*, "
        "roberta*, ours of these names) or a Hugging Face folder into a model file for lightseq-generate, "
        "lightseq_fairseq.inference and, where its format can express the model, LightSeq.")
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT",
                        help="checkpoint.pt; several with --average; with --from huggingface a folder")
    parser.add_argument("--from", dest="source", choices=("fairseq", "huggingface"), default="fairseq",
                        help="what CHECKPOINT is (default: fairseq)")
    parser.add_argument("-o", "--output", required=True, metavar="FILE",
                        help="the model file; .pb is protobuf, .hdf5 is HDF5")
    parser.add_argument("--format", choices=sorted(FORMATS), help="format of FILE whatever its suffix")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="type of the weights (default: fp32)")
    parser.add_argument("--data-bin", metavar="DIR",
                        help="folder with dict.<lang>.txt (default: the one that the checkpoint was trained on)")
    parser.add_argument("-s", "--source-lang", metavar="LANG", help="default: that of the checkpoint, or of its data")
    parser.add_argument("-t", "--target-lang", metavar="LANG", help="default: likewise")
    parser.add_argument("--average", action="store_true", help="export the mean of the checkpoints' weights")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns 0, or 2 after one sentence on stderr about what is wrong."""
    args = argument_parser().parse_args(argv)
    started = time.perf_counter()
    try:
        format = format_of(args.output, args.format)
        notes = []
        if args.source == "huggingface":
            model, dropped = _from_folder(args)
            notes = [f"dropped {name}" for name in dropped]
        else:
            model = from_checkpoints(args.checkpoints, args.data_bin, args.average, args.source_lang, args.target_lang,
                                     progress=_progress_bar)
        save(model, args.output, format, DTYPES[args.dtype])
        if args.source == "huggingface":
            tokenizer = copy_tokenizer(args.checkpoints[0], args.output)
            notes.append(f"tokenizer files are in {tokenizer}" if tokenizer else "the folder has no tokenizer files")
    except ModelFileError as error:
        print(f"lightseq-export: error: {error}", file=sys.stderr)
        return 2
    for note in notes:
        print(note)
    print(summary(model, Path(args.output), format, args.dtype, time.perf_counter() - started))
    return 0


def _from_folder(args: argparse.Namespace) -> tuple[ModelFile, tuple[str, ...]]:
    """The model of the one folder, and the tensors that it loses."""
    given = [option for option, value in (("--average", args.average), ("--data-bin", args.data_bin),
                                          ("--source-lang", args.source_lang), ("--target-lang", args.target_lang))
             if value]
    if given or len(args.checkpoints) != 1:
        raise ExportError(f"--from huggingface takes one folder, got {len(args.checkpoints)}" if not given else
                          f"{', '.join(given)} cannot be given with --from huggingface")
    found = from_huggingface(args.checkpoints[0])
    return found.model, found.dropped


def _progress_bar(paths: Sequence[Any]) -> Iterable[Any]:
    """The checkpoints, with a bar on a terminal."""
    bar: Iterable[Any] = tqdm(paths, desc="reading", unit="checkpoint", disable=None, leave=False)
    return bar


def summary(model: ModelFile, path: Path, format: str, dtype: str, seconds: float) -> str:
    """What was written, for the person at the terminal."""
    distinct = {id(tensor): tensor.numel() for tensor in model.tensors.values()}
    reasons = obstacles(model.config) if dtype == "fp32" else [f"weights in {dtype}"]
    return (f"{path}: {format}, {path.stat().st_size / 1e6:.1f} MB, {len(distinct)} tensors in {dtype} "
            f"({sum(distinct.values()) / 1e6:.1f} M parameters), {_languages(model)}"
            f"{seconds:.1f} s; " + (f"not for LightSeq: {', '.join(reasons)}" if reasons else "LightSeq reads it too"))


def _languages(model: ModelFile) -> str:
    return f"{model.source_lang}-{model.target_lang}, " if model.source_lang and model.target_lang else ""


if __name__ == "__main__":
    sys.exit(main())
