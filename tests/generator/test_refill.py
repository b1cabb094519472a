"""Sentences that share slots get the hypotheses that they get alone."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch

from lightseq_fairseq.generator import refill as module
from lightseq_fairseq.generator.beam_search import decode
from lightseq_fairseq.generator.device_search import DeviceSearch
from lightseq_fairseq.generator.device_state import Kind
from lightseq_fairseq.generator.generator import Generator
from lightseq_fairseq.generator.model import Transformer
from lightseq_fairseq.generator.options import GenerationError, GenerationOptions
from lightseq_fairseq.generator.refill import Slots
from tests.generator.test_device_search import (  # noqa: F401  one of them a fixture
    MODELS,
    assert_same,
    memory_model,
    raw_weights,
    sentences,
)
from tests.generator.test_generator import random_model


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    monkeypatch.setattr(module, "_PAGE_TOKENS", 32)
    monkeypatch.setattr(module, "_LEAST_PAGE", 16)


def run(refill, src, options, prefixes=None, limits=None):
    """What ``refill`` finds, in the order of ``src``; ``options`` are one for all, or one of each."""
    options = [options] * len(src) if isinstance(options, GenerationOptions) else options
    limits = limits or [o.max_len_b for o in options]
    tickets = [refill.submit(*arguments, None if prefixes is None else prefixes[i])
               for i, arguments in enumerate(zip(src, options, limits, strict=True))]
    found = dict(refill.run())
    assert refill.idle and len(refill.free_slots) == refill.slots.count
    assert len(refill.free_pages) == refill.slots.pages and all(page.users == 0 for page in refill.free_pages)
    return [found[ticket] for ticket in tickets]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [3])
def test_models(name, count, device):
    model = Transformer(random_model(**MODELS[name]), device)
    src, options = sentences(11), GenerationOptions(beam=3, nbest=3, max_len_b=15)
    refill = DeviceSearch(model).refill(Slots(count, 3, 16, 12))
    assert_same(run(refill, src, options), decode([model], src, options))


@pytest.mark.parametrize(("beam", "count", "ahead", "steps"), [(1, 1, 1, 2), (2, 6, 0, 1), (5, 6, 3, 3), (4, 17, 1, 1)])
def test_looking_late_changes_nothing(beam, count, ahead, steps, device, monkeypatch):
    monkeypatch.setattr(module, "_LOOKS_AHEAD", ahead)
    monkeypatch.setattr(module, "_STEPS_A_LOOK", steps)
    model = Transformer(random_model(seed=3), device)
    src, options = sentences(6 * count, seed=beam), GenerationOptions(beam=beam, nbest=beam, max_len_b=13)
    assert_same(run(DeviceSearch(model).refill(Slots(count, beam, 14, 12)), src, options),
                decode([model], src, options))


def test_options_and_limits_of_each_sentence(device):
    model = Transformer(random_model(seed=3), device)
    kinds = [GenerationOptions(beam=4, nbest=4), GenerationOptions(beam=2, nbest=1, lenpen=0.3, unkpen=-3.0),
             GenerationOptions(beam=1, temperature=0.6), GenerationOptions(beam=3, nbest=2, min_len=5),
             GenerationOptions(beam=4, normalize_scores=False, nbest=2, unkpen=50.0)]
    src = sentences(30)
    options, limits = [kinds[i % 5] for i in range(30)], [5 + i * 7 % 11 for i in range(30)]
    found = run(DeviceSearch(model).refill(Slots(5, 4, 17, 12)), src, options, limits=limits)
    for i in range(30):
        assert_same([found[i]], decode([model], [src[i]], options[i], None, [limits[i]]))


@pytest.mark.parametrize("options", [
    dict(diverse_beam_groups=2, unkpen=-4.0), dict(diversity_rate=0.7), dict(no_repeat_ngram_size=2),
    dict(no_repeat_ngram_size=1, diverse_beam_groups=4),
], ids=str)
def test_other_searches(options, device):
    model = Transformer(random_model(seed=3), device)
    src, options = sentences(14), GenerationOptions(beam=4, nbest=4, max_len_b=11, **options)
    refill = DeviceSearch(model).refill(Slots(4, 4, 12, 12), Kind.of(options))
    assert_same(run(refill, src, options), decode([model], src, options))


def test_kinds_cover_what_is_data(device):
    """Slots that may block n-grams also serve sentences that block none, and refuse another kind of search."""
    model = Transformer(random_model(seed=3), device)
    refill = DeviceSearch(model).refill(Slots(3, 3, 12, 12), Kind(siblings=True, ngrams=True))
    kinds = [GenerationOptions(beam=3, no_repeat_ngram_size=size, diversity_rate=rate)
             for size, rate in ((0, 0.0), (1, 0.0), (2, 0.5))]
    src = sentences(9)
    found = run(refill, src, kinds * 3, limits=[11] * 9)
    for i in range(9):
        assert_same([found[i]], decode([model], [src[i]], kinds[i % 3], None, [11]))
    with pytest.raises(GenerationError, match="do not search by Kind.*sampling=True"):
        refill.submit(src[0], GenerationOptions(beam=3, sampling=True), 11)


def test_samples_repeat_with_their_seed(device):
    model, src = Transformer(random_model(seed=3), device), sentences(14)
    options, found = GenerationOptions(beam=3, nbest=3, max_len_b=11, sampling=True, sampling_topk=5), []
    for seed in (1, 1, 2):
        refill = DeviceSearch(model).refill(Slots(4, 3, 12, 12), Kind.of(options))
        refill.draws = torch.Generator(device).manual_seed(seed)
        found.append([[h.tokens.tolist() for h in hypotheses] for hypotheses in run(refill, src, options)])
    assert found[0] == found[1] != found[2]
    assert len({str(h) for hypotheses in found[0] for h in hypotheses}) > 30, "beams and sentences draw their own"


@pytest.mark.parametrize("score_forced_eos", [True, False])
@pytest.mark.parametrize("score_prefix", [True, False])
def test_prefixes(score_prefix, score_forced_eos, device):
    model = Transformer(random_model(), device)
    src, prefixes = sentences(9), [[7], [8, 9, 2], None, [], [5, 6], [2], [4] * 30, [3, 3], [9]]
    options = GenerationOptions(beam=3, nbest=2, max_len_b=9, score_prefix=score_prefix,
                                score_forced_eos=score_forced_eos)
    found = run(DeviceSearch(model).refill(Slots(4, 3, 10, 12)), src, options, prefixes)
    for sentence, prefix, ours in zip(src, prefixes, found, strict=True):
        assert_same([ours], decode([model], [sentence], options, torch.tensor([prefix]) if prefix else None))


def test_slots_serve_for_ever(device):
    """What earlier sentences left behind must not reach later ones."""
    model = Transformer(random_model(), device)
    refill = DeviceSearch(model).refill(Slots(4, 4, 26, 12))
    before = refill.memory
    for seed, options in ((1, dict(max_len_b=20)), (8, dict(max_len_b=3, unkpen=2.0)), (3, dict(max_len_b=25)),
                          (4, dict(max_len_b=20, beam=2, temperature=2.0))):
        options = GenerationOptions(**{"beam": 4, "nbest": 2, **options})
        src = sentences(11, seed)
        assert_same(run(refill, src, options), decode([model], src, options))
    assert refill.memory == before and f"{before / 2**20:.0f} MiB" in str(refill)


def test_memory_is_known_beforehand(device):
    search = DeviceSearch(Transformer(random_model(), device))
    for slots in (Slots(3, 2, 40, 30), Slots(50, 5, 100, 64)):
        assert search.refill(slots).memory == pytest.approx(search.refill_memory(slots), rel=0.1)


def test_slots_over_the_encoders_output(device, monkeypatch):
    """Pages of it take a fraction of the memory that those of keys and values take."""
    search = DeviceSearch(memory_model(monkeypatch, device, True))
    src, options = sentences(11), GenerationOptions(beam=1, max_len_b=9, min_len=9)
    slots = Slots(3, 1, 16, 12)
    refill = search.refill(slots)
    assert refill.memory == pytest.approx(search.refill_memory(slots), rel=0.1)
    assert refill.state.buffers.source.dim() == 3
    found, expected = run(refill, src, options), search.decode(src, options, None, [9] * len(src))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[0].positional_scores[0], theirs[0].positional_scores[0], rtol=0,
                                   atol=0.02 if device.type == "cuda" else 1e-5)
    if device.type == "cpu":
        assert_same(found, expected)


def test_sentences_may_come_and_go_at_any_time(device):
    """A cancelled sentence yields nothing, its slot serves the next one, and the others do not notice."""
    model = Transformer(random_model(seed=3), device)
    options = GenerationOptions(beam=2, nbest=2, max_len_b=17, min_len=4)
    src, found, limits = sentences(24), {}, [4 + i * 5 % 13 for i in range(24)]
    refill = DeviceSearch(model).refill(Slots(3, 2, 18, 12))
    tickets = [refill.submit(src[i], options, limits[i]) for i in range(12)]
    assert refill.cancel(tickets[10]), "while it waits"
    found |= refill.collect()
    under_way = [refill.live[slot][0].ticket for slot in sorted(refill.live)]
    assert under_way and refill.cancel(under_way[0]) and not refill.cancel(under_way[0])
    assert not refill.cancel(next(iter(found))) and not refill.cancel(999)
    tickets += [refill.submit(src[i], options, limits[i]) for i in range(12, 24)]
    while not refill.idle:
        found |= refill.collect()
    assert refill.collect() == {}
    gone = {tickets[10], under_way[0]}
    assert set(found) == set(tickets) - gone
    kept = [i for i, ticket in enumerate(tickets) if ticket not in gone]
    assert_same([found[tickets[i]] for i in kept],
                decode([model], [src[i] for i in kept], options, None, [limits[i] for i in kept]))
    assert sorted(refill.free_slots) == [0, 1, 2] and len(refill.free_pages) == refill.slots.pages


def test_steps_are_full(device):
    """Ten times as many sentences as slots take little more than a tenth of the steps that they take alone."""
    model = Transformer(random_model(seed=3), device)
    src, options = sentences(80), GenerationOptions(beam=2, max_len_b=17, min_len=3)
    refill = DeviceSearch(model).refill(Slots(8, 2, 18, 12))
    count, advance = [0], refill.advance

    def counted():
        count[0] += 1
        advance()

    refill.advance = counted
    hypotheses = run(refill, src, options)
    least = [max(len(h[0].tokens), 4) for h in hypotheses]
    assert count[0] <= (sum(least) / 8 + max(least)) * 3


def test_what_does_not_fit_is_refused(device):
    refill = DeviceSearch(Transformer(random_model(), device)).refill(Slots(2, 2, 10, 6))
    options = GenerationOptions(beam=2)
    for arguments, words in (
            (([4] * 7, options, 5), "7 source tokens exceed the 6"), (([4, 2], options, 10), "11 target tokens exceed"),
            (([4, 2], GenerationOptions(beam=3), 5), "3 beams exceed the 2"), (([], options, 5), "no tokens"),
            (([4, 23], options, 5), "among the 23 source types"), (([4, 2], options, 5, [29]), "29 target types"),
            (([4, 2], GenerationOptions(beam=1, min_len=6), 5), "min_len 6 exceeds")):
        with pytest.raises(GenerationError, match=words):
            refill.submit(*arguments)
    assert refill.idle


def test_a_model_that_gives_no_numbers_has_no_hypotheses(device):
    model = random_model()
    broken = dataclasses.replace(model, tensors={
        name: torch.full_like(tensor, torch.nan) if "output_projection" in name else tensor
        for name, tensor in model.tensors.items()})
    refill = DeviceSearch(Transformer(broken, device)).refill(Slots(2, 2, 10, 6))
    assert run(refill, [torch.tensor([4, 2])] * 3, GenerationOptions(beam=2, max_len_b=5)) == [[], [], []]


def on_the_device(device):
    """A generator that searches on the device, also where that is the CPU."""
    generator = Generator([random_model(seed=3)], device)
    if generator.device_search is None:
        generator.device_search = DeviceSearch(generator.models[0])
    return generator


def test_a_generator_decodes_many_sentences_in_slots(device, monkeypatch):
    monkeypatch.setattr("lightseq_fairseq.generator.generator.MANY", 20)
    generator, seen = on_the_device(device), []
    ids, options = [s.tolist() for s in sentences(24)], GenerationOptions(beam=2, nbest=2, max_len_a=1, max_len_b=4)
    batches = generator.infer(ids, options, refill=False)
    assert generator.refill is None
    assert_same(generator.infer(ids, options, progress=seen.append), batches)
    slots = generator.refill
    assert slots is not None and sum(seen) == 24
    assert_same(generator.infer(ids[:5], options, refill=True), batches[:5])
    prefixes = [[7], [8, 9]] * 12
    assert_same(generator.infer(ids, options, prefixes), generator.infer(ids, options, prefixes, refill=False))
    assert generator.refill is slots, "they are kept"
    text = [" ".join(f"s{i}" for i in sentence[:-1]) for sentence in ids]
    assert generator.translate(text, options) == [generator.decode_ids(h[0].tokens) for h in batches]


def test_reserved_slots_stay(device):
    """What does not fit them goes in batches, and results come in their order."""
    generator = on_the_device(device)
    refill = generator.reserve(Slots(4, 2, 10, 8))
    ids, options = [s.tolist() for s in sentences(12)], GenerationOptions(beam=2, max_len_a=1, max_len_b=2)
    assert max(map(len, ids)) > 8 and min(map(len, ids)) < 8
    assert_same(generator.infer(ids, options, refill=True), generator.infer(ids, options, refill=False))
    wide = dataclasses.replace(options, beam=3)
    assert_same(generator.infer(ids, wide, refill=True), generator.infer(ids, wide, refill=False))
    assert generator.refill is refill
    ticket = refill.submit(ids[1], options, 3)
    with pytest.raises(GenerationError, match="slots that serve nobody else"):
        generator.infer(ids, options, refill=True)
    assert list(refill.collect()) == [ticket], "whoever submits it gets it"
    with pytest.raises(GenerationError, match="MiB, more than the"):
        generator.reserve(Slots(10**6, 5, 1000, 8))


def test_refill_is_refused_by_name(device):
    ids = [[4, 2], [5, 2]]
    with pytest.raises(GenerationError, match="refill is for one encoder-decoder model on a GPU"):
        on_the_device(device).infer(ids, GenerationOptions(beam=2, return_alignment=True), refill=True)
    with pytest.raises(GenerationError, match="slots are for one encoder-decoder model on a GPU"):
        Generator([random_model(), random_model(1)], device).reserve(Slots(2, 2, 10, 10))


@pytest.mark.parametrize("refill", [True, False])
def test_ten_thousand_sentences_leave_memory_flat(refill, device):
    if device.type != "cuda":
        pytest.skip("it is the GPU's memory that is watched: run with --device cuda")
    generator = Generator([random_model()], device)
    ids = [sentence.tolist() for sentence in sentences(10_000)]
    options = GenerationOptions(beam=2, max_len_b=9)
    reserved = []

    def run():
        generator.infer(ids, options, refill=refill, max_sentences=250,
                        progress=lambda count: reserved.extend([torch.cuda.memory_reserved()] * count))
        gc.collect()
        return torch.cuda.memory_allocated()

    gc.collect()  # what other tests have left
    first = run()
    if refill:  # all is taken in front
        assert len(set(reserved[1000:])) == 1
    most = torch.cuda.memory_reserved()
    del reserved[:]
    assert run() <= first and len(reserved) == 10_000 and max(reserved) <= most
