"""Markdown tables: a name cannot break them."""

from tools.markdown import table


def test_a_cell_cannot_end_itself():
    lines = table(["", "tumor|edema"], [["average", "0.5"], ["ties", ""]]).splitlines()
    assert lines == ["| | tumor\\|edema |", "|---|---|", "| average | 0.5 |", "| ties | |"]
