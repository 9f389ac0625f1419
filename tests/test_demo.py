"""The demo from beginning to end, and again: finished steps are not repeated."""

import json

import nibabel
import numpy as np
import pytest

from tests.conftest import ROOT, here, run
from tools.bundle_code.nnunet_data import all_cases
from tools.demo import PHANTOM_TASKS, Steps, _phantom_cohorts, choose_tasks, results_table
from tools.errors import UserError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Nine simulated patients in voxels of 8 mm, with labels for the organs of the tasks alone: learned in minutes."""
    fine, folder = (tmp_path_factory.mktemp("data") / name for name in ("fine", "Dataset001_Coarse"))
    assert here("tools", "phantom", "--output", fine, "--population", "portal", "--cases", 9).returncode == 0
    description = json.loads((fine / "dataset.json").read_text())
    labels = {name: value for name, value in description["labels"].items() if name == "liver" or "kidney" in name}
    for path in fine.glob("*Tr/*.nii.gz"):
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        coarse = nibabel.load(path).slicer[::2, ::2, ::2]
        if path.parent.name == "labelsTr":
            values = np.asarray(coarse.dataobj)
            kept = np.where(np.isin(values, list(labels.values())), values, 0)
            coarse = nibabel.Nifti1Image(kept, coarse.affine, coarse.header)
        nibabel.save(coarse, folder / path.parent.name / path.name)
    description["labels"] = {"background": 0, **labels}
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


@pytest.mark.slow
def test_the_demo_makes_its_table_and_pictures_and_resumes(dataset, tmp_path):
    output = tmp_path / "demo"
    words = ["tools", "demo", "--dataset_dir", dataset, "--output", output, "--patch_size", 32, "--batch_size", 2]
    words += ["--pretrain_epochs", 8, "--finetune_epochs", 6]
    words += ["--tasks", "{liver: liver, kidneys: [right kidney, left kidney]}"]
    text = run(*words, cwd=ROOT).stdout
    results = json.loads((output / "results.json").read_text())
    assert len(results["test_cases"]) == 2
    titles = ["starting point", "specialists", "start + new heads (λ = 0)", "average"]
    assert list(results["mean_dice"])[:4] == titles
    assert set(results["mean_dice"]["specialists"]) == {"liver", "kidneys"}
    assert all(0 <= dice <= 1 for row in results["mean_dice"].values() for dice in row.values())
    assert results["mean_dice"]["specialists"]["liver"] > 0.3
    assert len(list((output / "overlays").glob("*.png"))) == 2
    for command in ("new_pretraining", "monai.bundle run", "new_task", "tools diff", "tools merge", "tools evaluate"):
        assert command in text
    again = run(*words, cwd=ROOT).stdout
    assert again.count("(done before)") == text.count("\n$ ") - 1  # what inspect prints is shown each time
    other = run(*words, "--seed", 1, cwd=ROOT, check=False)
    assert other.returncode == 1
    assert "begun with other settings (seed was 0)" in other.stderr


def test_simulated_patients_of_one_hospital_pretrain_and_the_others_fine_tune_and_test(tmp_path):
    cohorts = _phantom_cohorts(Steps(tmp_path / "logs"), tmp_path, seed=0)
    used = {}
    for name, folder in (("pretrain", cohorts.pretrain), ("finetune", cohorts.finetune)):
        (fold,) = json.loads((cohorts.splits / f"{name}.json").read_text())
        used[name] = [case for part in fold.values() for case in part]
        assert sorted(used[name]) == sorted(all_cases(folder))
        description = json.loads((folder / "dataset.json").read_text())
        assert ("portal" in description["name"]) == (name == "finetune")
    assert [len(part) for part in fold.values()] == [6, 2, 6]
    assert list(choose_tasks(None, cohorts.finetune, PHANTOM_TASKS, ())) == ["liver", "spleen", "kidneys", "stomach"]


def test_tasks_are_labels_or_a_dictionary_and_have_folders_of_their_own(tmp_path):
    labels = {"background": 0, "left kidney": 1, "left.kidney": 2, "liver": 3}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    usual = {"both": ["left kidney", "liver"], "other": 2}
    assert list(choose_tasks(None, tmp_path, usual, ())) == ["both", "other"]
    assert choose_tasks("liver,left kidney", tmp_path, usual, ()) == {
        "liver": ["liver"],
        "left kidney": ["left kidney"],
    }
    assert choose_tasks("{a: 3, b: 2}", tmp_path, None, ()) == {"a": ["liver"], "b": ["left.kidney"]}
    for tasks, taken in ((None, ()), ("liver,left kidney", ("liver",))):
        with pytest.raises(UserError, match=r"folder name of task .* is taken"):
            choose_tasks(tasks, tmp_path, None, taken)


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


def test_a_command_that_goes_on_by_itself_is_not_told_to_overwrite(tmp_path):
    steps = Steps(tmp_path / "logs")
    steps.run("stopped", ["python", "-m", "tools", "vendor", "--check"], tmp_path)  # it has no --overwrite
    assert (tmp_path / "logs" / "stopped.done").is_file()


def test_too_few_patients_are_refused(phantom_dataset, tmp_path):
    result = here("tools", "demo", "--dataset_dir", phantom_dataset, "--output", tmp_path / "demo")
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
    means["specialists"]["spleen"] = 0.01  # of which 0.5 would be fifty times as much
    rows = results_table(means, patients=6).splitlines()[-2:]
    assert rows == ["| spleen | 0.200 | 0.010 | 0.500 |", "| mean | 0.300 | 0.405 | 0.550 (0.75) |"]


def test_a_task_whose_folder_would_be_another_steps_is_refused(dataset, tmp_path):
    words = ["tools", "demo", "--dataset_dir", dataset, "--output", tmp_path / "demo", "--tasks"]
    result = here(*words, "{pretrain: liver, spleen: spleen}")
    assert result.returncode == 1
    assert "the folder name of task 'pretrain' is taken" in result.stderr
