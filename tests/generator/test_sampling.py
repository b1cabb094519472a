"""Draws are counted; what must not be drawn never is."""

import pytest
import torch
from fairseq import search as fairseq_search

from lightseq_fairseq.generator.sampling import Sampling, draw, trim_top_p
from tests.generator.stock_model import dictionary

PROBS = torch.tensor([0.1, 0.4, 0.0, 0.2, 0.3])


def test_a_uniform_points_at_a_token():
    uniforms = torch.tensor([0.0, 0.05, 0.1, 0.49, 0.51, 0.69, 0.75, 1 - 2**-24])
    assert draw(PROBS, uniforms).tolist() == [0, 0, 1, 1, 3, 3, 4, 4]


def test_probabilities_need_no_sum_of_one():
    assert draw(PROBS * 7, torch.tensor([0.05, 0.49, 0.75])).tolist() == [0, 1, 4]


def test_impossible_tokens_at_the_ends_are_never_drawn():
    probs = torch.tensor([0.0, 1.5, 0.0])
    assert draw(probs, torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, 1]


@pytest.mark.parametrize("p, kept", [(0.3, 1), (0.4, 1), (0.5, 2), (0.7, 2), (0.75, 3), (1.0, 4)])
def test_top_p_keeps_the_fewest_that_reach_p(p, kept):
    values, columns = trim_top_p(PROBS.double()[None], p)
    assert (values > 0).sum() == kept and columns[0, :kept].tolist() == [1, 4, 3, 0][:kept]


@pytest.mark.parametrize("top_k, top_p", [(0, 0.0), (2, 0.0), (3, 0.0), (9, 0.0), (0, 0.5), (0, 0.75)])
def test_frequencies_scores_and_support_equal_fairseqs(top_k, top_p):
    beam, sentences = 100, 40
    lprobs = PROBS.log().expand(sentences, beam, 5)
    ours = Sampling(beam, top_k, top_p, torch.Generator().manual_seed(7))
    theirs = fairseq_search.Sampling(dictionary(5), min(top_k, 5) or -1, top_p or -1.0)
    for step in range(2):
        before = torch.zeros(sentences, beam, step)
        expected = theirs.step(step, lprobs.clone(), before)
        found = ours(step, lprobs[:, :1].clone() if step == 0 else lprobs.clone(), before[..., -1] if step else None)
        assert torch.equal(found.beams, expected[2])
        for token in range(5):
            rate, reference = ((tokens == token).float().mean().item() for tokens in (found.tokens, expected[1]))
            assert abs(rate - reference) < 0.05  # 4000 draws each: four deviations of the difference
            assert (rate == 0) == (reference == 0)
        torch.testing.assert_close(found.scores, PROBS.log()[found.tokens])


def test_a_seed_repeats_the_draws():
    lprobs = torch.zeros(3, 1, 50).log_softmax(-1)
    first, again, other = (Sampling(4, generator=torch.Generator().manual_seed(s))(0, lprobs.clone(), None).tokens
                           for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_scores_add_up():
    found = Sampling(2)(1, PROBS.log().expand(1, 2, 5).clone(), torch.tensor([[-1.0, -2.0]]))
    torch.testing.assert_close(found.scores, PROBS.log()[found.tokens] + torch.tensor([[-1.0, -2.0]]))
