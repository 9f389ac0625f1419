"""The coefficients that were tried, from the folder that ``search`` wrote."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from tools.bundle import read_json
from tools.errors import UserError
from tools.report_page.charts import grid_map, scatter
from tools.report_page.page import Section

GRID = 0.7  # share of a grid's cells that must have been tried to draw it as one
CHARTS = 12  # coefficients that are drawn, at most
RECIPES = {"default": "the method's default", "equal_share": "1/T for each of T tasks", "best": "best"}


def coefficients_section(folder: str | Path) -> Section:
    """The section.

    Args:
        folder: output of ``search``.

    Raises:
        UserError: it is no such folder.
    """
    folder = Path(folder)
    for name in ("trials.csv", "search.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no output of search: it has no {name}")
    facts = read_json(folder / "search.json")
    try:
        with (folder / "trials.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["mean_dice"]]  # a trial that was stopped has none
        names = [name for name, value in facts["best"]["values"].items() if isinstance(value, int | float)]
        trials = np.array([[float(row[name]) for name in names] for row in rows])
        dice = np.array([float(row["mean_dice"]) for row in rows])
        best = int(np.argmax(dice))
        shown = {
            "count": len(rows),
            "tasks": [str(task) for task in facts["tasks"]],
            "method": str(facts["method"]),
            "table": _table(facts),
            "statement": str(facts.get("held_out", {}).get("statement", "")),
            "charts": _charts(names, trials, dice, best),
            "left_out": max(0, len(names) - CHARTS),
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder} is not as search writes it ({type(error).__name__}: {error}); search again"
        ) from None
    recipe = folder / "best.yaml"
    return Section("coefficients", "Coefficients", shown | {"recipe": recipe.read_text() if recipe.is_file() else ""})


def _charts(names: Sequence[str], trials: np.ndarray, dice: np.ndarray, best: int) -> list[Markup]:
    """A map for two coefficients on a grid, else one chart of points for each coefficient."""
    if len(names) == 2:
        (x, columns), (y, rows) = (np.unique(axis, return_inverse=True) for axis in trials.T)
        values = np.full((len(y), len(x)), np.nan)
        values[rows, columns] = dice
        if min(values.shape) > 1 and np.isfinite(values).mean() >= GRID:
            return [grid_map(x, y, values, (rows[best], columns[best]), (names[0], names[1], "mean Dice"))]
    varied = np.argsort(-np.ptp(trials, axis=0))[:CHARTS]
    return [scatter(trials[:, i].tolist(), dice.tolist(), best, names[i], "mean Dice") for i in sorted(varied)]


def _table(facts: Mapping[str, Any]) -> list[dict[str, str]]:
    """The recipes that are compared: their coefficients, and mean Dice on validation and on held-out cases."""
    held_out = facts.get("held_out", {})
    return [
        {
            "name": title,
            "values": ", ".join(f"{key} {_short(value)}" for key, value in facts[name]["values"].items()),
            "validation": f"{facts[name]['mean_dice']:.4f}",
            "held_out": f"{held_out[name]['mean_dice']:.4f}" if name in held_out else "",
        }
        for name, title in RECIPES.items()
        if name in facts
    ]


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
