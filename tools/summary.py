"""What scores of many cases say together: means with bootstrap intervals, shares of the specialists, paired tests, a table."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tools.scores import Score

METRICS: dict[str, Callable[[Score], float]] = {
    "dice": lambda score: score.dice,
    "nsd": lambda score: score.nsd,
    "hd95_mm": lambda score: score.hd95_mm,
    "false_positive_ml": lambda score: math.nan if score.reference_ml else score.predicted_ml,
}
RESAMPLES = 9999
LEAST_CASES = 6  # with fewer no interval, and no Wilcoxon test of them, even uncorrected, gets below p = 0.05
LEARNED = 0.1  # mean Dice of a reference bundle that others are measured by; a share of less says nothing


@dataclass(frozen=True)
class Estimate:
    """A mean over cases.

    Attributes:
        mean: NaN when there are no cases.
        low: of the 95 % bootstrap interval; NaN with fewer than ``LEAST_CASES`` cases.
        high: likewise.
        cases: how many.
    """

    mean: float
    low: float
    high: float
    cases: int

    def as_dict(self) -> dict[str, float | int | None]:
        return {name: None if math.isnan(value) else value for name, value in vars(self).items()}


@dataclass
class BundleSummary:
    """The means of one bundle.

    Attributes:
        labels: for each label and metric; means over cases.
        mean: for each metric; the mean over labels of the means over cases.
        missed: for each label the number of cases that have it and where nothing was predicted.
    """

    labels: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    mean: dict[str, Estimate] = field(default_factory=dict)
    missed: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        labels = {
            label: {name: value.as_dict() for name, value in metrics.items()} | {"missed": self.missed[label]}
            for label, metrics in self.labels.items()
        }
        return {"labels": labels, "mean": {name: value.as_dict() for name, value in self.mean.items()}}


@dataclass
class Summary:
    """Everything that summary.json says.

    Attributes:
        bundles: by name.
        against: for each label the bundle that the others are compared with.
        normalized_accuracy: for each of the others ``{"labels": {label: share}, "mean": …, "worst": …}``, of the mean Dice.
        not_learned: labels without a share, because the reference bundle itself has a mean Dice below ``LEARNED``.
        paired: a test of the differences in Dice for each of the others and each label; see ``paired_tests``.
    """

    bundles: dict[str, BundleSummary]
    against: dict[str, str]
    normalized_accuracy: dict[str, dict[str, Any]]
    not_learned: list[str]
    paired: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        return {
            "bundles": {name: bundle.as_dict() for name, bundle in self.bundles.items()},
            "against": list(dict.fromkeys(self.against.values())),
            "normalized_accuracy": self.normalized_accuracy,
            "not_learned": self.not_learned,
            "paired": self.paired,
        }


def summarise(scores: Sequence[Score], against: Mapping[str, str] | None = None) -> Summary:
    """Means with intervals of every bundle, and how the others compare with the reference bundles.

    Args:
        scores: of all bundles.
        against: for each label the bundle, usually a specialist, that others are compared with; one without scores of the label
            does not count.
    """
    names = dict.fromkeys(score.bundle for score in scores)
    bundles = {name: _bundle_summary([score for score in scores if score.bundle == name]) for name in names}
    scored = {(score.bundle, score.label) for score in scores}
    against = {label: name for label, name in (against or {}).items() if (name, label) in scored}
    reference = {label: bundles[name].labels[label]["dice"].mean for label, name in against.items()}
    shares = {}
    for name in bundles:
        if name not in against.values():
            own = {label: values["dice"].mean for label, values in bundles[name].labels.items()}
            known = [label for label, value in reference.items() if value >= LEARNED and own.get(label, math.nan) >= 0]
            parts = {label: own[label] / reference[label] for label in known}
            if parts:
                shares[name] = {
                    "labels": parts,
                    "mean": float(np.mean([*parts.values()])),
                    "worst": min(parts.values()),
                }
    not_learned = [label for label, value in reference.items() if value < LEARNED]
    return Summary(bundles, against, shares, not_learned, paired_tests(scores, against))


def _bundle_summary(scores: Sequence[Score]) -> BundleSummary:
    labels = list(dict.fromkeys(score.label for score in scores))
    cases = list(dict.fromkeys(score.case for score in scores))
    summary = BundleSummary({label: {} for label in labels})
    for name, metric in METRICS.items():
        values = np.full((len(cases), len(labels)), np.nan)
        for score in scores:
            values[cases.index(score.case), labels.index(score.label)] = metric(score)
        for position, label in enumerate(labels):
            summary.labels[label][name] = estimate(values[:, [position]])
        summary.mean[name] = estimate(values)
    for label in labels:
        summary.missed[label] = sum(s.label == label and s.reference_ml > 0 == s.predicted_ml for s in scores)
    return summary


def mean_dice(scores: Sequence[Score]) -> float:
    """The mean over labels of the mean Dice over cases of one bundle; NaN when no case has any of the labels."""
    dice: dict[str, list[float]] = {}
    for score in scores:
        if not math.isnan(score.dice):
            dice.setdefault(score.label, []).append(score.dice)
    return float(np.mean([np.mean(values) for values in dice.values()])) if dice else math.nan


def estimate(values: np.ndarray) -> Estimate:
    """The mean over labels of the means over cases, with its 95 % percentile-bootstrap interval over cases.

    Cases are drawn anew with all their labels together. The interval says how far the mean could be another one with other
    cases of the same kind; not what another training run would give.

    Args:
        values: ``(cases, labels)``, NaN where there is none.

    Source: Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 1979; ``scipy.stats.bootstrap``.
    """
    from scipy.stats import bootstrap

    def mean(chosen: np.ndarray, axis: int = -1) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a label that none of the chosen cases has does not count
            return np.nanmean(np.nanmean(values[chosen], axis=-2), axis=-1)

    values = values[~np.isnan(values).all(axis=1)]
    if not len(values):
        return Estimate(math.nan, math.nan, math.nan, 0)
    everyone, low, high = np.arange(len(values)), math.nan, math.nan
    if len(values) >= LEAST_CASES:
        settings = {"n_resamples": RESAMPLES, "batch": 1000, "method": "percentile", "rng": np.random.default_rng(0)}
        low, high = bootstrap((everyone,), mean, vectorized=True, **settings).confidence_interval
    return Estimate(float(mean(everyone)), float(low), float(high), len(values))


def paired_tests(scores: Sequence[Score], against: Mapping[str, str]) -> list[dict[str, Any]]:
    """Differences in Dice to the reference bundle, case by case, each with a two-sided Wilcoxon signed-rank test.

    Args:
        scores: of all bundles.
        against: for each label the reference bundle.

    Returns:
        For each other bundle and label: bundle, against, label, cases, difference (an estimate of its mean), p, and p_holm,
        corrected for all tests in the list.

    Source: Wilcoxon, Biometrics Bulletin 1945; Holm, Scandinavian Journal of Statistics 1979.
    """
    from scipy.stats import wilcoxon

    dice = {(score.bundle, score.label, score.case): score.dice for score in scores if not math.isnan(score.dice)}
    tests = []
    for bundle, label in dict.fromkeys((score.bundle, score.label) for score in scores):
        reference = against.get(label, bundle)
        cases = [case for *which, case in dice if which == [bundle, label] and (reference, label, case) in dice]
        if bundle in against.values() or reference == bundle or not cases:
            continue
        differences = np.array([dice[bundle, label, case] - dice[reference, label, case] for case in cases])
        p = float(wilcoxon(differences).pvalue) if differences.any() else 1.0
        difference = estimate(differences[:, None]).as_dict()
        tests.append({"bundle": bundle, "against": reference, "label": label, **difference, "p": p})
        tests[-1]["difference"] = tests[-1].pop("mean")
    for test, corrected in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = corrected
    return tests


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for there being several of them, so that the chance of any false one among them stays as stated."""
    order, corrected = np.argsort(p), np.empty(len(p))
    corrected[order] = np.maximum.accumulate(np.sort(p) * np.arange(len(p), 0, -1))
    return [float(value) for value in np.minimum(corrected, 1)]
