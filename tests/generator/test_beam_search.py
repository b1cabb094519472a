"""The decoding loop finds what fairseq's SequenceGenerator finds, for every option that both have."""

import dataclasses

import pytest
import torch
from fairseq import search as fairseq_search
from fairseq.ngram_repeat_block import NGramRepeatBlock
from fairseq.sequence_generator import SequenceGeneratorWithAlignment

from lightseq_fairseq.generator import beam_search
from lightseq_fairseq.generator.beam_search import Continuation, decode
from lightseq_fairseq.generator.options import GenerationError, GenerationOptions
from lightseq_fairseq.generator.search import Candidates
from tests import tolerances
from tests.generator.stock_model import StockModel, dictionary, fairseq_hypotheses, sentences, stock_transformer

NAMES = {"beam": "beam_size", "lenpen": "len_penalty", "unkpen": "unk_penalty"}
"""Options that SequenceGenerator calls otherwise."""


def run(options, src=None, models=None, **more):
    models = models or [stock_transformer()]
    return decode([StockModel(m) for m in models], sentences(7) if src is None else src, options, **more)


def compare(src=None, models=None, prefix_tokens=None, max_lens=None, theirs=None, **options):
    """Both decode; every hypothesis of every sentence must agree. Returns ours."""
    src, models = sentences(7) if src is None else src, models or [stock_transformer()]
    options = {"max_len_b": 20, **options}
    found = run(GenerationOptions(nbest=options["beam"], **options), src, models,
                prefix_tokens=prefix_tokens, max_lens=max_lens)
    if theirs is None:
        theirs = {NAMES.get(name, name): value for name, value in options.items()}
    expected = fairseq_hypotheses(models, src, prefix_tokens, **theirs)
    assert_same(found, expected)
    return found


def assert_same(found, expected, temperature=1.0):
    """Errors of logits grow as these do, divided by the temperature."""
    bound = {**tolerances.SCORE, "atol": tolerances.SCORE["atol"] / min(1.0, temperature)}
    assert [len(ours) for ours in found] == [len(theirs) for theirs in expected]
    for ours, theirs in zip(sum(found, []), sum(expected, []), strict=True):
        assert ours.tokens.tolist() == theirs["tokens"].tolist()
        torch.testing.assert_close(ours.positional_scores, theirs["positional_scores"], **bound)
        assert ours.score == pytest.approx(float(theirs["score"]), rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("beam", [1, 2, 4, 5, 10])
@pytest.mark.parametrize("batch", [1, 2, 13])
def test_beams_and_batches(beam, batch):
    compare(sentences(batch, seed=batch), beam=beam)


@pytest.mark.parametrize("options", [
    dict(lenpen=0.6), dict(lenpen=0.0), dict(lenpen=3.0), dict(normalize_scores=False),
    dict(unkpen=-4.0), dict(unkpen=50.0), dict(temperature=0.5), dict(temperature=3.0),
    dict(min_len=0), dict(min_len=6), dict(max_len_b=5), dict(min_len=4, max_len_b=4), dict(min_len=0, max_len_b=0),
], ids=str)
@pytest.mark.parametrize("beam", [1, 5])
def test_one_option_at_a_time(beam, options):
    compare(beam=beam, **options)


def test_the_length_limit_follows_each_source():
    for sentence in sentences(5):
        compare([sentence], beam=4, max_len_a=0.6, max_len_b=1)


def test_given_length_limits_stand_for_those_of_a_batch():
    src = sentences(7)
    compare(src, beam=4, max_len_a=0.6, max_len_b=1, max_lens=[int(0.6 * max(map(len, src)) + 1)] * 7)


def test_the_model_limits_the_length():
    compare(sentences(3), beam=2, max_len_b=500, min_len=63)


@pytest.mark.parametrize("beam", [1, 4, 6])
@pytest.mark.parametrize("lenpen", [0.6, 1.0])
def test_an_ensemble_of_two(beam, lenpen):
    compare(models=[stock_transformer(), stock_transformer(seed=2)], beam=beam, lenpen=lenpen, temperature=1.3)


@pytest.mark.parametrize("size", [2, 3])
def test_blocking_of_ngrams(size, monkeypatch):
    forbid = NGramRepeatBlock._no_repeat_ngram  # fairseq hands it the padding after the tokens, and nothing matches

    def without_padding(self, tokens, lprobs, bsz, beam_size, step):
        return forbid(self, tokens[:, :step + 1], lprobs, bsz, beam_size, step)

    monkeypatch.setattr(NGramRepeatBlock, "_no_repeat_ngram", without_padding)
    options = dict(beam=5, min_len=15)
    blocked = compare(no_repeat_ngram_size=size, **options)
    free = run(GenerationOptions(max_len_b=20, nbest=5, **options))
    assert [h.tokens.tolist() for h in blocked[0]] != [h.tokens.tolist() for h in free[0]]


def test_no_word_comes_twice_yet_sentences_end():
    for hypotheses in run(GenerationOptions(beam=4, nbest=4, max_len_b=20, no_repeat_ngram_size=1)):
        for hypothesis in hypotheses:
            assert len(set(hypothesis.tokens.tolist())) == len(hypothesis.tokens)


@pytest.mark.parametrize("beam", [1, 5])
@pytest.mark.parametrize("length", [1, 3])
def test_a_prefix_comes_first(beam, length):
    prefix = torch.randint(4, 40, (7, length))
    found = compare(prefix_tokens=prefix, beam=beam)
    assert all(h.tokens[:length].tolist() == prefix[i].tolist() for i, hs in enumerate(found) for h in hs)


@pytest.mark.parametrize("beam", [1, 4])
def test_prefixes_of_different_lengths_and_with_eos(beam):
    prefix = torch.tensor([[7, 8, 9], [7, 8, 1], [7, 1, 1], [8, 2, 1], [9, 9, 2], [7, 7, 7], [8, 8, 8]])
    found = compare(prefix_tokens=prefix, beam=beam)
    assert [h.tokens.tolist() for h in found[3]] == [[8, 2]] * beam


def test_a_prefix_longer_than_the_limit_is_cut():
    compare(prefix_tokens=torch.randint(4, 40, (7, 6)), beam=3, max_len_b=4)


def test_a_prefix_excuses_from_the_minimum_length():
    prefix = torch.tensor([[7, 8, 9], [7, 2, 1]])
    compare(sentences(2), prefix_tokens=prefix, beam=3, min_len=4)


def test_the_minimum_length_does_not_depend_on_neighbours():
    """fairseq suspends it for the whole batch while any sentence is under its prefix."""
    src = sentences(2)
    prefix = torch.tensor([[7, 8, 9, 10], [1, 1, 1, 1]])
    together = run(GenerationOptions(beam=4, min_len=4), src, prefix_tokens=prefix)
    alone = run(GenerationOptions(beam=4, min_len=4), src[1:])
    assert together[1][0].tokens.tolist() == alone[0][0].tokens.tolist()


@pytest.mark.parametrize("groups, strength", [(1, 0.5), (2, 0.5), (3, 2.0), (6, 0.2)])
def test_diverse_beam_search(groups, strength):
    options = dict(beam=6, max_len_b=20, diverse_beam_groups=groups, diverse_beam_strength=strength)
    compare(theirs=dict(beam_size=6, max_len_b=20, search_strategy=fairseq_search.DiverseBeamSearch(
        dictionary(40), groups, strength)), **options)


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_diverse_siblings(rate):
    compare(theirs=dict(beam_size=4, max_len_b=20, search_strategy=fairseq_search.DiverseSiblingsSearch(
        dictionary(40), rate)), beam=4, diversity_rate=rate)


@pytest.mark.parametrize("beam", [1, 4])
def test_matching_the_source_length(beam):
    src = sentences(7)
    found = compare(src, max_lens=[max(map(len, src))] * 7, beam=beam, match_source_len=True, theirs=dict(
        beam_size=beam, match_source_len=True,
        search_strategy=fairseq_search.LengthConstrainedBeamSearch(dictionary(40), 1, 0, 1, 0)))
    assert [len(hs[0].tokens) for hs in found] == [len(s) + 1 for s in src]


def test_matched_lengths_do_not_depend_on_neighbours():
    options = GenerationOptions(beam=4, nbest=4, match_source_len=True)
    found = run(options)
    alone = [run(options, [s])[0] for s in sentences(7)]
    assert [[h.tokens.tolist() for h in hs] for hs in found] == [[h.tokens.tolist() for h in hs] for hs in alone]
    assert all(len(h.tokens) == len(s) + 1 for s, hs in zip(sentences(7), found, strict=True) for h in hs)


@pytest.mark.parametrize("types", [6, 7, 9])
@pytest.mark.parametrize("min_len", [0, 1])
def test_a_vocabulary_hardly_larger_than_the_beam(types, min_len):
    src = sentences(5, types)
    compare(src, [stock_transformer(types, updates=20)], beam=5, min_len=min_len, max_len_b=6)


def test_a_vocabulary_large_enough_for_two_stages():
    compare(sentences(5, 2100), [stock_transformer(2100, updates=5)], beam=4, max_len_b=8)


def test_a_beam_of_the_whole_vocabulary_is_cut():
    options = GenerationOptions(beam=50, nbest=50, max_len_b=6)
    found = run(options, sentences(2, 8), [stock_transformer(8, updates=20)])
    assert_same(found, fairseq_hypotheses([stock_transformer(8, updates=20)], sentences(2, 8), beam_size=50,
                                          max_len_b=6))


def test_attention_and_alignment():
    model, src = stock_transformer(), sentences(7)
    expected = fairseq_hypotheses([model], src, None, SequenceGeneratorWithAlignment, beam_size=4, max_len_b=20)
    found = run(GenerationOptions(beam=4, nbest=4, max_len_b=20, return_attention=True, return_alignment=True))
    assert_same(found, expected)
    for ours, theirs, source in ((o, t, s) for os, ts, s in zip(found, expected, src, strict=True)
                                 for o, t in zip(os, ts, strict=True)):
        torch.testing.assert_close(ours.attention, theirs["attention"].t()[:, -len(source):].float(), atol=1e-5,
                                   rtol=0)
        assert ours.alignment == theirs["alignment"]


def test_attention_of_an_ensemble_is_averaged():
    models = [stock_transformer(), stock_transformer(seed=2)]
    expected = fairseq_hypotheses(models, sentences(3), beam_size=2, max_len_b=20)
    found = run(GenerationOptions(beam=2, max_len_b=20, return_attention=True), sentences(3), models)
    for (ours,), theirs, source in zip(found, expected, sentences(3), strict=True):
        torch.testing.assert_close(ours.attention, theirs[0]["attention"].t()[:, -len(source):].float(), atol=1e-5,
                                   rtol=0)


@pytest.mark.parametrize("worth", [0.0, 0.5, 1.0])
def test_when_sentences_leave_changes_nothing(worth, monkeypatch):
    monkeypatch.setattr(beam_search, "_WORTH_LEAVING", worth)
    compare(sentences(9), beam=4, no_repeat_ngram_size=30, prefix_tokens=torch.randint(4, 40, (9, 1)))
    compare(sentences(9), theirs=dict(beam_size=4, max_len_b=20, search_strategy=fairseq_search.DiverseBeamSearch(
        dictionary(40), 2, 0.5)), beam=4, diverse_beam_groups=2)


def test_a_sentence_does_not_see_its_neighbours():
    options = GenerationOptions(beam=5, nbest=5, max_len_a=1.2, max_len_b=2, no_repeat_ngram_size=2)
    together = run(options)
    for sentence, hypotheses in zip(sentences(7), together, strict=True):
        alone = run(options, [sentence])[0]
        assert [h.tokens.tolist() for h in alone] == [h.tokens.tolist() for h in hypotheses]


def test_nbest_returns_the_best_of_the_beam():
    options = GenerationOptions(beam=5, nbest=5)
    for few, all_ in zip(run(dataclasses.replace(options, nbest=2)), run(options), strict=True):
        assert [h.tokens.tolist() for h in few] == [h.tokens.tolist() for h in all_[:2]]
        assert [h.score for h in all_] == sorted((h.score for h in all_), reverse=True)


def test_a_seed_repeats_samples():
    options = GenerationOptions(beam=4, nbest=4, sampling=True, seed=3, max_len_b=12)
    texts = [[[h.tokens.tolist() for h in hs] for hs in run(dataclasses.replace(options, seed=seed))]
             for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_samples_are_scored_by_the_model():
    sample = run(GenerationOptions(beam=1, sampling=True, sampling_topk=5, seed=1, max_len_b=12))
    prefix = torch.nn.utils.rnn.pad_sequence([hs[0].tokens for hs in sample], batch_first=True, padding_value=1)
    forced = run(GenerationOptions(beam=1, max_len_b=12, min_len=0), prefix_tokens=prefix)
    for drawn, again in zip(sample, forced, strict=True):
        torch.testing.assert_close(drawn[0].positional_scores, again[0].positional_scores, **tolerances.SCORE)


def test_sampled_first_tokens_have_the_models_frequencies():
    model, (sentence,) = stock_transformer(), sentences(1)
    count = 3000
    samples = decode([StockModel(model)], [sentence], GenerationOptions(
        beam=30, nbest=30, sampling=True, max_len_b=1), generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    drawn = []
    for _ in range(count // 30):
        samples = decode([StockModel(model)], [sentence], GenerationOptions(
            beam=30, nbest=30, sampling=True, max_len_b=1), generator=generator)
        drawn += [int(h.tokens[0]) for h in samples[0]]
    logits = model(sentence[None], torch.tensor([len(sentence)]), torch.tensor([[2]]))[0][0, 0]
    expected = logits.softmax(-1).detach()
    expected[[1, 2]] = 0  # pad never, eos not at the first step
    rates = torch.tensor(drawn).bincount(minlength=40) / count
    assert (rates - expected / expected.sum()).abs().max() < 0.04


def test_which_candidates_end_and_which_go_on():
    candidates = Candidates(torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-1.0, -2.0, -3.0, -torch.inf]]),
                            torch.tensor([[2, 7, 2, 8], [5, 6, 2, 2]]), torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]]))
    step = Continuation(2, eos=2)(candidates)
    assert step.ended.tolist() == [[True, False], [False, False]]  # an eos beyond the K best does not count
    assert step.totals.tolist() == [[-1.0, -2.0], [-1.0, -2.0]] and step.beams.tolist() == [[1, 0], [0, 1]]
    assert step.tokens.tolist() == [[7, 8], [5, 6]] and step.parents.tolist() == [[0, 1], [0, 1]]
    assert step.scores.tolist() == [[-2.0, -4.0], [-1.0, -2.0]]


def test_a_beam_with_no_way_on_is_idle_and_ends_nothing_more():
    continuation = Continuation(2, eos=2)
    first = continuation(Candidates(torch.tensor([[-1.0, -2.0]]), torch.tensor([[2, 7]]), torch.tensor([[0, 1]])))
    assert first.ended.tolist() == [[True, False]] and first.tokens.tolist() == [[7, 2]]
    assert continuation.idle.tolist() == [[False, True]]
    second = continuation(Candidates(torch.tensor([[-3.0, -4.0]]), torch.tensor([[8, 2]]), torch.tensor([[0, 1]])))
    assert second.ended.tolist() == [[False, False]]


@pytest.mark.parametrize("more, message", [
    (dict(src=[torch.tensor([], dtype=torch.int64)]), r"sentences \[0\] have no tokens"),
    (dict(prefix_tokens=torch.tensor([4])), r"prefix_tokens must have shape \(7, P\), got \(1,\)"),
    (dict(prefix_tokens=torch.full((7, 1), 40)), "prefix_tokens must be ids of the 40 target types, got 40"),
    (dict(max_lens=[3]), "one entry for each of 7 sentences, got 1"),
    (dict(max_lens=[3] * 6 + [0]), "min_len 1 exceeds the longest output allowed to a sentence, 0"),
])
def test_what_does_not_fit_is_said(more, message):
    with pytest.raises(GenerationError, match=message):
        run(GenerationOptions(beam=2), **more)


def test_an_ensemble_of_two_vocabularies_is_an_error():
    models = [stock_transformer(), stock_transformer(9, updates=1)]
    with pytest.raises(GenerationError, match=r"must have one tgt_vocab_size, got \[9, 40\]"):
        run(GenerationOptions(beam=2), models=models)


def test_a_model_of_nan_is_an_error():
    model = StockModel(stock_transformer())
    encode = model.encode

    def spoilt(src_tokens, beam, max_steps):
        state = encode(src_tokens, beam, max_steps)
        step = state.step

        def spoil(tokens, need_attention):
            logits, attention = step(tokens, need_attention)
            logits[-1] = torch.nan
            return logits, attention

        state.step = spoil
        return state

    model.encode = spoilt
    with pytest.raises(GenerationError, match=r"sentence 2 has no hypothesis.*\(NaN\)"):
        decode([model], sentences(3), GenerationOptions(beam=3, max_len_b=8))


def test_no_sentences_no_hypotheses():
    assert decode([StockModel(stock_transformer())], [], GenerationOptions()) == []
