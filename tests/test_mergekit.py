"""The methods that mergekit has too give what it gives, where the definitions agree; mergekit runs in its own environment."""

import subprocess

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from tests.conftest import ROOT
from tests.test_merge_methods import merged  # noqa: F401 - the fixture

MERGEKIT = ROOT / ".venv-mergekit" / "bin" / "mergekit-pytorch"
SHAPES = {"kernel": (8, 5, 3, 3, 3), "linear": (10, 20), "bias": (10,)}
pytestmark = pytest.mark.skipif(not MERGEKIT.is_file(), reason="mergekit is not there: make .venv-mergekit/ready")


@pytest.mark.parametrize(
    ("method", "tasks", "theirs", "ours"),
    [
        ("average", 3, {"merge_method": "linear", "weight": 1.0}, {}),
        ("task_arithmetic", 3, {"weight": 0.4, "normalize": False}, {"parameters": {"scale": 0.4}}),
        (
            "ties",
            3,
            {"weight": 1.0, "density": 0.5, "normalize": True},
            {"parameters": {"density": 0.5, "scope": "tensor"}},
        ),
        ("slerp", 2, {"t": 0.3}, {"parameters": {"t": 0.3}}),
        ("nuslerp", 2, {"weight": [3, 1], "nuslerp_flatten": True}, {"parameters": {"weights": [3, 1]}}),
        ("karcher", 3, {"max_iter": 10, "tol": 1e-5}, {}),
        ("model_stock", 3, {}, {}),
        (
            "task_arithmetic",
            3,
            {"merge_method": "breadcrumbs", "weight": 0.4, "density": 0.5, "gamma": 0.1, "normalize": False},
            {
                "parameters": {"scale": 0.4},
                "sparsify": {"method": "breadcrumbs", "parameters": {"density": 0.5, "outliers": 0.1}},
            },
        ),
    ],
)
def test_agreement_with_mergekit(method, tasks, theirs, ours, merged, tmp_path):  # noqa: F811
    random = np.random.default_rng(0)
    base = {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    common = {name: random.standard_normal(shape) for name, shape in SHAPES.items()}
    specialists = [
        {n: (t + 0.1 * common[n] + 0.1 * random.standard_normal(t.shape)).astype(np.float32) for n, t in base.items()}
        for _ in range(tasks)
    ]
    save_file(base, tmp_path / "base.safetensors")
    for task, state in enumerate(specialists):
        save_file(state, tmp_path / f"task{task}.safetensors")
    weight = theirs.pop("weight", None)
    weights = weight if isinstance(weight, list) else [weight] * tasks
    density, gamma = theirs.pop("density", None), theirs.pop("gamma", None)
    models = []
    for task in range(tasks):
        own = {"weight": weights[task], "density": density, "gamma": gamma}
        own = {name: value for name, value in own.items() if value is not None}
        models.append({"model": str(tmp_path / f"task{task}.safetensors"), "parameters": own})
    config = {
        "merge_method": theirs.pop("merge_method", method),
        "models": models,
        "dtype": "float32",
        "parameters": theirs,
    }
    if method == "slerp":  # its base model is the first of the two
        config["base_model"] = models[0]["model"]
    elif method not in ("average", "karcher"):
        config["base_model"] = str(tmp_path / "base.safetensors")
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    subprocess.run([MERGEKIT, tmp_path / "config.yml", tmp_path / "out"], check=True, capture_output=True)
    expected = load_file(tmp_path / "out" / "model.safetensors")
    got = merged(method, specialists, base, **ours)
    near = 1e-4 if method == "karcher" else 2e-6  # both stop when a step is small, at not quite the same point
    for name, tensor in expected.items():
        np.testing.assert_allclose(got[name], tensor, atol=near, err_msg=name)
