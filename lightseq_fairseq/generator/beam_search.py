"""The decoding loop: a model's logits, rules on them, a search strategy, and the beams that go on.

The result is fairseq's: hypotheses are complete when eos is among the K best of the 2K candidates of a step; a
sentence is finished with K complete hypotheses or at its length limit; the rest of the candidates fill the beams.
B sentences, K beams, R rows (K, or 1 at the first step), V target types, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lightseq_fairseq.config import TransformerConfig
from lightseq_fairseq.generator.constrained_search import ConstrainedBeamSearch
from lightseq_fairseq.generator.hypotheses import History, Hypothesis, Ranking, Step, align
from lightseq_fairseq.generator.logits import (
    ForcedTokens,
    MinLength,
    NoRepeatNgram,
    Rule,
    TokenPenalties,
    log_probabilities,
)
from lightseq_fairseq.generator.options import GenerationError, GenerationOptions
from lightseq_fairseq.generator.sampling import Sampling
from lightseq_fairseq.generator.search import (
    BeamSearch,
    Candidates,
    DiverseBeamSearch,
    LengthMatchedSearch,
    SearchStrategy,
)
from lightseq_fairseq.generator.sequence_model import SequenceModel

_WORTH_LEAVING = 0.75
"""Finished sentences leave the batch once no more than this part of it is live; leaving copies the caches."""


@torch.no_grad()
def decode(models: Sequence[SequenceModel], src_tokens: Sequence[Tensor], options: GenerationOptions,
           prefix_tokens: Tensor | None = None, max_lens: Sequence[int] | None = None,
           generator: torch.Generator | None = None,
           constraints: Sequence[Sequence[Tensor]] | None = None) -> list[list[Hypothesis]]:
    """Translate a batch: for each sentence up to ``options.nbest`` hypotheses, best first.

    ``models`` is an ensemble, usually of one. ``src_tokens`` are 1-D int64 sentences, eos included, without pads.
    ``prefix_tokens`` (B, P) int64 must come first in the target, pad where a prefix is shorter. ``max_lens``
    replaces the length limits that the options give each sentence. ``generator`` draws samples instead of
    ``options.seed``. ``constraints`` are the phrases of each sentence, 1-D int64, for ``options.constraints``. Raises
    :class:`GenerationError`.
    """
    if not len(src_tokens):
        return []
    if max_lens is None:
        max_lens = length_limits(models, src_tokens, options)
    check(models, src_tokens, options, prefix_tokens, max_lens, constraints)
    return _Decoding(models, src_tokens, options, prefix_tokens, max_lens, generator, constraints).run()


def length_limits(models: Sequence[SequenceModel], src_tokens: Sequence[Tensor],
                  options: GenerationOptions) -> list[int]:
    """The step at which each sentence must end, see ``GenerationOptions.max_len_a``."""
    if options.match_source_len:
        return [sentence.numel() for sentence in src_tokens]
    before = fed_before(models[0].config, src_tokens)
    most = min(model.config.max_target_positions for model in models)
    counted = [sentence.numel() - 1 if options.include_context else 0 for sentence in src_tokens]
    return [min(int(options.max_len_a * sentence.numel() + options.max_len_b) - own, most - fed)
            for sentence, fed, own in zip(src_tokens, before, counted, strict=True)]


def fed_before(config: TransformerConfig, src_tokens: Sequence[Tensor]) -> list[int]:
    """Tokens that the decoder is fed up to the first step: the start token, or the text that a language model
    continues."""
    return [1 if config.has_encoder else sentence.numel() for sentence in src_tokens]


class Continuation:
    """Which candidates of a step are complete and which go on; remembers beams that have nothing left to do.

    A beam is idle when its sentence had fewer than K candidates that go on: after sampling eos, or with a vocabulary
    hardly larger than the beam. Idle beams come last and yield no hypotheses.
    """

    def __init__(self, beam: int, eos: int) -> None:
        self.beam, self.eos = beam, eos
        self.idle: Tensor | None = None  # (B, K) bool

    def __call__(self, candidates: Candidates, at_limit: Tensor | None = None) -> Step:
        """Candidates (B, C), best first, C >= K; all those of the sentences ``at_limit`` (B,) bool are complete."""
        scores, tokens, beams = candidates
        first = slice(self.beam)
        stops = tokens == self.eos if at_limit is None else (tokens == self.eos) | at_limit[:, None]
        stops &= scores != -torch.inf
        ended = stops[:, first]
        if self.idle is not None:
            ended = ended & ~self.idle
            stops[:, first] |= self.idle
        if at_limit is not None:
            stops |= at_limit[:, None]
        stops, order = stops.sort(dim=1, stable=True)  # those that go on come first, otherwise in their order
        order = order[:, first]
        if self.idle is not None or tokens.size(1) < 2 * self.beam:
            self.idle = stops[:, first]
        return Step(ended, scores[:, first], beams[:, first],
                    tokens.gather(1, order), beams.gather(1, order), scores.gather(1, order))

    def keep(self, sentences: Tensor) -> None:
        """(B',) int64: only these sentences go on."""
        if self.idle is not None:
            self.idle = self.idle[sentences]


class Improvement:
    """Which sentences could still find a better hypothesis, see ``GenerationOptions.early_stopping``."""

    def __init__(self, batch: int, beam: int, options: GenerationOptions, device: torch.device) -> None:
        self.lenpen = options.lenpen if options.normalize_scores else 0.0
        self.beam = beam
        self.best = torch.full((batch, beam), -torch.inf, device=device)
        """Scores of the best hypotheses so far, (B, K)."""
        self.last_steps = torch.full((batch,), torch.iinfo(torch.int64).max, device=device)
        """Of all sentences that there were: the step at which each was finished."""
        self.live = torch.arange(batch, device=device)

    def __call__(self, step: int, chosen: Step, complete: Tensor) -> Tensor:
        """(B,) int64: K for the sentences that are finished, 0 for the others; once finished, for ever."""
        scale = (step + 1) ** self.lenpen
        ended = (chosen.totals / scale).masked_fill(~chosen.ended, -torch.inf)
        self.best = torch.cat((self.best, ended), 1).topk(self.beam).values
        over = (self.best[:, -1] > -torch.inf) & (chosen.scores[:, 0] / scale <= self.best[:, -1])
        newly = over & (complete < self.beam)
        last = self.last_steps[self.live]
        self.last_steps[self.live] = torch.where(newly, step, last)
        return torch.where(over | (complete >= self.beam), self.beam, 0)

    def keep(self, sentences: Tensor) -> None:
        """(B',) int64: only these sentences go on."""
        self.best, self.live = self.best[sentences], self.live[sentences]


class _Decoding:
    """One batch on its way."""

    def __init__(self, models: Sequence[SequenceModel], src_tokens: Sequence[Tensor], options: GenerationOptions,
                 prefix_tokens: Tensor | None, max_lens: Sequence[int], generator: torch.Generator | None,
                 constraints: Sequence[Sequence[Tensor]] | None) -> None:
        config, self.device = models[0].config, models[0].device
        self.config, self.options, self.src_tokens, self.max_lens = config, options, src_tokens, max_lens
        self.beam = min(options.beam, config.tgt_vocab_size - 1)  # pad is never chosen
        self.states = [model.encode(src_tokens, self.beam, max(max_lens) + 1) for model in models]
        self.need_attention = options.return_attention or options.return_alignment
        self.last_steps = list(max_lens) if options.force_eos else [limit - 1 for limit in max_lens]
        self.limits = torch.tensor(self.last_steps, device=self.device)
        self.limit_steps = set(self.last_steps)
        self.complete = torch.zeros(len(src_tokens), dtype=torch.int64, device=self.device)  # hypotheses so far
        self.history = History(len(src_tokens), self.beam, self.device)
        self.continuation = Continuation(self.beam, config.eos)
        self.improvement = None if options.early_stopping else \
            Improvement(len(src_tokens), self.beam, options, self.device)
        self.search = _search_strategy(options, self.beam, config.eos, src_tokens, self.device, generator, constraints)
        self.constrained = [False] * len(src_tokens) if constraints is None else [len(c) > 0 for c in constraints]
        self.penalties = TokenPenalties(config.pad, config.unk, options.unkpen, self.device)
        contexts = () if config.has_encoder else [text[options.include_context:] for text in src_tokens]
        self.contexts = self._contexts() if options.include_context else None
        counted = [len(text) for text in contexts] if options.include_context else None
        self.rules: list[Rule] = [MinLength(options.min_len, config.eos, counted, self.device)]
        if options.no_repeat_ngram_size:
            self.rules.append(NoRepeatNgram(options.no_repeat_ngram_size, config.pad, contexts, self.device))
        prefix = None if prefix_tokens is None else prefix_tokens.to(self.device)
        self.forced = ForcedTokens(self.limits, prefix, config.pad, config.eos, options.force_eos, options.score_prefix,
                                   options.score_forced_eos)

    def _contexts(self) -> list[Tensor]:
        """Log-probabilities of the texts that are continued, their first tokens left out; as of an ensemble."""
        each = [state.context_log_probabilities(self.src_tokens) for state in self.states]  # type: ignore[attr-defined]
        if len(each) == 1:
            return [scores.cpu() for scores in each[0]]
        return [torch.stack(of_models).exp().mean(0).log().cpu() for of_models in zip(*each, strict=True)]

    def run(self) -> list[list[Hypothesis]]:
        tokens = first_tokens(self.config, self.src_tokens).to(self.device)
        scores = None
        for step in range(max(self.last_steps) + 1):
            lprobs, attention = self._log_probabilities(step, tokens)
            candidates = self.forced.close(step, self.search(step, lprobs, scores))
            cut = not self.options.force_eos and step in self.limit_steps
            chosen = self.continuation(candidates, self.limits == step if cut else None)
            self.history.append(chosen, attention)
            tokens, scores = chosen.tokens, chosen.scores
            live = self._count_live(step, chosen)
            if live == 0:
                break
            for state in self.states:
                state.reorder(chosen.parents)
            self.search.advance(tokens, chosen.parents)
            for rule in self.rules:
                rule.advance(tokens, chosen.parents)
            if live <= _WORTH_LEAVING * len(tokens):
                tokens, scores = self._leave(tokens, scores)
        return self._hypotheses()

    def _log_probabilities(self, step: int, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """What may follow the newest tokens (B, R): (B, R, V), and the attention (B, R, S)."""
        logits, attentions = zip(*(state.step(tokens, self.need_attention) for state in self.states), strict=True)
        lprobs = log_probabilities(logits, self.options.temperature)
        self.penalties(lprobs)
        forced = self.forced.take(step, lprobs)
        for rule in self.rules:
            rule(step, lprobs)
        if forced is not None:
            self.forced.put(step, lprobs, forced)
        attention = attentions[0]
        if len(attentions) > 1 and attention is not None:
            attention = torch.stack(attentions).sum(0).div_(len(attentions))
        return lprobs, attention

    def _count_live(self, step: int, chosen: Step) -> int:
        """Sentences that are not finished; the one value that the host reads of a step."""
        if self.improvement is None:
            self.complete += chosen.ended.sum(1)
        else:
            self.complete = self.improvement(step, chosen, self.complete)
        if step in self.limit_steps:
            self.complete[self.limits <= step] = self.beam
        return int((self.complete < self.beam).sum())

    def _leave(self, tokens: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Drop the finished sentences from everything that goes on."""
        live = (self.complete < self.beam).nonzero()[:, 0]
        for state in self.states:
            state.keep(live)
        for rule in self.rules:
            rule.keep(live)
        for follower in (self.search, self.continuation, self.forced, self.history, self.improvement):
            if follower is not None:
                follower.keep(live)
        self.complete, self.limits = self.complete[live], self.limits[live]
        return tokens[live], scores[live]

    def _hypotheses(self) -> list[list[Hypothesis]]:
        """Those of the whole batch, ranked."""
        options = self.options
        source_lens = np.array([len(sentence) for sentence in self.src_tokens])
        ranking = Ranking(options.lenpen, options.normalize_scores, source_lens if options.match_source_len else None,
                          cut=None if options.force_eos else np.array(self.last_steps),
                          first_only=options.early_stopping)
        if self.contexts is not None:
            totals = np.array([float(scores.sum()) for scores in self.contexts], dtype=np.float32)
            ranking = replace(ranking, context_lens=source_lens - 1, context_totals=totals)
        last_steps = self.last_steps
        if self.improvement is not None:
            last_steps = np.minimum(last_steps, self.improvement.last_steps.cpu().numpy()).tolist()
        found = self.history.best(last_steps, ranking, options.nbest, self.config.eos)
        check_found(found, self.constrained)
        if self.contexts is not None:
            found = [[_with_context(h, text, scores) for h in hypotheses]
                     for hypotheses, text, scores in zip(found, self.src_tokens, self.contexts, strict=True)]
        for sentence, hypotheses in enumerate(found):
            if self.need_attention:
                found[sentence] = [self._finish(h, self.src_tokens[sentence].cpu()) for h in hypotheses]
        return found

    def _finish(self, hypothesis: Hypothesis, source: Tensor) -> Hypothesis:
        """Cut the attention to the source's length and add the alignment, as asked for."""
        assert hypothesis.attention is not None
        attention = hypothesis.attention[:, :len(source)]
        pairs = None
        if self.options.return_alignment:
            pairs = align(attention, self._words(source), self._words(hypothesis.tokens))
        return replace(hypothesis, attention=attention if self.options.return_attention else None, alignment=pairs)

    def _words(self, tokens: Tensor) -> Tensor:
        """Which tokens are neither eos nor pad."""
        return (tokens != self.config.eos) & (tokens != self.config.pad)


def first_tokens(config: TransformerConfig, src_tokens: Sequence[Tensor]) -> Tensor:
    """What the decoder is fed first, (B, 1) int64: the start token, or the last of the text that is continued."""
    if config.has_encoder:
        return torch.full((len(src_tokens), 1), config.start)
    return torch.stack([text[-1:].cpu() for text in src_tokens])


def _with_context(hypothesis: Hypothesis, text: Tensor, scores: Tensor) -> Hypothesis:
    """``hypothesis`` behind the ``text`` (T,) that it continues, whose first token has no score and is left out."""
    return replace(hypothesis, tokens=torch.cat((text[1:].cpu(), hypothesis.tokens)),
                   positional_scores=torch.cat((scores, hypothesis.positional_scores)))


def _search_strategy(options: GenerationOptions, beam: int, eos: int, src_tokens: Sequence[Tensor],
                     device: torch.device, generator: torch.Generator | None,
                     constraints: Sequence[Sequence[Tensor]] | None) -> SearchStrategy:
    """What the options ask for."""
    if options.sampling:
        if generator is None and options.seed is not None:
            generator = torch.Generator(device).manual_seed(options.seed)
        return Sampling(beam, options.sampling_topk, options.sampling_topp, generator)
    if options.diverse_beam_groups:
        return DiverseBeamSearch(beam, options.diverse_beam_groups, options.diverse_beam_strength)
    if options.match_source_len:
        return LengthMatchedSearch(beam, eos, torch.tensor([len(s) for s in src_tokens], device=device))
    if options.constraints is not None and constraints is not None:
        phrases = [[phrase.tolist() for phrase in sentence] for sentence in constraints]
        return ConstrainedBeamSearch(beam, eos, options.constraints, phrases)
    return BeamSearch(beam, options.diversity_rate)


def check_found(found: list[list[Hypothesis]], constrained: Sequence[bool] | None = None) -> None:
    """GenerationError if a sentence has no hypothesis; ``constrained`` are those with constraints."""
    for sentence, hypotheses in enumerate(found):
        if not hypotheses:
            if constrained is not None and constrained[sentence]:
                raise GenerationError(f"sentence {sentence} has no hypothesis that contains its constraints; give it "
                                      "a larger max_len_b, or constraints that its prefix and blocked n-grams allow")
            raise GenerationError(f"sentence {sentence} has no hypothesis because the model's probabilities are "
                                  "not numbers (NaN); use --fp32 if it was run in fp16, or another checkpoint")


def check(models: Sequence[SequenceModel], src_tokens: Sequence[Tensor], options: GenerationOptions,
          prefix_tokens: Tensor | None, max_lens: Sequence[int],
          constraints: Sequence[Sequence[Tensor]] | None = None) -> None:
    """GenerationError naming everything that does not fit together."""
    batch, wrong = len(src_tokens), []
    config = models[0].config
    if not options.early_stopping and (options.sampling or options.include_context or options.match_source_len):
        wrong.append("early_stopping=False is for searches, without include_context and match_source_len")
    if not config.has_encoder:
        wrong += _wrong_contexts(models, src_tokens, options, max_lens)
    elif options.include_context:
        wrong.append("include_context is for language models, which continue a text")
    for name in ("tgt_vocab_size", "pad", "eos", "unk", "start"):
        values = sorted({getattr(model.config, name) for model in models})
        if len(values) > 1:
            wrong.append(f"the models of an ensemble must have one {name}, got {values}")
    empty = [i for i, sentence in enumerate(src_tokens) if not sentence.numel()]
    if empty:
        wrong.append(f"sentences {empty} have no tokens, not even the eos that ends every source sentence"
                     if config.has_encoder else f"texts {empty} have no tokens, not even one to begin with")
    types = config.tgt_vocab_size
    if prefix_tokens is not None:
        if prefix_tokens.dim() != 2 or len(prefix_tokens) != batch:
            wrong.append(f"prefix_tokens must have shape ({batch}, P), got {tuple(prefix_tokens.shape)}")
        strange = prefix_tokens[(prefix_tokens < 0) | (prefix_tokens >= types)].tolist()
        if strange:
            wrong.append(f"prefix_tokens must be ids of the {types} target types, got {strange[0]}")
    if len(max_lens) != batch:
        wrong.append(f"max_lens must have one entry for each of {batch} sentences, got {len(max_lens)}")
    if min(max_lens) < options.min_len and not options.include_context:
        wrong.append(f"min_len {options.min_len} exceeds the longest output allowed to a sentence, {min(max_lens)}: "
                     "lower min_len or raise max_len_a or max_len_b")
    if (constraints is None) != (options.constraints is None):
        wrong.append("constraints of sentences and options.constraints, 'ordered' or 'unordered', need each other")
    if constraints is not None:
        wrong += _wrong_constraints(constraints, models[0].config, max_lens)
    if wrong:
        raise GenerationError("; ".join(wrong))


def _wrong_contexts(models: Sequence[SequenceModel], texts: Sequence[Tensor], options: GenerationOptions,
                    max_lens: Sequence[int]) -> list[str]:
    """What is wrong with texts that a language model is to continue."""
    wrong = [f"{name} needs a source and not a text to continue" for name in
             ("match_source_len", "return_attention", "return_alignment") if getattr(options, name)]
    most = min(model.config.max_target_positions for model in models)
    long = [i for i, (text, limit) in enumerate(zip(texts, max_lens, strict=False)) if len(text) + limit > most]
    if long:
        wrong.append(f"texts {long} and their continuations are longer than the model's {most} positions")
    short = [i for i, limit in enumerate(max_lens) if limit < (0 if options.force_eos else 1)]
    if short:
        wrong.append(f"texts {short} leave no token to say: raise max_len_a or max_len_b, or shorten the texts")
    return wrong


def _wrong_constraints(constraints: Sequence[Sequence[Tensor]], config: TransformerConfig,
                       max_lens: Sequence[int]) -> list[str]:
    """What is wrong with the phrases of sentences."""
    if len(constraints) != len(max_lens):
        return [f"constraints must have one list for each of {len(max_lens)} sentences, got {len(constraints)}"]
    if any(phrase.dim() != 1 for phrases in constraints for phrase in phrases):
        return ["each constraint must be a 1-D tensor of token ids"]
    wrong = []
    strange = [token for phrases in constraints for phrase in phrases for token in phrase.tolist()
               if not 0 <= token < config.tgt_vocab_size or token in (config.pad, config.eos)]
    if strange:
        wrong.append(f"constraints must be ids of the {config.tgt_vocab_size} target types other than pad and eos, "
                     f"got {strange[0]}")
    for sentence, (phrases, longest) in enumerate(zip(constraints, max_lens, strict=True)):
        tokens = sum(map(len, phrases))
        if tokens > longest:
            wrong.append(f"the constraints of sentence {sentence} have {tokens} tokens, more than its longest output, "
                         f"{longest}: raise max_len_a or max_len_b")
    return wrong
