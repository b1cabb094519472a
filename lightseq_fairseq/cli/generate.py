"""``lightseq-generate``: fairseq-generate with our model and our search inside.

Arguments, batches and every printed line are fairseq-generate's, because its own ``main`` runs. Two things in it are
replaced: how ``--path`` is loaded (model files, or checkpoints through the exporter), and what searches.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lightseq_fairseq import model_file
from lightseq_fairseq.cli.ahead import Ahead, Batches
from lightseq_fairseq.config import ConfigError
from lightseq_fairseq.generator.generator import Generator
from lightseq_fairseq.generator.hypotheses import Hypothesis
from lightseq_fairseq.generator.options import GenerationError, GenerationOptions, refused_options
from lightseq_fairseq.generator.scoring import Scorer
from lightseq_fairseq.model_file import ModelFile, ModelFileError

_SAME_NAME = ("beam", "lenpen", "min_len", "max_len_a", "max_len_b", "match_source_len", "unkpen", "temperature",
              "no_repeat_ngram_size", "sampling", "diverse_beam_strength")
"""Fields of GenerationOptions that fairseq's GenerationConfig calls the same."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
"""Choices of --dtype."""

_ZERO_FOR_NONE = ("sampling_topk", "sampling_topp", "diverse_beam_groups", "diversity_rate")
"""Fields that are 0 where fairseq has -1."""


def main() -> int:
    """Entry point; arguments come from the command line."""
    return run("lightseq-generate", "fairseq_cli.generate", _refused, reads_ahead=True)


def _refused(cfg: Any) -> list[str]:
    """What fairseq-generate accepts and then cannot do."""
    if cfg.generation.constraints is not None:
        raise GenerationError("--constraints needs constraints, and a test set has none: give them to "
                              "lightseq-interactive --constraints, tabs between a line and each of them")
    return []


def run(program: str, stock_name: str, refused: Callable[[Any], list[str]] = lambda cfg: [],
        at_end: Callable[[Search], None] = lambda search: None, reads_ahead: bool = False) -> int:
    """Run a command of fairseq with our model and search; returns 0, or 2 after one sentence about what is wrong.

    ``refused`` names what a configuration asks for and does not get; ``at_end`` sees the search after its work;
    ``reads_ahead`` if batches are those of a whole test set.
    """
    from lightseq_fairseq import fairseq_compat

    stock = fairseq_compat.import_fairseq(stock_name)
    fairseq_compat.apply()
    substitute = Substitute(stock.main, refused, reads_ahead)
    try:
        with _own_options(reads_ahead), mock.patch.object(stock, "main", substitute):  # as cli_main calls it
            stock.cli_main()
    except Exception as error:
        in_arguments = isinstance(error, ValueError) and not substitute.called
        if not (in_arguments or _is_for_the_user(error)):
            raise
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if substitute.search is not None:
        at_end(substitute.search)
    gc.freeze()  # or Python looks through all modules once more before it ends, for a second
    return 0


@contextlib.contextmanager
def _own_options(reads_ahead: bool) -> Iterator[None]:
    """fairseq's parser of generation, with what only we have."""
    from fairseq import options

    stock = options.get_generation_parser

    def get_generation_parser(*args: Any, **kwargs: Any) -> argparse.ArgumentParser:
        parser = stock(*args, **kwargs)
        parser.set_defaults(num_workers=0)  # a test set is read before a process that would read it has started
        group = parser.add_argument_group("lightseq")
        group.add_argument("--dtype", choices=sorted(DTYPES),
                           help="type of weights and arithmetic: fp16 and bf16 are --fp16 and --bf16; int8, on "
                                "the CPU, multiplies in 8 bits what is worth it")
        if reads_ahead:
            group.add_argument("--refill", action=argparse.BooleanOptionalAction,
                               help="let sentences of later batches take the place of finished ones, on a GPU "
                                    "(default: where many sentences wait)")
        return parser

    with mock.patch.object(options, "get_generation_parser", get_generation_parser):
        yield


def _is_for_the_user(error: Exception) -> bool:
    """Our own, a missing file, or what fairseq says about arguments and data, by assertions and bare exceptions."""
    ours = (GenerationError, ModelFileError, ConfigError, FileNotFoundError, AssertionError)
    return str(error) != "" and (isinstance(error, ours) or type(error) is Exception)


def _dtype(name: str | None, fp16: bool, bf16: bool) -> torch.dtype:
    """What --dtype, --fp16 and --bf16 ask for together; GenerationError where they contradict one another."""
    asked = {*([name] if name else []), *(["fp16"] if fp16 else []), *(["bf16"] if bf16 else [])}
    if len(asked) > 1:
        raise GenerationError(f"{' and '.join(sorted(asked))} were all asked for by --dtype, --fp16, --bf16: give one")
    return DTYPES[asked.pop()] if asked else torch.float32


class _LookedUpOnce:
    """A configuration whose fields are asked for once. fairseq asks for some of them for every word that it prints, and
    OmegaConf takes 20 microseconds to answer, which made up a third of the time between two batches."""

    _SECTIONS = "generation", "common_eval"
    """Whose fields fairseq's loop reads; it assigns none of them."""

    def __init__(self, cfg: Any) -> None:
        self._cfg = cfg

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._cfg, name)
        if name in self._SECTIONS:
            value = _LookedUpOnce(value)
        setattr(self, name, value)
        return value

    def __str__(self) -> str:
        return str(self._cfg)


class Substitute:
    """A fairseq ``main`` in which models are loaded and searched by us."""

    _generator, _scorer = Generator, Scorer
    """What searches, and what scores references."""

    def __init__(self, stock_main: Callable[[Any], Any], refused: Callable[[Any], list[str]],
                 reads_ahead: bool = False) -> None:
        """``reads_ahead`` if batches are those of a whole test set."""
        self.stock_main, self.refused, self.reads_ahead = stock_main, refused, reads_ahead
        self.called = False
        self.search: Search | None = None

    def __call__(self, cfg: Any, **kwargs: Any) -> Any:
        """``cfg`` is fairseq's configuration, or the arguments that it is made of."""
        from argparse import Namespace

        from fairseq import checkpoint_utils, utils
        from fairseq.data import Dictionary, data_utils
        from fairseq.dataclass.utils import convert_namespace_to_omegaconf

        self.called = True
        self.refill = getattr(cfg, "refill", None)
        self.dtype = _dtype(getattr(cfg, "dtype", None), getattr(cfg, "fp16", False), getattr(cfg, "bf16", False))
        self.cfg = convert_namespace_to_omegaconf(cfg) if isinstance(cfg, Namespace) else cfg
        if self.cfg.generation.replace_unk == "@@ ":  # the option without a value; fairseq would open that file
            self.cfg.generation.replace_unk = ""
        wrong = _not_taken(self.cfg) + self.refused(self.cfg)
        if wrong:
            raise GenerationError(f"{', '.join(wrong)}: not supported here, use fairseq's own command")
        self.options = options_of(self.cfg.generation)
        with mock.patch.object(checkpoint_utils, "load_model_ensemble", self._load), \
                mock.patch.object(data_utils, "batch_by_size", with_the_last_batch(data_utils.batch_by_size)), \
                mock.patch.object(utils, "move_to_cuda", stays_on_the_host), \
                mock.patch.object(Dictionary, "string", of_numbers(Dictionary.string)):
            return self.stock_main(_LookedUpOnce(self.cfg), **kwargs)

    def _load(self, paths: Sequence[str], *, task: Any, **unused: Any) -> tuple[list[LoadedModel], Any]:
        """In place of load_model_ensemble: the models, and where fairseq looks for their task; ``task`` will search
        with ours."""
        from fairseq.tasks.fairseq_task import FairseqTask
        from fairseq.tasks.language_modeling import LanguageModelingTask

        known = {"build_generator": [FairseqTask.build_generator],
                 "inference_step": [FairseqTask.inference_step, LanguageModelingTask.inference_step]}
        for name, ways in known.items():
            if getattr(type(task), name) not in ways:
                raise GenerationError(f"--task {self.cfg.task._name} generates in its own way, which is not supported; "
                                      "use --task translation or language_modeling, or fairseq-generate")
        models = [LoadedModel(load_model(path, task.cfg or self.cfg.task)) for path in paths]
        for path, model in zip(paths, models, strict=True):
            check_kind(path, model.file, task)
            check_dictionaries(path, model.file, task)
        task.build_generator = self._build_generator
        if self.reads_ahead:
            stock_batches = task.get_batch_iterator

            def get_batch_iterator(dataset: Any, *args: Any, **kwargs: Any) -> Batches:
                return Batches(stock_batches(dataset, *args, **kwargs), lambda sample: self._expect(sample, dataset))

            task.get_batch_iterator = get_batch_iterator
        return models, self.cfg

    def _expect(self, sample: dict[str, Any], dataset: Any) -> bool:
        """A batch that fairseq has read; whether it need read no further before it goes on."""
        search = self.search
        if search is None or "net_input" not in sample or "id" not in sample:
            return True
        if search.ahead is None and isinstance(search.generator, Generator) and not search.sentences:
            search.ahead = Ahead.of(search.generator, self.options, dataset, self.cfg.generation.prefix_size,
                                    self.refill)
        if search.ahead is None:
            return True
        padded = sample["net_input"]["src_tokens"]
        sentences = search.unpadded(padded)
        search.ahead.expect(sample, sentences, search.max_lens(sentences, padded))
        return search.ahead.enough

    def _build_generator(self, models: Sequence[LoadedModel], *unused: Any, **also_unused: Any) -> Search:
        """In place of the task's build_generator."""
        args, dtype = self.cfg.generation, self.dtype
        if args.score_reference and self.refill:
            raise GenerationError("--refill is for search, and --score-reference does none")
        device = "cuda" if torch.cuda.is_available() and not self.cfg.common.cpu else "cpu"
        files, soft = [model.file for model in models], args.print_alignment == "soft"
        self.search = (ReferenceScores(self._scorer(files, device, dtype), self.options, soft) if args.score_reference
                       else Search(self._generator(files, device, dtype), self.options, soft))
        return self.search


def with_the_last_batch(stock: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """``stock``, which is fairseq's batch_by_size, without its loss of sentences: it drops the last batch if that is
    no multiple of --required-batch-size-multiple, which is 8 unless set."""
    def batch_by_size(indices: Any, *args: Any, **kwargs: Any) -> list[Any]:
        batches = stock(indices, *args, **kwargs) if len(indices) else []
        missing = indices[sum(map(len, batches)):]
        return [*batches, missing] if len(missing) else batches

    return batch_by_size


def stays_on_the_host(sample: Any, device: Any = None) -> Any:
    """In place of fairseq's move_to_cuda. Our search takes batches from the host, where fairseq prints them; from the
    GPU it would fetch each word of a source several times, one at a time."""
    return sample


def of_numbers(stock: Callable[..., str]) -> Callable[..., str]:
    """``stock``, which is Dictionary.string, given a sentence's words as numbers: as tensors of one element each they
    take eight times as long to look up."""
    @functools.wraps(stock)
    def string(self: Any, tensor: Any, *args: Any, **kwargs: Any) -> str:
        is_one = torch.is_tensor(tensor) and tensor.dim() == 1
        return stock(self, tensor.tolist() if is_one else tensor, *args, **kwargs)

    return string


def _not_taken(cfg: Any) -> list[str]:
    """Names of the options in ``cfg`` that would change the result and that we do not take."""
    from fairseq.dataclass.configs import CheckpointConfig, CommonEvalConfig, DatasetConfig, GenerationConfig

    wrong = refused_options(cfg.generation, vars(GenerationConfig()))
    for name in ("num_shards", "shard_id"):
        if getattr(cfg.dataset, name) != getattr(DatasetConfig, name):
            wrong.append(f"--{name.replace('_', '-')} (fairseq-generate itself ignores it; --distributed-world-size "
                         "and --distributed-rank share the sentences out)")
    if cfg.common_eval.model_overrides != CommonEvalConfig.model_overrides:
        wrong.append("--model-overrides (a model file is what it is)")
    if cfg.checkpoint.checkpoint_shard_count != CheckpointConfig.checkpoint_shard_count:
        wrong.append("--checkpoint-shard-count (sharded checkpoints)")
    if cfg.checkpoint.checkpoint_suffix:
        wrong.append("--checkpoint-suffix (sharded checkpoints)")
    return wrong


def options_of(args: Any) -> GenerationOptions:
    """What fairseq's GenerationConfig says, in our words; GenerationError if it contradicts itself."""
    attention = args.print_alignment is not None or args.replace_unk is not None
    given: dict[str, Any] = {name: getattr(args, name) for name in _SAME_NAME}
    given |= {name: 0 if getattr(args, name) == -1 else getattr(args, name) for name in _ZERO_FOR_NONE}
    return GenerationOptions(**given, nbest=min(args.nbest, args.beam), normalize_scores=not args.unnormalized,
                             constraints=None if args.constraints is None else str(args.constraints),
                             return_attention=attention, return_alignment=attention)


def load_model(path: str, data: Any) -> ModelFile:
    """A model file, or a checkpoint with the dictionaries of ``data``, a task's configuration; ModelFileError."""
    from lightseq_fairseq.export import from_checkpoints

    suffixes = tuple(suffix for known in model_file.FORMATS.values() for suffix in known)
    if path.lower().endswith(suffixes):
        return model_file.load(path)
    return from_checkpoints([path], data.data.split(os.pathsep)[0], source_lang=getattr(data, "source_lang", None),
                            target_lang=getattr(data, "target_lang", None))


def check_kind(path: str, model: ModelFile, task: Any) -> None:
    """GenerationError unless the model is of the task's kind: a decoder for language modelling, else both stacks."""
    from fairseq.tasks.language_modeling import LanguageModelingTask

    wanted = "decoder" if isinstance(task, LanguageModelingTask) else "encoder-decoder"
    if model.config.stacks != wanted:
        advice = {"decoder": "use --task language_modeling", "encoder-decoder": "use --task translation",
                  "encoder": "an encoder alone generates nothing"}[model.config.stacks]
        raise GenerationError(f"{path} is a model of stacks {model.config.stacks!r}, the task needs {wanted!r}; "
                              + advice)


def check_dictionaries(path: str, model: ModelFile, task: Any) -> None:
    """GenerationError unless the model was made for the dictionaries of the data."""
    for side, types, symbols, words in (
            ("source", model.config.src_vocab_size, model.src_symbols, task.source_dictionary.symbols),
            ("target", model.config.tgt_vocab_size, model.tgt_symbols, task.target_dictionary.symbols)):
        advice = "translate data that was prepared with the model's dictionaries"
        if types != len(words):
            raise GenerationError(f"{path} has {types} {side} types, but the data's dictionary has {len(words)}; "
                                  + advice)
        for index, (ours, theirs) in enumerate(zip(symbols or (), words, strict=False)):
            if ours != theirs:
                raise GenerationError(f"{path} has {ours!r} as {side} type {index}, but the data's dictionary has "
                                      f"{theirs!r}; {advice}")


class LoadedModel:
    """A model as fairseq's ``main`` handles it before it searches: on which device and in what type is our affair."""

    def __init__(self, file: ModelFile) -> None:
        self.file = file

    def max_positions(self) -> tuple[int, int] | int:
        """Longest source and target; a language model's longest text."""
        if not self.file.config.has_encoder:
            return self.file.config.max_target_positions
        return self.file.config.max_source_positions, self.file.config.max_target_positions

    def half(self) -> None:
        """Decided when the search is built."""

    def cuda(self) -> None:
        """Decided when the search is built."""

    def prepare_for_inference_(self, cfg: Any) -> None:
        """Done when the search is built."""


class Search:
    """Our Generator as fairseq's ``main`` knows a generator."""

    def __init__(self, generator: Generator | Scorer, options: GenerationOptions, soft: bool = False) -> None:
        self.generator, self.options, self.soft = generator, options, soft
        self.eos, self.pad = generator.config.eos, generator.config.pad
        self.symbols_to_strip_from_output = {self.eos}
        self.sentences, self.tokens, self.seconds = 0, 0, 0.0
        self.ahead: Ahead | None = None

    def generate(self, models: Any, sample: dict[str, Any], prefix_tokens: Tensor | None = None,
                 constraints: Tensor | None = None, bos_token: int | None = None,
                 **unused: Any) -> list[list[dict[str, Any]]]:
        """Hypotheses of each sentence of a batch, best first, as fairseq's SequenceGenerator returns them;
        ``constraints`` (B, C) int64 are packed as fairseq's ``pack_constraints`` does. A language model continues
        ``bos_token`` and ``prefix_tokens`` (B, P) int64, pad behind the shorter ones."""
        started = time.perf_counter()
        answered = None if self.ahead is None else self.ahead.hypotheses(sample)
        if answered is not None:
            found = answered
        elif self.generator.config.has_encoder:
            found = self._hypotheses(sample, prefix_tokens, constraints)
        else:
            found = self._continuations(sample, prefix_tokens, bos_token)
        self.sentences += len(found)
        self.tokens += sum(len(hypotheses[0].tokens) for hypotheses in found)
        self.seconds += time.perf_counter() - started
        return [[self._as_dict(hypothesis) for hypothesis in hypotheses] for hypotheses in found]

    def _hypotheses(self, sample: dict[str, Any], prefix_tokens: Tensor | None,
                    constraints: Tensor | None) -> list[list[Hypothesis]]:
        from fairseq.token_generation_constraints import unpack_constraints

        assert isinstance(self.generator, Generator)
        padded = sample["net_input"]["src_tokens"]
        sentences = self.unpadded(padded)
        phrases = None if constraints is None else [unpack_constraints(row) for row in constraints]
        return self.generator.generate(sentences, self.options, prefix_tokens, self.max_lens(sentences, padded),
                                       constraints=phrases)

    def _continuations(self, sample: dict[str, Any], prefix_tokens: Tensor | None,
                       bos_token: int | None) -> list[list[Hypothesis]]:
        assert isinstance(self.generator, Generator)
        padded = sample["net_input"]["src_tokens"]
        start = torch.tensor([self.eos if bos_token is None else bos_token], device=padded.device)
        rows = [start[:0]] * len(padded) if prefix_tokens is None else self.unpadded(prefix_tokens)
        ended = [bool((row == self.eos).any()) for row in rows]  # their continuation is eos
        rows = [row[:int((row == self.eos).nonzero()[0])] if end else row for row, end in zip(rows, ended, strict=True)]
        forced = torch.tensor([[self.eos if end else self.pad] for end in ended]) if any(ended) else None
        limit = self.max_lens(rows, padded)[0]
        if limit < max(map(len, rows)):
            raise GenerationError(f"a text of {max(map(len, rows))} tokens leaves nothing to say before the limit of "
                                  f"{limit}; raise --max-len-b or give shorter texts")
        return self.generator.generate([torch.cat((start, row)) for row in rows],
                                       replace(self.options, include_context=True), forced,
                                       max_lens=[limit - len(row) for row in rows])

    def unpadded(self, padded: Tensor) -> list[Tensor]:
        """(B, S) -> B sentences."""
        real = padded != self.pad
        return list(padded[real].split(real.sum(1).tolist()))

    def max_lens(self, sentences: Sequence[Tensor], padded: Tensor) -> list[int]:
        """fairseq's limit is one for the whole batch, by its longest source."""
        options, longest = self.options, padded.size(1)
        limit = int(options.max_len_a * longest + options.max_len_b)
        if options.match_source_len:
            limit = longest
        else:
            limit = min(limit, min(model.config.max_target_positions for model in self.generator.models) - 1)
        return [limit] * len(sentences)

    def _as_dict(self, hypothesis: Hypothesis) -> dict[str, Any]:
        alignment: Any = hypothesis.alignment
        if self.soft and hypothesis.attention is not None:
            alignment = [[f"{weight:.6f}" for weight in row] for row in hypothesis.attention.tolist()]
        elif alignment is not None:
            alignment = HardAlignment(alignment)
        return {"tokens": hypothesis.tokens, "score": torch.tensor(hypothesis.score),
                "positional_scores": hypothesis.positional_scores, "attention": hypothesis.attention,
                "alignment": alignment}


class ReferenceScores(Search):
    """Our Scorer in its place: the only hypothesis of a sentence is its reference (--score-reference)."""

    def _hypotheses(self, sample: dict[str, Any], prefix_tokens: Tensor | None,
                    constraints: Tensor | None) -> list[list[Hypothesis]]:
        assert isinstance(self.generator, Scorer)
        if sample["target"] is None:
            raise GenerationError("--score-reference needs references, but the data has no target side")
        found = self.generator.score(self.unpadded(sample["net_input"]["src_tokens"]),
                                     self.unpadded(sample["target"]), self.options.return_attention,
                                     self.options.return_alignment)
        return [[hypothesis] for hypothesis in found]


class HardAlignment:
    """(source, target) pairs for --print-alignment, which goes through them; for --replace-unk, which asks for the
    source position of target word i, that position (fairseq gives it the pair, and fails)."""

    def __init__(self, pairs: list[tuple[int, int]]) -> None:
        self.pairs = pairs

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.pairs)

    def __getitem__(self, target: int) -> int:
        return self.pairs[target][0] if self.pairs else -1  # an empty source has but its eos, the last


if __name__ == "__main__":
    sys.exit(main())
