"""The demo from beginning to end, and again: finished steps are not repeated."""

import json

import pytest

from tests.conftest import ROOT, run


@pytest.mark.slow
def test_the_demo_makes_its_table_and_pictures_and_resumes(tmp_path):
    output = tmp_path / "demo"
    words = ["tools", "demo", "--output", output, "--pretrain_epochs", 2, "--finetune_epochs", 2]
    words += ["--tasks", "{liver: liver, kidneys: [right kidney, left kidney]}"]
    text = run(*words, cwd=ROOT).stdout
    results = json.loads((output / "results.json").read_text())
    assert len(results["test_cases"]) == 6
    titles = ["starting point", "specialists", "start + new heads (λ = 0)", "average"]
    assert list(results["mean_dice"])[:4] == titles
    assert set(results["mean_dice"]["specialists"]) == {"liver", "kidneys"}
    assert all(0 <= dice <= 1 for row in results["mean_dice"].values() for dice in row.values())
    assert results["mean_dice"]["specialists"]["liver"] > 0.1  # two epochs of the head alone
    assert len(list((output / "overlays").glob("*.png"))) == 6
    for command in ("new_pretraining", "monai.bundle run", "new_task", "tools diff", "tools merge", "tools evaluate"):
        assert command in text
    (output / "logs" / "merged_average.done").unlink()
    again = run(*words, cwd=ROOT).stdout
    assert again.count("(done before)") == text.count("\n$ ") - 3  # inspect, that merge, and evaluate run again
    other = run(*words, "--seed", 1, cwd=ROOT, check=False)
    assert other.returncode == 1
    assert "begun with other settings (seed was 0)" in other.stderr


def test_too_few_patients_are_refused(chain):
    result = run("tools", "demo", "--dataset_dir", chain.dataset, "--output", chain.root / "demo", check=False)
    assert result.returncode == 1
    assert "three separate groups need 7 at least" in result.stderr
