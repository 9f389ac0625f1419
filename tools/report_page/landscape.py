"""Loss around and between the models, from the folder that ``flatness`` wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tools.bundle import read_json
from tools.errors import UserError
from tools.report_page.charts import Series, contour_map, line_chart
from tools.report_page.colours import organ_colours
from tools.report_page.page import Section

MEASURES = {
    "loss": "loss",
    "fisher_trace": "Fisher trace",
    "empirical_fisher_trace": "empirical Fisher trace",
    "hessian_top": "top Hessian eigenvalue",
    "hessian_top_relative": "the same, relative to the weights",
}


def landscape_section(folder: str | Path) -> Section:
    """The section.

    Args:
        folder: output of ``flatness``.

    Raises:
        UserError: it is no such folder, or an entry is missing.
    """
    path = Path(folder) / "flatness.json"
    if not path.is_file():
        raise UserError(f"{folder} is no output of flatness: it has no flatness.json")
    measured = read_json(path)
    try:
        charts, bundles = [*_charts(measured)], measured["bundles"]
        rows = [
            (title, [_short(entry.get(measure)) for entry in bundles.values()])
            for measure, title in MEASURES.items()
            if any(measure in entry for entry in bundles.values())
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not as flatness writes it ({type(error).__name__}: {error})") from None
    facts = {"charts": charts, "bundles": [*bundles], "rows": rows}
    return Section("landscape", "Loss landscape", facts)


def _charts(measured: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What there is of noise, line and plane: "title", "svg", "legend" and "note"."""
    noisy = {name: entry["noise"] for name, entry in measured["bundles"].items() if entry.get("noise")}
    if noisy:
        curves = [
            Series(name, [n["mean"] for n in noise], colour, [n["std"] for n in noise])
            for (name, noise), colour in zip(noisy.items(), organ_colours(len(noisy)), strict=True)
        ]
        shares = [n["relative"] for n in next(iter(noisy.values()))]
        svg = line_chart(shares, curves, "noise ÷ size of the weights", "loss", log=min(shares) > 0)
        note = "Mean over random directions, and their standard deviation. A flat curve is good."
        yield {"title": "When the weights are moved", "svg": svg, "legend": curves, "note": note}
    if line := measured.get("line"):
        curves = [Series("mean", line["loss"], "var(--accent)")]
        tasks = line.get("losses", {})
        if len(tasks) > 1:
            colours = organ_colours(len(tasks))
            curves += [Series(f"task of {n}", v, c) for (n, v), c in zip(tasks.items(), colours, strict=True)]
        svg = line_chart(line["t"], curves, f"from {line['from']} (0) to {line['to']} (1)", "loss")
        note = f"Barrier: {line['barrier']:.3g} above the straight line between the ends."
        yield {
            "title": "On the way from one model to the other",
            "svg": svg,
            "legend": curves[1:] and curves,
            "note": note,
        }
    if plane := measured.get("plane"):
        svg = contour_map(plane["x"], plane["y"], np.array(plane["loss"], float), plane["points"], "loss")
        note = "Distances in weight space. Bright is low; contours are spaced by rank, not by value."
        yield {"title": "On the plane through three models", "svg": svg, "legend": [], "note": note}


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
