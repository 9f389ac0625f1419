"""What scores say together: intervals, shares and tests against what is known in closed form."""

import math

import numpy as np
import pytest

from tools.scores import Score
from tools.summary import estimate, holm, paired_tests, summarise
from tools.summary_table import markdown

NAN = math.nan


def scores(bundle, label, dice, reference_ml=10.0, predicted_ml=9.0):
    cases = enumerate(dice)
    return [Score(bundle, f"c{i}", label, d, d, 1.0, reference_ml, predicted_ml) for i, d in cases]


def test_the_interval_is_that_of_the_central_limit_theorem_for_many_cases():
    values = np.random.default_rng(0).normal(0.8, 0.1, (400, 1))
    found = estimate(values)
    error = values.std() / 20
    assert found.mean == pytest.approx(values.mean()) and found.cases == 400
    assert (found.low, found.high) == pytest.approx(
        (found.mean - 1.96 * error, found.mean + 1.96 * error), abs=error / 5
    )
    assert estimate(values) == found  # seeded


def test_labels_of_a_case_are_drawn_together():
    """Two labels that always say the same do not make the interval of their mean narrower."""
    values = np.random.default_rng(1).random((30, 1))
    one, two = estimate(values), estimate(np.hstack([values, values]))
    assert (two.mean, two.low, two.high) == pytest.approx((one.mean, one.low, one.high))


def test_the_mean_over_labels_is_that_of_their_means():
    values = np.array([[1.0, 0.0], [1.0, NAN], [1.0, NAN], [NAN, NAN]])
    found = estimate(values)
    assert (found.mean, found.cases) == (0.5, 3)
    assert math.isnan(found.low)  # too few


def test_absent_organs_do_not_count_but_what_was_predicted_does():
    found = summarise(
        [
            *scores("b", "liver", [0.5, 0.0], predicted_ml=0),
            Score("b", "c2", "liver", NAN, NAN, NAN, 0, 3),
            Score("b", "c3", "liver", NAN, NAN, NAN, 0, 0),
            Score("b", "c0", "spleen", NAN, NAN, NAN, 0, 0),
        ]
    )
    liver = found.as_dict()["bundles"]["b"]["labels"]["liver"]
    assert liver["dice"] == {"mean": 0.25, "low": None, "high": None, "cases": 2}
    assert liver["false_positive_ml"] == {"mean": 1.5, "low": None, "high": None, "cases": 2}
    assert liver["missed"] == 2
    assert found.bundles["b"].mean["dice"].mean == 0.25  # of the one label that was measured
    text = markdown(found, 2.0)
    assert "False-positive volume" in text and "b: liver 2 of 2" in text


def test_paired_differences_and_shares():
    """Six cases that all get worse: the exact test has p = 2 / 2⁶, and two such tests together twice that."""
    worse = [0.50, 0.51, 0.52, 0.53, 0.54, 0.55]
    found = summarise(
        [
            *scores("liver", "liver", [0.6, 0.62, 0.64, 0.66, 0.68, 0.7]),
            *scores("spleen", "spleen", [0.8] * 6),
            *scores("merged", "liver", worse),
            *scores("merged", "spleen", [0.8] * 6),
        ],
        {"liver": "liver", "spleen": "spleen"},
    )
    first, second = found.paired
    assert (first["bundle"], first["against"], first["label"], first["cases"]) == ("merged", "liver", "liver", 6)
    assert first["difference"] == pytest.approx(-0.125) and first["low"] < -0.125 < first["high"] < 0
    assert (first["p"], first["p_holm"]) == pytest.approx((2 / 64, 4 / 64))
    assert (second["p"], second["p_holm"]) == (1, 1)
    share = found.normalized_accuracy["merged"]
    assert share["labels"] == pytest.approx({"liver": 0.525 / 0.65, "spleen": 1})
    assert (share["mean"], share["worst"]) == pytest.approx(((1 + 0.525 / 0.65) / 2, 0.525 / 0.65))
    assert found.as_dict()["against"] == ["liver", "spleen"]
    lines = markdown(found, 2.0).splitlines()
    assert lines[2] == "| | liver | spleen | mean | worst |"
    assert lines[4].startswith("| specialists | 0.650 [0.62") and lines[4].endswith("] | 0.725 | |")
    assert lines[5].endswith("] (0.81) | 0.800 [0.800, 0.800] (1.00) | 0.662 [0.656, 0.669] (0.90) | 0.81 |")
    assert "No difference can be significant: 2 Wilcoxon signed-rank test(s) on at most 6 cases" in lines[-1]


def test_a_specialist_that_learned_nothing_measures_nothing():
    """0.6 would be sixty thousand times its Dice of 1e-5, and the mean share of both labels as absurd."""
    found = summarise(
        [
            *scores("liver", "liver", [0.6] * 2),
            *scores("aorta", "aorta", [1e-5] * 2),
            *scores("merged", "liver", [0.3] * 2),
            *scores("merged", "aorta", [0.6] * 2),
            *scores("other", "aorta", [0.6] * 2),
        ],
        {"liver": "liver", "aorta": "aorta"},
    )
    assert found.normalized_accuracy == {"merged": {"labels": {"liver": 0.5}, "mean": 0.5, "worst": 0.5}}
    assert found.as_dict()["not_learned"] == ["aorta"]
    text = markdown(found)
    assert "| merged | 0.300 (0.50) | 0.600 | 0.450 (0.50) | 0.50 |" in text
    assert "No share of aorta: the first row itself has a Dice below 0.1" in text


def test_a_difference_that_is_significant_has_a_star_and_a_row():
    better = np.linspace(0.6, 0.7, 12)
    against = {"liver": "a", "tumour": "a"}  # which the dataset does not have
    found = summarise([*scores("a", "liver", better - 0.1), *scores("b", "liver", better)], against)
    text = markdown(found, notes={"b": "λ = 0.4"})
    assert f"| b (λ = 0.4) | {better.mean():.3f} [" in text and "(1.18)* |" in text
    assert "| b | a | liver | 12 | +0.100 [+0.100, +0.100] |" in text


def test_cases_that_only_one_of_two_bundles_has_are_not_paired():
    pairs = [*scores("a", "liver", [0.5, 0.6, NAN]), *scores("b", "liver", [0.6, NAN, 0.7])]
    (test,) = paired_tests(pairs, {"liver": "a"})
    assert test["cases"] == 1 and test["p_holm"] == 1
    assert paired_tests(pairs, {}) == []


def test_holm_corrects_by_rank():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1, 1]
