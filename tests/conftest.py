"""Fixtures: simulated data, and one small chain of trained bundles that many tests look at."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel
import pytest
import torch

from tools.__main__ import main
from tools.bundle_code.residual_unet import ResidualUNet3D
from tools.instantiate import copy_template, set_labels, update_metadata

ROOT = Path(__file__).parents[1]
QUICK = {"width": 8, "patch_size": "[32, 32, 32]", "patches_per_volume": 4, "max_epochs": 2, "val_interval": 1}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first, so that one process does not go on with it when the others have nothing left."""
    items.sort(key=lambda item: item.path.name != "test_demo.py")


@cache
def _forks() -> subprocess.Popen:
    """Runs our commands and MONAI's; ends when its standard input is closed, with this process."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [sys.executable, ROOT / "tests" / "forks.py"]
    return subprocess.Popen(words, cwd="/", env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _forked(words: list[str], cwd: str, environment: dict[str, str], timeout: int) -> subprocess.CompletedProcess:
    with TemporaryDirectory() as folder:
        output = [Path(folder, name) for name in ("stdout", "stderr")]
        for file in output:
            file.touch()
        order = {"words": words, "cwd": cwd, "environment": environment, "timeout": timeout}
        print(json.dumps({**order, "output": [*map(str, output)]}), file=_forks().stdin, flush=True)
        code = int(_forks().stdout.readline())
        return subprocess.CompletedProcess(words, code, *(file.read_text() for file in output))


def _started(words: list[str], cwd: str, environment: dict[str, str], timeout: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=cwd, env=environment, timeout=timeout, capture_output=True, text=True)


def run(
    *words: object, cwd: Path | str | None = None, check: bool = True, timeout: int = 900, **environment: str
) -> subprocess.CompletedProcess:
    """Run ``python -m …`` as a user does, in a process of its own and from another working directory than the project's."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    arguments = [*map(str, words)], str(cwd or "/"), environment, timeout
    # what lies in other folders may be meant to be imported in place of a library
    result = (_forked if environment["PYTHONPATH"] in ("", str(ROOT)) else _started)(*arguments)
    if check and result.returncode:
        raise AssertionError(
            f"{words} failed with {result.returncode}:\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        )
    return result


def here(*words: object) -> subprocess.CompletedProcess:
    """The same for our own command line in this process, without the seconds that importing takes; never raises."""
    out, err = StringIO(), StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = main([*map(str, words[1:])])
    finally:
        signal.signal(signal.SIGTERM, handler)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def train(bundle: Path, *extra: object, check: bool = True, config: object = None) -> subprocess.CompletedProcess:
    """Train a bundle through ``python -m monai.bundle`` without the project on the path."""
    config = config or bundle / "configs" / "train.json"
    words = ["monai.bundle", "run", "--config_file", config, "--bundle_root", bundle, *extra]
    return run(*words, check=check, PYTHONPATH="")


@dataclass
class Chain:
    """A starting point, two specialists, their task vectors and a merged bundle, all tiny."""

    root: Path
    dataset: Path
    pretrain: Path
    specialists: dict[str, Path]
    vectors: dict[str, Path]
    merged: Path


@pytest.fixture(scope="session")
def phantom_dataset(tmp_path_factory) -> Path:
    """Simulated patients in voxels of 8 × 8 × 4 mm: windows are few, and a mistaken axis shows."""
    folder = tmp_path_factory.mktemp("data") / "Dataset001_Phantom"
    run("tools", "phantom", "--output", folder, "--cases", 4, "--population", "portal")
    for path in folder.glob("*Tr/*.nii.gz"):
        nibabel.save(nibabel.load(path).slicer[::2, ::2], path)
    return folder


@pytest.fixture(scope="session")
def chain(tmp_path_factory, phantom_dataset) -> Chain:
    root = tmp_path_factory.mktemp("chain")
    pretrain = root / "pretrain"
    labels = "{liver: liver, spleen: spleen, vertebrae: vertebrae}"
    run(
        "tools", "new_pretraining", "--bundle", ROOT / "bundles" / "pretrain_amos", "--dataset_dir", phantom_dataset,
        "--output", pretrain, "--overlay", "small", "--labels", labels, "--patch_size", 32,
    )  # fmt: skip
    for config in ("train.json", "inference.json"):
        path = pretrain / "configs" / config
        path.write_text(path.read_text().replace('"width": 16', '"width": 8'))
    train(pretrain, *[word for key in ("patches_per_volume", "max_epochs") for word in (f"--{key}", QUICK[key])])
    specialists, vectors = {}, {}
    for task in ("liver", "spleen"):
        specialists[task], vectors[task] = root / task, root / f"{task}.safetensors"
        run(
            "tools", "new_task", "--pretrained", pretrain, "--dataset_dir", phantom_dataset, "--task", task,
            "--output", specialists[task], "--overlay", "small",
        )  # fmt: skip
        train(specialists[task], "--max_epochs", 2, "--frozen_epochs", 1, "--patches_per_volume", 4)
        run("tools", "diff", "--pretrained", pretrain, "--finetuned", specialists[task], "--output", vectors[task])
    merged = root / "merged"
    files = ",".join(map(str, vectors.values()))
    run("tools", "merge", "--pretrained", pretrain, "--vectors", files, "--output", merged)
    return Chain(root, phantom_dataset, pretrain, specialists, vectors, merged)


@pytest.fixture(scope="session")
def untrained(tmp_path_factory) -> Path:
    """A small bundle with random weights, for what does not depend on training."""
    folder = tmp_path_factory.mktemp("untrained") / "two_organs"
    copy_template(ROOT / "bundles" / "merged_inference", folder)
    set_labels(folder, {"liver": [1], "spleen": [2]})
    path = folder / "configs" / "inference.json"
    path.write_text(path.read_text().replace('"width": 64', '"width": 8'))
    update_metadata(folder, name="Two organs")
    torch.manual_seed(0)
    torch.save(ResidualUNet3D(1, 3, width=8).state_dict(), folder / "models" / "model.pt")
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    folder = os.environ.get("REAL_DATA_DIR")
    if not folder:
        pytest.skip("REAL_DATA_DIR is not set: it names a folder of real nnU-Net datasets")
    return Path(folder)


@pytest.fixture(scope="session")
def timm():
    """timm, installed or of ``.venv-timm``. It imports torchvision; PyPI's has no compiled operators beside a CPU-only torch."""
    peer = str(ROOT / ".venv-timm")
    sys.path.append(peer)
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("timm", reason="timm is not there: make .venv-timm/ready", exc_type=ImportError)
    sys.path.remove(peer)
    yield module
    del library
