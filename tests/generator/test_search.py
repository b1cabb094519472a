"""One step of each search, over tables small enough to check by head, and against fairseq's search classes."""

import pytest
import torch
from fairseq import search as fairseq_search

from lightseq_fairseq.generator.search import BeamSearch, DiverseBeamSearch, LengthMatchedSearch
from tests.generator.stock_model import dictionary

TWO_BEAMS = [[-9.0, -1.0, -2.0, -5.0, -6.0],
             [-9.0, -4.0, -0.5, -7.0, -8.0]]
"""Log-probabilities of five tokens after each of two beams."""


def test_first_step_takes_the_best_tokens_of_the_one_beam():
    scores, tokens, beams = BeamSearch(2)(0, torch.tensor([TWO_BEAMS[:1]]), None)
    assert tokens.tolist() == [[1, 2, 3, 4]] and beams.tolist() == [[0, 0, 0, 0]]
    assert scores.tolist() == [[-1.0, -2.0, -5.0, -6.0]]


def test_later_steps_rank_the_sums_over_all_beams():
    scores, tokens, beams = BeamSearch(2)(1, torch.tensor([TWO_BEAMS]), torch.tensor([[-3.0, -1.0]]))
    # beam 0: -4 (1), -5 (2), -8 (3); beam 1: -1.5 (2), -5 (1), -8 (3)
    assert scores.tolist() == [[-1.5, -4.0, -5.0, -5.0]]
    assert tokens.tolist()[0][:2] == [2, 1] and beams.tolist()[0][:2] == [1, 0]
    assert sorted(zip(tokens.tolist()[0][2:], beams.tolist()[0][2:], strict=True)) == [(1, 1), (2, 0)]


def test_a_long_vocabulary_is_searched_in_two_stages_with_the_same_result():
    table, scores = torch.randn(3, 4, 5000), torch.randn(3, 4)
    values, places = (table + scores[..., None]).flatten(1).topk(8)
    found = BeamSearch(4)(1, table, scores)
    assert torch.equal(found.scores, values)
    assert torch.equal(found.tokens, places % 5000) and torch.equal(found.beams, places // 5000)


def test_a_beam_of_nan_comes_last():
    table = torch.tensor([TWO_BEAMS])
    table[0, 1] = torch.nan
    scores, tokens, beams = BeamSearch(2)(1, table, torch.tensor([[-3.0, -1.0]]))
    assert tokens.tolist() == [[1, 2, 3, 4]] and beams.tolist() == [[0] * 4]


def test_a_small_vocabulary_gives_fewer_candidates():
    scores, tokens, _ = BeamSearch(3)(0, torch.tensor([TWO_BEAMS[:1]]), None)
    assert tokens.tolist() == [[1, 2, 3, 4]]  # of 6 wanted; never the whole vocabulary, for pad is in it


def test_siblings_lose_their_rank():
    scores, tokens, beams = BeamSearch(2, diversity_rate=2.0)(
        1, torch.tensor([TWO_BEAMS]), torch.tensor([[-3.0, -1.0]]))
    # beam 0: -4-2, -5-4, -8-6; beam 1: -1.5-2, -5-4, -8-6
    assert scores.tolist() == [[-3.5, -6.0, -9.0, -9.0]]
    assert tokens.tolist()[0][:2] == [2, 1] and beams.tolist()[0][:2] == [1, 0]


def test_length_matched_search_moves_eos():
    strategy = LengthMatchedSearch(1, eos=2, src_lens=torch.tensor([1, 2]))
    table = torch.tensor([[TWO_BEAMS[0]], [TWO_BEAMS[0]]])
    assert strategy(1, table, torch.zeros(2, 1)).tokens.tolist() == [[2, 1], [1, 3]]
    strategy.keep(torch.tensor([1]))
    assert strategy(2, table[1:], torch.zeros(1, 1)).scores.tolist() == [[0.0, -1.0]]


def test_a_later_group_avoids_what_an_earlier_one_said():
    strategy = DiverseBeamSearch(2, groups=2, strength=3.0)
    first = strategy(0, torch.tensor([TWO_BEAMS[:1]]), None)
    assert first.tokens.tolist() == [[1, 2]]  # the second group finds 1 at -1-3
    second = strategy(1, torch.tensor([[TWO_BEAMS[0], TWO_BEAMS[0]]]), first.scores)
    assert second.tokens.tolist() == [[1, 2]] and second.beams.tolist() == [[0, 1]]


def test_agreement_counts_for_ever():
    strategy = DiverseBeamSearch(2, groups=2, strength=0.5)
    table = torch.tensor([[TWO_BEAMS[0], TWO_BEAMS[0]]])
    first = strategy(0, table[:, :1], None)
    assert first.tokens.tolist() == [[1, 1]] and first.scores.tolist() == [[-1.0, -1.5]]
    second = strategy(1, table, first.scores)  # 1 now costs the second group 0.5 * (1 + 1 shared): a tie with 2
    assert second.scores.tolist() == [[-2.0, -3.5]]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_diverse_beam_search_against_fairseq(groups):
    torch.manual_seed(groups)
    ours, theirs = DiverseBeamSearch(4, groups, 0.5), fairseq_search.DiverseBeamSearch(dictionary(30), groups, 0.5)
    _compare(ours, lambda step, lprobs, scores: theirs.step(step, lprobs, scores, None, torch.arange(3)))


def test_siblings_search_against_fairseq():
    ours, theirs = BeamSearch(4, diversity_rate=0.3), fairseq_search.DiverseSiblingsSearch(dictionary(30), 0.3)
    _compare(ours, theirs.step)


def _compare(ours, theirs):
    """Five steps over random tables (3, 4, 30), each going on with the first four candidates."""
    scores = torch.zeros(3, 4, 0)
    for step in range(5):
        lprobs = torch.randn(3, 4, 30).mul_(2).log_softmax(-1)
        if step == 0:
            lprobs[:] = lprobs[:, :1].clone()
        expected = theirs(step, lprobs.clone(), scores)
        found = ours(step, lprobs[:, :1].clone() if step == 0 else lprobs, scores[..., -1] if step else None)
        torch.testing.assert_close(found.scores, expected[0])
        assert torch.equal(found.tokens, expected[1])
        assert torch.equal(found.beams, expected[2] if step else torch.zeros_like(found.beams))
        scores = torch.cat((scores, expected[0][:, :4, None]), dim=2)
