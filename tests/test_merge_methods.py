"""Merge methods against their definitions, restated here step by step."""

import numpy as np
import pytest

from tools.errors import UserError
from tools.merge_engine import MergeEngine
from tools.merge_methods import METHODS
from tools.merge_methods.threshold import FEW, magnitude_of_share
from tools.network import Structure
from tools.recipe import Recipe
from tools.task_vector import Facts, TaskVector, save_task_vector
from tools.weights_file import WeightsFile, write_torch

SHAPES = {"kernel": (4, 3, 3, 3, 3), "up": (4, 2, 2, 2, 2), "linear": (5, 6), "bias": (7,), "alpha": (1,)}
STRUCTURE = Structure({"head": 0}, transposed=["up"])
IDENTITY = {"task_arithmetic": {"scale": 1}, "ties": {"density": 1}}  # parameters with which one vector comes back


@pytest.fixture
def merged(tmp_path):
    """Run a method over whole task vectors in files, as ``merge`` does; returns the merged weights by name."""

    def run(method, specialists, pretrained, structure=STRUCTURE, **recipe):
        layout = {name: ("float32", tensor.shape) for name, tensor in pretrained.items()}
        data = [(n, [t.astype("<f4").reshape(-1).view(np.uint8)]) for n, t in pretrained.items()]
        write_torch(tmp_path / "start.pt", layout, data)
        paths = []
        for position, specialist in enumerate(specialists):
            facts = Facts(f"t{position}", ["a"], {"a": ["a"]}, "0", "1", {}, structure)
            pairs = [(n, pretrained[n].astype(np.float32), t.astype(np.float32)) for n, t in specialist.items()]
            paths.append(str(tmp_path / f"{position}.safetensors"))
            save_task_vector(paths[-1], facts, pairs, {"head": np.zeros((2, 3), np.float32)}, {})
        recipe = Recipe("start", paths, method, recipe.pop("parameters", {}), **recipe)
        engine = MergeEngine(recipe, WeightsFile(tmp_path / "start.pt"), [TaskVector(path) for path in paths])
        pieces = {name: b"".join(piece.tobytes() for piece in data) for name, data in engine.pieces()}
        return {name: np.frombuffer(data, "<f4").reshape(pretrained[name].shape) for name, data in pieces.items()}

    return run


def weights(seed, shapes=SHAPES):
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def pretrained():
    return weights(0)


@pytest.fixture
def specialists(pretrained):
    return [{n: t + 0.1 * weights(seed)[n] for n, t in pretrained.items()} for seed in (1, 2, 3, 4)]


def flat(state):
    return np.concatenate([tensor.ravel() for tensor in state.values()]).astype(np.float64)


def ties_by_the_paper(deltas, density, scale, combine=np.mean):
    """Section 4 of TIES-Merging, entry by entry."""
    trimmed = []
    for d in deltas:
        keep = set(np.argsort(-np.abs(d))[: max(1, round(density * d.size))])
        trimmed.append([v if i in keep else 0.0 for i, v in enumerate(d)])
    merged = []
    for entries in zip(*trimmed):
        sign = np.sign(sum(entries))
        agreeing = [e for e in entries if e != 0 and np.sign(e) == sign]
        merged.append(scale * combine(agreeing) if agreeing else 0.0)
    return np.array(merged)


def test_average_and_task_arithmetic_are_weighted_sums(merged, pretrained, specialists):
    base, each = flat(pretrained), np.stack([flat(s) for s in specialists])
    close = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(flat(merged("average", specialists, pretrained)), each.mean(0), **close)
    result = merged("average", specialists, pretrained, parameters={"weights": [3, 0, 0, 1]})
    np.testing.assert_allclose(flat(result), 0.75 * each[0] + 0.25 * each[3], **close)
    result = merged("task_arithmetic", specialists, pretrained, parameters={"scale": [0.5, 0.0, -1.0, 0.25]})
    expected = base + np.array([0.5, 0.0, -1.0, 0.25]) @ (each - base)
    np.testing.assert_allclose(flat(result), expected, **close)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("combine", ["mean", "sum"])
def test_ties_trims_over_the_whole_vector_as_the_paper_says(merged, pretrained, specialists, density, combine):
    parameters = {"density": density, "scale": 0.7, "combine": combine}
    result = flat(merged("ties", specialists, pretrained, parameters=parameters)) - flat(pretrained)
    deltas = [flat(s) - flat(pretrained) for s in specialists]
    expected = ties_by_the_paper(deltas, density, 0.7, {"mean": np.mean, "sum": np.sum}[combine])
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-6)


def test_ties_per_tensor_trims_each_tensor_on_its_own(merged, pretrained, specialists):
    result = merged("ties", specialists, pretrained, parameters={"density": 0.2, "scope": "tensor"})
    for name, tensor in pretrained.items():
        deltas = [(s[name] - tensor).astype(np.float64).ravel() for s in specialists]
        expected = tensor.ravel() + ties_by_the_paper(deltas, 0.2, 1.0)
        np.testing.assert_allclose(result[name].ravel(), expected, rtol=1e-4, atol=1e-6)


class Pieces:
    """A task vector in memory."""

    def __init__(self, pieces):
        self.pieces = pieces
        self.size = sum(piece.size for piece in pieces)

    def scan(self, function):
        return map(function, self.pieces)

    def sample(self):
        return np.concatenate(self.pieces)[::64]


@pytest.mark.parametrize("share", [1e-6, 0.01, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_the_threshold_is_that_of_a_full_sort(share, ties):
    random = np.random.default_rng(0)
    values = np.abs(random.standard_normal(FEW + 12345)).astype(np.float32)
    if ties:
        values = np.round(values, 1)
    pieces = np.array_split(values, 7)
    expected = np.sort(values)[values.size - max(1, round(share * values.size))]
    assert magnitude_of_share(Pieces(pieces), share) == expected
    assert magnitude_of_share(Pieces([-values[:50], values[:0]]), 0.5) == np.sort(values[:50])[25]


def test_a_threshold_that_the_sample_misses_is_found_all_the_same():
    values = np.zeros(2 * FEW, np.float32)
    values[1::64] = -5  # never in the sample, which is every 64th from the first on
    values[2::64] = 3
    for share, expected in ((1 / 64, 5), (1.5 / 64, 3), (0.5, 0)):
        assert magnitude_of_share(Pieces([values]), share) == expected


@pytest.mark.parametrize("method", METHODS)
def test_one_vector_alone_gives_the_specialist_bit_for_bit(method, merged):
    """Also where a float32 difference is not exact."""
    random = np.random.default_rng(0)
    pretrained, specialist = (
        {
            n: (10.0 ** random.uniform(-5, 2, s) * random.choice([-1, 1], s)).astype(np.float32)
            for n, s in SHAPES.items()
        }
        for _ in range(2)
    )
    result = merged(method, [specialist], pretrained, parameters=IDENTITY.get(method, {}))
    assert all(np.array_equal(result[name], specialist[name]) for name in SHAPES)


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_vectors_and_of_tensors_does_not_matter(method, merged, pretrained, specialists):
    first = merged(method, specialists, pretrained)
    second = merged(method, specialists[::-1], dict(reversed(pretrained.items())))
    for name in pretrained:
        np.testing.assert_allclose(first[name], second[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_zero_vectors_one_element_and_empty_tensors(method, merged):
    pretrained = {
        "kernel": np.ones((2, 1, 1, 1, 1)),
        "alpha": np.array(0.25),
        "empty": np.zeros((0, 3)),
        "bias": np.ones(2),
    }
    result = merged(method, [pretrained, pretrained], pretrained)
    assert all(np.array_equal(result[name], tensor) for name, tensor in pretrained.items())
    changed = {**pretrained, "alpha": np.array(0.5)}
    result = merged(method, [changed, changed], pretrained, parameters=IDENTITY.get(method, {}))
    assert np.isfinite(result["alpha"]) and result["alpha"].shape == ()


def test_normalisation_statistics_are_averaged_whatever_the_method(merged):
    structure = Structure({"head": 0}, statistics=["running_mean", "running_var"])
    pretrained = {"running_mean": np.zeros(3), "running_var": np.ones(3), "bias": np.zeros(3)}
    specialists = [{n: t + d for n, t in pretrained.items()} for d in (1.0, 3.0)]
    for method, parameters in (("task_arithmetic", {"scale": 2.0}), ("ties", {"density": 0.3})):
        result = merged(method, specialists, pretrained, structure, parameters=parameters)
        assert result["running_mean"].tolist() == [2, 2, 2] and result["running_var"].tolist() == [3, 3, 3]


def test_overrides_and_exclusions_hold_for_the_tensors_they_name(merged, pretrained, specialists):
    result = merged(
        "task_arithmetic",
        specialists,
        pretrained,
        parameters={"scale": 0.5},
        overrides=[
            {"tensors": "k*", "parameters": {"scale": 0.1}},
            {"tensors": "up", "parameters": {"scale": [1, 0, 0, 0]}},
        ],
        exclude=["bias", "lin*"],
    )
    total = {n: sum(s[n].astype(np.float64) - t for s in specialists) for n, t in pretrained.items()}
    assert np.array_equal(result["bias"], pretrained["bias"]) and np.array_equal(result["linear"], pretrained["linear"])
    np.testing.assert_allclose(result["kernel"], pretrained["kernel"] + 0.1 * total["kernel"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result["alpha"], pretrained["alpha"] + 0.5 * total["alpha"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result["up"], specialists[0]["up"], rtol=1e-5, atol=1e-6)
    result = merged("average", specialists, pretrained, include=["up"])
    assert np.array_equal(result["kernel"], pretrained["kernel"]) and not np.array_equal(result["up"], pretrained["up"])


def test_nan_in_a_vector_is_refused_by_tensor(merged, pretrained, specialists):
    specialists[2]["up"][1, 1] = np.nan
    for method in METHODS:
        with pytest.raises(UserError, match=r"2\.safetensors: tensor up has NaN or infinite values"):
            merged(method, specialists, pretrained)


def test_a_result_that_overflows_is_refused(merged, pretrained, specialists):
    with pytest.raises(UserError, match=r"the merged tensor kernel has infinite values"):
        merged("task_arithmetic", specialists, pretrained, parameters={"scale": 1e39})


@pytest.mark.parametrize("name", METHODS)
def test_every_method_describes_itself(name):
    method = METHODS[name]
    assert method.summary.endswith(".") and method.reference
    assert all(parameter.help for parameter in method.parameters.values())
    method.check(method.defaults)
    with pytest.raises(UserError, match="has no parameter 'sccale'"):
        method.check({"sccale": 1})
