"""A recipe that is wrong is refused with the line, the entry and the nearest right name."""

import pytest

from tools.errors import UserError
from tools.recipe import Recipe

START = "pretrained: b\nvectors: [a, c]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (START + "method: tise\n", "line 3: no merge method 'tise', did you mean 'ties'?"),
        (
            START + "method: ties\nparameters:\n  scale: 1\n  densty: 1\n",
            "line 6: ties has no parameter 'densty', did you mean 'density'?",
        ),
        (
            START + "method: ties\nparameters: {density: 7}\n",
            "line 4: ties: density must be above 0 and at most 1, got 7",
        ),
        (START + "method: ties\nparameters: {density: .nan}\n", "line 4: ties: density must be above 0"),
        (
            START + "method: ties\nparameters: {density: high}\n",
            "line 4: ties: density must be a number, or one for each",
        ),
        (START + "method: ties\nparameters: {density: true}\n", "line 4: ties: density must be a number"),
        (START + "method: ties\nparameters: {scope: layer}\n", "line 4: ties: scope must be 'global' or 'tensor', got"),
        (
            START + "method: ties\nparameters: {scale: [1, 2, 3]}\n",
            "scale must be one number, or one for each of the 2",
        ),
        (START + "method: ties\nparameters: {scale: [1, x]}\n", "line 4: ties: scale must be a number"),
        (START + "method: 3\n", "line 3: method must be the name of a merge method; got 3"),
        (START + "parameters: [1]\n", "line 3: parameters must be a dictionary; got [1]"),
        (START + "overides: []\n", "line 3: unknown entry 'overides', did you mean 'overrides'?"),
        (START + "overrides:\n  - tensor: a\n", "line 4: unknown entry 'tensor', did you mean 'tensors'?"),
        (START + "overrides:\n  - tensors: a\n", "line 4: parameters must be a dictionary; it is missing"),
        (
            START + "method: ties\noverrides:\n- tensors: a\n  parameters: {denisty: 1}\n",
            "line 6: ties has no parameter 'denisty', did you mean 'density'?",
        ),
        (START + "sparsify: dar\n", "line 3: no sparsifier 'dar', did you mean 'dare'?"),
        (START + "sparsify: {method: dare, parameters: {density: 0}}\n", "line 3: dare: density must be above 0"),
        (START + "sparsify: {methd: dare}\n", "line 3: unknown entry 'methd', did you mean 'method'?"),
        (START + "postprocess:\n- lines\n- method: svcc\n", "line 5: no post-processor 'svcc', did you mean 'svc'?"),
        (START + "seed: x\n", "line 3: seed must be a whole number; got 'x'"),
        (START + "exclude: [3]\n", "line 3: exclude must be text, got 3"),
        (
            START + "dtype: float61\n",
            "line 3: dtype must be float32, float16, bfloat16, got 'float61', did you mean 'float16'?",
        ),
        (START + "method: ties\nmethod: average\n", "line 4: 'method' is there twice"),
        ("pretraind: b\nvectors: [a]\n", "line 1: unknown entry 'pretraind', did you mean 'pretrained'?"),
        ("vectors: [a]\n", "pretrained must be the path of a bundle; it is missing"),
        ("pretrained: b\nvectors: []\n", "line 2: no task vectors to merge"),
        ("pretrained: b\nvectors: a\n", "line 2: vectors must be a list of task vector files; got 'a'"),
        ("- a\n", "a recipe must have the entries pretrained, vectors, method"),
        ("", "a recipe must have the entries"),
        ("a: [", "is not YAML"),
        (START + "where: here\n", "line 3: unknown entry 'where'"),
        (START + "parameters: {weights: [&a [x, x], *a]}\n", "line 3: *a: a recipe has no aliases"),
        (START + "parameters: &x [*x]\n", "line 3: *x: a recipe has no aliases"),
        (START + "method: ties\nparameters: {scale: 1" + 400 * "0" + "}\n", "line 4: ties: scale must be finite"),
        (START + "method: ties\nparameters: {scale: 1e-1}\n", "got '1e-1' (text: write 0.1)"),
        (START + "include: []\n", "line 3: include has no pattern"),
        (START + "sparsify: false\n", "line 3: a sparsifier has the entries method and parameters; got False"),
        (START + "other_start: 1\n", "line 3: other_start must be true or false; got 1"),
        ("a: !!python/object/apply:os.system [ls]\n", "is not YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        Recipe.read(path)
    assert message in str(error.value), error.value
    assert str(path) in str(error.value)


def test_a_recipe_survives_writing_and_reading(tmp_path):
    import yaml

    path = tmp_path / "recipe.yaml"
    path.write_text(
        "pretrained: base\nvectors: [x/a.safetensors]\nmethod: task_arithmetic\nparameters: {scale: [0.5]}\n"
        "overrides: [{tensors: 'decoders.*', parameters: {scale: 0.1}}]\nexclude: ['*.bias']\ndtype: float16\n"
        "sparsify: dare\npostprocess: [{method: lines, parameters: {first: 0.1}}, svc]\nseed: 3\n"
    )
    recipe = Recipe.read(path)
    assert recipe.pretrained == str(tmp_path / "base")
    assert recipe.vectors == [str(tmp_path / "x/a.safetensors")]
    assert recipe.parameters == {"scale": [0.5]}
    path.write_text(yaml.safe_dump(recipe.as_dict()))
    assert Recipe.read(path) == recipe
    assert Recipe("b", ["v"]).as_dict() == {"pretrained": "b", "vectors": ["v"], "method": "average"}


def test_a_missing_recipe_is_said_so(tmp_path):
    with pytest.raises(UserError, match=r"recipe .*none\.yaml not found"):
        Recipe.read(tmp_path / "none.yaml")
