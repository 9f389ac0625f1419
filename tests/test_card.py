"""Model cards: what a merged bundle came from, with the terms of its data, and what it was measured to do."""

import json
import re
import shutil

import numpy as np
import pytest

from tests.conftest import here, run


@pytest.fixture(scope="module")
def results(chain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "evaluation"
    words = [
        "--bundle",
        f"{chain.merged},{chain.specialists['liver']}",
        "--dataset_dir",
        chain.dataset,
        "--output",
        folder,
    ]
    assert here("tools", "evaluate", *words, "--overlays", "False").returncode == 0
    return folder


def test_a_merged_bundle_says_what_it_was_trained_on_and_on_which_terms(chain):
    text = (chain.merged / "docs" / "README.md").read_text()
    source = "Phantom torso CT, portal (licence Apache-2.0; simulated by python -m tools phantom)"
    assert f"trained on {source}" in text
    assert text.count(source) == 3  # the starting point's and each task's
    assert "## Limits" in text


@pytest.mark.parametrize("which", ["merged", "liver"])
def test_results_are_put_into_the_card_once(chain, results, tmp_path, which):
    source = chain.merged if which == "merged" else chain.specialists[which]
    bundle = tmp_path / "renamed"
    shutil.copytree(source, bundle)
    before = (bundle / "docs" / "README.md").read_text()
    for _ in range(2):
        run("tools", "card", "--bundle", bundle, "--results", results)
    text = (bundle / "docs" / "README.md").read_text()
    assert text.count("## Measured results") == 1 and text.replace(_section(text), "") == before
    summary = json.loads((results / "summary.json").read_text())["bundles"][source.name]
    metrics = json.loads((bundle / "configs" / "metadata.json").read_text())["eval_metrics"]
    for label, found in summary["labels"].items():
        dice, nsd, hd95 = (found[name]["mean"] for name in ("dice", "nsd", "hd95_mm"))
        assert f"| {label} | {dice:.3f} | too few cases | {nsd:.3f} | {hd95:.1f} | 4 |" in text
        assert metrics["dice"][label] == pytest.approx(dice, abs=1e-4)
    assert metrics["mean_dice"] == pytest.approx(summary["mean"]["dice"]["mean"], abs=1e-4)
    assert np.isfinite(metrics["mean_dice"])


def _section(text):
    return re.search(r"## Measured results\n.*?(?=^## Limits|^---$)", text, re.DOTALL | re.MULTILINE)[0]


def test_results_of_other_weights_are_refused(chain, results, tmp_path):
    result = here("tools", "card", "--bundle", chain.specialists["spleen"], "--results", results)
    assert result.returncode == 1 and "evaluate the bundle as it is now" in result.stderr
    result = here("tools", "card", "--bundle", chain.merged, "--results", tmp_path)
    assert result.returncode == 1 and "no output of evaluate" in result.stderr


def test_results_of_the_same_weights_used_otherwise_are_refused(chain, results, tmp_path):
    """With masks for its tasks a bundle makes other label maps of the same weights."""
    vectors = ",".join(map(str, chain.vectors.values()))
    words = ["--pretrained", chain.pretrain, "--vectors", vectors, "--method", "emr", "--output"]
    assert here("tools", "merge", *words, tmp_path / "plain").returncode == 0
    assert here("tools", "merge", *words, tmp_path / "masks", "--modulate").returncode == 0
    same = [(tmp_path / name / "models/model.pt").read_bytes() for name in ("plain", "masks")]
    assert same[0] == same[1]
    where = ["--dataset_dir", chain.dataset, "--overlays", False, "--output", tmp_path / "evaluation"]
    assert here("tools", "evaluate", "--bundle", tmp_path / "plain", *where).returncode == 0
    card = ["tools", "card", "--results", tmp_path / "evaluation", "--bundle"]
    assert here(*card, tmp_path / "plain").returncode == 0
    result = here(*card, tmp_path / "masks")
    assert result.returncode == 1 and "has no results of" in result.stderr
