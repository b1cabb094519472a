"""Hypotheses read off a record written by hand: two sentences, two beams, eos 9."""

import numpy as np
import pytest
import torch

from lightseq_fairseq.generator.hypotheses import History, Ranking, Step, align

EOS = 9


def step(ended, totals, beams, tokens, parents, scores):
    tensors = [torch.tensor(x) for x in (ended, totals, beams, tokens, parents, scores)]
    return Step(tensors[0], tensors[1].float(), *tensors[2:5], tensors[5].float())


FIRST = step(ended=[[False, False], [False, False]], totals=[[-1, -2], [-1, -2]], beams=[[0, 0], [0, 0]],
             tokens=[[4, 5], [6, 7]], parents=[[0, 0], [0, 0]], scores=[[-1, -2], [-1, -2]])
SECOND = step(ended=[[True, False], [False, True]], totals=[[-3, -4], [-2, -5]], beams=[[1, 0], [0, 0]],
              tokens=[[4, 5], [6, 7]], parents=[[0, 1], [1, 0]], scores=[[-4, -6], [-3, -4]])
THIRD = step(ended=[[True, True], [True, True]], totals=[[-4, -6], [-6, -7]], beams=[[0, 1], [0, 1]],
             tokens=[[4, 4], [4, 4]], parents=[[0, 0], [0, 0]], scores=[[-9, -9], [-9, -9]])


def history(*steps):
    record = History(2, 2, torch.device("cpu"))
    for made in steps:
        record.append(made, None)
    return record


def said(found):
    return [[(h.tokens.tolist(), h.score) for h in hypotheses] for hypotheses in found]


def test_hypotheses_are_followed_back_through_the_beams():
    found = history(FIRST, SECOND, THIRD).best([2, 2], Ranking(normalize=False), 2, EOS)
    assert said(found) == [[([5, 9], -3.0), ([4, 4, 9], -4.0)], [([6, 9], -5.0), ([7, 6, 9], -6.0)]]
    assert found[1][1].positional_scores.tolist() == [-2.0, -1.0, -3.0]


def test_a_third_hypothesis_comes_too_late_for_the_pool():
    third = THIRD._replace(totals=torch.zeros(2, 2))  # better than all before
    found = history(FIRST, SECOND, third, third).best([3, 3], Ranking(normalize=False), 2, EOS)
    assert [score for _, score in said(found)[0]] == [0.0, -3.0]


def test_nothing_counts_after_the_last_step():
    found = history(FIRST, SECOND, THIRD).best([1, 2], Ranking(normalize=False), 2, EOS)
    assert said(found)[0] == [([5, 9], -3.0)] and len(found[1]) == 2


@pytest.mark.parametrize("lenpen, scores", [(0.0, [-3.0, -4.0]), (1.0, [-4 / 3, -1.5]), (2.0, [-4 / 9, -0.75])])
def test_length_penalty_divides(lenpen, scores):
    found = history(FIRST, SECOND, THIRD).best([2, 2], Ranking(lenpen), 2, EOS)
    assert [score for _, score in said(found)[0]] == pytest.approx(scores)


def test_equal_scores_stay_in_the_order_of_completion():
    third = THIRD._replace(totals=torch.tensor([[-3.0, -3.0], [-5.0, -5.0]]))
    found = history(FIRST, SECOND, third).best([2, 2], Ranking(normalize=False), 2, EOS)
    assert [len(tokens) for tokens, _ in said(found)[0]] == [2, 3]


def test_stopgaps_of_matched_length_rank_last():
    ranking = Ranking(normalize=False, longest=np.array([1, 1]))
    assert said(history(FIRST, SECOND, THIRD).best([2, 2], ranking, 2, EOS))[0][1] == ([4, 4, 9], -torch.inf)


def test_sentences_that_left_have_no_later_steps():
    whole = history(FIRST, SECOND, THIRD).best([1, 2], Ranking(), 2, EOS)
    record = history(FIRST, SECOND)
    record.keep(torch.tensor([1]))
    record.append(Step(*(column[1:] for column in THIRD)), None)
    assert said(record.best([1, 2], Ranking(), 2, EOS)) == said(whole)


def test_attention_is_that_of_the_beams_gone_through():
    record = History(1, 2, torch.device("cpu"))
    attention = torch.arange(12.0).view(3, 1, 2, 2)  # step, sentence, beam, source position
    for made, seen in zip((FIRST, SECOND, THIRD), (attention[0][:, :1], attention[1], attention[2]), strict=True):
        record.append(Step(*(column[1:] for column in made)), seen)
    found = record.best([2], Ranking(normalize=False), 2, EOS)[0]
    assert found[1].tokens.tolist() == [7, 6, 9]  # begun as the first row, went on from beam 1, ended from beam 0
    assert found[1].attention.tolist() == [[0.0, 1.0], [6.0, 7.0], [8.0, 9.0]]


def test_alignment_counts_words_only():
    attention = torch.tensor([[0.1, 0.2, 0.7], [0.6, 0.3, 0.1], [0.0, 0.0, 1.0]])
    source, target = torch.tensor([True, True, False]), torch.tensor([True, True, False])
    assert align(attention, source, target) == [(1, 0), (0, 1)]
    assert align(attention, torch.tensor([False, True, True]), target) == [(1, 0), (0, 1)]
    assert align(attention, torch.zeros(3, dtype=torch.bool), target) == []
