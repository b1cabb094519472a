"""Each rule on a table of two beams and five tokens: 0 a word, 1 pad, 2 eos, 3 unk, 4 a word."""

import torch

from lightseq_fairseq.generator.logits import (
    ForcedTokens,
    MinLength,
    NoRepeatNgram,
    TokenPenalties,
    log_probabilities,
)
from lightseq_fairseq.generator.search import Candidates

PAD, EOS, UNK = 1, 2, 3
NO = -torch.inf


def table():
    return torch.tensor([[[-1.0, -2.0, -3.0, -4.0, -5.0], [-5.0, -4.0, -3.0, -2.0, -1.0]]])


def test_temperature_divides_logits():
    logits = torch.randn(2, 3, 5)
    expected = torch.log_softmax(logits / 0.7, -1)
    torch.testing.assert_close(log_probabilities([logits.clone()], 0.7), expected)


def test_an_ensemble_averages_probabilities():
    logits = [torch.randn(2, 3, 5) for _ in range(3)]
    expected = torch.stack([x.softmax(-1) for x in logits]).mean(0).log()
    torch.testing.assert_close(log_probabilities([x.clone() for x in logits]), expected)


def test_pad_is_impossible_and_unk_pays():
    lprobs = table()
    TokenPenalties(PAD, UNK, 0.5, torch.device("cpu"))(lprobs)
    assert lprobs.tolist() == [[[-1.0, NO, -3.0, -4.5, -5.0], [-5.0, NO, -3.0, -2.5, -1.0]]]


def test_eos_waits_for_the_minimum_length():
    lprobs = table()
    MinLength(2, EOS)(2, lprobs)
    assert torch.equal(lprobs, table())
    MinLength(2, EOS)(1, lprobs)
    assert lprobs[..., EOS].tolist() == [[NO, NO]] and torch.equal(lprobs[..., 3:], table()[..., 3:])


def banned(rule: NoRepeatNgram) -> list[list[int]]:
    lprobs = torch.zeros(1, 2, 6)
    rule(0, lprobs)
    return [[t for t in range(6) if row[t] == NO and t != PAD] for row in lprobs[0]]


def say(rule: NoRepeatNgram, first: list[int], second: list[int]) -> None:
    for tokens in zip(first, second, strict=True):
        rule.advance(torch.tensor([tokens]), torch.tensor([[0, 1]]))


def test_no_bigram_comes_twice():
    rule = NoRepeatNgram(2, PAD)
    say(rule, [4, 5, 4], [4, 4, 5])
    assert banned(rule) == [[5], []]  # "4 5" was said; "5" was never followed
    say(rule, [3], [4])
    assert banned(rule) == [[], [4, 5]]


def test_no_trigram_comes_twice():
    rule = NoRepeatNgram(3, PAD)
    say(rule, [4, 5, 0, 4], [0, 0, 0, 0])
    assert banned(rule) == [[], [0]]
    say(rule, [5], [4])
    assert banned(rule) == [[0], []]


def test_no_word_comes_twice():
    rule = NoRepeatNgram(1, PAD)
    assert banned(rule) == [[], []]
    say(rule, [4, 5], [0, 0])
    assert banned(rule) == [[4, 5], [0]]


def test_history_follows_the_beams_and_the_sentences():
    rule = NoRepeatNgram(2, PAD)
    rule.advance(torch.tensor([[4, 5], [0, 3]]), torch.zeros(2, 2, dtype=torch.int64))
    rule.keep(torch.tensor([1]))
    rule.advance(torch.tensor([[4, 5]]), torch.tensor([[1, 1]]))
    assert rule.history.tolist() == [[[3, 4], [3, 5]]]


def forced(prefix, max_lens):
    prefix = None if prefix is None else torch.tensor(prefix)
    return ForcedTokens(torch.tensor(max_lens), prefix, PAD, EOS)


def force(tokens: ForcedTokens, step: int, lprobs: torch.Tensor) -> torch.Tensor:
    taken = tokens.take(step, lprobs)
    lprobs[..., EOS] = NO  # as a rule might
    if taken is not None:
        tokens.put(step, lprobs, taken)
    return lprobs


def test_a_prefix_leaves_one_token():
    lprobs = force(forced([[4]], [9]), 0, table())
    assert lprobs.tolist() == [[[NO] * 4 + [-5.0], [NO] * 4 + [-1.0]]]


def test_sentences_without_prefix_stay_free():
    both = force(forced([[4], [PAD]], [9, 9]), 0, table().repeat(2, 1, 1))
    assert both[0, 0].tolist() == [NO] * 4 + [-5.0] and both[1, 0].tolist() == [-1.0, -2.0, NO, -4.0, -5.0]


def test_the_length_limit_forces_eos_over_prefix_and_rules():
    tokens = forced([[4, 4, 4]], [1])
    assert force(tokens, 1, table()).tolist() == [[[NO, NO, -3.0, NO, NO], [NO, NO, -3.0, NO, NO]]]


def test_steps_without_force_cost_nothing():
    assert forced(None, [3, 5]).take(2, table()) is None
    assert forced([[4, PAD]], [5]).take(1, table()) is None


def test_an_eos_in_the_prefix_makes_all_candidates_one():
    tokens = forced([[EOS], [4]], [9, 9])
    candidates = Candidates(torch.tensor([[-3.0, NO], [-5.0, NO]]), torch.tensor([[2, 0], [4, 0]]),
                            torch.tensor([[0, 1], [0, 1]]))
    closed = tokens.close(0, candidates)
    assert closed.scores.tolist() == [[-3.0, -3.0], [-5.0, NO]]
    assert closed.tokens.tolist() == [[2, 2], [4, 0]] and closed.beams.tolist() == [[0, 0], [0, 1]]
    assert tokens.close(1, candidates) is candidates


def test_forced_tokens_follow_the_sentences():
    tokens = forced([[4], [0]], [9, 9])
    tokens.keep(torch.tensor([1]))
    assert tokens.tokens[:, 0].tolist() == [0]
