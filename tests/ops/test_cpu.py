"""The compiled CPU operators of a step's end against PyTorch's."""

from __future__ import annotations

import pytest
import torch

from lightseq_fairseq.ops import cpu
from tests import tolerances

LANES = pytest.mark.parametrize("lanes", [4, 8, 16])


@pytest.fixture
def operators():
    found = cpu.compiled_operators()
    assert found is not None, "the compiled CPU operators do not load; see the warning above"
    return found


@LANES
@pytest.mark.parametrize("types", [1, 5, 16, 1736, 3001])
def test_log_softmax(operators, types, lanes):
    table = torch.randn(3, 4, types) * 5
    expected = table.double().log_softmax(-1)
    operators.log_softmax_(table, lanes)
    torch.testing.assert_close(table.double(), expected, **tolerances.OP[torch.float32])


@LANES
def test_log_softmax_of_what_is_no_number(operators, lanes):
    """One NaN spoils its row, as in PyTorch, and a forbidden token none."""
    table = torch.randn(1, 3, 40)
    table[0, 0, 7], table[0, 1, 8] = torch.nan, -torch.inf
    expected = table.log_softmax(-1)
    operators.log_softmax_(table, lanes)
    torch.testing.assert_close(table, expected, equal_nan=True)


@LANES
@pytest.mark.parametrize("types, rows, count", [(7, 1, 6), (29, 3, 6), (300, 4, 8), (1736, 4, 8), (5000, 2, 40)])
@pytest.mark.parametrize("with_scores", [True, False])
def test_best_continuations(operators, types, rows, count, with_scores, lanes):
    table = torch.randn(5, rows, types).log_softmax(-1)
    table[0, 0, :3], table[1, :, 4:] = -torch.inf, -torch.inf
    table[2, 0] = torch.nan if rows > 1 else table[2, 0]
    scores = torch.randn(5, rows) if with_scores else None
    sums = table if scores is None else table + scores[..., None]
    expected, places = sums.nan_to_num(nan=-torch.inf, neginf=-torch.inf).flatten(1).sort(
        dim=1, descending=True, stable=True)
    values, tokens, beams = operators.best_continuations(table, scores, count, lanes)
    assert torch.equal(values, expected[:, :count])
    assert torch.equal(beams * types + tokens, places[:, :count])


@LANES
def test_the_earlier_of_equals_comes_first(operators, lanes):
    table = torch.zeros(2, 3, 100)
    _, tokens, beams = operators.best_continuations(table, torch.tensor([[0.0, 0.0, 1.0]] * 2), 4, lanes)
    assert tokens.tolist() == [[0, 1, 2, 3]] * 2 and beams.tolist() == [[2] * 4] * 2


def test_packed_linear_has_every_weight_once():
    weight, bias = torch.randn(40, 16), torch.randn(40)
    panels, padded_bias = cpu.pack_linear(weight, bias)
    panels = panels.view(2, 16, cpu.PANEL)
    assert torch.equal(torch.cat((panels[0].t(), panels[1].t()))[:40], weight) and not panels[1, :, 8:].any()
    assert torch.equal(padded_bias[:40], bias) and not padded_bias[40:].any()
