"""The study's file of results: several runs add to it, and it knows what they were runs of."""

from dataclasses import replace

import pytest

from tests.benchmarks.study import Results, Size
from tests.conftest import ROOT
from tools.bundle import read_json
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
    lines = found.table().splitlines()
    assert "| | stable (seeds: 2) | sharp (seeds: 1) |" in lines
    assert "| average | 0.500 ± 0.141 (0.85) | 0.100 (0.20) |" in lines
    assert lines[-1] == "| starting point: loss | 2.000 |  |"  # after the merges


def test_results_of_another_size_are_not_mixed(tmp_path):
    Results(tmp_path / "results.json", SIZE).add("HeadNeck", "stable", 0, {"average": (0.4, 0.8)})
    with pytest.raises(UserError, match=r"'width': 8.*another --output"):
        Results(tmp_path / "results.json", replace(SIZE, width=16))


def test_the_documentation_has_the_tables_of_the_results():
    path = ROOT / "docs" / "study.json"
    tables = Results(path, Size(**read_json(path)["size"])).table().split("**Dataset")[1:]
    text = (ROOT / "docs" / "results.md").read_text()
    assert len(tables) == 2
    for table in tables:
        assert table.split("\n", 1)[1].strip() in text
