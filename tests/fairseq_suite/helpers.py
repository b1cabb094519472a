"""What fairseq's tests import as ``tests.utils``, which the distribution lacks; only what the selected cases need.

Two parts: encoder-decoder models that say what a table tells them to, and fairseq's commands on a small made-up corpus
of the languages "in" and "out".
"""

from __future__ import annotations

import random
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fairseq import options
from fairseq.data import Dictionary, ListDataset
from fairseq.data.language_pair_dataset import collate
from fairseq.models import FairseqDecoder, FairseqEncoder, FairseqEncoderDecoderModel
from fairseq.tasks import LegacyFairseqTask
from fairseq_cli import generate, interactive, preprocess, train, validate
from torch import Tensor
from torch.nn.functional import pad

# data in memory

TestDataset = ListDataset


def dummy_dictionary(vocab_size: int) -> Dictionary:
    """``vocab_size`` words after the four special symbols; the first is number 4."""
    dictionary = Dictionary()
    for number in range(vocab_size):
        dictionary.add_symbol(f"word{number}")
    return dictionary


def dummy_dataloader(samples: Sequence[dict[str, Tensor]]) -> Iterator[dict[str, Any]]:
    """One batch of all samples, each with "source" and "target"."""
    symbols = Dictionary()
    numbered = [{"id": number, **sample} for number, sample in enumerate(samples)]
    return iter([collate(numbered, symbols.pad(), symbols.eos())])


# models that read their probabilities from a table

class Encoded(NamedTuple):
    """What an encoder hands on: which sentence each of R rows is about, and S states for attention, (R, S)."""

    sentences: Tensor
    states: Tensor


class TableEncoder(FairseqEncoder):
    """Numbers the sentences of a batch."""

    def __init__(self, args: Namespace, dictionary: Dictionary) -> None:
        super().__init__(dictionary)
        self.args = args

    def forward(self, src_tokens: Tensor, src_lengths: Tensor | None = None) -> Encoded:
        return Encoded(torch.arange(len(src_tokens)), src_tokens.float())

    def reorder_encoder_out(self, encoder_out: Encoded, new_order: Tensor) -> Encoded:
        return Encoded(*(rows[new_order] for rows in encoder_out))


class StretchingEncoder(TableEncoder):
    """Has two states for each source token."""

    def forward(self, src_tokens: Tensor, src_lengths: Tensor | None = None) -> Encoded:
        return super().forward(src_tokens.repeat_interleave(2, dim=1), src_lengths)


class InsistingEncoder(TableEncoder):
    """Demands ``fancy_other_input``, one value for each source token."""

    def forward(self, src_tokens: Tensor, src_lengths: Tensor | None = None, *, fancy_other_input: Tensor) -> Encoded:
        assert fancy_other_input.shape == src_tokens.shape
        return super().forward(src_tokens, src_lengths)


class TableDecoder(FairseqDecoder):
    """Log-probabilities from ``args``, whatever has been said so far; attention is even.

    ``args.probs`` (B, T, V) holds a distribution for each position of each sentence. Without it, ``args.beam_probs``
    holds for each step a table of one row for each beam of each sentence, in the order of the batch before any
    sentence left it; columns count from the end of the vocabulary, what is missing has no chance.
    """

    def __init__(self, args: Namespace, dictionary: Dictionary) -> None:
        super().__init__(dictionary)
        self.args = args

    def forward(self, prev_output_tokens: Tensor, encoder_out: Encoded) -> tuple[Tensor, dict[str, list[Tensor]]]:
        length = prev_output_tokens.size(1)
        if hasattr(self.args, "probs"):
            probs = self.args.probs[encoder_out.sentences, :length]
        else:
            probs = self.args.beam_probs[length - 1][self.table_rows(encoder_out.sentences), None]  # newest only
        lprobs = pad(probs.log(), (len(self.dictionary) - probs.size(-1), 0), value=-torch.inf)
        states = encoder_out.states[:, None].expand(-1, lprobs.size(1), -1)
        return lprobs, {"attn": [torch.full_like(states, 1 / states.size(-1))]}

    @staticmethod
    def table_rows(sentences: Tensor) -> Tensor:
        """``sentences`` names each sentence once for each of its beams, side by side."""
        beam = int((sentences == sentences[0]).sum())
        return sentences * beam + torch.arange(len(sentences)) % beam


class TableModel(FairseqEncoderDecoderModel):
    encoder_class = TableEncoder

    @classmethod
    def build_model(cls, args: Namespace, task: LegacyFairseqTask) -> TableModel:
        return cls(cls.encoder_class(args, task.source_dictionary), TableDecoder(args, task.target_dictionary))


class TestReshapingModel(TableModel):
    encoder_class = StretchingEncoder


class TestAdditionalInputModel(TableModel):
    encoder_class = InsistingEncoder


class TestTranslationTask(LegacyFairseqTask):
    """Two dictionaries, and a model that reads its table from the arguments."""

    def __init__(self, args: Namespace, source_dictionary: Dictionary, target_dictionary: Dictionary) -> None:
        super().__init__(args)
        self.dictionaries = source_dictionary, target_dictionary

    @classmethod
    def setup_task(cls, args: Namespace, source_dictionary: Dictionary,
                   target_dictionary: Dictionary) -> TestTranslationTask:
        return cls(args, source_dictionary, target_dictionary)

    def build_model(self, args: Namespace, from_checkpoint: bool = False) -> TableModel:
        return TableModel.build_model(args, self)

    @property
    def source_dictionary(self) -> Dictionary:
        return self.dictionaries[0]

    @property
    def target_dictionary(self) -> Dictionary:
        return self.dictionaries[1]


BEAMS_OF_TWO = [
    # for each step, two beams of sentence 1 and two of sentence 2; P(eos), P(w1), P(w2)
    [(0.0, 0.9, 0.1),
     (0.0, 0.9, 0.1),
     (0.0, 0.7, 0.3),
     (0.0, 0.7, 0.3)],
    [(1.0, 0.0, 0.0),  # w1: complete
     (0.0, 0.9, 0.1),  # w2
     (0.3, 0.3, 0.4),  # w1: 0.7 * 0.3 must lose against 0.3 * 0.9
     (0.0, 0.1, 0.9)],  # w2
    [(0.0, 0.1, 0.9),  # w2 w1: 0.09 * 0.1 must win against 0.01 * 0.6
     (0.6, 0.2, 0.2),  # w2 w2: complete only if the length is limited to here
     (0.6, 0.4, 0.0),  # w1 w2: complete, and w1 goes on
     (0.01, 0.3, 0.69)],  # w2 w2: complete only if the length is limited to here, and one beam goes on
    [(1.0, 0.0, 0.0),  # w2 w1 w2: complete
     (0.0, 0.5, 0.5),  # w2 w1 w1
     (0.0, 0.5, 0.5),  # w2 w2 w2
     (1.0, 0.0, 0.0)],  # w1 w2 w1: complete
]
"""Beam search with two beams over this finds the hypotheses that TestSequenceGenerator expects."""


def sequence_generator_setup() -> tuple[Dictionary, int, int, Tensor, Tensor, TableModel]:
    """Target dictionary, its two words, a batch of two sources with their lengths, and the model of BEAMS_OF_TWO."""
    dictionary = dummy_dictionary(2)
    eos, w1, w2 = dictionary.eos(), dictionary.nspecial, dictionary.nspecial + 1
    impossible_unk = [[(stop, 0.0, *words) for stop, *words in step] for step in BEAMS_OF_TWO]
    args = Namespace(beam_probs=[torch.tensor(step) for step in impossible_unk])
    model = TestTranslationTask.setup_task(args, dictionary, dictionary).build_model(args)
    return dictionary, w1, w2, torch.tensor([[w1, w2, eos], [w2, w1, eos]]), torch.tensor([3, 3]), model


# fairseq's commands on a corpus in a folder

LANGUAGES = ["--source-lang", "in", "--target-lang", "out"]
EVERYWHERE = ["--no-progress-bar", "--num-workers", "0", "--required-batch-size-multiple", "1"]
"""With the usual multiple of 8, fewer than 8 sentences are no batch at all."""


def create_dummy_data(data_dir: str, num_examples: int = 400, maxlen: int = 20) -> None:
    """Always the same random sentences of 1 to ``maxlen`` words; a translation is the sentence backwards."""
    words = [f"{consonant}{vowel}" for consonant in "bdgklmnpst" for vowel in "aeiou"]
    for split, count in (("train", num_examples), ("valid", max(num_examples // 10, 5)),
                         ("test", max(num_examples // 10, 5))):
        draw = random.Random(split)
        sentences = [draw.choices(words, k=draw.randint(1, maxlen)) for _ in range(count)]
        for language, direction in (("in", 1), ("out", -1)):
            lines = "".join(" ".join(sentence[::direction]) + "\n" for sentence in sentences)
            Path(data_dir, f"{split}.{language}").write_text(lines)


def run(main: Callable[[Namespace], None], parser: ArgumentParser, *flags: Sequence[str]) -> None:
    """A command of fairseq's; where a flag comes twice, the later one counts."""
    main(options.parse_args_and_arch(parser, [flag for group in flags for flag in group]))


def preprocess_translation_data(data_dir: str, extra_flags: Sequence[str] = ()) -> None:
    texts = [part for split in ("train", "valid", "test") for part in (f"--{split}pref", str(Path(data_dir, split)))]
    preprocess.main(options.get_preprocessing_parser().parse_args(
        [*LANGUAGES, *texts, "--destdir", data_dir, *extra_flags]))


def train_translation_model(data_dir: str, arch: str, extra_flags: Sequence[str] = (), run_validation: bool = False,
                            extra_valid_flags: Sequence[str] = ()) -> None:
    """One epoch with our criterion and optimizer, unless told otherwise; checkpoints lie beside the data."""
    task = [data_dir, "--task", "translation", *LANGUAGES, "--max-tokens", "500", *EVERYWHERE]
    run(train.main, options.get_training_parser(), task,
        ["--arch", arch, "--criterion", "ls_label_smoothed_cross_entropy", "--label-smoothing", "0.1", "--optimizer",
         "ls_adam", "--lr", "0.01", "--max-epoch", "1", "--save-dir", data_dir, "--distributed-world-size", "1"],
        extra_flags)
    if run_validation:
        run(validate.main, options.get_validation_parser(), task, last_checkpoint(data_dir),
            ["--valid-subset", "valid"], extra_valid_flags)


def generate_main(data_dir: str, extra_flags: Sequence[str] = ()) -> None:
    """Translate the test set, with fairseq-generate and with fairseq-interactive."""
    common = [data_dir, *last_checkpoint(data_dir), *EVERYWHERE, "--beam", "3", "--max-len-b", "8",
              "--batch-size", "32"]
    run(generate.main, options.get_generation_parser(), common, extra_flags)
    run(interactive.main, options.get_interactive_generation_parser(), common, LANGUAGES,
        ["--input", str(Path(data_dir, "test.in")), "--buffer-size", "32"], extra_flags)


def last_checkpoint(data_dir: str) -> list[str]:
    return ["--path", str(Path(data_dir, "checkpoint_last.pt"))]


def not_needed(*args: Any, **kwargs: Any) -> None:
    """Stands for what test_binaries.py imports for the sake of cases that are not selected."""
    raise NotImplementedError("none of the selected cases needs this helper")


create_laser_data_and_config_json = preprocess_lm_data = preprocess_summarization_data = not_needed
train_language_model = not_needed
