"""Dice and other metrics by task: starting point, specialists, the merge, and the merge as a share of the specialists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tools.report_page.evaluation import MERGE, START, Evaluation
from tools.report_page.page import Section, as_csv
from tools.summary_table import SPECIALISTS

METRICS = {
    "dice": ("Dice", 3),
    "nsd": ("Normalised surface Dice", 3),
    "hd95_mm": ("95 % Hausdorff distance, mm", 1),
    "ece": ("Calibration error of the probabilities around each organ", 3),
    "false_positive_ml": ("False-positive volume where the organ is absent, ml", 2),
}
Number = dict[str, Any]


def scores_section(evaluation: Evaluation) -> Section:
    """The section."""
    tables = [table for metric in METRICS if (table := _table(evaluation, metric))]
    bars = [
        {
            "label": label,
            "bars": [bar for column in (START, SPECIALISTS, MERGE) if (bar := _bar(evaluation, column, label))],
        }
        for label in evaluation.labels
    ]
    facts = {
        "where": evaluation.where,
        "tables": tables,
        "bars": bars,
        "roles": [column for column in (START, SPECIALISTS, MERGE) if column in evaluation.columns()],
        "table_csv": as_csv(_rows(evaluation)),
        "scores_csv": as_csv(
            [[*vars(evaluation.scores[0])], *([*vars(score).values()] for score in evaluation.scores)]
        ),
        "tests": _tests(evaluation),
        "missed": _missed(evaluation),
        "conflicts": [
            (" and ".join(pair["labels"]), f"{pair['ml']['mean']:.2f}")
            for pair in evaluation.conflicts
            if pair["ml"]["mean"] is not None
        ],
    }
    return Section("scores", "Dice by task", facts)


def key_figures(evaluation: Evaluation) -> list[dict[str, str]]:
    """The numbers for the top of the page."""
    merge = evaluation.summary["bundles"][evaluation.merge]["mean"]["dice"]
    interval = f"{merge['low']:.3f}–{merge['high']:.3f}" if merge.get("low") is not None else ""
    value = "–" if merge["mean"] is None else f"{merge['mean']:.3f}"
    note = "no case has an organ" if merge["mean"] is None else interval
    figures = [{"name": "mean Dice of the merge", "value": value, "note": note}]
    if evaluation.shares:
        shares, mean = evaluation.shares["labels"], evaluation.shares["mean"]
        worst = min(shares, key=shares.__getitem__)
        left_out = [label for label in evaluation.summary.get("not_learned", ()) if label in evaluation.labels]
        note = "merge ÷ specialist, mean over tasks"
        note += f" without {', '.join(left_out)}, which the specialist has not learned" * bool(left_out)
        figures.append({"name": "normalized accuracy", "value": f"{mean:.1%}", "note": note})
        figures.append({"name": "worst task", "value": f"{shares[worst]:.1%}", "note": worst})
    return figures


def normalized(evaluation: Evaluation, label: str) -> float | None:
    """Dice of the merge ÷ Dice of the label's specialist; None if one of them is missing."""
    return evaluation.shares.get("labels", {}).get(label)


def _table(evaluation: Evaluation, metric: str) -> dict[str, Any] | None:
    """A row for each label and one for the mean; None when nothing of it was measured."""
    title, digits = METRICS[metric]
    columns = evaluation.columns()
    rows = []
    for label in evaluation.labels:
        cells = [_cell(evaluation.value(column, label, metric), digits) for column in columns]
        share = normalized(evaluation, label)
        rows.append({"label": label, "cells": cells, "share": f"{share:.2f}" if share is not None else "–"})
    if all(cell is None for row in rows for cell in row["cells"]):
        return None
    means = [_cell(_mean(evaluation, column, metric), digits) for column in columns]
    return {
        "metric": metric,
        "title": title,
        "columns": columns,
        "rows": rows,
        "means": means,
        "share": f"{evaluation.shares['mean']:.2f}" if evaluation.shares and metric == "dice" else "",
    }


def _mean(evaluation: Evaluation, column: str, metric: str) -> Number | None:
    """Mean over the merge's labels: as it was measured for a bundle that has just these, else without an interval."""
    bundle = evaluation.bundle_of(column, "")
    own = evaluation.summary["bundles"].get(bundle, {})
    if bundle and set(own["labels"]) == set(evaluation.labels):
        entry = own["mean"].get(metric)
        return entry if entry and entry.get("mean") is not None else None
    values = [evaluation.value(column, label, metric) for label in evaluation.labels]
    return {"mean": float(np.mean([v["mean"] for v in values]))} if all(values) else None


def _cell(value: Number | None, digits: int) -> dict[str, str] | None:
    if value is None:
        return None
    low, high = value.get("low"), value.get("high")
    interval = f"{low:.{digits}f}–{high:.{digits}f}" if low is not None and high is not None else ""
    return {"mean": f"{value['mean']:.{digits}f}", "interval": interval}


def _bar(evaluation: Evaluation, column: str, label: str) -> dict[str, Any] | None:
    """Length and whiskers in percent of the full width, which is a Dice of 1."""
    value = evaluation.value(column, label, "dice")
    if value is None:
        return None
    low, high = (value.get(edge) if value.get(edge) is not None else value["mean"] for edge in ("low", "high"))
    return {
        "role": column,
        "text": f"{value['mean']:.3f}",
        "style": f"--mean:{100 * value['mean']:.2f}%;--low:{100 * low:.2f}%;--span:{100 * (high - low):.2f}%",
    }


def _tests(evaluation: Evaluation) -> list[dict[str, str]]:
    """The merge against the specialists, case by case."""
    return [
        {
            "label": test["label"],
            "cases": str(test["cases"]),
            "difference": f"{test['difference']:+.3f}",
            "interval": "" if test.get("low") is None else f"{test['low']:+.3f} to {test['high']:+.3f}",
            "p": f"{test['p_holm']:.2g}",
        }
        for test in evaluation.summary.get("paired", [])
        if test["bundle"] == evaluation.merge
    ]


def _missed(evaluation: Evaluation) -> list[str]:
    """Organs of which the merge found nothing, and in how many cases."""
    labels = evaluation.summary["bundles"][evaluation.merge]["labels"]
    return [
        f"{label} in {entry['missed']} of {entry['dice']['cases']}"
        for label, entry in labels.items()
        if entry.get("missed")
    ]


def _rows(evaluation: Evaluation) -> Sequence[Sequence[object]]:
    rows: list[list[object]] = [["label", "column", "bundle", "metric", "mean", "low", "high", "cases"]]
    for label in evaluation.labels:
        for column in evaluation.columns():
            for metric in METRICS:
                if value := evaluation.value(column, label, metric):
                    numbers = [value.get(name) for name in ("mean", "low", "high", "cases")]
                    rows.append([label, column, evaluation.bundle_of(column, label), metric, *numbers])
        if (share := normalized(evaluation, label)) is not None:
            rows.append([label, MERGE, evaluation.merge, "normalized_accuracy", share, None, None, None])
    return rows
