"""Tables as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[object], rows: Iterable[Iterable[object]]) -> str:
    """A table; what would end a cell in it, as in a name, is escaped."""
    return "\n".join([_row(header), "|" + "---|" * len(header), *map(_row, rows)])


def _row(cells: Iterable[object]) -> str:
    words = [str(cell).replace("|", "\\|") for cell in cells]
    return "|" + "".join(f" {word} |" if word else " |" for word in words)
