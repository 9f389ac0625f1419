"""Merge methods against their definitions, restated here step by step."""

import numpy as np
import pytest

from tools.errors import UserError
from tools.merge_engine import MergeEngine
from tools.merge_methods import METHODS, POSTPROCESSORS, SPARSIFIERS
from tools.merge_methods.threshold import FEW, magnitude_of_share
from tools.network import Structure
from tools.recipe import Recipe
from tools.task_statistics import save_statistics, statistics_file
from tools.task_vector import Facts, TaskVector, save_task_vector
from tools.weights_file import WeightsFile, write_torch

SHAPES = {"kernel": (4, 3, 3, 3, 3), "up": (4, 2, 2, 2, 2), "linear": (5, 6), "bias": (7,), "alpha": (1,)}
STRUCTURE = Structure({"head": 0}, transposed=["up"])
IDENTITY = {"task_arithmetic": {"scale": 1}, "ties": {"density": 1}, "consensus": {"scale": 1}}  # one vector comes back
FLATTENED = ("iso_c", "iso_cts")  # these give no vector back: that is their point
PAIRS = ("slerp", "nuslerp")  # of two tasks only


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
            if METHODS[method].needs_statistics:
                measured = recipe["statistics"][position] if "statistics" in recipe else statistics(method, specialist)
                shapes = {name: array.shape for name, array in measured.items()}
                about = {"method": method, "finetuned_sha256": facts.finetuned_sha256}
                save_statistics(statistics_file(paths[-1], method), about, shapes, measured.items())
        recipe.pop("statistics", None)
        recipe = Recipe("start", paths, method, recipe.pop("parameters", {}), **recipe)
        engine = MergeEngine(recipe, WeightsFile(tmp_path / "start.pt"), [TaskVector(path) for path in paths])
        pieces = {name: b"".join(piece.tobytes() for piece in data) for name, data in engine.pieces()}
        return {name: np.frombuffer(data, "<f4").reshape(pretrained[name].shape) for name, data in pieces.items()}

    return run


def statistics(method, specialist, structure=STRUCTURE):
    """Some that belong to this specialist, whatever its place among the others."""
    random = np.random.default_rng(np.frombuffer(b"".join(t.tobytes() for t in specialist.values()), np.uint8))
    if method == "fisher":
        return {name: random.random(tensor.shape, np.float32) for name, tensor in specialist.items()}
    grams = {}
    for name, tensor in specialist.items():
        if structure.is_matrix(name, tensor.shape):
            groups, _, columns = structure.matrices_shape(name, tensor.shape)
            inputs = tensor.shape[0] // groups if name in structure.transposed else columns
            seen = random.standard_normal((groups, 3 * inputs, inputs)).astype(np.float32)
            grams[name] = seen.swapaxes(1, 2) @ seen / seen.shape[1]
    return grams


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
@pytest.mark.parametrize("many", [2**22, 1000])
def test_the_threshold_is_that_of_a_full_sort(share, ties, many, monkeypatch):
    """Also of a vector so large that its bracket must be narrowed first."""
    monkeypatch.setattr("tools.merge_methods.threshold.MANY", many)
    random = np.random.default_rng(0)
    values = np.abs(random.standard_normal(FEW + 12345)).astype(np.float32)
    if ties:
        values = np.round(values, 1)
    pieces = np.array_split(values, 7)
    expected = np.sort(values)[values.size - max(1, round(share * values.size))]
    assert magnitude_of_share(Pieces(pieces), share) == expected
    assert magnitude_of_share(Pieces([-values[:50], values[:0]]), 0.5) == np.sort(values[:50])[25]


def test_a_large_vector_that_is_mostly_zero_or_has_nan_needs_no_more_memory(monkeypatch):
    monkeypatch.setattr("tools.merge_methods.threshold.MANY", 1000)
    kept = []
    monkeypatch.setattr(
        "tools.merge_methods.threshold._nth_largest", lambda v, n: kept.append(v.size) or np.sort(v)[-n]
    )
    values = np.zeros(2 * FEW, np.float32)
    values[: FEW // 2] = np.random.default_rng(0).standard_normal(FEW // 2)
    for share in (0.2, 0.9):
        expected = np.sort(np.abs(values))[values.size - round(share * values.size)]
        assert magnitude_of_share(Pieces(np.array_split(values, 5)), share) == expected
    assert max(kept, default=0) < FEW // 8
    values[5] = np.nan
    assert magnitude_of_share(Pieces([values]), 1.0) == 0


@pytest.mark.parametrize("many", [2**22, 1000])
def test_a_threshold_that_the_sample_misses_is_found_all_the_same(many, monkeypatch):
    monkeypatch.setattr("tools.merge_methods.threshold.MANY", many)
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
    if method == "tsv_m":  # through singular vectors
        assert all(np.allclose(result[n], specialist[n], atol=1e-4 * np.abs(specialist[n]).max()) for n in SHAPES)
    elif method not in FLATTENED:
        assert all(np.array_equal(result[name], specialist[name]) for name in SHAPES)


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_vectors_and_of_tensors_does_not_matter(method, merged, pretrained, specialists):
    specialists = specialists[:2] if method in PAIRS else specialists
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
    specialists[1]["up"][1, 1] = np.nan
    for method in METHODS:
        specialists = specialists[:2] if method in PAIRS else specialists
        with pytest.raises(UserError, match=r"1\.safetensors: tensor up has NaN or infinite values"):
            merged(method, specialists, pretrained)


def test_a_result_that_overflows_is_refused(merged, pretrained, specialists):
    with pytest.raises(UserError, match=r"the merged tensor kernel has infinite values"):
        merged("task_arithmetic", specialists, pretrained, parameters={"scale": 1e39})


def matrices(name, tensor):
    """A kernel as the matrix that multiplies the patch under it; restated, not taken from the engine."""
    tensor = np.moveaxis(tensor, 1, 0) if name == "up" else tensor
    return tensor.reshape(tensor.shape[0], -1)


def unfolded(state):
    return {name: matrices(name, tensor) for name, tensor in state.items() if tensor.ndim > 1}


def by_the_papers(method, deltas):
    """TSV-M (its algorithm 1), Iso-C and Iso-CTS (their sections 4.1 and 4.2) of matrices, by full decompositions."""

    def svd(matrix):
        return np.linalg.svd(matrix, full_matrices=False)

    full, n = min(deltas[0].shape), len(deltas)
    if method == "iso_c":
        u, s, v = svd(sum(deltas))
        return s.mean() * u @ v
    if method == "tsv_m":
        parts, rank = [svd(delta) for delta in deltas], full // n
    else:
        own = round((full - int(0.8 * full)) / n)
        u, s, v = svd(sum(deltas))
        common = [x[..., : full - n * own] if x is not v else x[: full - n * own] for x in (u, s, v)]
        parts, rank = [svd(delta - common[0] @ common[0].T @ delta) for delta in deltas], own
    u, s, v = (
        np.hstack([p[0][:, :rank] for p in parts]),
        np.hstack([p[1][:rank] for p in parts]),
        [p[2][:rank] for p in parts],
    )
    v = np.vstack(v)
    if method == "iso_cts":
        u, s, v = np.hstack([common[0], u]), np.hstack([common[1], s]), np.vstack([common[2], v])
        s = np.full(s.shape, s.mean())
    (p, _, q), (x, _, y) = svd(u), svd(v)
    return (p @ q) * s @ (x @ y)


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts"])
def test_spectral_methods_take_kernels_for_matrices_and_do_not_average_them(method, merged):
    shapes = {"kernel": (24, 3, 3, 3, 3), "up": (4, 16, 2, 2, 2), "linear": (20, 30), "bias": (7,)}
    pretrained = weights(0, shapes)
    specialists = [{n: t + weights(seed, shapes)[n] for n, t in pretrained.items()} for seed in (1, 2)]
    result = merged(method, specialists, pretrained, parameters={"scale": 0.7})
    base, got, each = unfolded(pretrained), unfolded(result), [unfolded(s) for s in specialists]
    for name, matrix in base.items():
        deltas = [s[name].astype(np.float64) - matrix for s in each]
        expected = 0.7 * by_the_papers(method, deltas)
        np.testing.assert_allclose(got[name] - matrix, expected, atol=1e-5)
        assert not np.allclose(got[name] - matrix, 0.7 * np.mean(deltas, axis=0), atol=0.1), "that is the average"
    mean = np.mean([s["bias"] - pretrained["bias"] for s in specialists], axis=0)
    np.testing.assert_allclose(result["bias"], pretrained["bias"] + 0.7 * mean, atol=1e-6)


def test_grouped_kernels_are_one_matrix_for_each_group(merged):
    structure = Structure({"head": 0}, groups={"kernel": 3})
    pretrained = weights(0, {"kernel": (12, 4, 3, 3, 3)})
    specialists = [
        {"kernel": pretrained["kernel"] + weights(seed, {"kernel": (12, 4, 3, 3, 3)})["kernel"]} for seed in (1, 2)
    ]
    result = merged("iso_c", specialists, pretrained, structure)["kernel"] - pretrained["kernel"]
    for group in range(3):
        part = slice(4 * group, 4 * group + 4)
        deltas = [(s["kernel"] - pretrained["kernel"])[part].reshape(4, -1).astype(np.float64) for s in specialists]
        np.testing.assert_allclose(result[part].reshape(4, -1), by_the_papers("iso_c", deltas), atol=1e-5)


def test_spectral_methods_bear_matrices_without_full_rank(merged):
    """Equal tasks, zero tasks, and fewer rows than tasks."""
    pretrained = weights(0, {"kernel": (6, 2, 3, 3, 3), "thin": (2, 9)})
    one = {n: t + np.outer(np.arange(t.shape[0]), np.ones(t[0].size)).reshape(t.shape) for n, t in pretrained.items()}
    for method in ("tsv_m", "iso_c", "iso_cts"):
        for specialists in ([one, one, one], [one, pretrained, pretrained]):
            result = merged(method, specialists, pretrained)
            assert all(np.isfinite(tensor).all() for tensor in result.values())
            rank = np.linalg.matrix_rank((result["kernel"] - pretrained["kernel"]).reshape(6, -1), tol=1e-4)
            assert rank == 1, f"{method} invents directions"


@pytest.mark.parametrize("by", ["tensor", "filter"])
def test_slerp_goes_along_the_great_circle(merged, pretrained, specialists, by):
    """By its defining properties: the ends, the angles, and the plane."""
    for t in (0.0, 0.25, 1.0):
        result = merged("slerp", specialists[:2], pretrained, parameters={"t": t, "by": by})
        for name in pretrained:
            a, b, c = (s[name].astype(np.float64) for s in (*specialists[:2], result))
            alone = by == "filter" and a.ndim > 1
            rows = [matrices(name, x) if alone else x.reshape(1, -1) for x in (a, b, c)]
            for x, y, z in zip(*rows, strict=True):
                angles = [
                    np.arccos(np.clip(u @ v / np.linalg.norm(u) / np.linalg.norm(v), -1, 1))
                    for u, v in ((x, z), (x, y))
                ]
                if angles[1] > 1e-3 and x.size > 1:  # in between, slerp keeps t of the angle only for equal lengths
                    if t in (0.0, 1.0):
                        np.testing.assert_allclose(z, (x, y)[int(t)], atol=1e-5)
                    assert 0 <= angles[0] <= angles[1] + 1e-6
                    residual = z - np.column_stack([x, y]) @ np.linalg.lstsq(np.column_stack([x, y]), z, rcond=None)[0]
                    np.testing.assert_allclose(residual, 0, atol=1e-5)


def test_slerp_of_equal_lengths_keeps_length_and_share_of_the_angle():
    slerp = METHODS["slerp"].function
    a, b = np.array([[1.0, 0, 0]]), np.array([[0, 1.0, 0]])
    origin = np.array([[0.5, 0.5, 2.0]])
    for t in (0.2, 0.5, 0.9):
        c = origin + slerp(origin, [a - origin, b - origin], t=t)
        np.testing.assert_allclose(c, [[np.cos(t * np.pi / 2), np.sin(t * np.pi / 2), 0]], atol=1e-12)
    np.testing.assert_allclose(origin + slerp(origin, [a - origin, a - origin]), a)
    nuslerp = METHODS["nuslerp"].function(origin, [2 * a, 2 * b], weights=[3, 1])
    np.testing.assert_allclose(nuslerp, [[2 * np.cos(np.pi / 8), 2 * np.sin(np.pi / 8), 0]], atol=1e-12)
    with pytest.raises(UserError, match="karcher takes any number"):
        slerp(origin, [a, b, a])


def test_karcher_is_the_point_of_least_squared_angles():
    karcher = METHODS["karcher"].function
    random = np.random.default_rng(0)
    origin = np.zeros((1, 6))
    points = [random.standard_normal((1, 6)) + 2 for _ in range(4)]
    centre = karcher(origin, points, iterations=1000, tolerance=1e-12)

    def squared_angles(x):
        return sum(np.arccos((x @ p.T).item() / np.linalg.norm(x) / np.linalg.norm(p)) ** 2 for p in points)

    for _ in range(50):
        assert squared_angles(centre) <= squared_angles(centre + 1e-3 * random.standard_normal((1, 6)))
    np.testing.assert_allclose(np.linalg.norm(centre), np.mean([np.linalg.norm(p) for p in points]))
    two = karcher(origin, points[:2], iterations=1000, tolerance=1e-12)
    half = METHODS["slerp"].function(origin, [p / np.linalg.norm(p) for p in points[:2]])
    np.testing.assert_allclose(two / np.linalg.norm(two), half, atol=1e-9)


@pytest.mark.parametrize("by", ["tensor", "filter"])
def test_model_stock_is_the_papers_ratio(merged, pretrained, specialists, by):
    common = weights(9)
    specialists = [{n: t + 0.2 * common[n] for n, t in s.items()} for s in specialists]
    result = merged("model_stock", specialists, pretrained, parameters={"by": by})
    for name in pretrained:
        deltas = [s[name].astype(np.float64) - pretrained[name] for s in specialists]
        if by == "filter" and deltas[0].ndim > 1:
            parts = [matrices(name, d) for d in deltas]
            rows, got = zip(*parts), matrices(name, result[name] - pretrained[name])
        else:
            rows, got = [[d.ravel() for d in deltas]], (result[name] - pretrained[name]).reshape(1, -1)
        for vectors, out in zip(rows, got, strict=True):
            cosines = [
                np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for i, a in enumerate(vectors) for b in vectors[:i]
            ]
            cosine = np.clip(np.mean(cosines), 0, 1)
            expected = 4 * cosine / (1 + 3 * cosine) * np.mean(vectors, axis=0)
            np.testing.assert_allclose(out, expected, atol=1e-6)


def test_consensus_and_emr_entry_by_entry(merged, pretrained, specialists):
    deltas = [flat(s) - flat(pretrained) for s in specialists]
    result = flat(merged("consensus", specialists, pretrained, parameters={"scale": 0.5, "mask": 0.6})) - flat(
        pretrained
    )
    unified = flat(merged("emr", specialists, pretrained)) - flat(pretrained)
    dropped = 0
    for position, entries in enumerate(zip(*deltas)):
        total = sum(entries)
        users = sum(abs(e) >= 0.6 * abs(total - e) for e in entries)
        dropped += users < 2
        assert result[position] == pytest.approx(0.5 * total if users >= 2 else 0, abs=1e-6)
        assert unified[position] == pytest.approx(max((e for e in entries if e * total > 0), key=abs), abs=1e-6)
    assert 0.1 < dropped / len(result) < 0.9


def test_sparsifiers_keep_what_they_say_and_the_expected_sum(merged):
    pretrained = {"kernel": np.zeros((40, 10, 3, 3, 3))}
    specialist = weights(1, {"kernel": (40, 10, 3, 3, 3)})
    for method in ("dare", "della"):
        step = {"method": method, "parameters": {"density": 0.3}}
        result = merged("average", [specialist], pretrained, sparsify=step)["kernel"]
        present = result != 0
        assert present.mean() == pytest.approx(0.3, abs=0.02)
        assert np.sum(result * specialist["kernel"]) == pytest.approx(np.sum(specialist["kernel"] ** 2), rel=0.05)
        if method == "dare":
            np.testing.assert_allclose(result[present], specialist["kernel"][present] / 0.3, rtol=1e-6)
        else:  # the larger half of the entries stays more often, by epsilon
            large = np.abs(specialist["kernel"]) > np.median(np.abs(specialist["kernel"]))
            assert present[large].mean() - present[~large].mean() == pytest.approx(0.15, abs=0.03)
    step = {"method": "breadcrumbs", "parameters": {"density": 0.4, "outliers": 0.1}}
    result = merged("average", [specialist], pretrained, sparsify=step)["kernel"]
    order = np.sort(np.abs(specialist["kernel"]).ravel())
    kept = np.abs(specialist["kernel"][result != 0])
    assert kept.size == 4320 and kept.min() == order[5400] and kept.max() == order[9719]


def test_sparsifiers_are_seeded_by_task_and_not_by_order(merged, pretrained, specialists):
    for method in ("dare", "della"):
        options = {"sparsify": method, "parameters": {"density": 0.5}}
        first = merged("ties", specialists, pretrained, **options)
        assert all(
            np.array_equal(a, b)
            for a, b in zip(first.values(), merged("ties", specialists, pretrained, **options).values())
        )
        other = merged("ties", specialists, pretrained, seed=1, **options)
        assert not all(np.array_equal(a, b) for a, b in zip(first.values(), other.values()))
    same = [specialists[0]] * 3  # equal vectors of different tasks lose different entries
    result = merged("average", same, pretrained, sparsify="dare")
    factors = flat(result) - flat(pretrained), flat(specialists[0]) - flat(pretrained)
    assert len(np.unique(np.round(factors[0] / factors[1], 2))) == 4  # 0, 1, 2 or 3 of three, each times two thirds


def test_lines_scales_from_the_first_tensor_to_the_last(merged, pretrained, specialists):
    plain = merged("average", specialists, pretrained)
    step = {"method": "lines", "parameters": {"first": 0.2, "last": 1.0}}
    result = merged("average", specialists, pretrained, postprocess=[step])
    for name, factor in zip(SHAPES, (0.2, 0.4, 0.6, 0.8, 1.0)):
        delta = plain[name].astype(np.float64) - pretrained[name]
        np.testing.assert_allclose(result[name], pretrained[name] + factor * delta, atol=1e-6)


def test_svc_is_the_papers_formula(merged, pretrained, specialists):
    parameters = {"scale": 1.0}
    plain = unfolded(merged("task_arithmetic", specialists, pretrained, parameters=parameters))
    step = {"method": "svc", "parameters": {"floor": 0.5}}
    whole = merged("task_arithmetic", specialists, pretrained, parameters=parameters, postprocess=[step])
    result, base, each = unfolded(whole), unfolded(pretrained), [unfolded(s) for s in specialists]
    for name, matrix in base.items():
        u, s, v = np.linalg.svd(plain[name].astype(np.float64) - matrix, full_matrices=False)
        for r in range(len(s)):
            own = [u[:, r] @ (e[name].astype(np.float64) - matrix) for e in each]
            ratios = [(s[r] * v[r]) @ a / (a @ a) for a in own]
            s[r] *= len(each) / sum(max(0.5, ratio) for ratio in ratios)
        np.testing.assert_allclose(result[name] - matrix, (u * s) @ v, atol=1e-4)
    assert np.array_equal(
        whole["bias"], merged("task_arithmetic", specialists, pretrained, parameters=parameters)["bias"]
    )


def test_fisher_weighs_every_entry_by_its_information(merged, pretrained, specialists):
    measured = [statistics("fisher", s) for s in specialists[:2]]
    measured[0]["bias"][:3], measured[1]["bias"][:3] = 0, 0  # nobody's: averaged
    measured[0]["bias"][3:5] = 0  # the other's
    result = merged("fisher", specialists[:2], pretrained, statistics=measured)
    for name in pretrained:
        f, s = ([np.float64(p[name]) for p in pair] for pair in (measured, specialists[:2]))
        f = [np.maximum(values, 1e-6) for values in f]
        np.testing.assert_allclose(result[name], (f[0] * s[0] + f[1] * s[1]) / (f[0] + f[1]), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(result["bias"][3:5], specialists[1]["bias"][3:5], rtol=1e-4, atol=1e-5)


def test_regmean_is_the_least_squares_solution(merged):
    """Of X₁W ≈ X₁W₁ and X₂W ≈ X₂W₂ together, solved by numpy; for a convolution X is what the kernel covers."""
    random = np.random.default_rng(0)
    shapes = {
        "linear": (5, 6),
        "kernel": (4, 3, 2, 2, 2),
        "grouped": (4, 3, 1, 1, 1),
        "up": (4, 2, 2, 1, 1),
        "bias": (7,),
    }
    structure = Structure({"head": 0}, transposed=["up"], groups={"grouped": 2})
    pretrained, *specialists = (weights(seed, shapes) for seed in range(3))
    inputs = {"linear": (1, 6), "kernel": (1, 24), "grouped": (2, 3), "up": (1, 4)}
    seen = [{n: random.standard_normal((g, 50, i)) for n, (g, i) in inputs.items()} for _ in specialists]
    for name in seen[0]:
        seen[0][name][:, :, 0] *= 10  # the first task sees another kind of inputs
    grams = [{n: np.float32(x.swapaxes(1, 2) @ x) for n, x in each.items()} for each in seen]
    parameters = {"off_diagonal": 1.0}
    result = merged("regmean", specialists, pretrained, structure, parameters=parameters, statistics=grams)
    for name, (groups, count) in inputs.items():
        for group in range(groups):

            def matrix(tensor, name=name, group=group, groups=groups, count=count):
                """Inputs × outputs, by the definition of the layer."""
                if name == "up":
                    return tensor.reshape(count, -1)
                return tensor.reshape(groups, -1, count)[group].T

            x = np.concatenate([each[name][group] for each in seen])
            y = np.concatenate([e[name][group] @ np.float64(matrix(s[name])) for e, s in zip(seen, specialists)])
            expected = np.linalg.lstsq(x, y, rcond=None)[0]
            np.testing.assert_allclose(matrix(result[name]), expected, rtol=1e-3, atol=1e-4)
    mean = np.mean([s["bias"] for s in specialists], axis=0)
    np.testing.assert_allclose(result["bias"], mean, rtol=1e-5, atol=1e-6)  # nothing was measured of it
    assert np.abs(result["linear"] - np.mean([s["linear"] for s in specialists], axis=0)).max() > 0.1


@pytest.mark.parametrize("name", [*METHODS, *SPARSIFIERS, *POSTPROCESSORS])
def test_every_method_describes_itself(name):
    method = {**METHODS, **SPARSIFIERS, **POSTPROCESSORS}[name]
    assert method.summary.endswith(".") and method.reference
    assert all(parameter.help for parameter in method.parameters.values())
    method.check(method.defaults)
    with pytest.raises(UserError, match="has no parameter 'sccale'"):
        method.check({"sccale": 1})
