"""Merging 95.5 M parameters, whole processes: ours, mergekit in its own environment, and merely reading and writing the bytes.

And the memory that eight vectors of 1.48 billion parameters take, which needs 60 GB of disk.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from tools.compare import PAIRS_ONLY
from tools.lineage import backbone_sha256
from tools.merge_methods import METHODS
from tools.network import Structure
from tools.task_vector import Facts, save_task_vector
from tools.weights_file import WeightsFile, write_torch

ROOT = Path(__file__).parents[2]
MERGEKIT = ROOT / ".venv-mergekit" / "bin" / "mergekit-pytorch"
NETWORK = {"_target_": "tools.bundle_code.residual_unet.ResidualUNet3D", "in_channels": 1, "out_channels": 2}
HEAD = {"head.weight": 0, "head.bias": 0}
WIDTH, TASKS = 128, 4
PUBLISHED_WIDTH = 64
LARGE_WIDTH, LARGE_TASKS = 504, 8
DENSITY = 0.2


def compare_merging(runs: int = 5) -> None:
    """Print seconds (median), their ratio to reading and writing the bytes, and the largest resident memory."""
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        files = made_models(folder, WIDTH, TASKS, for_mergekit=MERGEKIT.is_file())
        size = f"{files['parameters'] / 1e6:.1f} M parameters"
        print(f"\n{size}, starting point and {TASKS} vectors, page cache warm, whole processes")
        commands = {
            "read the vectors, write a model": f"cat {files['vectors']} > /dev/null && cp {files['start']} {folder}/copy.pt",
            "ours, task arithmetic": ours(folder, TASKS, "task_arithmetic --scale 0.4"),
            "ours, TIES (exact global trim)": ours(folder, TASKS, f"ties --density {DENSITY}"),
        }
        if MERGEKIT.is_file():
            commands["mergekit, task arithmetic"] = theirs(folder, "task_arithmetic", {"weight": 0.4})
            commands["mergekit, TIES (trim per tensor)"] = theirs(folder, "ties", {"weight": 1.0, "density": DENSITY})
        else:
            print("mergekit is not there: make .venv-mergekit/ready")
        figures: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for turn in range(1 + runs):
            for name, command in commands.items():
                if "mergekit" not in name or turn < 3:  # a minute each
                    figures[name].append(measured(command))
        floor = statistics.median(seconds for seconds, _ in figures["read the vectors, write a model"][1:])
        for name, pairs in figures.items():
            seconds = statistics.median(s for s, _ in pairs[1:])
            memory = max(m for _, m in pairs[1:])
            print(f"{name:<34} {seconds:8.2f} s {seconds / floor:7.1f} x {memory:7.0f} MiB", flush=True)


def measure_methods() -> None:
    """Print seconds and largest resident memory of every merge method that needs no statistics, for the published network."""
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        files = made_models(folder, PUBLISHED_WIDTH, TASKS)
        size = f"{files['parameters'] / 1e6:.1f} M parameters"
        print(f"\n{size}, starting point and {TASKS} vectors, page cache warm, whole processes")
        for name, method in METHODS.items():
            if not method.needs_statistics and name not in PAIRS_ONLY:
                seconds, memory = measured(ours(folder, TASKS, name))
                print(f"{name:<34} {seconds:8.2f} s {memory:7.0f} MiB", flush=True)


def measure_large_merge(folder: str) -> None:
    """Print the largest resident memory and the seconds of merging eight vectors of 1.48 billion parameters.

    Args:
        folder: where there are 60 GB for the models, which are removed afterwards.
    """
    with tempfile.TemporaryDirectory(dir=folder) as place:
        files = made_models(place, LARGE_WIDTH, LARGE_TASKS)
        size = f"{files['parameters'] / 1e6:.0f} M parameters"
        print(f"\n{size}, starting point and {LARGE_TASKS} vectors, from disk", flush=True)
        for name in ("task_arithmetic", "ties"):
            seconds, memory = measured(ours(place, LARGE_TASKS, name))
            print(f"{name:<34} {seconds:8.0f} s {memory:7.0f} MiB", flush=True)


def measured(command: str) -> tuple[float, float]:
    """Wall-clock seconds and peak resident MiB of a shell command."""
    began = time.perf_counter()
    process = subprocess.Popen(
        ["sh", "-c", f"exec {command}" if "&&" not in command else command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{command} failed")
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def ours(folder: str, tasks: int, method: str) -> str:
    """The command line of a merge by our tools."""
    vectors = ",".join(f"{folder}/{task}.safetensors" for task in range(tasks))
    words = f"-m tools merge --pretrained {folder}/start --vectors {vectors} --output {folder}/merged --overwrite"
    return f"{shlex.quote(sys.executable)} {words} --method {method}"


def theirs(folder: str, method: str, parameters: dict[str, float]) -> str:
    """The command line of the same merge by mergekit, on safetensors files of whole models."""
    models = [{"model": f"{folder}/theirs/{task}.safetensors", "parameters": parameters} for task in range(TASKS)]
    config = {
        "merge_method": method,
        "base_model": f"{folder}/theirs/base.safetensors",
        "models": models,
        "dtype": "float32",
    }
    path = Path(folder) / f"{method}.yml"
    path.write_text(yaml.safe_dump({**config, "parameters": {"normalize": False}}))
    return f"{MERGEKIT} {path} {folder}/theirs/merged"


def made_models(folder: str, width: int, tasks: int, for_mergekit: bool = False) -> dict[str, Any]:
    """Make models in a process of its own (a child's peak memory begins with that of its parent), and say where they are."""
    arguments = (Path(folder), width, tasks, for_mergekit)
    maker = multiprocessing.get_context("spawn").Process(target=make_models, args=arguments)
    maker.start()
    maker.join()
    return json.loads((Path(folder) / "files.json").read_text())


def make_models(folder: Path, width: int, tasks: int, for_mergekit: bool) -> None:
    """Write random models of the published network, wider, as bundle and task vectors, and as safetensors files for mergekit."""
    from tools.network import build

    network_def = {**NETWORK, "width": width}
    shapes = {name: tuple(tensor.shape) for name, tensor in build(network_def, 2).state_dict().items()}
    bundle = folder / "start"
    (bundle / "models").mkdir(parents=True)
    for part in ("configs", "scripts"):
        subprocess.run(["cp", "-r", ROOT / "bundles" / "pretrain_amos" / part, bundle], check=True)
    inference = json.loads((bundle / "configs" / "inference.json").read_text())
    (bundle / "configs" / "inference.json").write_text(json.dumps({**inference, "width": width}))
    layout = {name: ("float32", shape) for name, shape in shapes.items()}
    model = bundle / "models" / "model.pt"
    write_torch(model, layout, ((name, [tensor.reshape(-1).view(np.uint8)]) for name, tensor in weights(shapes, 0)))
    structure = Structure(HEAD)
    sha256 = backbone_sha256(WeightsFile(model), structure)
    head = {name: np.zeros(shapes[name], np.float32) for name in HEAD}
    vectors = [str(folder / f"{task}.safetensors") for task in range(tasks)]
    for task, path in enumerate(vectors):
        facts = Facts(f"task{task}", [f"organ{task}"], {f"organ{task}": [1]}, sha256, "", network_def, structure)
        save_task_vector(path, facts, Specialist(shapes, task), head, {})
    if for_mergekit:
        (folder / "theirs").mkdir()
        pairs = {"base": {name: before for name, before, _ in Specialist(shapes, 0)}}
        pairs |= {str(task): {name: after for name, _, after in Specialist(shapes, task)} for task in range(tasks)}
        for name, tensors in pairs.items():
            save_file(tensors, folder / "theirs" / f"{name}.safetensors")
    facts = {
        "parameters": sum(prod(shape) for name, shape in shapes.items() if name not in HEAD),
        "start": str(model),
        "vectors": " ".join(vectors),
    }
    (folder / "files.json").write_text(json.dumps(facts))


@dataclass(frozen=True)
class Specialist:
    """Name, pretrained and finetuned of every tensor of a random backbone, made whenever they are gone through."""

    shapes: dict[str, tuple[int, ...]]
    task: int

    def __iter__(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        pairs = zip(weights(self.shapes, 0), weights(self.shapes, 1 + self.task), strict=True)
        for (name, before), (_, noise) in pairs:
            if name not in HEAD:
                yield name, before, before + np.float32(0.05) * noise


def weights(shapes: dict[str, tuple[int, ...]], seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Random weights, about as large as a trained network's."""
    random = np.random.default_rng(seed)
    for name, shape in shapes.items():
        yield name, random.standard_normal(shape, np.float32) * np.float32(0.02)
