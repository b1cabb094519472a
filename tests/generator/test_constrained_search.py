"""Constrained beam search: turns of the banks by hand, and fairseq's hypotheses."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from fairseq import search as fairseq_search

from lightseq_fairseq.generator import beam_search
from lightseq_fairseq.generator.beam_search import decode
from lightseq_fairseq.generator.constrained_search import ConstrainedBeamSearch, by_turns
from lightseq_fairseq.generator.options import GenerationError, GenerationOptions
from tests.generator.stock_model import StockModel, fairseq_hypotheses, sentences, stock_transformer
from tests.generator.test_beam_search import assert_same

KINDS = ("ordered", "unordered")


def turns(scores, banks):
    return by_turns(np.array(scores, np.float32), np.array(banks), 3).tolist()


def test_banks_take_turns_the_furthest_first():
    assert turns([-1, -2, -3, -4, -5, -6], [0, 0, 1, 1, 2, 0]) == [4, 2, 0, 3, 1, 5]


def test_equal_scores_keep_their_order():
    assert turns([-1, -1, -1], [1, 1, 0]) == [0, 2, 1]


def test_what_cannot_be_said_comes_last_whatever_its_bank():
    assert turns([-np.inf, -1, -np.inf, -2], [3, 0, 1, 1]) == [3, 1, 0, 2]


def test_a_hundred_worse_is_a_bank_worse():
    # bank 1 begins again behind bank 0, at its first turn: -1, then -150, -200
    assert turns([-1, -150, -200, -1, -2], [0, 1, 1, 1, 0]) == [3, 1, 0, 2, 4]
    assert turns([-1, -50, -60, -1, -2], [0, 1, 1, 1, 0]) == [3, 0, 1, 4, 2]


def table(*rows):
    """(1, R, 6) log-probabilities of the tokens 0 to 5."""
    return torch.tensor([rows], dtype=torch.float32)


def test_the_first_step_tries_what_constraints_ask_for():
    search = ConstrainedBeamSearch(1, 2, "ordered", [[[5]]])
    scores, tokens, beams = search(0, table([-1, -9, -9, -2, -3, -8]), None)
    assert tokens.tolist() == [[5, 0]] and scores.tolist() == [[-8, -1]] and beams.tolist() == [[0, 0]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_hypothesis_ends_only_when_its_constraints_are_met(kind):
    search = ConstrainedBeamSearch(2, 2, kind, [[[5]]])
    assert search(0, table([-3, -9, 0, -4, -5, -6]), None).tokens.tolist()[0][:2] == [5, 0]
    search.advance(torch.tensor([[5, 0]]), torch.tensor([[0, 0]]))
    _, tokens, beams = search(1, table([-3, -9, 0, -4, -5, -6], [-3, -9, 0, -4, -5, -6]), torch.tensor([[-6.0, -3.0]]))
    ends = [beam for token, beam in zip(tokens[0].tolist(), beams[0].tolist(), strict=True) if token == 2]
    assert ends == [0]


def test_states_follow_beams_and_sentences():
    search = ConstrainedBeamSearch(2, 2, "ordered", [[], [[4, 5]], [[3]]])
    search.advance(torch.tensor([[4, 5], [4, 5], [4, 3]]), torch.zeros(3, 2, dtype=torch.int64))
    assert [[state.progress for state in beams] for beams in search.states] == [[0, 0], [1, 0], [0, 1]]
    search.keep(torch.tensor([1, 2]))
    search.advance(torch.tensor([[5, 5], [4, 3]]), torch.tensor([[1, 0], [1, 1]]))
    assert [[state.progress for state in beams] for beams in search.states] == [[0, 2], [1, 1]]
    assert search.sizes == [2, 1]


def random_constraints(draw, types):
    """Up to six phrases; some twice, some beginning others."""
    phrases = []
    for _ in range(draw.randint(0, 2)):
        phrase = draw.choices(range(4, types), k=draw.randint(1, 4))
        phrases.append(phrase)
        if draw.random() < 0.4:
            phrases.append(draw.choice([phrase, phrase[:1], [*phrase[:1], draw.randrange(4, types)]]))
    draw.shuffle(phrases)
    return [torch.tensor(phrase) for phrase in phrases]


@pytest.fixture
def stable(monkeypatch):
    """fairseq leaves the order of equal keys to torch and the CPU; here they keep theirs."""
    sort = torch.Tensor.sort
    monkeypatch.setattr(torch.Tensor, "sort", lambda self, dim=-1, descending=False, stable=True: sort(
        self, dim=dim, descending=descending, stable=True))


def stock_hypotheses(model, src, kind, constraints, **options):
    words = model.decoder.dictionary
    return fairseq_hypotheses([model], src, constraints=constraints, **options,
                              search_strategy=fairseq_search.LexicallyConstrainedBeamSearch(words, kind))


def contains(tokens, kind, phrases):
    """Whether the phrases stand in the tokens, whatever else does."""
    if kind == "unordered":
        return all(any(tokens[i:i + len(phrase)] == phrase for i in range(len(tokens))) for phrase in phrases)
    place = 0
    for phrase in phrases:
        place = next((i + len(phrase) for i in range(place, len(tokens)) if tokens[i:i + len(phrase)] == phrase), None)
        if place is None:
            return False
    return True


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(24))
def test_hypotheses_are_fairseqs(kind, seed, stable):
    draw = random.Random(seed)
    types = draw.choice([25, 40])
    model, src = stock_transformer(types, draw.randint(1, 2)), sentences(draw.randint(1, 7), types, seed=seed)
    constraints = [random_constraints(draw, types) for _ in src]
    beam, lenpen, temperature = draw.choice([1, 2, 4, 5, 10]), draw.choice([0.6, 1.0]), draw.choice([0.1, 1.0])
    options = dict(max_len_b=62, lenpen=lenpen, temperature=temperature)
    found = decode([StockModel(model)], src, GenerationOptions(beam=beam, nbest=beam, constraints=kind, **options),
                   constraints=constraints)
    options["len_penalty"] = options.pop("lenpen")
    expected = stock_hypotheses(model, src, kind, constraints, beam_size=beam, **options)
    at_limit = [any(len(h.tokens) == 63 for h in ours) for ours in found]
    best = [slice(1 if cut else None) for cut in at_limit]  # fairseq finds fewer at the limit
    assert_same([ours[n] for ours, n in zip(found, best, strict=True)],
                [theirs[n] for theirs, n in zip(expected, best, strict=True)], temperature)
    for hypotheses, phrases in zip(found, constraints, strict=True):
        assert all(contains(h.tokens.tolist(), kind, [p.tolist() for p in phrases]) for h in hypotheses)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_hypothesis_at_the_length_limit_is_fairseqs(kind, stable):
    model, src = stock_transformer(), sentences(7)
    constraints = [[torch.tensor([7, 8]), torch.tensor([9])] for _ in src]
    options = GenerationOptions(beam=4, nbest=4, max_len_b=5, constraints=kind)
    found = decode([StockModel(model)], src, options, constraints=constraints)
    expected = stock_hypotheses(model, src, kind, constraints, beam_size=4, max_len_b=5)
    assert_same([ours[:1] for ours in found], [theirs[:1] for theirs in expected])
    assert sum(map(len, found)) >= sum(map(len, expected))


@pytest.mark.parametrize("beam", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_constraints_may_fill_the_longest_output(kind, beam):
    phrases = [torch.tensor([7, 8]), torch.tensor([7]), torch.tensor([7, 8])]
    found = decode([StockModel(stock_transformer())], sentences(4), GenerationOptions(
        beam=beam, max_len_b=5, constraints=kind), constraints=[phrases] * 4)
    best = [hypotheses[0].tokens.tolist() for hypotheses in found]
    assert all(len(tokens) == 6 and sorted(tokens[:-1]) == [7, 7, 7, 8, 8] for tokens in best)


@pytest.mark.parametrize("kind", KINDS)
def test_no_constraints_change_nothing(kind):
    src = sentences(7)
    plain = decode([StockModel(stock_transformer())], src, GenerationOptions(beam=4, nbest=4, max_len_b=20))
    found = decode([StockModel(stock_transformer())], src,
                   GenerationOptions(beam=4, nbest=4, max_len_b=20, constraints=kind), constraints=[[]] * 7)
    assert [[h.tokens.tolist() for h in hs] for hs in found] == [[h.tokens.tolist() for h in hs] for hs in plain]


@pytest.mark.parametrize("worth", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_when_sentences_leave_changes_nothing(worth, kind, stable, monkeypatch):
    monkeypatch.setattr(beam_search, "_WORTH_LEAVING", worth)
    model, src, draw = stock_transformer(), sentences(9), random.Random(3)
    constraints = [random_constraints(draw, 40) for _ in src]
    found = decode([StockModel(model)], src, GenerationOptions(beam=4, nbest=4, max_len_b=60, constraints=kind),
                   constraints=constraints)
    assert_same(found, stock_hypotheses(model, src, kind, constraints, beam_size=4, max_len_b=60))


def test_a_vocabulary_large_enough_for_two_stages(stable):
    model, src, draw = stock_transformer(2100, updates=5), sentences(4, 2100), random.Random(2)
    constraints = [random_constraints(draw, 2100) for _ in src]
    found = decode([StockModel(model)], src, GenerationOptions(beam=4, nbest=1, max_len_b=16, constraints="unordered"),
                   constraints=constraints)
    expected = stock_hypotheses(model, src, "unordered", constraints, beam_size=4, max_len_b=16)
    assert_same(found, [theirs[:1] for theirs in expected])


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_hardly_larger_than_the_beam(kind):
    found = decode([StockModel(stock_transformer(9, updates=20))], sentences(3, 9), GenerationOptions(
        beam=8, nbest=8, max_len_b=12, constraints=kind), constraints=[[torch.tensor([4, 5])], [], [torch.tensor([6])]])
    assert all(contains(h.tokens.tolist(), kind, [[4, 5]]) for h in found[0]) and found[1]
    assert all(6 in h.tokens.tolist() for h in found[2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [dict(prefix_tokens=torch.tensor([[7, 9], [5, 1], [1, 1]])),
                                  dict(no_repeat_ngram_size=2), dict(min_len=0)], ids=str)
def test_constraints_hold_beside_other_rules(kind, more):
    prefix = more.pop("prefix_tokens", None) if "prefix_tokens" in more else None
    phrases = [[torch.tensor([9, 11]), torch.tensor([12])]] * 3
    found = decode([StockModel(stock_transformer())], sentences(3), GenerationOptions(
        beam=4, nbest=4, max_len_b=30, constraints=kind, **more), prefix, constraints=phrases)
    for hypotheses in found:
        assert len(hypotheses) == 4
        assert all(contains(h.tokens.tolist(), kind, [[9, 11], [12]]) for h in hypotheses)
        assert len({tuple(h.tokens.tolist()) for h in hypotheses}) == 4


@pytest.mark.parametrize("constraints, more, message", [
    ([[torch.tensor([2])], []], {}, "target types other than pad and eos, got 2"),
    ([[torch.tensor([40])], []], {}, "ids of the 40 target types other than pad and eos, got 40"),
    ([[]], {}, "one list for each of 2 sentences, got 1"),
    ([[torch.tensor([[4]])], []], {}, "each constraint must be a 1-D tensor"),
    ([[], [torch.tensor([4, 5]), torch.tensor([6])]], dict(max_len_b=2), "sentence 1 have 3 tokens, more than"),
    (None, {}, "need each other"),
    ([[], []], dict(constraints=None), "need each other"),
    ([[], [torch.tensor([4, 4, 4])]], dict(no_repeat_ngram_size=2, max_len_b=9), "sentence 1 has no hypothesis that"),
])
def test_what_does_not_fit_is_said(constraints, more, message):
    with pytest.raises(GenerationError, match=message):
        decode([StockModel(stock_transformer())], sentences(2),
               GenerationOptions(**{"beam": 2, "constraints": "ordered", **more}), constraints=constraints)
