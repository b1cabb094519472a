"""States of constraints, by hand and beside fairseq's."""

from __future__ import annotations

import random

import pytest
import torch
from fairseq import token_generation_constraints as stock

from lightseq_fairseq.generator.constraints import START, OrderedState, UnorderedState

A, B, C, D, X = range(4, 9)


def after(state, *tokens):
    for token in tokens:
        state = state.read(token)
    return state


def test_ordered_phrases_with_anything_between():
    start = OrderedState.start([[A, B], [C]])
    assert (start.progress, start.met, start.next_tokens()) == (0, False, [A])
    assert after(start, X).progress == 0
    assert after(start, A).next_tokens() == [B]
    between = after(start, A, B, X, X)
    assert (between.progress, between.met, between.next_tokens()) == (2, False, [A, C])
    end = after(between, C, X, A)
    assert (end.progress, end.met, end.next_tokens()) == (3, True, [A])


def test_an_ordered_phrase_broken_off_begins_all_again():
    start = OrderedState.start([[A, B], [C, D]])
    assert after(start, A, X).progress == 0
    assert after(start, A, A).progress == 1
    assert after(start, A, B, C, X).progress == 0  # the first phrase is lost, too
    assert after(start, A, B, C, A).progress == 1


def test_ordered_phrases_in_another_order_do_not_count():
    assert after(OrderedState.start([[A], [C]]), C, A).progress == 1


def test_unordered_phrases_in_any_order():
    start = UnorderedState.start([[A, B], [C]])
    assert (start.progress, start.met, start.next_tokens()) == (0, False, [A, C])
    assert after(start, A).next_tokens() == [A, B, C]
    for tokens in ([A, B, C], [C, A, B], [X, C, X, A, B, X], [A, B, A, B, C]):
        assert after(start, *tokens).met
    assert not after(start, A, C, B).met and after(start, A, C, B).progress == 1
    assert not after(start, A, B).met


def test_an_unordered_phrase_broken_off_leaves_the_others():
    assert after(UnorderedState.start([[C], [A, B]]), C, A, X).progress == 1


def test_a_phrase_that_begins_another_counts_once_the_longer_one_is_left():
    start = UnorderedState.start([[A], [A, B, C]])
    assert after(start, A).progress == 1 and after(start, A, B).progress == 2
    left = after(start, A, B, X)
    assert (left.progress, left.met) == (1, False)
    assert after(left, A, B, C).met
    assert not after(start, A, B, C).met  # its A belongs to the longer one
    assert after(start, A, B, C, A).met and after(start, A, A, B, C).met


@pytest.mark.parametrize("kind", START)
def test_a_phrase_given_twice_is_said_twice(kind):
    once = after(START[kind]([[A, B], [A, B]]), A, B)
    assert (once.progress, once.met) == (2, False)
    twice = after(once, A, B)
    assert (twice.progress, twice.met) == (4, True)
    assert after(twice, A, B).progress == 4


@pytest.mark.parametrize("kind", START)
def test_nothing_to_say_is_said(kind):
    for phrases in ([], [[]], [[], []]):
        start = START[kind](phrases)
        assert start.met and start.progress == 0 and start.next_tokens() == []
        assert after(start, A, X).met


@pytest.mark.parametrize("kind", START)
def test_states_do_not_change(kind):
    start = START[kind]([[A, B], [A]])
    after(start, A, B, A, X)
    assert start == START[kind]([[A, B], [A]])


@pytest.mark.parametrize("kind", START)
@pytest.mark.parametrize("seed", range(40))
def test_they_read_as_fairseqs(kind, seed):
    draw = random.Random(seed)
    phrases = [draw.choices(range(4, 7), k=draw.randint(1, 3)) for _ in range(draw.randint(1, 5))]
    theirs = {"ordered": stock.OrderedConstraintState, "unordered": stock.UnorderedConstraintState}[kind].create(
        stock.pack_constraints([[torch.tensor(phrase) for phrase in phrases]])[0])
    ours = START[kind](phrases)
    for token in draw.choices(range(4, 8), k=60):
        assert ours.next_tokens() == sorted(set(map(int, theirs.next_tokens())))
        ours, theirs = ours.read(token), theirs.advance(token)
        assert (ours.progress, ours.met) == (theirs.bank, theirs.finished)
