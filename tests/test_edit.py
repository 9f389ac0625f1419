"""Tasks of a merged bundle come, go and change their weight; the result is that of merging from scratch."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import run
from tools.bundle import Bundle
from tools.edit import edit
from tools.errors import UserError
from tools.merge import merge, merge_recipe
from tools.recipe import Recipe


def weights(bundle):
    return (bundle / "models" / "model.pt").read_bytes()


@pytest.fixture
def one(chain, tmp_path):
    merge(
        output=str(tmp_path / "one"), pretrained=str(chain.pretrain), vectors=str(chain.vectors["liver"]),
        method="task_arithmetic", scale=0.5,
    )  # fmt: skip
    return tmp_path / "one"


def scratch(chain, output, tasks, **options):
    vectors = [str(chain.vectors[task]) for task in tasks]
    merge(output=str(output), pretrained=str(chain.pretrain), vectors=vectors, method="task_arithmetic", **options)
    return weights(output)


def test_adding_removing_and_reweighting_equal_merging_from_scratch(chain, tmp_path, one):
    spleen = chain.vectors["spleen"]
    run("tools", "edit", "--bundle", one, "--add", spleen, "--output", tmp_path / "two", cwd=tmp_path)
    assert weights(tmp_path / "two") == scratch(chain, tmp_path / "a", ["liver", "spleen"], scale=0.5)
    assert Bundle(tmp_path / "two").labels == ["liver", "spleen"]
    run("tools", "edit", "--bundle", "two", "--scale", "{spleen: -0.2}", "--output", "three", cwd=tmp_path)
    assert weights(tmp_path / "three") == scratch(chain, tmp_path / "b", ["liver", "spleen"], scale=[0.5, -0.2])
    run("tools", "edit", "--bundle", "three", "--remove", "liver", "--output", "three", "--overwrite", cwd=tmp_path)
    assert weights(tmp_path / "three") == scratch(chain, tmp_path / "c", ["spleen"], scale=[-0.2])
    assert Bundle(tmp_path / "three").labels == ["spleen"]


def test_a_task_may_be_called_by_a_number_and_a_bundle_reached_by_a_link(chain, tmp_path):
    start, liver, vector = chain.pretrain, chain.specialists["liver"], tmp_path / "deep" / "v.safetensors"
    run("tools", "diff", "--pretrained", start, "--finetuned", liver, "--task", "6", "--output", vector)
    merge(
        str(tmp_path / "deep/er/one"), pretrained=str(start), vectors=str(vector), method="task_arithmetic", scale=0.5
    )
    (tmp_path / "link").symlink_to(tmp_path / "deep/er/one")
    run("tools", "edit", "--bundle", tmp_path / "link", "--scale", "{6: 0.3}", "--output", tmp_path / "two")
    assert weights(tmp_path / "two") == scratch(chain, tmp_path / "a", ["liver"], scale=[0.3])
    assert [Path(v).resolve() for v in Recipe.read(tmp_path / "two/docs/recipe.yaml").vectors] == [vector.resolve()]


def test_what_cannot_be_edited_is_refused(chain, tmp_path, one):
    spleen, output = str(chain.vectors["spleen"]), str(tmp_path / "new")
    for options, message in (
        ({"remove": "livr"}, "no task 'livr', did you mean 'liver'"),
        ({"remove": "liver"}, "no task would be left"),
        ({"add": str(chain.vectors["liver"])}, "has a task 'liver' already"),
        ({"scale": {"lung": 1}}, "--scale: no task 'lung'; there are liver"),
        ({"sclae": 1}, "task_arithmetic has no parameter 'sclae', did you mean 'scale'"),
    ):
        with pytest.raises(UserError, match=message):
            edit(str(one), output, **options)
    edit(str(one), output, scale={"liver": 0.1})
    with pytest.raises(UserError, match="a scale for each task, but none for spleen: add --scale"):
        edit(output, str(tmp_path / "newer"), add=spleen)
    recipe = Recipe(str(chain.pretrain), [str(chain.vectors["liver"])], "task_arithmetic")
    recipe.overrides = [{"tensors": part, "parameters": {"scale": 0.2}} for part in ("encoder", "decoder")]
    merge_recipe(recipe, tmp_path / "tuned")
    assert "others for some tensors by 2 overrides" in (tmp_path / "tuned/docs/README.md").read_text()
    with pytest.raises(UserError, match="sets scale for every tensor by its overrides"):
        edit(str(tmp_path / "tuned"), str(tmp_path / "newer"), scale=1)
    with pytest.raises(UserError, match="recipe"):
        edit(str(chain.pretrain), str(tmp_path / "newer"))
    vector = tmp_path / "moved.safetensors"
    shutil.copy(spleen, vector)
    merge(output=str(tmp_path / "m"), pretrained=str(chain.pretrain), vectors=str(vector))
    shutil.copy(chain.vectors["liver"], vector)
    with pytest.raises(UserError, match="is not the task vector that was merged"):
        edit(str(tmp_path / "m"), str(tmp_path / "newer"), scale=1)
