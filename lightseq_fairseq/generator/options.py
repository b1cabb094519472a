"""Decoding options of one call, checked when they are made."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

_REFUSED = {
    "lm_path": "fusion with a language model",
    "lm_weight": "fusion with a language model",
    "retain_dropout": "dropout at inference",
    "retain_dropout_modules": "dropout at inference",
    "decoding_format": "non-autoregressive decoding",
    "print_step": "iterative refinement",
    "retain_iter_history": "iterative refinement",
    "iter_decode_eos_penalty": "iterative refinement",
    "iter_decode_max_iter": "iterative refinement",
    "iter_decode_force_max_iter": "iterative refinement",
    "iter_decode_with_beam": "iterative refinement",
    "iter_decode_with_external_reranker": "iterative refinement",
    "beam_mt": "the first pass of speech translation",
    "max_len_a_mt": "the first pass of speech translation",
    "max_len_b_mt": "the first pass of speech translation",
    "lenpen_mt": "the first pass of speech translation",
    "eos_token": "the language tag of speech translation",
}
"""fairseq's decoding options that are not taken, and what they would ask for."""


class GenerationError(ValueError):
    """Decoding was asked for something contradictory or impossible; the message is one sentence."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How to decode; names, defaults and meaning are fairseq's. Lengths count target tokens without eos.

    Raises :class:`GenerationError` naming everything that is wrong.
    """

    beam: int = 5
    """Hypotheses kept per sentence, at most the vocabulary less one; with ``sampling`` the number of samples."""
    nbest: int = 1
    """Hypotheses returned per sentence, best first; a prefix that leaves fewer ways on may yield fewer."""
    lenpen: float = 1.0
    """A hypothesis of T tokens (eos included) scores ``sum(log p) / T ** lenpen``."""
    normalize_scores: bool = True
    """False drops the division: a hypothesis scores ``sum(log p)``."""
    min_len: int = 1
    """eos is not chosen at the first ``min_len`` steps; tokens forced by a prefix are exempt."""
    score_prefix: bool = True
    """Whether tokens that a prefix forces count in scores by their log-probabilities, as in fairseq; False counts 0, as
    Hugging Face does."""
    score_forced_eos: bool = True
    """Likewise eos at the limit, where ``force_eos`` makes it the last token."""
    max_len_a: float = 0.0
    """eos is forced at step ``min(int(max_len_a * src_len + max_len_b), max_target_positions - 1)``,
    where src_len counts the source's eos."""
    max_len_b: int = 200
    """See ``max_len_a``."""
    match_source_len: bool = False
    """eos is impossible before step src_len and costs nothing from then on, for tagging; ``max_len_*`` are ignored."""
    force_eos: bool = True
    """What happens to a hypothesis at its limit: True makes eos its last token, as fairseq does; False cuts it one
    token earlier, without eos, as Hugging Face does."""
    early_stopping: bool = True
    """When a sentence with ``beam`` complete hypotheses is finished: True at once, as in fairseq; False, which is
    Hugging Face's default, when its best beam, were it complete now, would score no better than the worst of the
    ``beam`` best hypotheses."""
    include_context: bool = False
    """For language models: hypotheses begin with the text that they continue, its first token left out, whose tokens
    count in scores and lengths, as in fairseq-generate. False leaves it out of everything, as Hugging Face does."""
    unkpen: float = 0.0
    """``log p(unk) -= unkpen``."""
    temperature: float = 1.0
    """``p = softmax(logits / temperature)``."""
    no_repeat_ngram_size: int = 0
    """No sequence of this many tokens comes twice in a hypothesis; 0 allows all."""
    sampling: bool = False
    """Draw each token from p instead of searching."""
    sampling_topk: int = 0
    """Draw among the k most probable tokens; 0 means all."""
    sampling_topp: float = 0.0
    """Draw among the most probable tokens whose sum first reaches this probability; 0 means all."""
    diverse_beam_groups: int = 0
    """Diverse beam search (arXiv:1610.02424) with this many groups, which must divide ``beam``; 0 means none."""
    diverse_beam_strength: float = 0.5
    """``log p(w) -= strength * sum(1 + tokens shared so far with that group)`` over earlier groups that chose w."""
    diversity_rate: float = 0.0
    """Diverse siblings (arXiv:1611.08562): the r-th best continuation of a beam loses ``rate * r``."""
    constraints: Literal["ordered", "unordered"] | None = None
    """Hypotheses contain the phrases that are given with their sentence, in that order or in any."""
    seed: int | None = None
    """Of the draws; None takes torch's own random state."""
    return_attention: bool = False
    """Fill :attr:`Hypothesis.attention`."""
    return_alignment: bool = False
    """Fill :attr:`Hypothesis.alignment`."""

    def __post_init__(self) -> None:
        wrong = _wrong_types(self)
        if not wrong:
            wrong = _wrong_values(self) + _contradictions(self)
        if wrong:
            raise GenerationError("; ".join(wrong))

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> GenerationOptions:
        """Options by name; unknown names and what fairseq has but we have not end in one :class:`GenerationError`."""
        known = [f.name for f in fields(cls)]
        wrong = []
        for name in options:
            if name in _REFUSED:
                wrong.append(f"{name} ({_REFUSED[name]}) is not supported")
            elif name not in known:
                close = difflib.get_close_matches(name, known, 1)
                wrong.append(f"unknown option {name!r}" + (f", did you mean {close[0]!r}?" if close else ""))
        if wrong:
            raise GenerationError("; ".join(wrong))
        return cls(**options)


def refused_options(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """"--name (what it asks for)" of each fairseq option in ``given`` that is not its default and not taken."""
    return [f"--{name.replace('_', '-')} ({what})" for name, what in _REFUSED.items()
            if name in given and given[name] != defaults.get(name)]


def _wrong_types(options: GenerationOptions) -> list[str]:
    """Values of another type than declared; an int serves as float, and no float may be infinite."""
    wrong = []
    for field in fields(options):
        value = getattr(options, field.name)
        if field.type == "bool":
            right = isinstance(value, bool)
        elif field.name == "constraints":
            right = value in ("ordered", "unordered", None)
        elif field.type == "float":
            right = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        else:
            right = isinstance(value, int) and not isinstance(value, bool) or (value is None and "None" in field.type)
        if not right:
            wrong.append(f"{field.name} must be {_A_TYPE[str(field.type)]}, got {value!r}")
    return wrong


_A_TYPE = {"int": "an integer", "int | None": "an integer or None", "float": "a finite number", "bool": "True or False",
           "Literal['ordered', 'unordered'] | None": "'ordered', 'unordered' or None"}


def _wrong_values(options: GenerationOptions) -> list[str]:
    """Values outside their range."""
    wrong = []
    for name in ("beam", "nbest"):
        if getattr(options, name) < 1:
            wrong.append(f"{name} must be at least 1, got {getattr(options, name)}")
    for name in ("min_len", "max_len_a", "max_len_b", "no_repeat_ngram_size", "sampling_topk", "diverse_beam_groups",
                 "diversity_rate"):
        if getattr(options, name) < 0:
            wrong.append(f"{name} must not be negative, got {getattr(options, name)}")
    if options.temperature <= 0:
        wrong.append(f"temperature must be greater than 0, got {options.temperature}")
    if not 0 <= options.sampling_topp <= 1:
        wrong.append(f"sampling_topp must lie between 0 and 1, got {options.sampling_topp}")
    return wrong


def _contradictions(options: GenerationOptions) -> list[str]:
    """Options that exclude each other."""
    wrong = []
    searches = {"sampling": options.sampling, "diverse_beam_groups": options.diverse_beam_groups > 0,
                "match_source_len": options.match_source_len, "diversity_rate": options.diversity_rate > 0,
                "constraints": options.constraints is not None}
    asked = [name for name, on in searches.items() if on]
    if len(asked) > 1:
        wrong.append(f"{' and '.join(asked)} exclude each other")
    for name in ("sampling_topk", "sampling_topp"):
        if getattr(options, name) > 0 and not options.sampling:
            wrong.append(f"{name} needs sampling")
    if options.sampling_topk > 0 and options.sampling_topp > 0:
        wrong.append("sampling_topk and sampling_topp exclude each other")
    if options.nbest > options.beam >= 1:
        wrong.append(f"nbest must not exceed beam, got {options.nbest} of {options.beam}")
    if options.diverse_beam_groups > 0 and options.beam % options.diverse_beam_groups:
        wrong.append(f"diverse_beam_groups must divide beam, got {options.diverse_beam_groups} and {options.beam}")
    return wrong
