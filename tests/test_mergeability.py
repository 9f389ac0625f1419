"""What inspect says of several task vectors, against plain NumPy on the whole vectors."""

import json

import numpy as np
import pytest

from tests.conftest import run
from tools.errors import UserError
from tools.inspect import describe_vector
from tools.mergeability import mergeability
from tools.network import Structure
from tools.task_vector import Facts, TaskVector, save_task_vector

SHAPES = {"enc.0.weight": (16, 4, 3, 3, 3), "enc.0.bias": (16,), "dec.0.weight": (6, 16, 2, 2, 2)}


def saved(path, deltas):
    structure = Structure({"head": 0}, transposed=["dec.0.weight"])
    facts = Facts(path.stem, ["a"], {"a": ["a"]}, "0", "1", {}, structure)
    pairs = [(name, np.zeros(d.shape, np.float32), d.astype(np.float32)) for name, d in deltas.items()]
    save_task_vector(path, facts, pairs, {"head": np.zeros((2, 3), np.float32)}, {})
    return TaskVector(path)


@pytest.fixture
def deltas():
    random = np.random.default_rng(0)
    common = {name: random.standard_normal(shape) for name, shape in SHAPES.items()}
    return [{n: c + random.standard_normal(c.shape) for n, c in common.items()} for _ in range(3)]


def test_measures_are_those_of_the_whole_vectors(tmp_path, deltas):
    result = mergeability([saved(tmp_path / f"{i}.safetensors", d) for i, d in enumerate(deltas)])
    a, b = (np.concatenate([t.ravel() for t in d.values()]) for d in deltas[:2])
    assert result["cosine"][0][1] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-4)
    assert result["sign_conflict"][1][0] == pytest.approx(np.mean(a * b < 0), abs=1e-6)
    opposite = np.abs(a * b)[a * b < 0].sum() / np.abs(a * b).sum()
    assert result["weighted_sign_conflict"][0][1] == pytest.approx(opposite, abs=1e-4)
    top = [set(np.argsort(-np.abs(v))[: round(0.2 * v.size)]) for v in (a, b)]
    assert result["top_overlap"][0][1] == pytest.approx(len(top[0] & top[1]) / len(top[0]), abs=1e-6)
    overlap = []
    for name in ("enc.0.weight", "dec.0.weight"):
        matrices = [np.moveaxis(d[name], 1, 0) if name.startswith("dec") else d[name] for d in deltas[:2]]
        left = [np.linalg.svd(m.reshape(16, -1), full_matrices=False)[0][:, :2] for m in matrices]
        overlap.append(np.sum((left[0].T @ left[1]) ** 2))
    assert result["subspace_overlap"][0][1] == pytest.approx(sum(overlap) / 4, abs=1e-4)
    for measure in ("cosine", "top_overlap", "subspace_overlap"):
        np.testing.assert_allclose(np.diag(result[measure]), 1, atol=1e-4)
        np.testing.assert_allclose(result[measure], np.transpose(result[measure]), atol=1e-5)
    norms = result["parts"]["enc.0"]["norm"]
    assert norms[2] == pytest.approx(np.sqrt(sum(np.sum(deltas[2][n] ** 2) for n in list(SHAPES)[:2])), rel=1e-5)


def test_running_statistics_are_no_weights(tmp_path, deltas):
    """They grow with the scale of the images, and no method merges them."""
    with_statistics = [{**d, "enc.0.running_var": 1000 * np.ones(16)} for d in deltas]
    plain, other = (
        [saved(tmp_path / f"{name}{i}.safetensors", d) for i, d in enumerate(found)]
        for name, found in (("plain", deltas), ("other", with_statistics))
    )
    for vector in other:
        vector.facts.structure.statistics.append("enc.0.running_var")
    assert mergeability(other) == {**mergeability(plain), "tasks": [vector.task for vector in other]}
    assert describe_vector(other[0])["norm"] == describe_vector(plain[0])["norm"]


def test_opposite_and_unrelated_vectors(tmp_path, deltas):
    vectors = [deltas[0], {n: -d for n, d in deltas[0].items()}, {n: 0 * d for n, d in deltas[0].items()}]
    result = mergeability([saved(tmp_path / f"{i}.safetensors", d) for i, d in enumerate(vectors)])
    assert result["cosine"][0] == pytest.approx([1, -1, 0], abs=1e-5)
    assert result["sign_conflict"][0] == [0, 1, 0]
    assert result["top_overlap"][0] == [1, 1, 0]


def test_vectors_of_other_networks_are_refused(tmp_path, deltas):
    other = saved(tmp_path / "other.safetensors", {"enc.0.bias": deltas[0]["enc.0.bias"]})
    with pytest.raises(UserError, match="not of the same network"):
        mergeability([saved(tmp_path / "one.safetensors", deltas[0]), other])


def test_the_report_and_its_picture(chain, tmp_path):
    words = ["tools", "inspect", chain.pretrain, *chain.vectors.values()]
    text = run(*words, "--plot", tmp_path / "report.png").stdout
    assert "share of entries whose signs differ" in text and "|τ| / |θ0| of each task" in text
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads(run(*words, "--json").stdout)["conflicts"]
    assert "\nall of the decoder" in text
    for task in range(2):  # what the whole is made of
        squares = [facts["groups"][group]["norm"][task] ** 2 for group in ("encoder", "decoder")]
        assert sum(squares) == pytest.approx(sum(part["norm"][task] ** 2 for part in facts["parts"].values()))
    assert facts["same_start"] and 0 < facts["parts"]["encoders.0"]["relative_norm"][0] < 1
    result = run("tools", "inspect", chain.pretrain, "--plot", tmp_path / "none.png", check=False)
    assert result.returncode == 1 and "name two of them at least" in result.stderr
