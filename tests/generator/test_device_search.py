"""The search that stays on the device finds what the one that asks the host at every step finds."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch

from lightseq_fairseq.generator import device_search
from lightseq_fairseq.generator.beam_search import decode, length_limits
from lightseq_fairseq.generator.device_search import DeviceSearch
from lightseq_fairseq.generator.device_state import Kind
from lightseq_fairseq.generator.generator import Generator
from lightseq_fairseq.generator.model import Transformer
from lightseq_fairseq.generator.options import GenerationError, GenerationOptions
from lightseq_fairseq.generator.refill import Slots
from lightseq_fairseq.layers.capture import side_stream
from lightseq_fairseq.layers.compiled import CompiledDecoder
from lightseq_fairseq.ops import decode_block, decode_memory_attention
from tests import tolerances
from tests.generator.test_generator import random_model

MODELS = {
    "pre-LN": {},
    "post-LN": dict(encoder_normalize_before=False, decoder_normalize_before=False),
    # fewer positions than the sizes that batches are rounded up to, on either side
    "learned positions, embedding norm": dict(decoder_positions="learned", layernorm_embedding=True,
                                              max_target_positions=21, encoder_positions="learned",
                                              max_source_positions=13),
    "no positions, no final norm": dict(decoder_positions="none", no_decoder_final_norm=True),
    "projections": dict(decoder_input_dim=32, decoder_output_dim=48, activation_fn="gelu"),
    "output bias, a wide vocabulary": dict(output_bias=True, tgt_vocab_size=131, activation_fn="swish"),
}


@pytest.fixture(autouse=True)
def raw_weights(monkeypatch):
    """On the CPU weights would be kept in oneDNN's layout, which the operators of the device do not read."""
    monkeypatch.setattr("lightseq_fairseq.ops.linear._PREPACKED", None)
    monkeypatch.setattr(CompiledDecoder, "serves", lambda *arguments: False)


def sentences(count, seed=4):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 12, (count,), generator=generator).tolist()
    return [torch.tensor([*torch.randint(4, 23, (n,), generator=generator).tolist(), 2]) for n in lengths]


def compare(model, src, prefix=None, max_lens=None, **options):
    """Both searches, every hypothesis; returns those of the device's."""
    options = GenerationOptions(**{"max_len_b": 17, "nbest": options["beam"], **options})
    limits = max_lens or length_limits([model], src, options)
    search = DeviceSearch(model)
    assert search.takes(options, [len(s) for s in src], limits)
    found = search.decode(src, options, prefix, limits)
    assert_same(found, decode([model], src, options, prefix, limits))
    return found


def assert_same(found, expected):
    assert [len(ours) for ours in found] == [len(theirs) for theirs in expected]
    for ours, theirs in zip(sum(found, []), sum(expected, []), strict=True):
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        torch.testing.assert_close(ours.positional_scores, theirs.positional_scores, **tolerances.SCORE)
        assert ours.score == pytest.approx(theirs.score, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("beam", [1, 4])
def test_models(name, beam, device):
    compare(Transformer(random_model(**MODELS[name]), device), sentences(7), beam=beam)


@pytest.mark.parametrize("pre", [True, False])
@pytest.mark.parametrize("beam", [1, 5])
def test_attention_in_one_launch(pre, beam, device, monkeypatch):
    """Its sizes are met by a model of this width; on the GPU it is for 16 bits."""
    taken = []
    for name in ("decode_self_block", "decode_cross_block"):
        joined = getattr(decode_block, name)
        monkeypatch.setattr(decode_block, name, lambda *a, name=name, joined=joined, **k: (
            taken.append(name), joined(*a, **k))[1])
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder")
             for name, size in (("embed_dim", 128), ("attention_heads", 4))}
    file = random_model(decoder_normalize_before=pre, **sizes)
    smaller = {name: tensor * 0.3 for name, tensor in file.tensors.items()}  # sums over so many columns are large
    compare(Transformer(dataclasses.replace(file, tensors=smaller), device), sentences(3), beam=beam)
    assert set(taken) == ({"decode_self_block", "decode_cross_block"} if device.type == "cpu" else set())


def memory_model(monkeypatch, device, pre, dtype=torch.float32):
    """One whose cross-attention is over the encoder's output itself, as that of one beam over long sources is; the
    kernel is for 16 bits and some hundred columns."""
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) != (9, 0):
            pytest.skip("the kernel is for compute capability 9.0")
        dtype = torch.float16
        monkeypatch.setattr(decode_memory_attention, "LEAST_BYTES", 0)
    else:
        monkeypatch.setattr(decode_memory_attention, "serves", lambda *arguments: True)
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder")
             for name, size in (("embed_dim", 512), ("attention_heads", 8))}
    file = random_model(encoder_normalize_before=pre, decoder_normalize_before=pre, **sizes)
    smaller = {name: tensor * 0.15 if tensor.dim() > 1 else tensor for name, tensor in file.tensors.items()}
    return Transformer(dataclasses.replace(file, tensors=smaller), device, dtype)


@pytest.mark.parametrize("pre", [True, False])
def test_cross_attention_over_the_encoders_output(pre, device, monkeypatch):
    model, src = memory_model(monkeypatch, device, pre), sentences(7)
    options = GenerationOptions(beam=1, max_len_b=9, min_len=9)
    over_memory = DeviceSearch(model)
    found = over_memory.decode(src, options, None, [9] * 7)
    assert all(plan.state.buffers.source.dim() == 3 for plan in over_memory.plans.values())
    monkeypatch.setattr(decode_memory_attention, "serves", lambda *arguments: False)
    over_keys = DeviceSearch(model)
    expected = over_keys.decode(src, options, None, [9] * 7)
    assert all(plan.state.buffers.source.dim() == 5 for plan in over_keys.plans.values())
    if device.type == "cpu":
        assert_same(found, expected)
    first = [torch.stack([hypotheses[0].positional_scores[0] for hypotheses in each]) for each in (found, expected)]
    torch.testing.assert_close(*first, rtol=0, atol=0.02 if device.type == "cuda" else 1e-5)
    assert first[0].std() > 0.05, "sources differ, and so should what is said of them"


def test_shapes_share_one_stream(device):
    """A third stream makes every graph slower; a stream for each shape went unnoticed while one shape was timed."""
    if device.type == "cpu":
        pytest.skip("streams are CUDA's; run with --device cuda")
    side_stream(torch.cuda.current_device())  # whether or not another test has captured something
    search = DeviceSearch(Transformer(random_model(), device))
    handed_out = [torch.cuda.Stream().stream_id]
    while (stream := torch.cuda.Stream().stream_id) != handed_out[0]:  # torch has so many, which go round
        handed_out.append(stream)
    for count in (1, 5):
        search.decode(sentences(count), GenerationOptions(beam=2, max_len_b=5), None, [5] * count)
    search.refill(Slots(3, 2, 16, 12))
    assert len(search.plans) == 2
    assert torch.cuda.Stream().stream_id == handed_out[1]


@pytest.mark.parametrize("beam", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("batch", [1, 5, 14])
def test_beams_and_batches(batch, beam, device):
    compare(Transformer(random_model(), device), sentences(batch, seed=batch), beam=beam)


@pytest.mark.parametrize("options", [
    dict(lenpen=0.6), dict(normalize_scores=False), dict(unkpen=-4.0), dict(unkpen=50.0), dict(temperature=0.5),
    dict(temperature=3.0), dict(min_len=0), dict(min_len=6), dict(max_len_b=5), dict(min_len=4, max_len_b=4),
    dict(min_len=0, max_len_b=0), dict(max_len_a=1.5, max_len_b=1), dict(max_len_b=40), dict(nbest=1),
], ids=str)
@pytest.mark.parametrize("beam", [1, 5])
def test_one_option_at_a_time(beam, options, device):
    compare(Transformer(random_model(seed=3), device), sentences(7), beam=beam, **options)


@pytest.mark.parametrize("prefix", [
    [[7], [8], [9]], [[7, 1], [8, 9], [1, 1]], [[5, 6, 7, 8], [2, 1, 1, 1], [4, 2, 1, 1]], [[3, 3], [9, 1], [4, 5]],
], ids=str)
@pytest.mark.parametrize("beam", [1, 4])
def test_prefixes(beam, prefix, device):
    model = Transformer(random_model(), device)
    compare(model, sentences(3), torch.tensor(prefix), beam=beam, unkpen=1.5)
    compare(model, sentences(3), torch.tensor(prefix), beam=beam, max_lens=[2, 9, 3])
    compare(model, sentences(3), torch.tensor(prefix), beam=beam, score_prefix=False)
    compare(model, sentences(3), torch.tensor(prefix), beam=beam, score_prefix=False, max_lens=[2, 9, 3])
    compare(model, sentences(3), torch.tensor(prefix), beam=beam, score_forced_eos=False, max_lens=[2, 9, 3])
    compare(model, sentences(3), torch.tensor(prefix), beam=beam, score_prefix=False, score_forced_eos=False,
            max_lens=[2, 9, 1])


@pytest.mark.parametrize("options", [
    {}, dict(min_len=0, unkpen=-4.0), dict(no_repeat_ngram_size=2), dict(lenpen=2.0)], ids=str)
@pytest.mark.parametrize("beam", [1, 4])
def test_eos_at_the_limit_that_does_not_count(beam, options, device):
    """Sentences that never come to their limits among those that do, one at its first step."""
    src = sentences(7)
    compare(Transformer(random_model(seed=3), device), src, beam=beam, score_forced_eos=False,
            max_lens=[2, 9, 0 if options.get("min_len") == 0 else 3, 30, 4, 1, 30], **options)


def test_diverse_beams_count_eos_at_the_limit(device):
    """Their scores hold penalties, from which it cannot be told apart later: such a search goes step by step."""
    search = DeviceSearch(Transformer(random_model(), device))
    slots = search.refill(Slots(4, 4, 32, 12), Kind(siblings=True))
    for diverse in (dict(diverse_beam_groups=2), dict(diversity_rate=0.5)):
        assert search.serves(GenerationOptions(beam=4, **diverse))
        options = GenerationOptions(beam=4, score_forced_eos=False, **diverse)
        assert not search.serves(options)
    assert "eos at the limit" in slots.refusal(5, options, 9)


@pytest.mark.parametrize("options", [
    dict(diversity_rate=0.7), dict(diversity_rate=3.0, unkpen=-4.0, min_len=5), dict(diverse_beam_groups=2),
    dict(diverse_beam_groups=4, diverse_beam_strength=2.0, unkpen=-4.0), dict(diverse_beam_groups=1),
    dict(diverse_beam_groups=2, diverse_beam_strength=0.1, min_len=4, temperature=0.5), dict(no_repeat_ngram_size=1),
    dict(no_repeat_ngram_size=2), dict(no_repeat_ngram_size=3, unkpen=-4.0), dict(no_repeat_ngram_size=40),
    dict(no_repeat_ngram_size=2, diverse_beam_groups=2), dict(no_repeat_ngram_size=2, diversity_rate=0.5),
], ids=str)
def test_other_searches(options, device):
    model = Transformer(random_model(seed=3), device)
    compare(model, sentences(7), beam=4, **options)
    compare(model, sentences(3), torch.tensor([[7, 1], [8, 9], [5, 2]]), beam=4, **options)


def test_graphs_are_captured_while_another_thread_pins_memory(device):
    """fairseq's data loader has such a thread, which no test had: searches were tested without a data loader."""
    if device.type != "cuda":
        pytest.skip("graphs are CUDA's")
    ends = threading.Event()

    def pin():
        while not ends.is_set():
            torch.empty(1 << 16).pin_memory()

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        for batch in (1, 5, 14):
            compare(Transformer(random_model(seed=batch), device), sentences(batch, seed=batch), beam=4)
    finally:
        ends.set()
        thread.join()


class Uniforms:
    """In place of torch.rand: the device asks for those of all steps at once, the other search for a step's."""

    def __init__(self):
        self.table, self.step = None, 0

    def __call__(self, *shape, generator=None, device=None):
        if self.table is None:
            self.table = torch.empty(*shape).uniform_(generator=torch.Generator().manual_seed(7))
            return self.table.to(device)
        self.step += 1
        return self.table[:shape[0], self.step - 1, :shape[1]].to(device)


@pytest.mark.parametrize("options", [
    dict(), dict(temperature=0.3), dict(temperature=2.0, unkpen=-3.0), dict(sampling_topk=1), dict(sampling_topk=3),
    dict(sampling_topk=400), dict(sampling_topp=0.3), dict(sampling_topp=0.9, unkpen=2.0), dict(sampling_topp=1.0),
    dict(min_len=6, no_repeat_ngram_size=1, sampling_topk=5), dict(no_repeat_ngram_size=2, temperature=0.5),
], ids=str)
@pytest.mark.parametrize("beam", [1, 5])
def test_samples_of_the_same_uniforms_are_the_same(beam, options, device, monkeypatch):
    monkeypatch.setattr("lightseq_fairseq.generator.beam_search._WORTH_LEAVING", 0)
    model = Transformer(random_model(seed=3, tgt_vocab_size=131), device)
    monkeypatch.setattr(torch, "rand", Uniforms())
    compare(model, sentences(6), beam=beam, sampling=True, **options)
    monkeypatch.setattr(torch, "rand", Uniforms())
    compare(model, sentences(3), torch.tensor([[7, 1], [8, 9], [5, 2]]), beam=beam, sampling=True, **options)


def test_a_seed_repeats_the_draws(device):
    search, src = DeviceSearch(Transformer(random_model(), device)), sentences(5)
    found = [search.decode(src, GenerationOptions(beam=3, nbest=3, sampling=True, seed=seed), None, [9] * 5)
             for seed in (1, 1, 2)]
    words = [[[h.tokens.tolist() for h in hypotheses] for hypotheses in kind] for kind in found]
    assert words[0] == words[1] != words[2]
    generator = torch.Generator(device).manual_seed(1)
    again = search.decode(src, GenerationOptions(beam=3, nbest=3, sampling=True, seed=5), None, [9] * 5, generator)
    assert_same(again, found[0])


def test_limits_of_each_sentence(device):
    found = compare(Transformer(random_model(), device), sentences(4), beam=3, max_lens=[3, 1, 12, 7])
    assert [max(len(h.tokens) for h in hypotheses) <= limit + 1
            for hypotheses, limit in zip(found, [3, 1, 12, 7], strict=True)]


def test_a_plan_serves_many_batches(device):
    """What one batch leaves behind must not reach the next."""
    model = Transformer(random_model(), device)
    search = DeviceSearch(model)
    for seed, count, options in ((1, 6, dict(max_len_b=20)), (8, 5, dict(max_len_b=3, unkpen=2.0)),
                                 (3, 6, dict(max_len_b=25, temperature=2.0)), (4, 5, dict(max_len_b=20))):
        options = GenerationOptions(beam=4, nbest=4, **options)
        src = sentences(count, seed)
        limits = length_limits([model], src, options)
        assert_same(search.decode(src, options, None, limits), decode([model], src, options, None, limits))
    assert len(search.plans) == 1


@pytest.mark.parametrize("count,length", [(1, 5), (130, 61), (32, 300), (64, 300), (128, 300), (128, 512)])
def test_little_is_encoded_in_vain(count, length):
    """Rounded to powers of two, the 38 400 tokens of 128 sources became 65 536: an encoder took 48 instead of 28 ms,
    and no test says how long anything takes."""
    tokens = device_search._Shape.around([length] * count, 1, 30, Kind()).source_tokens
    assert count * length <= tokens <= max(8192, 1.13 * count * length)


def test_batches_of_short_sources_share_a_shape():
    """Whose graphs are captured once for all of them."""
    shapes = {device_search._Shape.around([length] * 128, 4, 30, Kind()) for length in range(17, 33)}
    assert len(shapes) == 1


def test_plans_are_forgotten(device, monkeypatch):
    monkeypatch.setattr(device_search, "_MOST_PLANS", 2)
    search = DeviceSearch(Transformer(random_model(), device))
    for batch in (1, 2, 3, 1):
        search.decode(sentences(batch), GenerationOptions(beam=2), None, [4] * batch)
    assert [shape.batch for shape in search.plans] == [3, 1]


def test_memory_is_bounded(device):
    search = DeviceSearch(Transformer(random_model(), device))
    options = GenerationOptions(beam=2)
    a_sentence = 2 * 32 * 2 * 2 * 16 * 4  # beams, steps, layers, keys and values, columns, bytes
    search.most_bytes = 6 * a_sentence  # sources take one more each
    for batch in (1, 3, 2, 1):
        assert search.takes(options, [3] * batch, [4] * batch)
        search.decode([torch.tensor([4, 5, 2])] * batch, options, None, [4] * batch)
    assert [shape.batch for shape in search.plans] == [2, 1]
    assert not search.takes(options, [3] * 6, [4] * 6)


@pytest.mark.parametrize("options", [
    dict(match_source_len=True), dict(return_attention=True), dict(return_alignment=True), dict(beam=17),
    dict(constraints="ordered"),
], ids=str)
def test_what_is_not_taken(options, device):
    options = GenerationOptions(**{"beam": 4, **options})
    assert not DeviceSearch(Transformer(random_model(), device)).takes(options, [3, 1, 2], [9, 9, 9])


def test_models_that_are_not_taken(device):
    def takes(beam=4, **changes):
        model = Transformer(random_model(**changes), device)
        return DeviceSearch(model).takes(GenerationOptions(beam=beam), [3, 1, 2], [9, 9, 9])

    assert takes()
    assert not takes(cross_self_attention=True)
    assert not takes(no_cross_attention=True)
    assert not takes(decoder_attention_heads=4), "heads of 4 elements"
    assert not takes(beam=14), "29 types have no 28 continuations of one beam besides the special ones"


def test_what_is_wrong_is_said(device):
    model = random_model()
    search = DeviceSearch(Transformer(model, device))
    with pytest.raises(GenerationError, match="sentences \\[1\\] have no tokens"):
        search.decode([torch.tensor([4, 2]), torch.tensor([])], GenerationOptions(beam=2), None, [5, 5])
    broken = dataclasses.replace(model, tensors={
        name: torch.full_like(tensor, torch.nan) if "output_projection" in name else tensor
        for name, tensor in model.tensors.items()})
    with pytest.raises(GenerationError, match="sentence 0 has no hypothesis because"):
        DeviceSearch(Transformer(broken, device)).decode(
            [torch.tensor([4, 2])], GenerationOptions(beam=2, max_len_b=5), None, [5])


def test_a_generator_uses_it_on_a_gpu(device):
    generator = Generator([random_model()], device)
    assert (generator.device_search is not None) == (device.type == "cuda")
    if generator.device_search is not None:
        generator.infer([[4, 5, 2], [6, 2]], GenerationOptions(beam=3))
        assert generator.device_search.plans


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit(dtype, device):
    """The first token's log-probability, which no choice has touched yet, lies near that of fp32."""
    if device.type == "cpu" and dtype == torch.float16:
        pytest.skip("half precision is for GPUs; run with --device cuda")
    options = GenerationOptions(beam=1, max_len_b=4, min_len=4)
    first = []
    for kind in (torch.float32, dtype):
        search = DeviceSearch(Transformer(random_model(), device, kind))
        found = search.decode(sentences(6), options, None, [4] * 6)
        first.append(torch.stack([hypotheses[0].positional_scores[0] for hypotheses in found]))
    torch.testing.assert_close(first[1], first[0], rtol=0, atol=0.1)
