"""The table of methods: λ from the validation cases, scores from the test cases, and recipes that repeat a row."""

import json

import pytest
import yaml

from tests.conftest import here, run
from tools.bundle_code.nnunet_data import all_cases
from tools.compare import Row, table
from tools.errors import UserError


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
    rows = {row["title"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())}
    assert list(rows) == ["specialists", "starting point + new heads (λ = 0)", "average", "task_arithmetic"]
    assert set(rows["average"]["dice"]) == {"liver", "spleen"}
    assert "| average | " in text and (tmp_path / "out" / "results.md").read_text() in text

    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    validated = {}
    for key, dice in scores.items():
        recipe, *_, cases = json.loads(key) if key.startswith("[{") else (None, None)
        if recipe and cases[1:] == names[1:2]:
            validated[recipe["parameters"]["scale"]] = sum(dice.values())
    assert set(validated) == {0.3, 0.9}
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
    again = json.loads((tmp_path / "e" / "summary.json").read_text())["again"]
    assert {label: again[label] for label in ("liver", "spleen")} == pytest.approx(rows["task_arithmetic"]["dice"])

    halves = {key: {label: dice / 2 for label, dice in values.items()} for key, values in scores.items()}
    (tmp_path / "out" / "scores.json").write_text(json.dumps(halves))
    run(*words, "--scales", "0.3,0.9")  # nothing is scored twice
    for row in json.loads((tmp_path / "out" / "results.json").read_text()):
        assert row["dice"] == {label: dice / 2 for label, dice in rows[row["title"]]["dice"].items()}
    result = here(*words[:-1], "averge")
    assert result.returncode == 1 and "did you mean 'average'" in result.stderr


def test_the_table_compares_with_its_first_row():
    rows = [Row("specialists", {"a": 0.8, "b": 0.5}), Row("average", {"a": 0.4, "b": 0.5}, "λ = 1")]
    lines = table(rows).splitlines()
    assert lines[2] == "| specialists | 0.800 | 0.500 | 0.650 |  |"
    assert lines[3] == "| average (λ = 1) | 0.400 (0.50) | 0.500 (1.00) | 0.450 (0.75) | 0.50 |"


def test_an_unknown_split_is_refused(chain, tmp_path):
    from tools.compare import compare

    with pytest.raises(UserError, match="not found"):
        compare("p", "v", "s", str(chain.dataset), str(tmp_path / "none.json"), str(tmp_path / "out"))
