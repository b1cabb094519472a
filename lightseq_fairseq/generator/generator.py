"""Generator: model files in, hypotheses out.

::

    generator = Generator.load("model.pb")
    generator.translate(["ein kleiner hund ."], GenerationOptions(beam=4, lenpen=0.6))
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lightseq_fairseq import model_file
from lightseq_fairseq.config import TransformerConfig
from lightseq_fairseq.generator.beam_search import check, check_found, decode, length_limits
from lightseq_fairseq.generator.device_search import DeviceSearch
from lightseq_fairseq.generator.device_state import Kind
from lightseq_fairseq.generator.hypotheses import Hypothesis
from lightseq_fairseq.generator.model import load_model
from lightseq_fairseq.generator.options import GenerationError, GenerationOptions
from lightseq_fairseq.generator.refill import Refill, Slots
from lightseq_fairseq.model_file import ModelFile
from lightseq_fairseq.ops import _extension

logger = logging.getLogger(__name__)
Path = str | os.PathLike[str]
MANY = 64
"""Sentences from which on they are decoded in slots, where they can be."""


class Generator:
    """One model, or several as an ensemble, ready on one device."""

    def __init__(self, models: Sequence[ModelFile], device: torch.device | str | None = None,
                 dtype: torch.dtype = torch.float32) -> None:
        """``device`` is the first GPU where there is one; ``dtype`` float32, float16, bfloat16 or, on the CPU, int8
        (scores are always fp32). Raises GenerationError for members that do not speak the same two languages."""
        if not models:
            raise GenerationError("a generator needs at least one model")
        first = models[0]
        for member in models[1:]:
            check_same_vocabulary(first, member)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.config: TransformerConfig = first.config
        self.src_symbols, self.tgt_symbols, self.decoding = first.src_symbols, first.tgt_symbols, first.decoding
        self.models = [load_model(model, self.device, dtype) for model in models]
        on_device = len(self.models) == 1 and self.device.type == "cuda" and _extension.loaded()
        self.device_search = DeviceSearch(self.models[0]) if on_device else None  # type: ignore[arg-type]
        self.refill: Refill | None = None
        """The slots that many sentences are decoded in; see :meth:`reserve`."""
        self._reserved = False
        self._src_indices: dict[str, int] | None = None

    @classmethod
    def load(cls, path: Path | Sequence[Path], device: torch.device | str | None = None,
             dtype: torch.dtype = torch.float32) -> Generator:
        """Read a model file, or several for an ensemble; ModelFileError says what is wrong with one."""
        paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
        return cls([model_file.load(p) for p in paths], device, dtype)

    def reserve(self, slots: Slots, kind: Kind | None = None) -> Refill:
        """Take memory for ``slots``, and for searches of ``kind``, now and for good; ``str()`` of what comes back says
        how much, and its ``submit``, ``collect`` and ``cancel`` serve sentences that come and go. :meth:`infer` uses it
        for what fits, and takes no slots of its own. GenerationError where the search is not on the device, or memory
        does not suffice."""
        search = self.device_search
        if search is None or not self.config.has_encoder or not search.serves(GenerationOptions(beam=slots.beam)):
            raise GenerationError("slots are for one encoder-decoder model on a GPU with the compiled operators; "
                                  "sentences are decoded in batches without them")
        self.refill = None
        needed, most = search.refill_memory(slots), search.most_bytes
        if needed > most:
            raise GenerationError(f"{slots} needs {needed / 2**20:.0f} MiB, more than the {most / 2**20:.0f} that "
                                  "generation may take: ask for fewer slots, beams or steps")
        self.refill = search.refill(slots, kind)
        self._reserved = True
        logger.info("%s", self.refill)
        return self.refill

    def generate(self, src_tokens: Sequence[Tensor], options: GenerationOptions | None = None,
                 prefix_tokens: Tensor | None = None,
                 max_lens: Sequence[int] | None = None,
                 draws: torch.Generator | None = None,
                 constraints: Sequence[Sequence[Tensor]] | None = None) -> list[list[Hypothesis]]:
        """One batch, in the order given: sentences 1-D int64, eos included, without padding; to a language model, texts
        to continue.

        ``prefix_tokens`` (B, P) int64 are forced target beginnings, pad where one is shorter; ``max_lens`` are limits
        that replace the options'; ``draws`` samples in place of ``options.seed``; ``constraints`` are the phrases, 1-D
        int64 without eos, that the hypotheses of each sentence contain as ``options.constraints`` says.
        Returns the ``nbest`` hypotheses of each sentence, best first.
        """
        options = options or GenerationOptions()
        known = self._device_options(options)
        if self.device_search is not None and len(src_tokens) and constraints is None and known is not None:
            limits = length_limits(self.models, src_tokens, options) if max_lens is None else max_lens
            lengths = [sentence.numel() for sentence in src_tokens]
            if min(limits) > 0 and self.device_search.takes(known, lengths, limits):
                found = self.device_search.decode(src_tokens, known, prefix_tokens, limits, draws)
                if options.force_eos:
                    return found
                return [[_cut(h, limit, options) for h in hypotheses]
                        for hypotheses, limit in zip(found, limits, strict=True)]
        return decode(self.models, src_tokens, options, prefix_tokens, max_lens, draws, constraints)

    def _device_options(self, options: GenerationOptions) -> GenerationOptions | None:
        """What the search on the device may be asked for to find what ``options`` ask for, None if nothing: its rules
        are fairseq's, of which one beam only needs to lose the eos that was forced on it."""
        if options.include_context or (options.no_repeat_ngram_size and not self.config.has_encoder):
            return None
        if options.force_eos and options.early_stopping:
            return options
        return replace(options, force_eos=True, early_stopping=True) if options.beam == 1 else None

    def infer(self, ids: Sequence[Sequence[int]], options: GenerationOptions | None = None,
              prefix_ids: Sequence[Sequence[int]] | None = None, max_tokens: int = 4096, max_sentences: int = 128,
              progress: Callable[[int], object] | None = None,
              constraints: Sequence[Sequence[Sequence[int]]] | None = None,
              refill: bool | None = None) -> list[list[Hypothesis]]:
        """Any number of sentences of ids, eos included, in any order of length; results in the order given.

        Sentences of like length are decoded together, at most ``max_sentences`` and ``max_tokens`` source tokens at
        a time (a longer sentence goes alone). ``progress`` is told how many sentences each batch has finished.
        ``prefix_ids`` and ``constraints`` are what :meth:`generate` takes of each sentence, as ids.

        With ``refill``, which is the default on a GPU where many sentences wait, a sentence that is finished makes room
        for the next one instead; what does not fit a slot still goes in batches. True raises GenerationError where that
        cannot be, False leaves it.
        """
        self._check_ids(ids)
        results: list[list[Hypothesis]] = [[] for _ in ids]
        rest = list(range(len(ids)))
        seed = None if options is None else options.seed  # for all batches together: each would draw the same otherwise
        draws = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        if refill or (refill is None and len(ids) >= MANY):
            served = self._infer_in_slots(ids, options or GenerationOptions(), prefix_ids, constraints, refill is True,
                                          results, progress, draws)
            rest = [index for index in rest if index not in served]
        for places in _batches_by_length([len(ids[i]) for i in rest], max_tokens, max_sentences):
            batch = [rest[place] for place in places]
            prefixes = None if prefix_ids is None else self._padded([prefix_ids[i] for i in batch])
            sources = sentences_of([ids[i] for i in batch])
            phrases = None if constraints is None else [
                [torch.tensor(phrase, dtype=torch.int64) for phrase in constraints[i]] for i in batch]
            found = self.generate(sources, options, prefixes, draws=draws, constraints=phrases)
            for index, hypotheses in zip(batch, found, strict=True):
                results[index] = hypotheses
            if progress is not None:
                progress(len(batch))
        check_found(results)
        return results

    def slots(self, options: GenerationOptions, sentences: int, longest: int, limit: int) -> Refill | None:
        """Slots that are there, or memory for new ones, to decode so many sentences of at most ``longest`` source
        tokens that must end at step ``limit``; None where the search is not on the device, or none would serve them."""
        search = self.device_search
        fairseqs = options.force_eos and options.early_stopping
        if search is None or not self.config.has_encoder or not fairseqs or not search.serves(options):
            return None
        if self._reserved:  # unless they serve somebody who has submitted sentences
            return self.refill if self.refill is not None and self.refill.idle else None
        wanted, kind = search.slots_for(sentences, options.beam, limit + 1, longest), Kind.of(options)
        held = None if self.refill is None or not self.refill.kind.covers(kind) else self.refill.slots
        if wanted is None or (held is not None and held.beam == wanted.beam and held.count >= wanted.count
                              and held.steps >= wanted.steps and held.width >= wanted.width):
            return self.refill if wanted is not None else None
        self.refill = None  # its memory first
        self.refill = search.refill(wanted, kind)
        logger.info("%s", self.refill)
        return self.refill

    def _infer_in_slots(self, ids: Sequence[Sequence[int]], options: GenerationOptions,
                        prefix_ids: Sequence[Sequence[int]] | None,
                        constraints: Sequence[Sequence[Sequence[int]]] | None, insist: bool,
                        results: list[list[Hypothesis]], progress: Callable[[int], object] | None,
                        draws: torch.Generator | None) -> set[int]:
        """Fills in ``results`` what slots serve; returns which sentences those are."""
        limits = length_limits(self.models, [torch.empty(len(sentence)) for sentence in ids], options)
        refill = None if constraints is not None else self.slots(
            options, len(ids), max(map(len, ids)), max(limits))
        if refill is None:
            if insist:
                raise GenerationError("refill is for one encoder-decoder model on a GPU, without constraints, "
                                      "alignments and the like, and with slots that serve nobody else: leave it to be "
                                      "chosen")
            return set()
        refill.draws = draws
        fitting = [i for i in range(len(ids)) if refill.refusal(len(ids[i]), options, limits[i]) is None]
        if fitting:
            prefixes = None if prefix_ids is None else self._padded([prefix_ids[i] for i in fitting])
            check(self.models, [torch.empty(len(ids[i])) for i in fitting], options, prefixes,
                  [limits[i] for i in fitting])
        places = {refill.submit(ids[i], options, limits[i], None if prefix_ids is None else prefix_ids[i]): i
                  for i in sorted(fitting, key=lambda i: -len(ids[i]))}  # the longest first: they take most steps
        for ticket, hypotheses in refill.run():
            if ticket in places:  # and not of a call that was broken off
                results[places[ticket]] = hypotheses
                if progress is not None:
                    progress(1)
        return set(fitting)

    def translate(self, lines: Sequence[str], options: GenerationOptions | None = None, remove_bpe: str | None = None,
                  max_tokens: int = 4096, max_sentences: int = 128,
                  progress: Callable[[int], object] | None = None, refill: bool | None = None) -> list[str]:
        """The best translation of each line of space-separated tokens, as the model's vocabulary has them.

        ``remove_bpe`` joins subwords again: "@@ " for subword-nmt, "sentencepiece" for its underscores. Batches,
        ``progress`` and ``refill`` are those of :meth:`infer`. GenerationError if the model file holds no vocabularies.
        """
        ids = [self.encode_line(line) for line in lines]
        found = self.infer(ids, options, None, max_tokens, max_sentences, progress, refill=refill)
        return [self.decode_ids(hypotheses[0].tokens, remove_bpe) for hypotheses in found]

    def encode_line(self, line: str) -> list[int]:
        """Ids of the line's tokens and eos, which a language model has in front; what the vocabulary lacks is unk."""
        if self._src_indices is None:
            symbols = _present(self.src_symbols, "source")
            self._src_indices = {symbol: index for index, symbol in enumerate(symbols)}
        unk = self.config.unk
        ids = [self._src_indices.get(token, unk) for token in line.split()]
        return [*ids, self.config.eos] if self.config.has_encoder else [self.config.eos, *ids]

    def decode_ids(self, tokens: Tensor | Sequence[int], remove_bpe: str | None = None) -> str:
        """Text of target ids, without eos and padding."""
        symbols = _present(self.tgt_symbols, "target")
        ids = tokens.tolist() if isinstance(tokens, Tensor) else tokens
        text = " ".join(symbols[i] for i in ids if i not in (self.config.eos, self.config.pad))
        if remove_bpe == "sentencepiece":
            return text.replace(" ", "").replace("\u2581", " ").strip()
        return (text + " ").replace(remove_bpe, "").rstrip() if remove_bpe else text

    def _padded(self, prefix_ids: Sequence[Sequence[int]]) -> Tensor:
        """(B, P) int64, pad behind the shorter ones."""
        width = max(map(len, prefix_ids))
        return torch.tensor([[*ids, *[self.config.pad] * (width - len(ids))] for ids in prefix_ids], dtype=torch.int64)

    def _check_ids(self, ids: Sequence[Sequence[int]]) -> None:
        vocab = self.config.src_vocab_size
        for index, sentence in enumerate(ids):
            if not len(sentence):
                raise GenerationError(f"sentence {index} is empty; an empty line is the eos token ({self.config.eos}) "
                                      "alone")
            low, high = min(sentence), max(sentence)
            if low < 0 or high >= vocab:
                raise GenerationError(f"sentence {index} has a token id {low if low < 0 else high} outside of the "
                                      f"source vocabulary of {vocab}; is the model that of this dictionary?")


def sentences_of(ids: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """Sentences as :meth:`Generator.generate` takes them, views of one tensor: torch.tensor of a list takes seven times
    as long, a tensor for each sentence longer still."""
    joint = np.fromiter(itertools.chain.from_iterable(ids), np.int64)
    return torch.split(torch.from_numpy(joint), [len(sentence) for sentence in ids])


def _cut(hypothesis: Hypothesis, limit: int, options: GenerationOptions) -> Hypothesis:
    """``hypothesis`` without the eos that its limit, an index of a step, has put behind it."""
    if len(hypothesis.tokens) <= limit:
        return hypothesis
    scores = hypothesis.positional_scores[:limit]
    score = float(scores.sum()) / (limit**options.lenpen if options.normalize_scores else 1.0)
    return replace(hypothesis, tokens=hypothesis.tokens[:limit], score=score, positional_scores=scores)


def check_same_vocabulary(first: ModelFile, member: ModelFile) -> None:
    """GenerationError where two members of an ensemble have not one vocabulary a side, or are not of one kind."""
    if first.config.stacks != member.config.stacks:
        raise GenerationError(f"the models of an ensemble must be of one kind, got stacks {first.config.stacks!r} and "
                              f"{member.config.stacks!r}")
    for side, ours, theirs, sizes in (
            ("source", first.src_symbols, member.src_symbols,
             (first.config.src_vocab_size, member.config.src_vocab_size)),
            ("target", first.tgt_symbols, member.tgt_symbols,
             (first.config.tgt_vocab_size, member.config.tgt_vocab_size))):
        if sizes[0] != sizes[1] or (ours is not None and theirs is not None and ours != theirs):
            raise GenerationError(f"the models of an ensemble must share their vocabularies, but the {side} "
                                  f"vocabularies differ ({sizes[0]} and {sizes[1]} types)")


def _present(symbols: tuple[str, ...] | None, side: str) -> tuple[str, ...]:
    if symbols is None:
        raise GenerationError(f"the model file holds no {side} vocabulary, so only ids can be translated; export it "
                              "again with lightseq-export --data-bin")
    return symbols


def _batches_by_length(lengths: Sequence[int], max_tokens: int, max_sentences: int) -> Iterator[list[int]]:
    """Indices in batches of like length, the longest first, so that memory is asked for once."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) >= max_sentences or (len(batch) + 1) * lengths[batch[0]] > max_tokens):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
