"""What a search leaves behind: a table of its trials, the scores of the default and of the best recipe, and a heat map."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools.merge_scorer import CaseDice, mean_dice
from tools.search_space import Coefficient, Range, Value
from tools.search_study import Row
from tools.summary import estimate


def write_trials(path: Path, rows: Sequence[Row], coefficients: Sequence[str], labels: Sequence[str]) -> None:
    """Write trials.csv: one line for each, without Dice where not all cases were scored.

    Args:
        path: of the file.
        rows: finished trials.
        coefficients: their names.
        labels: that were scored.
    """
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        dices = [f"dice/{label}" for label in labels]
        writer.writerow(["trial", "state", *coefficients, "mean_dice", *dices, "cases", "seconds"])
        for row in rows:
            scores = [row.mean, *(row.dice[label] for label in labels)] if row.dice else [""] * (1 + len(labels))
            scores = ["" if score != score else f"{score:.6f}" if score != "" else "" for score in scores]
            values = [row.values[name] for name in coefficients]
            writer.writerow([row.number, row.state, *values, *scores, row.cases, f"{row.seconds:.1f}"])


def facts_of(dice: Mapping[str, float]) -> dict[str, Any]:
    """Scores for search.json: mean over labels, and by label; None for a label that no case has."""
    values = {label: None if np.isnan(value) else round(value, 6) for label, value in dice.items()}
    return {"mean_dice": round(float(np.nanmean([*dice.values()])), 6), "dice": values}


def held_out(scores: Mapping[str, Mapping[str, CaseDice]]) -> dict[str, Any]:
    """Scores on held-out cases, and whether the best recipe's are better than the default's, case by case.

    Args:
        scores: by recipe, "default", maybe "equal_share", "best", and "heads_alone" for λ = 0; by case; by label.

    Returns:
        For search.json; its "statement" is for people.
    """
    facts: dict[str, Any] = {name: facts_of(mean_dice(cases)) for name, cases in scores.items()}
    best, default = ([[*case.values()] for case in scores[name].values()] for name in ("best", "default"))
    difference = estimate(np.array(best) - np.array(default)).as_dict()
    facts["difference"] = {k: round(v, 6) if isinstance(v, float) else v for k, v in difference.items()}
    alone = facts["heads_alone"]["mean_dice"]
    facts["statement"] = (
        f"{_statement(facts['difference'])}; the best has {facts['best']['mean_dice']:.4f}, "
        f"the starting point with the new heads alone (λ = 0) {alone:.4f}"
    )
    return facts


def _statement(difference: Mapping[str, Any]) -> str:
    mean, low, high, cases = (difference[key] for key in ("mean", "low", "high", "cases"))
    if low is None:
        return f"{cases} held-out case(s) cannot say whether the best recipe beats the default: {mean:+.4f} Dice"
    measured = f"{mean:+.4f} Dice on average (95 % interval {low:+.4f} … {high:+.4f}, {cases} held-out cases)"
    if low > 0:
        return f"the best recipe beats the default on held-out cases: {measured}"
    if high < 0:
        return f"the best recipe is worse than the default on held-out cases: {measured}"
    return f"the best recipe is not shown to beat the default on held-out cases: {measured}"


def draw_heat_map(
    path: Path,
    rows: Sequence[Row],
    coefficients: Sequence[Coefficient],
    marks: Mapping[str, Mapping[str, Value]],
    title: str,
) -> None:
    """Draw mean Dice over two coefficients: squares where both have lists of values, else points.

    Args:
        path: PNG to write.
        rows: complete trials.
        coefficients: the two.
        marks: points to mark, by their names in the legend.
        title: over the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 5.2))
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    across, up = (c.name for c in coefficients)
    scores = {(row.values[across], row.values[up]): row.mean for row in rows}
    if any(isinstance(c.choice, Range) for c in coefficients):
        x, y = zip(*scores, strict=True)
        picture = ax.scatter(x, y, c=[*scores.values()], s=60)
    else:
        xs, ys = (sorted(c.choice) for c in coefficients)
        grid = np.array([[scores.get((x, y), np.nan) for x in xs] for y in ys])
        picture = ax.pcolormesh(xs, ys, grid, shading="nearest")
    styles = ("o", "s", "*")
    for style, (name, values) in zip(styles, marks.items()):
        x, y = values[across], values[up]
        size = 17 if style == "*" else 11
        label = f"{name}: ({x:g}, {y:g}), Dice {scores[x, y]:.3f}"
        ax.plot(x, y, style, ms=size, mfc="none" if style != "*" else "white", mec="red", mew=1.8, label=label)
    ax.set_xlabel(across)
    ax.set_ylabel(up)
    ax.set_title(title, fontsize=9)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=8, frameon=False)
    figure.colorbar(picture, ax=ax, label="mean Dice")
    figure.savefig(path, dpi=110, bbox_inches="tight", format="png")
