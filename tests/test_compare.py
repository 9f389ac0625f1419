"""The table of methods: λ from the validation cases, scores from the test cases, and recipes that repeat a row."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml

from tests.conftest import here, run
from tests.gains import make_plane, relabel
from tools.bundle_code.nnunet_data import all_cases
from tools.compare import unknown_organs
from tools.errors import UserError
from tools.scores import read_scores, write_scores
from tools.summary import mean_dice

TITLES = ["specialists", "starting point + new heads (λ = 0)", "average", "task_arithmetic"]

FLAGS = ["pretrained", "vectors", "specialists", "dataset_dir", "split_file", "output"]


def means(bundle):
    return {label: found["dice"]["mean"] for label, found in bundle["labels"].items()}


def test_lambda_is_chosen_on_validation_and_rows_can_be_repeated(chain, tmp_path):
    names = sorted(all_cases(chain.dataset))
    (tmp_path / "split.json").write_text(json.dumps([{"train": names[:1], "val": names[1:2], "test": names[2:3]}]))
    words = [
        "tools",
        "compare",
        "--pretrained",
        chain.pretrain,
        "--vectors",
        ",".join(map(str, chain.vectors.values())),
    ]
    words += ["--specialists", ",".join(map(str, chain.specialists.values())), "--dataset_dir", chain.dataset]
    words += [
        "--split_file",
        tmp_path / "split.json",
        "--output",
        tmp_path / "out",
        "--methods",
        "average,task_arithmetic",
    ]
    text = run(*words, "--scales", "0.3,0.9").stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["bundles"]) == TITLES and results["against"] == ["specialists"]
    dice = {title: means(row) for title, row in results["bundles"].items()}
    assert set(dice["average"]) == {"liver", "spleen"}
    share = results["normalized_accuracy"]["average"]["labels"]["liver"]
    assert share == pytest.approx(dice["average"]["liver"] / dice["specialists"]["liver"])
    heads = results["normalized_accuracy"][TITLES[1]]["labels"]
    assert ("with new heads reaches less than 5%" in text) == (min(heads.values()) < 0.05)
    assert "| average | " in text and (tmp_path / "out" / "results.md").read_text() in text

    files = sorted((tmp_path / "out" / "scores").glob("task_arithmetic_*_val_*.csv"))
    validated = {float(file.name.split("_")[2]): mean_dice(read_scores(file)) for file in files}
    assert set(validated) == {0.3, 0.9}
    assert {score.case for file in files for score in read_scores(file)} == set(names[1:2])
    recipe = tmp_path / "out" / "recipes" / "task_arithmetic.yaml"
    assert yaml.safe_load(recipe.read_text())["parameters"]["scale"] == max(validated, key=validated.get)
    run("tools", "merge", "--recipe", recipe, "--output", tmp_path / "again")
    evaluation = ["--dataset_dir", chain.dataset, "--split_file", tmp_path / "split.json", "--part", "test"]
    run(
        "tools",
        "evaluate",
        "--bundle",
        tmp_path / "again",
        *evaluation,
        "--overlays",
        False,
        "--output",
        tmp_path / "e",
    )
    again = json.loads((tmp_path / "e" / "summary.json").read_text())["bundles"]["again"]
    assert means(again) == pytest.approx(dice["task_arithmetic"])

    for file in (tmp_path / "out" / "scores").iterdir():
        write_scores(file, [replace(score, dice=score.dice / 2) for score in read_scores(file)])
    run(*words, "--scales", "0.3,0.9")  # nothing is scored twice
    halves = json.loads((tmp_path / "out" / "results.json").read_text())["bundles"]
    for title, found in dice.items():
        assert means(halves[title]) == pytest.approx({label: value / 2 for label, value in found.items()})
    result = here(*words[:-1], "averge")
    assert result.returncode == 1 and "did you mean 'average'" in result.stderr


def test_organs_that_the_starting_point_does_not_know_are_named():
    told = unknown_organs({"liver": 0.9, "spleen": 0.05, "aorta": 0.01, "stomach": 0.0})
    assert "less than 5% of the specialists on aorta, stomach: " in told and "pseudo_labels" in told
    assert unknown_organs({"liver": 0.9, "spleen": 0.05}) == ""


def test_an_unknown_split_is_refused(chain, tmp_path):
    from tools.compare import compare

    with pytest.raises(UserError, match="not found"):
        compare("p", "v", str(chain.merged), str(chain.dataset), str(tmp_path / "none.json"), str(tmp_path / "out"))


@pytest.mark.parametrize("others", ["runs/average", "a/joint,b/joint", "runs/specialists"])
def test_rows_of_one_name_are_refused(others):
    result = here("tools", "compare", *[f"--{flag}=x" for flag in FLAGS], "--others", others)
    assert result.returncode == 1 and "must have names that differ" in result.stderr


@pytest.fixture(scope="module")
def plane(tmp_path_factory):
    return make_plane(tmp_path_factory.mktemp("plane"))


def compared(plane, output, *more, specialists="bright,dark", data="Dataset001_Quarters", methods="average"):
    words = ["--pretrained", plane / "start", "--vectors", f"{plane}/bright.safetensors,{plane}/dark.safetensors"]
    words += ["--specialists", ",".join(str(plane / name) for name in specialists.split(",")), "--output", output]
    words += ["--dataset_dir", plane / data, "--methods", methods, *more]
    return here("tools", "compare", *words)


def test_scores_of_other_labels_are_not_taken_for_these(plane, tmp_path):
    shutil.copytree(plane / "Dataset001_Quarters", tmp_path / "data")
    where = ["--dataset_dir", tmp_path / "data", "--split_file", plane / "split.json"]
    words = ["--pretrained", plane / "start", "--vectors", f"{plane}/bright.safetensors,{plane}/dark.safetensors"]
    words += ["--specialists", f"{plane}/bright,{plane}/dark", "--methods", "average", "--output", tmp_path / "out"]
    dice = []
    for _ in range(2):
        assert here("tools", "compare", *words, *where).returncode == 0
        dice.append(means(json.loads((tmp_path / "out/results.json").read_text())["bundles"]["average"]))
        relabel(tmp_path / "data", range(12), lambda label: (3 - label) % 3)  # the organs change places
    assert dice[0] == {"bright": 1.0, "dark": 0.0} and dice[1]["bright"] < 0.7


def test_lambda_is_not_chosen_on_test_cases_nor_one_label_measured_by_two(plane, tmp_path):
    names = [f"case{number}" for number in range(4)]
    (tmp_path / "split.json").write_text(json.dumps([{"train": [], "val": names, "test": names[2:]}]))
    result = compared(plane, tmp_path / "out", "--split_file", tmp_path / "split.json")
    assert result.returncode == 1 and "share 2 cases" in result.stderr
    result = compared(plane, tmp_path / "out", "--split_file", plane / "split.json", specialists="bright,dark,start")
    assert result.returncode == 1 and "both have a label 'bright'" in result.stderr
    assert not (tmp_path / "out").exists()
    shutil.copytree(plane / "Dataset001_Quarters", tmp_path / "empty")
    relabel(tmp_path / "empty", range(6), np.zeros_like)
    empty = {"data": tmp_path / "empty", "methods": "task_arithmetic"}
    result = compared(plane, tmp_path / "none", "--split_file", plane / "split.json", **empty)
    assert result.returncode == 1 and "has an organ of a task, so none can choose λ" in result.stderr
    (tmp_path / "file").write_text("")
    result = compared(plane, tmp_path / "file", "--split_file", plane / "split.json")
    assert result.returncode == 1 and "is a file, and --output is to be a folder" in result.stderr
