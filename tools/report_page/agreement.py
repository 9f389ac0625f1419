"""How much the task vectors agree: cosines and sign conflicts between them, and their lengths along the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tools.mergeability import mergeability
from tools.report_page.charts import Series, line_chart
from tools.report_page.colours import mixed, organ_colours
from tools.report_page.page import Section
from tools.task_vector import TaskVector
from tools.weights_file import WeightsFile


def agreement_section(vectors: Sequence[TaskVector], pretrained: WeightsFile | None) -> Section:
    """The section.

    Args:
        vectors: of the merge, two at least.
        pretrained: weights of the starting point, for lengths relative to it.
    """
    measured = mergeability(vectors, pretrained)
    tasks, parts = measured["tasks"], measured["parts"]
    relative = "relative_norm" in next(iter(parts.values()))
    norms = np.array([part["relative_norm" if relative else "norm"] for part in parts.values()])
    lengths = [
        Series(task, column.tolist(), colour)
        for task, column, colour in zip(tasks, norms.T, organ_colours(len(tasks)), strict=True)
    ]
    conflicts = [
        Series("cosine", [part["cosine"] for part in parts.values()], "var(--accent)"),
        Series("sign conflict", [part["sign_conflict"] for part in parts.values()], "var(--warm)"),
    ]
    unit = "|τ| ÷ |θ0|" if relative else "|τ|"
    facts = {
        "tasks": tasks,
        "maps": [
            _map(
                "Cosine", measured["cosine"], 0.0, "0: unrelated; 1: the same direction; below 0: they undo each other"
            ),
            _map(
                "Sign conflict",
                measured["sign_conflict"],
                0.5,
                "share of weights that two tasks move in opposite directions; 0.5: chance",
            ),
        ],
        "unit": unit,
        "charts": [
            {
                "title": "Length of the task vectors along the network",
                "svg": line_chart([*parts], lengths, "part of the network", unit, low=0),
                "legend": lengths,
            },
            {
                "title": "Agreement along the network, mean over pairs",
                "svg": line_chart([*parts], conflicts, "part of the network", "mean over pairs"),
                "legend": conflicts,
            },
        ],
        "parts": [(part, [f"{value:.3g}" for value in row]) for part, row in zip(parts, norms, strict=True)],
    }
    return Section("agreement", "Do the task vectors agree?", facts)


def _map(title: str, matrix: Sequence[Sequence[float]], centre: float, note: str) -> dict[str, Any]:
    """A table whose cells are coloured by how far they are from the centre; a task with itself is left blank."""
    values = np.array(matrix)
    pairs = values[~np.eye(len(values), dtype=bool)]
    reach = max(0.1, float(np.abs(pairs - centre).max()))
    rows = [
        [None if i == j else (f"{value:.2f}", *mixed(value, centre, reach)) for j, value in enumerate(row)]
        for i, row in enumerate(values)
    ]
    turned = "conflict" if centre else "cosine"  # more is worse for one, better for the other
    return {"title": title, "note": note, "rows": rows, "kind": turned, "mean": f"{pairs.mean():.3f}"}
