"""The folder that ``evaluate`` wrote, and who in it is the merge, the starting point and the specialists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.bundle import Bundle, read_json
from tools.card import evaluated_as
from tools.errors import UserError
from tools.scores import Score, read_scores
from tools.summary_table import SPECIALISTS

MERGE, START = "merge", "starting point"


@dataclass(frozen=True)
class Evaluation:
    """Results of several bundles on the same cases.

    Attributes:
        folder: where they are.
        summary: summary.json.
        scores: rows of scores.csv.
        conflicts: of calibration.json, if it is there: pairs of the merge's labels, and the volume that both claim, ml.
        channels: for each bundle the labels of its label maps, from 1 on.
        where: dataset and part, for people.
        merge: the merge's name in them.
        start: the starting point's, empty if it was not evaluated.
        specialists: the bundle that each label is compared with.
        others: the remaining bundles, by the title of their column: their name, where that is not what another one is called.
    """

    folder: Path
    summary: Mapping[str, Any]
    scores: list[Score]
    conflicts: list[dict[str, Any]]
    channels: Mapping[str, list[str]]
    where: str
    merge: str
    start: str
    specialists: Mapping[str, str]
    others: Mapping[str, str]

    @classmethod
    def read(cls, folder: str | Path, pretrained: str, subject: Bundle) -> Evaluation:
        """Read the folder.

        Args:
            folder: output of ``evaluate``.
            pretrained: name of the merge's starting point.
            subject: the merge.

        Raises:
            UserError: it is no such folder, or the merge was not evaluated as it is now.
        """
        folder = Path(folder)
        for name in ("summary.json", "scores.csv", "evaluation.json"):
            if not (folder / name).is_file():
                raise UserError(f"{folder} is no output of evaluate: it has no {name}")
        summary, facts = read_json(folder / "summary.json"), read_json(folder / "evaluation.json")
        bundles, merge = summary.get("bundles"), evaluated_as(subject, facts)
        if not isinstance(bundles, dict) or not isinstance(facts.get("bundles"), dict):
            raise UserError(f"{folder} was written by another version of evaluate; evaluate the bundle again")
        if merge not in bundles:
            raise UserError(f"{folder} has no results of {subject.path}: evaluate the bundle as it is now")
        scores = read_scores(folder / "scores.csv")
        calibrated = (
            read_json(folder / "calibration.json")["bundles"] if (folder / "calibration.json").is_file() else {}
        )
        for name, found in calibrated.items():  # one more metric
            bundles[name]["mean"]["ece"] = found["mean"]
            for label, entry in bundles[name]["labels"].items():
                entry["ece"] = found["ece"].get(label)
        against = summary.get("against") or []
        against = [name for name in ([against] if isinstance(against, str) else against) if name in bundles]
        specialists = {}
        for name in reversed([name for name in against if name != merge]):
            specialists |= dict.fromkeys(bundles[name]["labels"], name)
        specialists = {label: specialists[label] for label in bundles[merge]["labels"] if label in specialists}
        start = pretrained if pretrained in bundles and pretrained not in (merge, *specialists.values()) else ""
        remaining = [name for name in bundles if name not in (merge, start, *against)]
        others = {f"{name} (bundle)" if name in (MERGE, START, SPECIALISTS) else name: name for name in remaining}
        where = f"{facts.get('dataset', 'a dataset without a name')}, {facts.get('part', '')}"
        conflicts = calibrated.get(merge, {}).get("conflicts", [])
        return cls(
            folder, summary, scores, conflicts, facts.get("labels", {}), where, merge, start, specialists, others
        )

    @property
    def labels(self) -> list[str]:
        """The merge's labels that were scored."""
        return list(self.summary["bundles"][self.merge]["labels"])

    @property
    def shares(self) -> Mapping[str, Any]:
        """The merge's normalized accuracy: "labels", "mean" and "worst"; empty if there are no specialists."""
        return self.summary.get("normalized_accuracy", {}).get(self.merge, {})

    def columns(self) -> list[str]:
        """What there is to compare: starting point, specialists, merge, then the names of other bundles."""
        return [*([START] if self.start else []), *([SPECIALISTS] if self.specialists else []), MERGE, *self.others]

    def bundle_of(self, column: str, label: str) -> str:
        """The bundle that stands in a column for a label; empty if none does."""
        roles = {MERGE: self.merge, START: self.start, SPECIALISTS: self.specialists.get(label, "")}
        return roles[column] if column in roles else self.others[column]

    def value(self, column: str, label: str, metric: str) -> dict[str, Any] | None:
        """Mean, interval and number of cases of a label; None if it was not measured."""
        entry = (
            self.summary["bundles"].get(self.bundle_of(column, label), {}).get("labels", {}).get(label, {}).get(metric)
        )
        return entry if entry and entry.get("mean") is not None else None
