"""The study's file of results, which several runs add to, its table and its picture."""

from dataclasses import replace

import numpy as np
import pytest

from tests.benchmarks.study import STARTS, _images
from tests.benchmarks.study_results import TASK, Results, Size, draw, draw_tasks, filled
from tests.conftest import ROOT
from tools.errors import UserError

SIZE = Size(width=8, patch_size=32, batch_size=2, pretrain_steps=400, finetune_steps=96, scales="0.1,0.4", unseen=False)


def test_runs_that_share_a_file_keep_each_others_results(tmp_path):
    path = tmp_path / "results.json"
    one, other = Results(path, SIZE), Results(path, SIZE)
    one.add("HeadNeck", "stable", 0, {"specialists": (0.5,), "starting point: loss": (2.0,), "average": (0.4, 0.8)})
    other.add("HeadNeck", "sharp", 0, {"specialists": (0.5,), "average": (0.1, 0.2)})
    one.add("HeadNeck", "stable", 1, {"specialists": (0.7,), "average": (0.6, 0.9)})
    found = Results(path, SIZE)
    assert set(found.of("HeadNeck", "stable")) == {0, 1} and set(found.of("HeadNeck", "sharp")) == {0}
    assert found.of("HeadNeck", "scratch") == {}
    lines = found.table(["unused", "stable"]).splitlines()
    assert "| | stable (seeds: 2) | sharp (seeds: 1) |" in lines
    assert "| average | 0.500 ± 0.141 (0.85) | 0.100 (0.20) |" in lines
    assert lines[-1] == "| starting point: loss | 2.000 | |"  # after the merges


def test_a_seed_whose_specialists_learned_nothing_has_no_share(tmp_path):
    results = Results(tmp_path / "results.json", SIZE)
    results.add("HeadNeck", "sharp", 0, {"specialists": (0.01,), "average": (0.02,)})
    results.add("HeadNeck", "sharp", 1, {"specialists": (0.51,), "average": (0.04, 0.08)})
    assert "| average | 0.030 ± 0.014 (0.08) |" in results.table().splitlines()
    draw([results], tmp_path / "results.png")


def test_results_of_another_size_are_not_mixed(tmp_path):
    Results(tmp_path / "results.json", SIZE).add("HeadNeck", "stable", 0, {"average": (0.4, 0.8)})
    with pytest.raises(UserError, match=r"'width': 8.*another --output"):
        Results(tmp_path / "results.json", replace(SIZE, width=16))


def test_an_interrupted_study_goes_on_only_as_it_was_begun(tmp_path):
    tasks = {"HeadNeck": {"larynx": ["larynx"], "parotids": ["left", "right"]}}
    Results(tmp_path / "results.json", SIZE).begin(tasks)  # and was stopped before it had a result
    with pytest.raises(UserError, match="of another size"):
        Results(tmp_path / "results.json", replace(SIZE, spacing=6))
    results = Results(tmp_path / "results.json", SIZE)
    results.begin(tasks)
    with pytest.raises(UserError, match="results of other tasks of HeadNeck"):
        results.begin({"HeadNeck": {"larynx": ["larynx"]}})
    results.begin({"Abdomen": {"liver": ["liver"]}})
    assert set(Results(tmp_path / "results.json", SIZE).tasks) == {"HeadNeck", "Abdomen"}


def test_self_supervision_gets_the_images_of_all_its_cases(tmp_path):
    names = {"pat.1": "pat.1_0000.nii.gz", "plain": "plain.nii.gz", "pat_2": "pat_2_0000.nii.gz"}
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / "D" / folder).mkdir(parents=True)
    for case, image in names.items():
        (tmp_path / "D/imagesTr" / image).write_text(case)
        (tmp_path / "D/labelsTr" / f"{case}.nii.gz").touch()
    for _ in range(2):
        linked = _images(tmp_path / "D", ["pat.1", "plain"], tmp_path / "linked")
    assert {path.name: path.read_text() for path in linked.iterdir()} == {names[n]: n for n in ("pat.1", "plain")}


def test_the_picture_has_a_cell_for_each_method_and_start(tmp_path):
    from matplotlib.image import imread

    results = Results(tmp_path / "results.json", SIZE)
    results.add("Dataset1_HeadNeck", "stable", 0, {"specialists": (0.5,), "average": (0.4, 0.0), "ties": (0.4, 1.0)})
    results.add("Dataset1_HeadNeck", "sharp", 0, {"specialists": (0.5,), "ties": (0.4, 1.0)})
    draw([results], tmp_path / "results.png")
    pixels = imread(tmp_path / "results.png")[..., :3].reshape(-1, 3)
    yellow, purple = (
        (np.abs(pixels - colour).max(1) < 0.02).sum() for colour in ((0.993, 0.906, 0.144), (0.267, 0.005, 0.329))
    )
    assert 1.5 < yellow / purple < 2.5, "two cells keep all, one keeps nothing, and one is empty"


def test_tasks_show_whether_new_heads_foretell_the_average(tmp_path):
    results = Results(tmp_path / "results.json", SIZE)
    known, half, new, failed = (0.8, 0.9, 0.92), (0.6, 0.5, 0.4), (0.7, 0.01, 0.1), (0.1, 0.0, 1.0)
    results.add("HeadNeck", "stable", 0, {"average": (0.4, 0.6), f"{TASK}liver": known, f"{TASK}spleen": half})
    results.add("HeadNeck", "scratch", 0, {"average": (0.1, 0.1), f"{TASK}liver": new, f"{TASK}spleen": failed})
    told = draw_tasks([results], tmp_path / "tasks.png")
    assert told.startswith("3 tasks; correlation 0.9"), "a specialist that learned nothing has no share"
    assert told.endswith(
        "0.8 or more: 1 tasks, of which the average keeps 0.92 (0.92 to 0.92); "
        "new heads keep less than 0.05: 1 tasks, of which the average keeps 0.10 (0.10 to 0.10)"
    )
    assert (tmp_path / "tasks.png").stat().st_size > 10_000
    assert "liver" not in results.table()


def test_the_documentation_has_the_tables_of_the_results(tmp_path):
    text = (ROOT / "docs" / "results.md").read_text()
    studies = {path.name: Results.read(path) for path in sorted((ROOT / "docs").glob("study*.json"))}
    told = draw_tasks(list(studies.values()), tmp_path / "tasks.png")
    assert studies
    assert filled(text, studies, told, STARTS) == text


def test_a_document_gets_new_tables_at_its_marks(tmp_path):
    results = Results(tmp_path / "study.json", SIZE)
    results.add("HeadNeck", "stable", 0, {"average": (0.4, 0.8)})
    text = "Before.\n\n<!-- study.json HeadNeck -->\n\n| old |\n|---|\n\nAfter.\n"
    found = filled(text, {"study.json": results})
    assert found.startswith("Before.\n\n<!-- study.json HeadNeck -->\n\n| | stable (seeds: 1) |\n")
    assert found.endswith("| average | 0.400 (0.80) |\n\nAfter.\n") and "old" not in found
    with pytest.raises(UserError, match=r"no line <!-- study.json HeadNeck -->"):
        filled("Before.\n", {"study.json": results})
