"""The step of the search on the device: hand-made tables, and the compiled operator against the reference."""

from __future__ import annotations

import pytest
import torch

from lightseq_fairseq.ops import beam_step as ops
from tests import tolerances

PAD, EOS, UNK = 1, 2, 3
MUTATED = ("steps", "complete", "scores", "idle", "ancestors", "record", "x")


def settings(batch, beam, **options):
    """One row for all."""
    return torch.tensor([ops.Settings(**{"beam": beam, **options})] * batch)


def state(batch, beam, steps, vocab, step, device, seed=0, width=16):
    """Arguments of beam_step_ in the middle of a search, the logits included."""
    draw = torch.Generator().manual_seed(seed)
    columns = -(-vocab // ops.TILE) * ops.TILE
    made = dict(
        logits=torch.randn(batch * beam, columns, generator=draw) * 2,
        settings=settings(batch, beam),
        limits=torch.full((batch,), steps - 1, dtype=torch.int32),
        forced=torch.full((batch, steps), PAD, dtype=torch.int32),
        steps=torch.full((batch,), step, dtype=torch.int32),
        complete=torch.zeros(batch, dtype=torch.int32),
        scores=-torch.rand(batch, beam, generator=draw) * step, idle=torch.zeros(batch, dtype=torch.int32),
        x=torch.zeros(batch * beam, width), embeddings=torch.randn(vocab, width, generator=draw),
        positions=torch.randn(steps + 2, width, generator=draw),
        ancestors=torch.randint(beam, (batch, beam, steps), generator=draw, dtype=torch.uint8),
        record=torch.full((steps, batch, beam, 6), -7, dtype=torch.int32))
    return {name: tensor.to(device) for name, tensor in made.items()}


def run(given, vocab, stream=None, **search):
    """One step in place; returns the row of the record that it wrote. What is fed next is of dtype ``stream``."""
    types = dict(vocab=vocab, pad=PAD, eos=EOS, unk=UNK)
    step = int(given["steps"].max())
    for name in ("x", "embeddings", "positions"):
        given[name] = given[name].to(stream or given["logits"].dtype)
    statistics = ops.token_statistics(given["logits"], given["settings"], **types)
    rest = {name: given[name] for name in (*MUTATED, "overlap", "drawn") if name in given}
    ops.beam_step_(given["logits"], statistics, given["settings"], given["limits"], given["forced"], **rest,
                   embeddings=given["embeddings"], positions=given["positions"], scale=3.0, first_position=2, **types,
                   **search)
    return given["record"][step]


def as_floats(column):
    return column.contiguous().view(torch.float32)


def compare(given, vocab, **search):
    """The compiled operator and the reference leave the same."""
    given["logits"] = given["logits"].contiguous()
    other = {name: tensor.cpu().clone() for name, tensor in given.items()}
    step = int(given["steps"].max())
    run(given, vocab, **search)
    run(other, vocab, **search)
    for name in (*MUTATED, "overlap"):
        if name not in given:
            continue
        mine, want = given[name].cpu(), other[name]
        if name == "scores":
            torch.testing.assert_close(mine, want, **tolerances.SCORE)
        elif name == "record":
            for column in (1, 5):
                torch.testing.assert_close(as_floats(mine[..., column]), as_floats(want[..., column]),
                                           **tolerances.SCORE, equal_nan=True)
            real = as_floats(want[..., 5]) != -torch.inf  # what a beam without a way on says does not matter
            for column in (0, 3, 4):
                assert torch.equal(mine[..., column][real], want[..., column][real]), column
            real = as_floats(want[..., 1]) != -torch.inf
            assert torch.equal(mine[..., 2][real], want[..., 2][real])
        elif name in ("ancestors", "x"):
            real = other["scores"] != -torch.inf
            mine, want = mine.view(*real.shape, -1)[real], want.view(*real.shape, -1)[real]
            torch.testing.assert_close(mine[..., :step + 1], want[..., :step + 1])
        else:
            assert torch.equal(mine, want), name


def test_a_table_done_by_hand(device):
    """Two beams; probabilities of beam 0: eos 1/2, type 4 1/4, type 5 1/4; of beam 1: type 4 1/2, type 6 1/2."""
    given = state(1, 2, 9, 8, 3, device)
    logits = torch.full((2, 64), -torch.inf)
    logits[0, [EOS, 4, 5]] = torch.tensor([0.5, 0.25, 0.25]).log()
    logits[1, [4, 6]] = torch.tensor([0.5, 0.5]).log()
    given["logits"], given["scores"] = logits.to(device), torch.tensor([[-1.0, -1.2]], device=device)
    ended, totals, beams, tokens, parents, scores = run(given, 8).unbind(-1)
    half = torch.tensor(0.5).log().item()
    assert ended.tolist() == [[1, 0]] and beams.tolist() == [[0, 1]]
    assert as_floats(totals)[0].tolist() == pytest.approx([-1 + half, -1.2 + half])
    assert tokens.tolist() == [[4, 6]] and parents.tolist() == [[1, 1]]  # type 4 of beam 0 is worse, -1 + 2 * half
    assert as_floats(scores)[0].tolist() == pytest.approx([-1.2 + half] * 2)
    fed = given["embeddings"][[4, 6]] * 3 + given["positions"][2 + 4]
    torch.testing.assert_close(given["x"], fed)
    assert given["steps"].tolist() == [4] and given["complete"].tolist() == [1]
    assert given["ancestors"][0, :, 3].tolist() == [1, 1]


def test_equals_come_in_order_of_beams_and_types(device):
    vocab = 200
    given = state(1, 4, 5, vocab, 2, device)
    given["logits"], given["scores"] = torch.zeros(4, 256, device=device), torch.zeros(1, 4, device=device)
    given["settings"] = settings(1, 4, min_len=9.0).to(device)  # no eos yet
    _, _, _, tokens, parents, _ = run(given, vocab)[0].unbind(-1)
    assert tokens.tolist() == [0, 3, 4, 5] and parents.tolist() == [0, 0, 0, 0]


def test_at_the_first_step_beams_are_one(device):
    given = state(2, 3, 5, 50, 0, device)
    record = run(given, 50)
    assert record[..., 4].eq(0).all() and len(set(record[0, :, 3].tolist())) == 3


def test_a_finished_sentence_stays_as_it_is(device):
    given = state(3, 2, 9, 70, 4, device)
    given["complete"][1], given["limits"][2] = 2, 4
    before = {name: given[name].clone() for name in MUTATED}
    record = run(given, 70)
    assert (record[1] == -7).all() and (record[[0, 2]] != -7).any()
    assert given["steps"].tolist() == [5, 4, 4] and given["complete"].tolist()[1:] == [2, 2]
    assert torch.equal(given["ancestors"][1:], before["ancestors"][1:])
    assert not given["x"].view(3, -1)[1:].any() and given["x"].view(3, -1)[0].any()


def test_rows_of_any_width(device):
    for width in (1, 24, 37, 1030):
        compare(state(2, 3, 9, 70, 4, device, width=width), 70)


def test_sentences_at_different_steps(device):
    given = state(3, 4, 12, 90, 7, device)
    given["steps"] = torch.tensor([7, 0, 3], dtype=torch.int32, device=device)
    other = {name: tensor.cpu().clone() for name, tensor in given.items()}
    run(given, 90)
    run(other, 90)
    assert given["steps"].tolist() == [8, 1, 4]
    for name in ("ancestors", "x", "complete"):
        torch.testing.assert_close(given[name].cpu(), other[name])


@pytest.mark.parametrize("dtype, stream", [
    *((dtype, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("step", [0, 1, 17])
@pytest.mark.parametrize("beam", [1, 2, 4, 5, 16])
@pytest.mark.parametrize("vocab", [43, 64, 1000, 28672])
def test_against_the_reference(vocab, beam, step, dtype, stream, device):
    if vocab - 3 < 2 * beam:
        return
    batch = 2 if vocab > 20000 and device.type == "cpu" else 5
    given = state(batch, beam, 33, vocab, step, device, seed=vocab + beam)
    given["logits"] = given["logits"].to(dtype)  # 16 bits: many are equal
    given["complete"][1] = beam
    given["limits"][0] = step
    given["forced"][0, step] = EOS
    compare(given, vocab, stream=stream)


@pytest.mark.parametrize("options", [dict(temperature=0.3), dict(temperature=2.5, unkpen=4.0, min_len=20),
                                     dict(unkpen=-6.0, min_len=0)], ids=str)
def test_settings(options, device):
    for seed in range(4):
        given = state(3, 4, 12, 300, 5, device, seed)
        given["settings"] = settings(3, 4, **options).to(device)
        compare(given, 300)


def test_settings_of_each_sentence(device):
    """Fewer beams than there is room for: as if alone with so many; the rest is left alone."""
    given = state(3, 4, 12, 300, 5, device)
    given["settings"] = torch.cat([settings(1, 4, temperature=0.5), settings(1, 2, unkpen=-6.0), settings(1, 3)])
    given["settings"] = given["settings"].to(device)
    kept, alone = {name: tensor.clone() for name, tensor in given.items()}, state(3, 2, 12, 300, 5, device)
    for name in ("logits", "x", "scores", "ancestors"):
        alone[name] = kept[name].view(3, 4, *kept[name].shape[1 if name in ("logits", "x") else 2:])[:, :2]
        alone[name] = alone[name].flatten(0, 1) if name in ("logits", "x") else alone[name]
        alone[name] = alone[name].contiguous()
    alone["embeddings"], alone["positions"] = kept["embeddings"], kept["positions"]
    alone["settings"] = settings(3, 2, unkpen=-6.0).to(device)
    record = run(given, 300)
    assert torch.equal(record[1, :2], run(alone, 300)[1])
    assert torch.equal(given["scores"][1, 2:], kept["scores"][1, 2:]) and record[1, 2:, 0].eq(0).all()
    assert torch.equal(given["x"].view(3, 4, -1)[1, 2:], kept["x"].view(3, 4, -1)[1, 2:])
    compare(kept, 300)


def test_a_sentence_of_fewer_beams_is_finished_with_so_many_hypotheses(device):
    given = state(2, 4, 12, 50, 5, device)
    given["settings"], given["complete"] = settings(2, 2).to(device), torch.tensor([1, 1], dtype=torch.int32)
    given["complete"] = given["complete"].to(device)
    given["logits"][:, EOS] = torch.tensor([9.0, 9, 0, 0, -9, -9, 0, 0], device=device)
    run(given, 50)
    assert given["complete"].tolist() == [4, 1] and given["steps"].tolist() == [5, 6]


def test_forced_tokens(device):
    for step in (0, 3):
        given = state(5, 3, 12, 90, step, device)
        given["settings"] = settings(5, 3, unkpen=2.0, min_len=8).to(device)
        given["forced"][:, step] = torch.tensor([EOS, 80, UNK, PAD, EOS], dtype=torch.int32)
        given["limits"][0] = step
        compare(given, 90)


def test_what_is_no_number_comes_last(device):
    given = state(2, 3, 12, 90, 4, device)
    given["logits"][1] = torch.nan
    given["logits"][2, 5] = torch.inf
    compare(given, 90)
    assert (given["record"][4, 0, :, 4] == 0).all()


def test_a_search_of_many_steps(device):
    vocab, steps = 130, 20
    given = state(6, 4, steps, vocab, 0, device)
    other = {name: tensor.cpu().clone() for name, tensor in given.items()}
    draw = torch.Generator().manual_seed(9)
    for _ in range(steps):
        logits = torch.randn(24, 192, generator=draw)
        given["logits"], other["logits"] = logits.to(device), logits
        if bool((other["complete"] == 4).all()):
            break
        run(given, vocab)
        run(other, vocab)
    assert torch.equal(given["ancestors"].cpu(), other["ancestors"])
    assert torch.equal(given["record"][..., [0, 2, 3, 4]].cpu(), other["record"][..., [0, 2, 3, 4]])
    assert given["steps"].tolist() == other["steps"].tolist()


@pytest.mark.parametrize("step", [0, 1, 7])
@pytest.mark.parametrize("beam", [1, 2, 5, 16])
@pytest.mark.parametrize("vocab", [43, 1000, 5000])
def test_siblings(vocab, beam, step, device):
    for rate in (0.0, 0.3, 2.0):
        given = state(4, beam, 12, vocab, step, device, seed=vocab + beam)
        given["settings"] = settings(4, beam, diversity_rate=rate, unkpen=-3.0).to(device)
        given["forced"][1, step], given["limits"][2] = 7, step
        compare(given, vocab, siblings=True)


@pytest.mark.parametrize("step", [0, 1, 7])
@pytest.mark.parametrize(("beam", "groups"), [(1, 1), (4, 2), (6, 3), (6, 2), (16, 4), (15, 15)])
@pytest.mark.parametrize("vocab", [43, 1000, 5000])
def test_groups(vocab, beam, groups, step, device):
    for strength in (0.0, 0.5, 3.0):
        given = state(4, beam, 12, vocab, step, device, seed=vocab + beam)
        given["settings"] = settings(4, beam, diverse_beam_strength=strength, unkpen=-3.0).to(device)
        given["overlap"] = torch.randint(3, (4, groups, groups), dtype=torch.int32).to(device) * (step > 0)
        given["forced"][1, step], given["limits"][2] = 7, step
        given["idle"][3] = (1 << beam - 1 if step else 0)
        compare(given, vocab)


def test_groups_done_by_hand(device):
    """Two groups of one beam; the second pays 1 + 2 times the strength for the type that the first has chosen."""
    given = state(1, 2, 9, 8, 3, device)
    logits = torch.full((2, 64), -torch.inf)
    logits[:, [4, 5]] = torch.tensor([0.6, 0.4]).log()
    given["logits"], given["scores"] = logits.to(device), torch.tensor([[-1.0, -0.5]], device=device)
    given["settings"] = settings(1, 2, diverse_beam_strength=0.1).to(device)
    given["overlap"] = torch.full((1, 2, 2), 2, dtype=torch.int32, device=device)
    record = run(given, 8)[0]
    assert record[:, 3].tolist() == [4, 4] and record[:, 4].tolist() == [0, 1]
    low = torch.tensor(0.6).log().item()
    assert as_floats(record[:, 5]).tolist() == pytest.approx([-1 + low, -0.5 + low - 0.3])
    given["settings"], given["steps"] = settings(1, 2, diverse_beam_strength=0.2).to(device), given["steps"] - 1
    given["scores"] = torch.tensor([[-1.0, -0.5]], device=device)
    assert run(given, 8)[0, :, 3].tolist() == [4, 5], "0.8 is more than log(0.6 / 0.4)"
    assert given["overlap"].tolist() == [[[4, 3], [3, 4]]]


@pytest.mark.parametrize("step", [0, 4])
@pytest.mark.parametrize("beam", [1, 5, 16])
def test_what_was_drawn(beam, step, device):
    given = state(5, beam, 12, 90, step, device)
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(2, 6, (5 * beam,), generator=draw, dtype=torch.int32)  # many are eos
    scores = -torch.rand(5 * beam, generator=draw)
    given["drawn"] = torch.stack((tokens, scores.view(torch.int32)), 1).to(device)
    given["idle"] = torch.randint(1 << beam, (5,), generator=draw, dtype=torch.int32).to(device) * (step > 0)
    given["forced"][0, step], given["limits"][1], given["complete"][2] = EOS, step, beam
    compare(given, 90)


def test_idle_beams_end_nothing(device):
    given = state(1, 4, 12, 90, 4, device)
    tokens = torch.tensor([7, EOS, EOS, 8], dtype=torch.int32)
    given["drawn"] = torch.stack((tokens, torch.zeros(4).view(torch.int32)), 1).to(device)
    given["idle"][0] = 0b0100
    record = run(given, 90)[0]
    assert record[:, 0].tolist() == [0, 1, 0, 0] and record[:, 3].tolist() == [7, 8, EOS, EOS]
    assert given["idle"].tolist() == [0b1100] and given["complete"].tolist() == [1]


def test_what_does_not_fit_is_named(device):
    given = state(2, 3, 5, 50, 2, device)
    given["scores"] = given["scores"].double()
    given["complete"] = given["complete"][:1]
    with pytest.raises(ValueError, match=r"complete must be \(2,\).*scores must be \(2, 3\) torch.float32"):
        run(given, 50)
    with pytest.raises(ValueError, match="at most 16 beams"):
        run(state(1, 17, 5, 90, 2, device), 90)


def test_contract(device):
    if device.type == "cpu":
        given = state(2, 3, 5, 50, 2, device)
        torch.library.opcheck(torch.ops.lightseq.token_statistics.default,
                              (given["logits"], given["settings"], 50, PAD, EOS, UNK))
