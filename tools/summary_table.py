"""A summary of scores as Markdown: a table for each metric, and the paired tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tools.markdown import table
from tools.summary import LEARNED, LEAST_CASES, BundleSummary, Estimate, Summary

SPECIALISTS = "specialists"  # the row of several reference bundles
SIGNIFICANT = 0.05
DIGITS = {"dice": 3, "nsd": 3, "hd95_mm": 1, "false_positive_ml": 1}


def markdown(summary: Summary, tolerance: float | None = None, notes: Mapping[str, str] | None = None) -> str:
    """Tables whose first row is what the others are compared with; a metric that no case has gets none.

    Several reference bundles are one row, "specialists", in which each label is that of its own one.

    Args:
        summary: of all bundles.
        tolerance: of the normalised surface Dice, mm.
        notes: what to say behind the names of bundles.
    """
    titles = {
        "dice": "Dice",
        "nsd": f"Normalised surface Dice within {tolerance:g} mm" if tolerance is not None else "",
        "hd95_mm": "HD95, mm (less is better; as much as the image's diagonal where an organ was missed)",
        "false_positive_ml": "False-positive volume in cases without the organ, ml (less is better)",
    }
    rows = _rows(summary)
    labels = list(dict.fromkeys([*summary.against, *(label for b in rows.values() for label in b.labels)]))
    parts = []
    for metric, title in titles.items():
        if any(bundle.mean[metric].cases for bundle in summary.bundles.values()):
            parts.append(f"**{title}**\n\n" + _table(summary, rows, labels, metric, notes or {}))
    return "\n".join([*parts, *_missed(summary), *_remarks(summary), *_tests(summary)])


def _rows(summary: Summary) -> dict[str, BundleSummary]:
    """What each row shows, the reference first."""
    references = set(summary.against.values())
    others = {name: bundle for name, bundle in summary.bundles.items() if name not in references}
    if len(references) < 2:
        return {name: summary.bundles[name] for name in references} | others
    joined = BundleSummary({label: summary.bundles[name].labels[label] for label, name in summary.against.items()})
    return {SPECIALISTS: joined} | others


def _table(
    summary: Summary, rows: Mapping[str, BundleSummary], labels: Sequence[str], metric: str, notes: Mapping[str, str]
) -> str:
    shares = summary.normalized_accuracy if metric == "dice" else {}
    stars = {(t["bundle"], t["label"]) for t in summary.paired if metric == "dice" and t["p_holm"] < SIGNIFICANT}
    digits, columns = DIGITS[metric], [*labels, "mean", *(["worst"] if shares else [])]
    lines = []
    for name, bundle in rows.items():
        share = shares.get(name, {"labels": {}})
        measured = {label: bundle.labels[label][metric] for label in labels if label in bundle.labels}
        cells = [
            cell(measured.get(label), digits, share["labels"].get(label), (name, label) in stars) for label in labels
        ]
        whole = None
        if len(measured) == len(labels):
            whole = bundle.mean.get(metric) if len(bundle.labels) == len(labels) else None
            whole = whole or _without_interval(np.mean([value.mean for value in measured.values()]))
        shared = {*share["labels"], *summary.not_learned}
        compared = all(label in shared for label, value in measured.items() if not math.isnan(value.mean))
        cells.append(cell(whole, digits, share.get("mean") if compared else None))
        if shares:
            cells.append(f"{share['worst']:.2f}" if "worst" in share else "")
        note = f" ({notes[name]})" if notes.get(name) else ""
        lines.append([f"{name}{note}", *cells])
    return table(["", *columns], lines) + "\n"


def _without_interval(mean: float) -> Estimate:
    return Estimate(float(mean), math.nan, math.nan, 1)


def cell(value: Estimate | None, digits: int, share: float | None = None, star: bool = False) -> str:
    """As "0.814 [0.786, 0.839] (0.98)*"."""
    if value is None or math.isnan(value.mean):
        return ""
    interval = "" if math.isnan(value.low) else f" [{value.low:.{digits}f}, {value.high:.{digits}f}]"
    part = "" if share is None else f" ({share:.2f})"
    return f"{value.mean:.{digits}f}{interval}{part}" + ("*" if star else "")


def _missed(summary: Summary) -> list[str]:
    """Organs that were there and of which nothing was predicted."""
    missed = [
        f"{name}: {label} {count} of {bundle.labels[label]['dice'].cases}"
        for name, bundle in summary.bundles.items()
        for label, count in bundle.missed.items()
        if count
    ]
    return [f"Cases with an organ of which nothing was predicted (their Dice is 0): {'; '.join(missed)}.\n"] * bool(
        missed
    )


def _remarks(summary: Summary) -> list[str]:
    cases = [value["dice"].cases for bundle in summary.bundles.values() for value in bundle.labels.values()]
    remarks = []
    if max(cases) >= LEAST_CASES:
        remarks.append("In square brackets: 95 % bootstrap interval over cases.")
    if min(cases) < LEAST_CASES:
        remarks.append(f"Fewer than {LEAST_CASES} cases with an organ are too few for an interval.")
    if summary.normalized_accuracy:
        remarks.append(
            "In round brackets: normalized accuracy, the share of the first row's; worst: that of the worst label."
        )
    if summary.not_learned:
        remarks.append(
            f"No share of {', '.join(summary.not_learned)}: the first row itself has a Dice below {LEARNED}, by which "
            "nothing can be measured."
        )
    return [" ".join(remarks) + "\n"] * bool(remarks)


def _tests(summary: Summary) -> list[str]:
    tests = summary.paired
    if not tests:
        return []
    most = max(test["cases"] for test in tests)
    least = min(2 ** (1 - most) * len(tests), 1)
    what = f"{len(tests)} Wilcoxon signed-rank test(s) on at most {most} cases"
    if least >= SIGNIFICANT:
        return [f"No difference can be significant: {what} cannot get below p = {least:.2g} after Holm's correction.\n"]
    rows = [
        [*(test[column] for column in ("bundle", "against", "label", "cases")), _difference(test)]
        + [f"{test[p]:.2g}" for p in ("p", "p_holm")]
        for test in tests
    ]
    text = table(["", "against", "label", "cases", "difference in Dice", "p", "p, Holm"], rows)
    return [f"*: p < {SIGNIFICANT} after Holm's correction for {what}:\n", f"{text}\n"]


def _difference(test: Mapping[str, Any]) -> str:
    interval = "" if test["low"] is None else f" [{test['low']:+.3f}, {test['high']:+.3f}]"
    return f"{test['difference']:+.3f}{interval}"
