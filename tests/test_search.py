"""Searching the coefficients of a merge whose Dice is known in closed form, and what is refused."""

import csv
import json
import shutil

import numpy as np
import optuna
import pytest
import torch
import yaml

from tests.conftest import here
from tests.gains import ORGANS, dice, make_plane, relabel
from tools.bundle import read_json, write_json
from tools.search_study import _storage


@pytest.fixture(scope="module")
def plane(tmp_path_factory):
    return make_plane(tmp_path_factory.mktemp("plane"))


def words(plane, output, *more):
    vectors = f"{plane}/bright.safetensors,{plane}/dark.safetensors"
    data = ["--dataset_dir", plane / "Dataset001_Quarters", "--split_file", plane / "split.json"]
    return ["tools", "search", "--pretrained", plane / "start", "--vectors", vectors, *data, "--output", output, *more]


def search(plane, output, *more):
    result = here(*words(plane, output, *more))
    assert result.returncode == 0, result.stderr
    return result.stdout


def refused(plane, output, *more):
    result = here(*words(plane, output, *more))
    assert result.returncode == 1
    return result.stderr


def trials(output):
    with (output / "trials.csv").open() as file:
        return list(csv.DictReader(file))


GRID = ("--sampler", "grid", "--points", 5, "--scans", 1)


def test_a_grid_is_the_closed_form_and_the_best_point_merges_to_its_score(plane, tmp_path):
    text = search(plane, tmp_path / "s", *GRID, "--test_part", "test")
    rows = trials(tmp_path / "s")
    assert len(rows) == 26  # the default 0.4 is not one of the 25 points
    for row in rows:
        for organ in ORGANS:
            assert float(row[f"dice/{organ}"]) == pytest.approx(dice(organ, float(row[f"scale/{organ}"])), abs=1e-6)
    facts = read_json(tmp_path / "s" / "search.json")
    assert facts["default"]["mean_dice"] == 0.5 and facts["default"]["values"] == {
        "scale/bright": 0.4,
        "scale/dark": 0.4,
    }
    assert facts["equal_share"]["mean_dice"] == 0.5
    assert facts["best"]["mean_dice"] == facts["merged_again"]["mean_dice"] == 1.0
    assert facts["validation"]["of"] == 6 and len(facts["validation"]["cases"]) == 1
    assert facts["held_out"]["best"]["mean_dice"] == 1.0
    assert {*facts["held_out"]["cases"]} == {f"case{number}" for number in range(6, 12)}
    assert facts["held_out"]["heads_alone"]["mean_dice"] == np.mean([dice(organ, 0.0) for organ in ORGANS])
    assert "the best recipe beats the default on held-out cases: +0.5000" in text and "(λ = 0)" in text
    assert (tmp_path / "s" / "heat_map.png").stat().st_size > 5000

    assert here("tools", "merge", "--recipe", tmp_path / "s/best.yaml", "--output", tmp_path / "m").returncode == 0
    state = torch.load(tmp_path / "m/models/model.pt")
    assert [state["encoder.weight"].item(), state["decoder.weight"].item()] == pytest.approx(
        [facts["best"]["values"]["scale/bright"], facts["best"]["values"]["scale/dark"]]
    )


def test_a_stopped_search_goes_on_and_machines_share_a_study(plane, tmp_path):
    storage = ("--storage", f"sqlite:///{tmp_path}/studies.db")
    search(plane, tmp_path / "a", *GRID, *storage, "--trials", 9)
    assert len(trials(tmp_path / "a")) == 9
    search(plane, tmp_path / "b", *GRID, *storage)  # another machine, with an output folder of its own
    rows = trials(tmp_path / "b")
    assert rows[:9] == trials(tmp_path / "a") and len(rows) == 26
    points = [(row["scale/bright"], row["scale/dark"]) for row in rows]
    assert len(set(points)) == 26  # nothing was scored twice
    message = refused(plane, tmp_path / "c", *GRID, *storage, "--space", "0..2")
    assert "begun with other settings (space was" in message
    assert "begun with other settings (cases was ['case" in refused(plane, tmp_path / "c", *GRID, *storage, "--seed", 1)


def test_tpe_finds_the_best_region_and_stops_what_is_worse(plane, tmp_path):
    space = ("--space", "{scale: 0..1.5}", "--trials", 40)
    search(plane, tmp_path / "s", *space)
    rows = trials(tmp_path / "s")
    assert len(rows) == 40 and rows[0]["scale/bright"] == "0.4" and rows[1]["scale/bright"] == "0.5"
    facts = read_json(tmp_path / "s" / "search.json")
    assert facts["best"]["mean_dice"] == 1.0
    pruned = [row for row in rows if row["state"] == "pruned"]
    assert pruned and all(row["cases"] < "6" and row["mean_dice"] == "" for row in pruned)
    for row in pruned:
        assert np.mean([dice(organ, float(row[f"scale/{organ}"])) for organ in ORGANS]) < 1


def test_groups_and_parameters_of_other_methods(plane, tmp_path):
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump(
            {
                "pretrained": str(plane / "start"),
                "vectors": [str(plane / f"{task}.safetensors") for task in ORGANS],
                "method": "ties",
                "parameters": {"scope": "tensor", "density": 1.0, "scale": 0.123456789},
            }
        )
    )
    data = ["--dataset_dir", plane / "Dataset001_Quarters", "--split_file", plane / "split.json", "--scans", 1]
    space = "{scale: [0.5, 1.0], combine: [mean, sum]}"
    result = here(
        "tools", "search", "--recipe", tmp_path / "r.yaml", *data, "--output", tmp_path / "s", "--sampler", "grid",
        "--space", space, "--per_task", "none", "--groups", "encoder,decoder",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = trials(tmp_path / "s")
    assert {*rows[0]} >= {"encoder/scale", "decoder/scale", "combine"} and len(rows) == 9
    assert rows[0]["encoder/scale"] == rows[0]["decoder/scale"] == "0.123457"  # the recipe's own first
    best = yaml.safe_load((tmp_path / "s/best.yaml").read_text())
    assert best["overrides"] == [
        {"tensors": "encoder", "parameters": {"scale": 0.5}},
        {"tensors": "decoder", "parameters": {"scale": 1.0}},
    ]
    assert best["parameters"]["density"] == 1.0 and read_json(tmp_path / "s/search.json")["best"]["mean_dice"] == 1.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--part", "val", "--test_part", "val"], "share 6 cases (case0"),
        (["--space", "{scal: 0..1}"], "no parameter 'scal', did you mean 'scale'"),
        (["--space", "{scale: 1}"], "must be a range such as 0..1"),
        (["--space", "2..1"], "the range 2..1 is empty"),
        (["--per_task", "density"], "task_arithmetic has no 'density' that takes a value for each task"),
        (["--method", "ties", "--space", "{density: 0..1}"], "density must be above 0"),
        (["--method", "model_stock"], "has no coefficient to search"),
        (["--groups", "endoder", "--trials", 1], "no tensor is called 'endoder', did you mean 'encoder'"),
        (["--sampler", "supervised"], "distil --objective labels"),
        (["--sampler", "grid", "--points", 1], "--points 1: it must be 2 or more"),
        (["--sampler", "gird"], "did you mean 'grid'"),
        (["--sampler", "grid", "--points", 1000], "make a grid of 1,000,000 points"),
        (["--storage", "sqlite:////no/such/folder/x.db"], "cannot be used: (sqlite3.OperationalError)"),
        (["--storage", "postgresql://me:secret@nowhere/x"], "the storage postgresql://nowhere/x cannot be used"),
        (["--storage", __file__], "cannot be used: it is a file, but not a journal"),
    ],
)
def test_what_cannot_be_searched_is_refused(plane, tmp_path, flags, message):
    error = refused(plane, tmp_path / "s", *flags)
    assert message in error and "secret" not in error


@pytest.fixture
def own(plane, tmp_path):
    """A copy whose labels may be changed."""
    return shutil.copytree(plane, tmp_path / "plane")


def test_absent_organs_count_alike_in_the_scores_and_in_their_difference(own, tmp_path):
    """The dark organ is in two of the held-out cases only."""
    relabel(own / "Dataset001_Quarters", range(8, 12), lambda label: np.where(label == 2, 0, label))
    search(own, tmp_path / "s", *GRID, "--test_part", "test")
    found = read_json(tmp_path / "s" / "search.json")["held_out"]
    assert found["difference"]["mean"] == found["best"]["mean_dice"] - found["default"]["mean_dice"] == 0.5
    assert found["difference"]["cases"] == 6


def test_other_references_are_not_gone_on_with_and_few_cases_say_nothing(own, tmp_path):
    (own / "split.json").write_text(json.dumps([{"val": ["case0"], "test": ["case2", "case3"]}]))
    text = search(own, tmp_path / "s", *GRID, "--test_part", "test")
    assert "2 held-out case(s) cannot say whether the best recipe beats the default: +0.5000" in text
    relabel(own / "Dataset001_Quarters", [0], lambda label: (3 - label) % 3)
    assert "begun with other settings (files was" in refused(own, tmp_path / "s", *GRID)
    relabel(own / "Dataset001_Quarters", [2, 3], np.zeros_like)
    text = refused(own, tmp_path / "t", *GRID, "--test_part", "test")
    assert "none of its cases has any of the organs bright, dark" in text and not (tmp_path / "t").exists()


def test_a_default_that_another_machine_began_and_lost_is_scored_though_time_is_up(plane, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tools.merge_scorer.MergeScorer.scores", killed)
        assert here(*words(plane, tmp_path / "s", *GRID)).returncode == 130
    storage = _storage(str(tmp_path / "s/study.journal"))
    study = optuna.load_study(study_name="search", storage=storage)
    study.enqueue_trial({"scale/bright": 0.4, "scale/dark": 0.4})
    study.ask(study.trials[0].distributions)
    search(plane, tmp_path / "s", *GRID, "--timeout", 1e-6)
    found = read_json(tmp_path / "s/search.json")
    assert found["default"]["mean_dice"] == 0.5 and found["trials"]["complete"] == 2  # and 1/T


def test_other_preprocessing_or_another_search_is_not_gone_on_with(own, tmp_path):
    search(own, tmp_path / "s", *GRID, "--trials", 2)
    before = (tmp_path / "s/best.yaml").read_text()
    storage = ("--storage", f"sqlite:///{tmp_path}/studies.db")
    message = refused(own, tmp_path / "s", *GRID, *storage, "--method", "average", "--space", "{weights: 0..1}")
    assert "search.json is of another search (task_arithmetic" in message
    path = own / "start/configs/inference.json"
    inference = read_json(path)
    inference["preprocessing"]["transforms"].append({"_target_": "ScaleIntensityd", "keys": "image"})
    write_json(path, inference)
    assert "begun with other settings (inference was" in refused(own, tmp_path / "s", *GRID)
    assert (tmp_path / "s/best.yaml").read_text() == before


def test_vectors_of_another_starting_point_are_searched_when_the_recipe_says_so(own, tmp_path):
    """The start's weights are moved by less than half of what an organ needs; its identity is another."""
    state = torch.load(own / "start/models/model.pt")
    torch.save(state | {"encoder.weight": state["encoder.weight"] + 0.01}, own / "start/models/model.pt")
    recipe = {"pretrained": str(own / "start"), "method": "task_arithmetic", "other_start": True}
    recipe["vectors"] = [str(own / f"{organ}.safetensors") for organ in ORGANS]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    data = ["--dataset_dir", own / "Dataset001_Quarters", "--split_file", own / "split.json", "--test_part", "test"]
    flags = [
        "tools",
        "search",
        "--recipe",
        tmp_path / "r.yaml",
        *data,
        *GRID,
        "--trials",
        3,
        "--output",
        tmp_path / "s",
    ]
    result = here(*flags)
    assert result.returncode == 0, result.stderr
    assert read_json(tmp_path / "s/search.json")["held_out"]["heads_alone"]["mean_dice"] == 0
    torch.save(state | {"encoder.weight": state["encoder.weight"] + 0.02}, own / "start/models/model.pt")
    result = here(*flags)
    assert result.returncode == 1 and "begun with other settings (pretrained was" in result.stderr


def test_a_part_of_a_huge_grid_needs_no_memory(plane, tmp_path):
    groups = ("--groups", "encoder,decoder", "--sampler", "grid", "--points", 1000, "--trials", 3, "--scans", 1)
    assert "trials: 3 complete" in search(plane, tmp_path / "s", *groups)
