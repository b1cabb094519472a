"""What would be said twice gets the logit -inf; the histories of beams are followed through their ancestors."""

from __future__ import annotations

import pytest
import torch

from lightseq_fairseq.generator.logits import NoRepeatNgram
from lightseq_fairseq.ops import beam_step as ops
from lightseq_fairseq.ops.block_ngrams import block_ngrams_
from tests.ops.test_beam_step import EOS, PAD, UNK, settings, state

TYPES = dict(pad=PAD, eos=EOS, unk=UNK)


def told(batch, beam, vocab, step, device, dtype=torch.float32, kinds=6, **options):
    """A search at ``step`` whose beams have said but ``kinds`` types, and what the rule of the other search forbids."""
    given = state(batch, beam, 24, vocab, step, device, seed=step + beam)
    draws = torch.Generator().manual_seed(step)
    given["logits"] = given["logits"].to(dtype)
    given["settings"] = settings(batch, beam, **options).to(device)
    rule = NoRepeatNgram(int(options["no_repeat_ngram_size"]), PAD)
    ancestors = torch.zeros(batch, beam, 24, dtype=torch.uint8)
    for past in range(step):
        tokens = torch.randint(3, 3 + kinds, (batch, beam), generator=draws)
        parents = torch.randint(beam, (batch, beam), generator=draws)
        rule.advance(tokens, parents)
        given["record"][past, :, :, 3], given["record"][past, :, :, 4] = tokens.to(device), parents.to(device)
        ancestors[:, :, :past] = ancestors[:, :, :past].gather(1, parents[..., None].expand(-1, -1, past))
        ancestors[:, :, past] = parents
    given["ancestors"] = ancestors.to(device)
    given["statistics"] = ops.token_statistics(given["logits"], given["settings"], vocab, **TYPES)
    table = torch.zeros(batch, beam, vocab)
    rule(step, table)
    table[..., PAD] = 0
    return given, (table == -torch.inf).view(batch * beam, vocab)


def block(given, vocab):
    names = ("logits", "statistics", "settings", "forced", "steps", "complete", "ancestors", "record")
    block_ngrams_(*(given[name] for name in names), vocab, **TYPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("step", [1, 2, 9, 23])
@pytest.mark.parametrize(("vocab", "kinds"), [(43, 3), (300, 70)])
def test_the_rule_of_the_other_search(vocab, kinds, step, size, dtype, device):
    given, banned = told(3, 4, vocab, step, device, dtype, kinds, no_repeat_ngram_size=size, temperature=0.7)
    before, sums = given["logits"].cpu().clone(), given["statistics"][..., 0].clone()
    block(given, vocab)
    assert torch.equal(given["logits"].cpu(), before.index_put(
        tuple(banned.nonzero().t()), torch.tensor(-torch.inf, dtype=dtype)))
    assert torch.equal(given["statistics"][..., 0], sums)
    best = ops.token_statistics(given["logits"].cpu(), given["settings"].cpu(), vocab, **TYPES)[..., 1]
    torch.testing.assert_close(given["statistics"][..., 1].cpu(), best)
    if step > 20 and size < 3:
        assert banned.any()


def test_who_is_left_alone(device):
    given, banned = told(4, 3, 90, 9, device, no_repeat_ngram_size=1)
    assert banned.view(4, -1).any(1).all()
    given["complete"][0], given["forced"][1, 9], given["settings"][2, -1] = 3, 5, 0
    before = given["logits"].clone()
    block(given, 90)
    assert torch.equal(given["logits"][:9], before[:9]) and not torch.equal(given["logits"][9:], before[9:])


def test_what_does_not_fit_is_named(device):
    given, _ = told(2, 3, 50, 2, device, no_repeat_ngram_size=2)
    given["record"] = given["record"][:3]
    with pytest.raises(ValueError, match=r"record must be \(24, 2, 3, 6\)"):
        block(given, 50)
