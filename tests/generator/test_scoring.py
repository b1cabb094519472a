"""Given translations get the log-probabilities that decoding them step by step has."""

from __future__ import annotations

import pytest
import torch

from lightseq_fairseq.generator import GenerationError, GenerationOptions, Generator, Scorer, scoring
from tests.generator.test_generator import random_model


@pytest.fixture(scope="module")
def models():
    return [random_model(seed) for seed in (1, 2)]


@pytest.mark.parametrize("members", [1, 2])
def test_scores_are_those_of_the_search(members, models, device, monkeypatch):
    monkeypatch.setattr(scoring, "_ROWS", 5)
    sources = [torch.tensor(ids) for ids in ([5, 6, 7, 2], [9, 2], [4, 8, 4, 8, 4, 2])]
    options = GenerationOptions(beam=3, max_len_b=12, return_attention=True, return_alignment=True)
    found = [hypotheses[0] for hypotheses in Generator(models[:members], device).generate(sources, options)]
    scored = Scorer(models[:members], device).score(sources, [h.tokens for h in found], attention=True, alignment=True)
    for ours, theirs in zip(scored, found, strict=True):
        assert torch.equal(ours.tokens, theirs.tokens)
        torch.testing.assert_close(ours.positional_scores, theirs.positional_scores, rtol=1e-4, atol=1e-4)
        assert ours.score == pytest.approx(theirs.score, abs=1e-4)
        torch.testing.assert_close(ours.attention, theirs.attention, rtol=1e-4, atol=1e-4)
        assert ours.alignment == theirs.alignment


def test_what_cannot_be_scored(models):
    scorer = Scorer(models[:1])
    assert scorer.score([], []) == []
    with pytest.raises(GenerationError, match="1 sources and 0 targets"):
        scorer.score([torch.tensor([2])], [])
    with pytest.raises(GenerationError, match="source 0 has no tokens.*target 0 must be ids"):
        scorer.score([torch.tensor([], dtype=torch.int64)], [torch.tensor([999999])])
