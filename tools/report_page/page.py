"""The frame of the page: puts sections, style and script into one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: of its template, without ``.html.j2``, and its anchor.
        title: its heading.
        facts: what the template shows.
    """

    name: str
    title: str
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Missing:
    """A part that is not there.

    Attributes:
        title: what would be shown.
        command: that gives it.
    """

    title: str
    command: str


def render(
    title: str, lede: str, figures: Sequence[Mapping[str, str]], sections: Sequence[Section], missing: Sequence[Missing]
) -> str:
    """The whole page.

    Args:
        title: of the merge.
        lede: a sentence or two below it.
        figures: the most important numbers, each with "value", "name" and "note".
        sections: in their order.
        missing: what is left out, and how to get it.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["download"] = data_uri
    script = (HERE / "page.js").read_text()
    return environment.get_template("page.html.j2").render(
        title=title,
        lede=lede,
        figures=figures,
        sections=sections,
        missing=missing,
        style=Markup((HERE / "page.css").read_text()),
        script=Markup(script),
        # the browser itself then refuses every other script, and everything from a network
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def data_uri(content: str | bytes, kind: str) -> str:
    """Content that stands in an address, so that it needs no file of its own."""
    raw = content.encode() if isinstance(content, str) else content
    return f"data:{kind};base64,{base64.b64encode(raw).decode()}"


def as_csv(rows: Sequence[Sequence[object]]) -> str:
    """Rows as CSV; a spreadsheet takes no name in them for a formula."""
    text = io.StringIO()
    csv.writer(text).writerows([_harmless(cell) for cell in row] for row in rows)
    return text.getvalue()


def _harmless(cell: object) -> object:
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in "=+-@\t\r" and cell else cell
