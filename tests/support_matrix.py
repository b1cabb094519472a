"""Which models can do what: the table of README.md, each cell of which is a test (test_support.py).

A cell holds what the table says and a function that does it through the public door, with a tiny model, and compares
the outcome with fairseq's or Hugging Face's own; or that comes back with the sentence by which it is refused.

    python -m tests.support_matrix    # writes the table into README.md
"""

from __future__ import annotations

import copy
import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from fairseq import checkpoint_utils
from fairseq_cli import train as stock_train

import lightseq_fairseq.inference as lsi
from lightseq_fairseq import fairseq_compat
from lightseq_fairseq.cli import export, generate, interactive, train
from lightseq_fairseq.export import ExportError
from lightseq_fairseq.huggingface import accelerate
from lightseq_fairseq.huggingface.acceleration import FAMILIES
from lightseq_fairseq.plugin.ls_trainer import LSTrainer
from tests import tolerances
from tests.cli.conftest import run_command
from tests.cli.test_generate import assert_same_lines
from tests.cli.test_generate_interactive import timeless
from tests.cli.test_language_model import LINES, stock_lines
from tests.conftest import scramble
from tests.export.hugging_face_models import MODELS, folder_of, random_model
from tests.export.test_huggingface import HIDDEN, padded, texts
from tests.generator.stock_model import fairseq_hypotheses, sentences
from tests.generator.test_language_model import hugging_face, until_eos
from tests.huggingface.models import batch, pair
from tests.huggingface.test_accelerate import assert_same_gradients, assert_same_outputs, compute
from tests.plugin import test_ls_bart, test_ls_roberta, test_ls_transformer_lm
from tests.plugin.recorded_run import SIZES, recorded_logs
from tests.test_inference import hugging_face_targets

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- support: python -m tests\.support_matrix -->\n).*?(<!-- end -->)", re.DOTALL)
UPDATES = 10


# What every cell works with -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Stock:
    """A training by fairseq itself."""

    checkpoint: Path
    logs: list[dict[str, float]]
    """What its criterion said of each update."""

    @functools.cached_property
    def model(self) -> Any:
        """fairseq's own, in evaluation on the CPU."""
        fairseq_compat.apply()
        (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(self.checkpoint)])
        return model.eval()


@dataclass
class Place:
    """The device, a folder, binarised data by the names of their fixtures, and models that cells share."""

    device: torch.device
    folder: Path
    data: Callable[[str], Path]
    trained: dict[str, Stock] = field(default_factory=dict)

    def stock(self, family: Fairseq) -> Stock:
        """The family's model after :data:`UPDATES` updates of fairseq-train."""
        if family.arch not in self.trained:
            self.trained[family.arch] = run_training(self, family, "", stock_train.cli_main)
        return self.trained[family.arch]

    def scrambled(self, family: Fairseq) -> Stock:
        """The same with noise on every parameter: after so few updates all sentences would be answered alike."""
        name = f"{family.arch}, scrambled"
        if name not in self.trained:
            stock = self.stock(family)
            model, state = copy.deepcopy(stock.model), torch.load(stock.checkpoint)
            state["model"] = scramble(model, scale=0.3).state_dict()
            self.trained[name] = Stock(stock.checkpoint.with_name("scrambled.pt"), [])
            torch.save(state, self.trained[name].checkpoint)
        return self.trained[name]


# fairseq's families ---------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Fairseq:
    """A family by the names of fairseq; ours are the same behind ``ls_``."""

    arch: str
    criterion: str
    flags: tuple[str, ...]
    task: str = "translation"
    data: str = "data_bin"


def run_training(place: Place, family: Fairseq, prefix: str, command: Callable[[], None]) -> Stock:
    """fairseq-train's or our ``command``, names of architecture, criterion and optimizer behind ``prefix``."""
    folder = place.folder / f"{prefix}{family.arch}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LSTrainer, "whole_step_devices", ("cpu", "cuda"))  # on the CPU the same steps without a graph
        patch.delattr(checkpoint_utils.save_checkpoint, "best", raising=False)
        logs = recorded_logs(patch)
        status, _, errors = run_command(
            command, place.data(family.data), "--task", family.task, "--arch", prefix + family.arch, "--criterion",
            prefix + family.criterion, "--optimizer", prefix + "adam", "--lr", "3e-3", "--lr-scheduler", "inverse_sqrt",
            "--warmup-updates", "5", "--clip-norm", "1", "--max-tokens", "250",
            "--max-update", str(UPDATES), "--dropout", "0", "--attention-dropout", "0", "--num-workers", "0",
            "--disable-validation", "--log-format", "none", "--seed", "2", "--distributed-world-size", "1",
            "--save-dir", folder, *family.flags, *(["--cpu"] if place.device.type == "cpu" else []))
    assert status == 0, errors
    return Stock(folder / "checkpoint_last.pt", logs)


def trains(family: Fairseq, place: Place) -> None:
    """The losses of fairseq-train, update by update, and its parameters in the end."""
    stock = place.stock(family)
    with mock.patch.object(LSTrainer, "_build_step", autospec=True, side_effect=LSTrainer._build_step) as built:
        ours = run_training(place, family, "ls_", train.main)
    assert built.called
    assert len(ours.logs) == UPDATES
    for found, expected in zip(ours.logs, stock.logs, strict=True):
        assert found == pytest.approx(expected, rel=tolerances.LOSS_CURVE["rtol"])
    first, *_, last = (log["loss"] / log["sample_size"] for log in stock.logs)
    assert last < first
    fairseq_compat.apply()
    theirs, found = (torch.load(run.checkpoint)["model"] for run in (stock, ours))
    assert list(found) == list(theirs)
    names = [name for name in theirs if not name.endswith("k_proj.bias")]  # gradients of 0, whose sign is rounding's
    expected, found = (torch.cat([model[name].flatten().cpu() for name in names]) for model in (theirs, found))
    assert (found - expected).norm() < 1e-3 * expected.norm()


def translates(family: Fairseq, place: Place, load: Callable[..., Any]) -> None:
    """Hypotheses and scores of fairseq's beam search."""
    model = place.scrambled(family).model
    rows = sentences(4, len(model.decoder.dictionary))
    ours = load(lsi.Bart if "bart" in family.arch else lsi.Transformer, beam=3, lenpen=1.0, max_len_b=20)
    tokens, scores = ours.infer([row.tolist() for row in rows])
    expected = fairseq_hypotheses([model], rows, beam_size=3, max_len_b=20)
    assert tokens.shape[:2] == (4, 3)
    for found, score, hypotheses in zip(tokens.tolist(), scores, expected, strict=True):
        assert [until_eos(ids, 2) for ids in found] == [best["tokens"].tolist() for best in hypotheses]
        np.testing.assert_allclose(score, [float(best["score"]) for best in hypotheses], **tolerances.SCORE)


def continues(family: Fairseq, place: Place, load: Callable[..., Any]) -> None:
    """The losses of texts by fairseq's model, and the words that are the likeliest by it."""
    model = place.scrambled(family).model
    rows = [torch.cat((row[-1:], row[:-1])) for row in sentences(4, len(model.decoder.dictionary), longest=12)]
    gpt = load(lsi.Gpt, max_len_b=8)
    with torch.no_grad():
        losses = [float(torch.nn.functional.cross_entropy(model(row[None])[0][0, :-1], row[1:])) for row in rows]
        expected = []
        for row in rows:
            for _ in range(8):
                logits = model(row[None])[0][0, -1]
                logits[1] = -torch.inf  # padding is not said
                row = torch.cat((row, logits.argmax()[None]))
                if row[-1] == 2:
                    break
            expected.append(row.tolist())
    np.testing.assert_allclose(gpt.ppl([row.tolist() for row in rows]), losses, **tolerances.SCORE)
    found = gpt.sample([row.tolist() for row in rows]).tolist()
    assert [ids[:len(row)] for ids, row in zip(found, expected, strict=True)] == expected


def encodes(family: Fairseq, place: Place, load: Callable[..., Any]) -> None:
    """fairseq's features of padded sentences."""
    model = place.scrambled(family).model
    tokens, mask = padded(texts(high=40), pad=1)
    with torch.no_grad():
        expected, _ = model(tokens, features_only=True)
    found = torch.from_numpy(load(lsi.Bert).infer(tokens.numpy()))
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **tolerances.LAYER)


def from_checkpoint(family: Fairseq, place: Place, cls: Any, **options: Any) -> Any:
    """What runs a checkpoint as it is."""
    return cls.from_fairseq_pretrained(place.scrambled(family).checkpoint, place.data(family.data), 3, place.device,
                                       **options)


def exported(place: Place, source: Path, suffix: str, *flags: str) -> Path:
    """The file that lightseq-export writes of a checkpoint or a folder."""
    path = place.folder / f"{source.parent.name}-{source.name}{suffix}"
    status, lines, errors = run_command(lambda: export.main([*flags, str(source), "-o", str(path)]))
    assert status == 0, errors
    assert lines[-1].startswith(f"{path}: {'hdf5' if suffix == '.hdf5' else 'protobuf'}, ")
    return path


def from_file(family: Fairseq, place: Place, suffix: str, cls: Any, **options: Any) -> Any:
    """What runs a model file."""
    return cls(exported(place, place.scrambled(family).checkpoint, suffix), 3, place.device, **options)


def prints_lines(family: Fairseq, place: Place) -> None:
    """The lines of fairseq-generate and fairseq-interactive, of a checkpoint."""
    common = (place.data(family.data), "--path", place.scrambled(family).checkpoint, "--task", family.task, "--beam", 3,
              *(["--cpu"] if place.device.type == "cpu" else []))
    test_set = ("--gen-subset", "valid", "--required-batch-size-multiple", 1, "--max-len-b", 20, "--num-workers", 0)
    if family.task == "language_modeling":
        test_set += ("--sample-break-mode", "eos", "--prefix-size", 2, "--tokens-per-sample", 30)
    for command, options, stdin in ((generate, test_set, ""), (interactive, ("--max-len-b", 20), LINES)):
        status, found, errors = run_command(command.main, *common, *options, stdin=stdin)
        assert status == 0, errors
        assert_same_lines(timeless(found), timeless(stock_lines(command, *common, *options, stdin=stdin)))


def refuses_to_generate(family: Fairseq, place: Place) -> list[str]:
    """What lightseq-generate says of an encoder alone."""
    status, lines, errors = run_command(
        generate.main, place.data(family.data), "--path", place.scrambled(family).checkpoint, "--task",
        "language_modeling", "--gen-subset", "valid", "--cpu")
    assert (status, lines) == (2, [])
    return [errors]


# Hugging Face's -------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class HuggingFace:
    """A family by names of :data:`tests.export.hugging_face_models.MODELS`, and classes with a head to be trained."""

    names: tuple[str, ...]
    cls: type = lsi.Bert
    trained: tuple[str, ...] = ()
    first_token: int | None = None
    """Every target begins with it, as with its language."""


def stock_of(name: str) -> Any:
    """A random model in evaluation on the CPU, of a family that is supported or of one that is not."""
    if name in MODELS:
        return random_model(name)
    cls, config = {"t5": (transformers.T5ForConditionalGeneration, transformers.T5Config(
                       vocab_size=53, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3)),
                   "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(
                       vocab_size=53, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                       num_attention_heads=3))}[name]
    return cls(config).eval()


def infers(family: HuggingFace, place: Place, load: Callable[..., Any]) -> None:
    """Hugging Face's hidden states, targets of beam search, or continuations."""
    for name in family.names:
        stock = stock_of(name)
        check = {lsi.Bert: infers_hidden_states, lsi.Bart: infers_targets, lsi.Gpt: infers_continuations}[family.cls]
        check(stock, functools.partial(load, folder_of(stock, place.folder / name), family.cls))
        if family.first_token is not None:
            stock.generation_config.forced_bos_token_id = family.first_token
            folder = folder_of(stock, place.folder / f"{name}, first token")
            (folder / "tokenizer.json").write_text("{}")  # with which generation_config.json travels
            infers_targets(stock, functools.partial(load, folder, family.cls))


def infers_hidden_states(stock: Any, load: Callable[..., Any]) -> None:
    """Of the last layer, in the tokens' own slots, and the pooler's."""
    ids, mask = padded(texts(), stock.config.pad_token_id)
    with torch.no_grad():
        expected = stock(ids, attention_mask=mask)
    bert, real = load(), mask.bool()
    torch.testing.assert_close(torch.from_numpy(bert.infer(ids.numpy()))[real], expected.last_hidden_state[real],
                               **HIDDEN)
    torch.testing.assert_close(torch.from_numpy(bert.pool(ids.numpy())), expected.pooler_output, **HIDDEN)


def infers_targets(stock: Any, load: Callable[..., Any], beam: int = 3) -> None:
    """The best target of a search, behind a first token that generation_config may force."""
    rows, eos = texts(), stock.config.eos_token_id
    bart = load(beam=beam, nbest=1, lenpen=1.0, min_len=0, max_len_b=10, force_eos=False, no_repeat_ngram_size=2)
    tokens, _ = bart.infer([row.tolist() for row in rows])
    first = stock.generation_config.forced_bos_token_id
    expected = hugging_face_targets(stock, rows, bart.config.start, num_beams=beam, early_stopping=beam > 1,
                                    no_repeat_ngram_size=2, forced_bos_token_id=first)
    assert first is None or all(best[0] == first for best in tokens[:, 0].tolist())
    assert [until_eos(best, eos) for best in tokens[:, 0].tolist()] == [until_eos(row, eos) for row in expected]


def infers_continuations(stock: Any, load: Callable[..., Any]) -> None:
    """The likeliest words behind each text."""
    rows, gpt = texts(), load(max_len_b=9)
    found = gpt.sample([row.tolist() for row in rows]).tolist()
    for row, ids in zip(rows, found, strict=True):
        expected = [*row.tolist(), *until_eos(hugging_face(stock, row, max_new_tokens=9)[0], gpt.config.eos)]
        assert ids[:len(expected)] == expected


def from_folder(place: Place, folder: Path, cls: Any, **options: Any) -> Any:
    """What runs a folder as it is."""
    return cls.from_pretrained(folder, 3, place.device, **options)


def from_exported_folder(place: Place, suffix: str, folder: Path, cls: Any, **options: Any) -> Any:
    """What runs a model file."""
    return cls.from_pretrained(exported(place, folder, suffix, "--from", "huggingface"), 3, place.device, **options)


def fine_tunes(family: HuggingFace, place: Place) -> None:
    """Hugging Face's loss, outputs and gradients, and our attention."""
    attention = importlib.import_module("lightseq_fairseq.ops.attention")
    for kind in family.trained:
        stock, ours = pair(kind, place.device)
        given = batch(kind, place.device)
        with mock.patch.object(attention, "_attention", wraps=attention._attention) as counted:
            expected, _, their_gradients = compute(stock, given)
            assert not counted.called
            found, _, our_gradients = compute(ours, given)
            assert counted.called
        torch.testing.assert_close(found.loss, expected.loss, **tolerances.LAYER)
        assert_same_outputs(found, expected, given)
        assert_same_gradients(our_gradients, their_gradients)


def is_refused(family: HuggingFace, place: Place, suffix: str) -> list[str]:
    """What lightseq-export says of each model of the family; without ``suffix``, what the classes say."""
    said = []
    for name in family.names:
        folder = folder_of(stock_of(name), place.folder / name)
        if suffix:
            path = place.folder / f"{name}{suffix}"
            status, _, errors = run_command(
                lambda: export.main(["--from", "huggingface", str(folder), "-o", str(path)]))  # noqa: B023
            assert status == 2 and not path.exists()
            said.append(errors)
        else:
            with pytest.raises(ExportError) as error:
                lsi.Bert.from_pretrained(folder)
            said.append(str(error.value))
    return said


def is_not_accelerated(family: HuggingFace, place: Place) -> list[str]:
    """What accelerate says of each model of the family, which stays as it was."""
    said = []
    for name in family.names:
        stock = stock_of(name)
        with pytest.raises(ValueError) as error:
            accelerate(stock)
        said.append(str(error.value))
    return said


# The table ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Cell:
    """What the table says, and the function that shows it at a :class:`Place`."""

    says: str
    run: Callable[[Place], list[str] | None]
    refusal: str = ""
    """Where it is refused: the pattern of each sentence that ``run`` returns."""


ABILITIES = {
    "train": "`lightseq-train`",
    "protobuf": "`lightseq-export` to protobuf",
    "hdf5": "to HDF5",
    "generate": "`lightseq-generate`, `-interactive`",
    "python": "Python class",
    "accelerate": "`accelerate` (training)",
}
"""Columns and their heads."""

FAIRSEQ = {
    "transformer": ("Transformer", Fairseq("transformer", "label_smoothed_cross_entropy", tuple(SIZES))),
    "bart": ("BART", Fairseq("bart_base", "label_smoothed_cross_entropy", tuple(test_ls_bart.SMALL),
                             data="joined_data_bin")),
    "mbart": ("mBART", Fairseq("mbart_base", "label_smoothed_cross_entropy", tuple(test_ls_bart.SMALL),
                               data="joined_data_bin")),
    "transformer_lm": ("language models", Fairseq(
        "transformer_lm_gpt2_small", "cross_entropy",
        (*test_ls_transformer_lm.SMALL, "--tokens-per-sample", "30", "--sample-break-mode", "eos"),
        "language_modeling", "text_bin")),
    "roberta": ("RoBERTa", Fairseq(
        "roberta_base", "masked_lm",
        (*test_ls_roberta.SMALL, "--tokens-per-sample", "40", "--sample-break-mode", "eos", "--mask-prob", "0.3"),
        "masked_lm", "text_bin")),
}
HUGGING_FACE = {
    "hf-bert": ("BERT", HuggingFace(("bert",), lsi.Bert, ("BertForSequenceClassification",))),
    "hf-roberta": ("RoBERTa", HuggingFace(("roberta",), lsi.Bert, ("RobertaForMaskedLM",))),
    "hf-xlm-roberta": ("XLM-RoBERTa, CamemBERT", HuggingFace(
        ("xlm-roberta", "camembert"), lsi.Bert, ("XLMRobertaForTokenClassification", "CamembertForMaskedLM"))),
    "hf-bart": ("BART", HuggingFace(("bart",), lsi.Bart, ("BartForConditionalGeneration",))),
    "hf-mbart": ("mBART", HuggingFace(("mbart",), lsi.Bart, ("MBartForConditionalGeneration",), first_token=17)),
    "hf-marian": ("Marian", HuggingFace(("marian",), lsi.Bart, ("MarianMTModel",))),
    "hf-m2m_100": ("M2M100, NLLB", HuggingFace(("m2m_100",), lsi.Bart, ("M2M100ForConditionalGeneration",),
                                               first_token=17)),
    "hf-gpt2": ("GPT-2", HuggingFace(("gpt2",), lsi.Gpt, ("GPT2LMHeadModel",))),
}
NOT_SUPPORTED = HuggingFace(("t5", "llama"))


class Row(NamedTuple):
    """A family's name in the table, and its cells by :data:`ABILITIES`; a pair that makes no sense has none."""

    label: str
    cells: dict[str, Cell]


def fairseq_row(label: str, family: Fairseq) -> Row:
    """What there is to do with a family of fairseq."""
    infer, cls = {"translation": (translates, "Bart" if "bart" in family.arch else "Transformer"),
                  "language_modeling": (continues, "Gpt"), "masked_lm": (encodes, "Bert")}[family.task]

    def runs(load: Callable[..., Any], *where: str) -> Callable[[Place], None]:
        return lambda place: infer(family, place, functools.partial(load, family, place, *where))

    cells = {"train": Cell("one graph an update", functools.partial(trains, family)),
             "protobuf": Cell("yes", runs(from_file, ".pb")), "hdf5": Cell("yes", runs(from_file, ".hdf5")),
             "generate": Cell("yes", functools.partial(prints_lines, family)),
             "python": Cell(f"`{cls}`", runs(from_checkpoint))}
    if family.task == "masked_lm":
        cells["generate"] = Cell("no", functools.partial(refuses_to_generate, family),
                                 "a model of stacks 'encoder', .* an encoder alone generates nothing")
    return Row(f"fairseq: {label} (`ls_{family.arch}`)", cells)


def hugging_face_row(label: str, family: HuggingFace) -> Row:
    """What there is to do with a family of Hugging Face."""
    def runs(load: Callable[..., Any], *where: str) -> Callable[[Place], None]:
        return lambda place: infers(family, place, functools.partial(load, place, *where))

    return Row(f"Hugging Face: {label}", {
        "protobuf": Cell("yes", runs(from_exported_folder, ".pb")),
        "hdf5": Cell("yes", runs(from_exported_folder, ".hdf5")),
        "python": Cell(f"`{family.cls.__name__}`", runs(from_folder)),
        "accelerate": Cell("yes", functools.partial(fine_tunes, family)),
    })


def matrix() -> dict[str, Row]:
    """All rows by name."""
    refusals = {ability: Cell("no", functools.partial(is_refused, NOT_SUPPORTED, suffix=suffix),
                              "models of type '(t5|llama)' cannot be exported .*; supported are bert, ")
                for ability, suffix in (("protobuf", ".pb"), ("hdf5", ".hdf5"), ("python", ""))}
    refusals["accelerate"] = Cell("no", functools.partial(is_not_accelerated, NOT_SUPPORTED),
                                  f"(T5|Llama)For.* has no layers of {re.escape(FAMILIES)}")
    return ({name: fairseq_row(*row) for name, row in FAIRSEQ.items()}
            | {name: hugging_face_row(*row) for name, row in HUGGING_FACE.items()}
            | {"hf-t5": Row("Hugging Face: T5, Llama", refusals)})


MATRIX = matrix()


def table() -> str:
    """MATRIX in Markdown."""
    lines = ["| | " + " | ".join(ABILITIES.values()) + " |", "|---" * (len(ABILITIES) + 1) + "|"]
    lines += [" | ".join([f"| {row.label}", *(row.cells[ability].says if ability in row.cells else ""
                                              for ability in ABILITIES)]) + " |" for row in MATRIX.values()]
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """The README with the table as it is now."""
    written, count = BLOCK.subn(lambda block: block[1] + table() + block[2], text)
    assert count == 1, f"{README.name} must have one block for the table"
    return written


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
