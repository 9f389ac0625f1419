"""The demo from beginning to end, and again: finished steps are not repeated."""

import json
import shutil

import pytest

from tests.conftest import ROOT, here, run
from tools.demo import Steps, results_table


@pytest.mark.slow
def test_the_demo_makes_its_table_and_pictures_and_resumes(tmp_path):
    output = tmp_path / "demo"
    words = ["tools", "demo", "--output", output, "--pretrain_epochs", 2, "--finetune_epochs", 2]
    words += ["--tasks", "{liver: liver, kidneys: [right kidney, left kidney]}"]
    text = run(*words, cwd=ROOT, timeout=3600).stdout  # half an hour on a processor without bfloat16
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
    again = run(*words, cwd=ROOT).stdout
    assert again.count("(done before)") == text.count("\n$ ") - 1  # what inspect prints is shown each time
    other = run(*words, "--seed", 1, cwd=ROOT, check=False)
    assert other.returncode == 1
    assert "begun with other settings (seed was 0)" in other.stderr


def test_a_step_is_repeated_when_one_that_it_builds_on_was(tmp_path):
    steps = Steps(tmp_path / "logs")

    def run_both():
        for name, after in (("first", []), ("second", ["first"])):
            made = tmp_path / name
            steps.run(name, ["python", "-c", f"open({str(made)!r}, 'a').write('x')"], made, after)
        return (tmp_path / "first").read_text(), (tmp_path / "second").read_text()

    assert run_both() == ("x", "x")
    assert run_both() == ("x", "x")
    (tmp_path / "logs" / "second.done").unlink()
    assert run_both() == ("x", "xx")
    (tmp_path / "logs" / "first.done").unlink()
    assert run_both() == ("xx", "xxx")


def test_too_few_patients_are_refused(chain):
    result = here("tools", "demo", "--dataset_dir", chain.dataset, "--output", chain.root / "demo")
    assert result.returncode == 1
    assert "three separate groups need 7 at least" in result.stderr


def test_a_bundle_that_learns_without_labels_is_refused(tmp_path):
    result = here("tools", "demo", "--pretrain_bundle", "pretrain_genesis", "--output", tmp_path / "demo")
    assert result.returncode == 1
    assert "pretrain_genesis learns without labels" in result.stderr
    assert not (tmp_path / "demo").exists()


def test_the_table_averages_the_tasks_shares_of_their_specialists():
    means = {
        "starting point": {"liver": 0.4, "spleen": 0.2},
        "specialists": {"liver": 0.8, "spleen": 0.5},
        "average": {"liver": 0.6, "spleen": 0.5},
    }
    rows = results_table(means, patients=6).splitlines()[-3:]
    assert rows == [
        "| liver | 0.400 | 0.800 | 0.600 (0.75) |",
        "| spleen | 0.200 | 0.500 | 0.500 (1.00) |",
        "| mean | 0.300 | 0.650 | 0.550 (0.88) |",
    ]


def test_a_task_whose_folder_would_be_another_steps_is_refused(chain, tmp_path):
    dataset = shutil.copytree(chain.dataset, tmp_path / "dataset")
    for file in [*dataset.glob("imagesTr/*"), *dataset.glob("labelsTr/*")]:  # 4 patients become 8
        shutil.copyfile(file, file.with_name(f"again_{file.name}"))
    words = ["tools", "demo", "--dataset_dir", dataset, "--output", tmp_path / "demo", "--tasks"]
    result = here(*words, "{pretrain: liver, spleen: spleen}")
    assert result.returncode == 1
    assert "the folder name of task 'pretrain' is taken" in result.stderr
