"""Merge methods against their definitions, restated here step by step."""

import numpy as np
import pytest

from tools.errors import UserError
from tools.merge_methods import METHODS
from tools.recipe import Recipe


def run(name, deltas, **parameters):
    """A method over whole task vectors, as ``merge`` calls it."""
    entry = METHODS[name]
    vectors = [{"a": d[:6].reshape(2, 3), "b": d[6:]} for d in deltas]
    parameters = {**entry.defaults, **parameters}
    if entry.prepare:
        parameters |= entry.prepare(vectors, **parameters)
    base = {k: np.zeros_like(v) for k, v in vectors[0].items()}
    return np.concatenate([entry.function(base[k], [v[k] for v in vectors], **parameters).ravel() for k in "ab"])


def ties_by_the_paper(deltas, density, scale):
    """Section 4 of TIES-Merging, entry by entry."""
    trimmed = []
    for d in deltas:
        keep = set(np.argsort(-np.abs(d))[: max(1, round(density * d.size))])
        trimmed.append([v if i in keep else 0.0 for i, v in enumerate(d)])
    merged = []
    for entries in zip(*trimmed):
        sign = np.sign(sum(entries))
        agreeing = [e for e in entries if e != 0 and np.sign(e) == sign]
        merged.append(scale * np.mean(agreeing) if agreeing else 0.0)
    return np.array(merged)


@pytest.fixture
def deltas():
    random = np.random.default_rng(0)
    return [random.standard_normal(50).astype(np.float32) for _ in range(4)]


def test_average_and_task_arithmetic_are_weighted_sums(deltas):
    np.testing.assert_allclose(run("average", deltas), np.mean(deltas, axis=0), rtol=1e-6)
    np.testing.assert_allclose(
        run("task_arithmetic", deltas, scale=0.3), 0.3 * np.sum(deltas, axis=0), rtol=1e-5, atol=1e-6
    )
    weights = [0.5, 0.0, -1.0, 0.25]
    expected = sum(w * d for w, d in zip(weights, deltas))
    np.testing.assert_allclose(run("task_arithmetic", deltas, scale=weights), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("density", [0.02, 0.2, 0.5, 1.0])
def test_ties_trims_over_the_whole_vector_as_the_paper_says(deltas, density):
    merged = run("ties", deltas, density=density, scale=0.7)
    np.testing.assert_allclose(merged, ties_by_the_paper(deltas, density, 0.7), rtol=1e-5, atol=1e-6)


def test_ties_per_tensor_trims_each_tensor_on_its_own(deltas):
    merged = run("ties", deltas, density=0.2, scope="tensor")
    parts = [ties_by_the_paper([d[s] for d in deltas], 0.2, 1.0) for s in (slice(0, 6), slice(6, None))]
    np.testing.assert_allclose(merged, np.concatenate(parts), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_one_vector_alone_comes_back_and_order_does_not_matter(name, deltas):
    parameters = {"task_arithmetic": {"scale": 1}, "ties": {"density": 1}}.get(name, {})
    assert np.array_equal(run(name, deltas[:1], **parameters), deltas[0])
    np.testing.assert_allclose(run(name, deltas), run(name, deltas[::-1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_zero_vectors_and_one_element_tensors(name):
    entry = METHODS[name]
    for delta in (np.zeros(3, np.float32), np.ones(1, np.float32), np.zeros(0, np.float32)):
        merged = entry.function(delta, [delta, delta])
        assert merged.shape == delta.shape
        assert merged.dtype == np.float32
        assert np.isfinite(merged).all()


def test_parameters_are_checked():
    for parameters, message in (
        ({"density": 0}, "above 0"),
        ({"scope": "layer"}, "scope must be"),
        ({"scale": [1, 2, 3]}, "one for each of the 2"),
    ):
        with pytest.raises(UserError, match=message):
            run("ties", [np.ones(9, np.float32)] * 2, **parameters)


def test_recipe_names_the_mistake_and_the_nearest_right_word(tmp_path):
    path = tmp_path / "recipe.yaml"
    for text, message in (
        ("pretrained: b\nvectors: [a]\nmethod: tise\n", "no merge method 'tise', did you mean 'ties'?"),
        ("pretrained: b\nvectors: [a]\nmethod: ties\nparameters: {densty: 1}\n", "'densty', did you mean 'density'?"),
        ("pretraind: b\nvectors: [a]\n", "unknown entry 'pretraind', did you mean 'pretrained'?"),
        ("vectors: [a]\n", "pretrained must be a path"),
        ("pretrained: b\nvectors: []\n", "no task vectors"),
        ("- a\n", "must have the entries"),
        ("a: [", "is not YAML"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message.replace("?", r"\?")):
            Recipe.read(path)
    path.write_text("pretrained: base\nvectors: [x/a.safetensors]\nmethod: task_arithmetic\nparameters: {scale: 0.5}\n")
    recipe = Recipe.read(path)
    assert recipe.vectors == [str(tmp_path / "x/a.safetensors")]
    assert recipe.parameters == {"scale": 0.5}
