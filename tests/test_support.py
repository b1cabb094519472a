"""Every cell of README.md's table of models does what the table says, and the table is that of these cells."""

from __future__ import annotations

import re

import pytest

from tests.support_matrix import ABILITIES, MATRIX, README, Place, with_table

CELLS = {f"{family}-{ability}": cell for family, row in MATRIX.items() for ability, cell in row.cells.items()}


@pytest.fixture(scope="module")
def place(device, request, tmp_path_factory) -> Place:
    return Place(device, tmp_path_factory.mktemp("support"), request.getfixturevalue)


@pytest.mark.parametrize("name", CELLS)
def test_cell(name, place):
    cell = CELLS[name]
    said = cell.run(place)
    if not cell.refusal:
        assert said is None and cell.says != "no"
        return
    assert said and cell.says == "no"
    for sentence in said:
        assert re.search(cell.refusal, sentence)


def test_readme_has_the_table_of_these_cells():
    """Else run python -m tests.support_matrix."""
    assert all(row.cells.keys() <= ABILITIES.keys() for row in MATRIX.values())
    assert with_table(README.read_text()) == README.read_text()
