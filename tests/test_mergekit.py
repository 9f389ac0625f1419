"""The methods that mergekit has too give what it gives, where the definitions agree; mergekit runs in its own environment."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from tests.conftest import ROOT
from tests.test_merge_methods import merged  # noqa: F401 - the fixture

PYTHON = ROOT / ".venv-mergekit" / "bin" / "python"
SHAPES = {"kernel": (8, 5, 3, 3, 3), "linear": (10, 20), "bias": (10,)}
# method, number of tasks, mergekit's settings, ours
CASES = [
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
]
MERGE_ALL = """
import sys
from mergekit.scripts.merge_raw_pytorch import main
for folder in sys.argv[1:]:
    main([f"{folder}/config.yml", f"{folder}/out"], standalone_mode=False)
"""  # the command mergekit-pytorch, whose imports take half a minute, for one folder after another
pytestmark = pytest.mark.skipif(
    not (PYTHON.parent.parent / "ready").is_file(), reason="mergekit is not there: make .venv-mergekit/ready"
)


def weights(tasks: int) -> tuple[dict, list[dict]]:
    """A starting point, and specialists that have something in common."""
    random = np.random.default_rng(0)
    base = {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    common = {name: random.standard_normal(shape) for name, shape in SHAPES.items()}
    specialists = [
        {n: (t + 0.1 * common[n] + 0.1 * random.standard_normal(t.shape)).astype(np.float32) for n, t in base.items()}
        for _ in range(tasks)
    ]
    return base, specialists


def write_case(folder: Path, method: str, tasks: int, theirs: dict) -> None:
    """The configuration of one merge and its weights, as mergekit reads them."""
    base, specialists = weights(tasks)
    save_file(base, folder / "base.safetensors")
    for task, state in enumerate(specialists):
        save_file(state, folder / f"task{task}.safetensors")
    theirs = dict(theirs)
    weight = theirs.pop("weight", None)
    per_task = weight if isinstance(weight, list) else [weight] * tasks
    density, gamma = theirs.pop("density", None), theirs.pop("gamma", None)
    models = []
    for task in range(tasks):
        own = {"weight": per_task[task], "density": density, "gamma": gamma}
        own = {name: value for name, value in own.items() if value is not None}
        models.append({"model": str(folder / f"task{task}.safetensors"), "parameters": own})
    config = {
        "merge_method": theirs.pop("merge_method", method),
        "models": models,
        "dtype": "float32",
        "parameters": theirs,
    }
    if method == "slerp":  # its base model is the first of the two
        config["base_model"] = models[0]["model"]
    elif method not in ("average", "karcher"):
        config["base_model"] = str(folder / "base.safetensors")
    (folder / "config.yml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What mergekit makes of each case."""
    folders = [tmp_path_factory.mktemp("case") for _ in CASES]
    for folder, (method, tasks, theirs, _) in zip(folders, CASES):
        write_case(folder, method, tasks, theirs)
    result = subprocess.run([PYTHON, "-c", MERGE_ALL, *folders], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return [load_file(folder / "out" / "model.safetensors") for folder in folders]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case[2].get("merge_method", case[0]) for case in CASES])
def test_agreement_with_mergekit(number, expected, merged):  # noqa: F811
    method, tasks, _, ours = CASES[number]
    base, specialists = weights(tasks)
    got = merged(method, specialists, base, **ours)
    near = 1e-4 if method == "karcher" else 2e-6  # both stop when a step is small, at not quite the same point
    for name, tensor in expected[number].items():
        np.testing.assert_allclose(got[name], tensor, atol=near, err_msg=name)
