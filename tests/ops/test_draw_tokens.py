"""Draws on the device: those of generator/sampling.py of the same uniforms, never what may not be drawn, as often as is
right."""

from __future__ import annotations

import pytest
import torch

from lightseq_fairseq.generator.sampling import trim_top_p
from lightseq_fairseq.generator.top_k import top_k
from lightseq_fairseq.ops import beam_step as ops
from lightseq_fairseq.ops.draw_tokens import draw_tokens
from tests import tolerances
from tests.ops.test_beam_step import EOS, PAD, UNK, as_floats, settings, state


def run(given, vocab):
    """Tokens and scores, (B, K) each."""
    types = dict(vocab=vocab, pad=PAD, eos=EOS, unk=UNK)
    statistics = ops.token_statistics(given["logits"], given["settings"], **types)
    arguments = (given[name] for name in ("settings", "forced", "steps", "complete", "uniforms"))
    drawn = draw_tokens(given["logits"], statistics, *arguments, **types).view(*given["scores"].shape, 2)
    return drawn[..., 0], as_floats(drawn[..., 1])


def sampled(batch, beam, vocab, step, device, seed=0, **options):
    given = state(batch, beam, 9, vocab, step, device, seed)
    draws = torch.Generator().manual_seed(seed)
    given["uniforms"] = torch.empty(batch, 9, beam).uniform_(generator=draws).to(device)
    given["settings"] = settings(batch, beam, **options).to(device)
    return given


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [
    dict(), dict(unkpen=-5.0), dict(sampling_topk=1), dict(sampling_topk=7), dict(sampling_topk=600),
    dict(sampling_topk=10**5), dict(sampling_topp=0.2), dict(sampling_topp=0.95, temperature=2.0),
    dict(sampling_topp=1.0), dict(sampling_topp=0.9, unkpen=-5.0), dict(min_len=8, temperature=0.3),
], ids=str)
@pytest.mark.parametrize("vocab", [43, 1000, 28672])
def test_draws_are_those_of_sampling(vocab, options, dtype, device):
    beam, batch = 3, 2 if vocab > 20000 and device.type == "cpu" else 8
    for step in (0, 4):
        given = sampled(batch, beam, vocab, step, device, seed=vocab + step, **options)
        given["logits"] = given["logits"].to(dtype)
        tokens, scores = (column.cpu() for column in run(given, vocab))
        rows = torch.arange(batch)[:, None] * beam + torch.arange(beam) * (step > 0)
        setting = ops.Settings(**{"beam": beam, **options})
        lprobs = (given["logits"].cpu()[rows, :vocab].float() / setting.temperature).log_softmax(-1).double()
        lprobs[..., UNK] -= setting.unkpen
        lprobs[..., PAD] = -torch.inf
        if step < setting.min_len:
            lprobs[..., EOS] = -torch.inf
        columns, probs = torch.arange(vocab).expand_as(lprobs), lprobs.exp()
        if setting.sampling_topk:
            probs, columns = (part if i else part.exp() for i, part in enumerate(
                top_k(lprobs, min(vocab, int(setting.sampling_topk)))))
        if setting.sampling_topp:
            probs, columns = trim_top_p(probs, setting.sampling_topp)
        chosen = tokens.long().unsqueeze(2)
        mass, uniforms = lprobs.gather(2, chosen).exp(), given["uniforms"][:, step].cpu().double()
        if dtype != torch.float32 and (setting.sampling_topk or setting.sampling_topp):
            # 16 bits: many types are equal, and those of one probability may come in another order
            assert (probs == mass).any(-1).all()
            first = (probs * (probs > mass)).sum(-1)
            last = first + (probs * (probs == mass)).sum(-1)
        else:
            assert ((columns == chosen) & (probs > 0)).any(-1).all()
            last = (probs.cumsum(-1) * (columns == chosen)).sum(-1)
            first = last - mass[..., 0]
        # sums of so many probabilities in fp32 may decide otherwise where a uniform falls on the border of two types
        total = probs.sum(-1)
        assert ((first - 1e-5 * total <= uniforms * total) & (uniforms * total <= last + 1e-5 * total)).all()
        torch.testing.assert_close(scores, mass[..., 0].log().float(), **tolerances.SCORE)


def test_frequencies(device):
    probs = torch.tensor([0.1, 0.0, 0.05, 0.05, 0.4, 0.0, 0.3, 0.1])
    for options, kept in ((dict(), [0, 2, 3, 4, 6, 7]), (dict(sampling_topk=2), [4, 6]),
                          (dict(sampling_topp=0.75), [0, 4, 6]), (dict(min_len=9, unkpen=100.0), [0, 4, 6, 7])):
        given = sampled(500, 16, 8, 3, device, seed=5, **options)
        given["logits"] = torch.full((8000, 64), -torch.inf)
        given["logits"][:, :8] = probs.log()
        given["logits"] = given["logits"].to(device)
        tokens = run(given, 8)[0].flatten()
        rates = torch.bincount(tokens.cpu(), minlength=8) / 8000
        want = torch.zeros(8)
        want[kept] = probs[kept] / probs[kept].sum()
        assert (rates - want).abs().max() < 0.025 and (rates[want == 0] == 0).all()


def test_ends_of_the_uniforms(device):
    """0 draws the first that may be drawn, the largest number below 1 the last; equals are drawn in their order."""
    for options in (dict(), dict(sampling_topk=50), dict(sampling_topp=1.0)):
        given = sampled(1, 2, 700, 3, device, min_len=9, **options)
        given["logits"] = torch.zeros(2, 704, device=device)
        given["logits"][:, [0, 699]] = -torch.inf
        given["uniforms"][0, 3] = torch.tensor([0.0, 1 - 2**-24])
        last = 53 if "sampling_topk" in options else 698  # 3 to 52, and not 1 and 2
        assert run(given, 700)[0].tolist() == [[3, last - 1 if last == 53 else last]]


@pytest.mark.parametrize("vocab", [1000, 5003, 50257])
@pytest.mark.parametrize("case", ["one tile", "ties", "one huge", "specials", "flat"])
def test_order_of_what_is_kept(case, vocab, device):
    """Whatever the logits look like, the k most probable are drawn as they lie in their order, the first one by 0."""
    given = sampled(1, 4, vocab, 3, device, seed=vocab)
    draws = torch.Generator().manual_seed(vocab)
    logits = torch.randint(-8, 8, (vocab,), generator=draws) / 4.0
    types = torch.arange(vocab)
    if case == "one tile":  # all candidates of top-k
        logits[vocab // 2 // 64 * 64:][:64] = 9 + torch.randperm(64, generator=draws) / 16
    elif case == "ties":  # across the k-th place, over many tiles
        logits[types % 97 == 5], logits[types % 301 == 7] = 6.0, 7.0
    elif case == "one huge":
        logits[vocab - 1] = 30.0
    elif case == "specials":  # eos and unk come first, which statistics do not know of
        logits[[0, PAD, EOS, UNK]] = torch.tensor([9.0, 12.0, 11.0, 10.0])
    elif case == "flat":  # equals, nearly all of which may be drawn
        logits = logits / 1024
    given["logits"][:, :vocab] = logits.to(device)
    given["uniforms"][0, 3] = torch.tensor([0.0, 0.4, 0.97, 1 - 2**-24])
    tiles = given["logits"].size(1) // ops.TILE
    for options in (dict(sampling_topk=1), dict(sampling_topk=7), dict(sampling_topk=50), dict(sampling_topk=tiles + 5),
                    dict(sampling_topk=700), dict(sampling_topk=40, unkpen=2.0), dict(sampling_topk=9, unkpen=-2.0)):
        given["settings"] = settings(1, 4, **options).to(device)
        lprobs = logits.log_softmax(0)
        lprobs[UNK] -= options.get("unkpen", 0.0)
        lprobs[PAD] = -torch.inf
        kept = lprobs.sort(descending=True, stable=True)[1][:options["sampling_topk"]]
        running = lprobs[kept].double().exp().cumsum(0)
        places = given["uniforms"][0, 3].cpu().double() * running[-1]
        nearly = [[kept[torch.searchsorted(running, (place + way * running[-1]).clamp(0, running[-1] * (1 - 1e-9)),
                                           right=True)].item() for way in (-1e-6, 1e-6)] for place in places]
        order = kept.tolist()
        tokens = run(given, vocab)[0][0].tolist()
        assert tokens[0] == order[0], options
        for token, (first, last) in zip(tokens, nearly, strict=True):
            assert order.index(first) <= order.index(token) <= order.index(last), options


@pytest.mark.parametrize("vocab", [5003, 50257, 250112])
def test_flat_distributions_need_nearly_all_types(vocab, device):
    """Top-p of types that are all equal keeps the first of them, drawn in their order."""
    given = sampled(1, 8, vocab, 3, device, min_len=9)
    given["logits"][:, :vocab] = 0.5
    given["uniforms"][0, 3] = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999, 1 - 2**-24])
    allowed = torch.arange(vocab)
    allowed = allowed[(allowed != PAD) & (allowed != EOS)]
    for top_p in (0.2, 0.9):
        given["settings"] = settings(1, 8, min_len=9, sampling_topp=top_p).to(device)
        places = given["uniforms"][0, 3].cpu().double() * top_p * vocab
        tokens = run(given, vocab)[0][0].cpu()
        assert ((tokens - allowed[places.long()]).abs() <= 2 + vocab * 1e-5).all()  # log(vocab) is rounded


def test_runs_repeat(device):
    """Nothing depends on the order of threads."""
    for options in (dict(), dict(sampling_topk=50), dict(sampling_topk=3000), dict(sampling_topp=0.9)):
        given = sampled(2, 4, 50257, 3, device, **options)
        given["logits"] = (given["logits"] * 4).round() / 4
        tokens, scores = run(given, 50257)
        for _ in range(2 if device.type == "cpu" else 20):
            again, same = run(given, 50257)
            assert torch.equal(tokens, again) and torch.equal(scores, same)


def test_what_must_be_said(device):
    given = sampled(3, 2, 90, 3, device, min_len=9, sampling_topk=2)
    given["forced"][:, 3] = torch.tensor([EOS, 80, PAD], dtype=torch.int32)
    tokens, scores = run(given, 90)
    assert tokens[:2].tolist() == [[EOS, EOS], [80, 80]]
    lprobs = given["logits"][:4, :90].log_softmax(-1)
    torch.testing.assert_close(scores[:2].flatten(), lprobs[torch.arange(4), tokens[:2].flatten().long()],
                               **tolerances.SCORE)


def test_sentences_of_their_own_options(device):
    given = sampled(3, 4, 300, 4, device)
    given["settings"] = torch.cat([settings(1, 4, sampling_topk=1), settings(1, 2), settings(1, 4, temperature=9.0)])
    given["settings"], given["complete"][2] = given["settings"].to(device), 4
    tokens, _ = run(given, 300)
    allowed = given["logits"][:4, :300].clone()
    allowed[:, PAD] = -torch.inf
    assert tokens[0].tolist() == allowed.argmax(1).tolist()


def test_nothing_to_draw(device):
    given = sampled(1, 3, 90, 4, device, sampling_topp=0.5)
    given["logits"][1] = torch.nan
    tokens, scores = run(given, 90)
    assert scores[0, 1] == -torch.inf and scores[0, [0, 2]].isfinite().all() and (tokens < 90).all()


def test_what_does_not_fit_is_named(device):
    given = sampled(2, 3, 50, 2, device)
    given["uniforms"] = given["uniforms"].double()
    with pytest.raises(ValueError, match=r"uniforms must be \(2, 9, 3\) torch.float32"):
        run(given, 50)


def test_contract(device):
    if device.type == "cpu":
        given = sampled(2, 3, 50, 2, device)
        statistics = ops.token_statistics(given["logits"], given["settings"], 50, PAD, EOS, UNK)
        torch.library.opcheck(torch.ops.lightseq.draw_tokens.default, (
            given["logits"], statistics, *(given[name] for name in (
                "settings", "forced", "steps", "complete", "uniforms")), 50, PAD, EOS, UNK))
