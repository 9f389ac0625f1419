"""``inspect``: what a bundle or a task vector is."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from tools.bundle import Bundle
from tools.errors import UserError
from tools.lineage import backbone_sha256
from tools.task_vector import TaskVector


def inspect(*paths: str, json: bool = False) -> None:
    """Print lineage, labels, sizes and norms; for several task vectors also their cosines and sign conflicts.

    Args:
        paths: bundles or task vectors (.safetensors).
        json: print JSON.
    """
    if not paths:
        raise UserError("name one or more bundles or task vectors")
    facts = []
    vectors: list[TaskVector] = []
    for path in paths:
        if Path(str(path)).is_dir():
            facts.append(describe_bundle(Bundle(path)))
        else:
            vectors.append(TaskVector(path))
            facts.append({"path": str(path), **describe_vector(vectors[-1])})
    result: dict[str, Any] = {"items": facts}
    if len(vectors) > 1:
        result["conflicts"] = conflicts(vectors)
    print(json_module.dumps(result, indent=2) if json else _as_text(result))


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """Labels, lineage and weights of a bundle."""
    facts: dict[str, Any] = {
        "path": str(bundle.path),
        "kind": "bundle",
        "name": bundle.metadata.get("name", bundle.name),
        "labels": bundle.labels,
        "lineage": bundle.metadata.get("lineage", {}),
        "weights": None,
    }
    if bundle.model_file.is_file():
        weights, structure = bundle.weights(), bundle.structure()
        facts["weights"] = {
            "tensors": len(weights.entries),
            "parameters": sum(
                e.size for n, e in weights.entries.items() if n not in structure.aliases and e.is_floating
            ),
            "MiB": round(bundle.model_file.stat().st_size / 2**20, 2),
            "head": list(structure.head),
            "backbone_sha256": backbone_sha256(weights, structure),
        }
    return facts


def describe_vector(vector: TaskVector) -> dict[str, Any]:
    """Labels, lineage and size of a task vector, and its norm for each part of the network."""
    squares: dict[str, float] = {}
    for name in vector.tensors:
        part = part_of(name)
        squares[part] = squares.get(part, 0.0) + sum(_dot(block.values, block.values) for block in vector.blocks(name))
    return {
        "kind": "task vector",
        "task": vector.task,
        "labels": vector.facts.labels,
        "label_map": vector.facts.label_map,
        "pretrained": vector.facts.pretrained_name,
        "pretrained_sha256": vector.facts.pretrained_sha256,
        "sha256": vector.sha256,
        "tool_version": vector.facts.tool_version,
        "parameters": sum(prod(tensor.shape) for tensor in vector.tensors.values()),
        "norm": float(np.sqrt(sum(squares.values()))),
        "norm_by_block": {part: float(np.sqrt(square)) for part, square in squares.items()},
    }


def part_of(name: str) -> str:
    """The part of the network that a tensor belongs to: "encoders.0" of "encoders.0.basic_module.conv1.weight"."""
    return ".".join(name.split(".")[:2])


def conflicts(vectors: Sequence[TaskVector]) -> dict[str, Any]:
    """How much task vectors disagree: cosines, and the share of entries on whose sign two of them differ.

    Raises:
        UserError: they are not of the same network.
    """
    shapes = [{name: tensor.shape for name, tensor in vector.tensors.items()} for vector in vectors]
    if any(other != shapes[0] for other in shapes):
        raise UserError("these task vectors are not of the same network")
    count = len(vectors)
    products, opposite, entries = np.zeros((count, count)), np.zeros((count, count)), 0
    for name in vectors[0].tensors:
        for blocks in zip(*(vector.blocks(name) for vector in vectors), strict=True):
            values = [block.values for block in blocks]
            entries += values[0].size
            for i, a in enumerate(values):
                products[i, i] += _dot(a, a)
                for j in range(i):
                    products[i, j] += _dot(a, values[j])
                    opposite[i, j] += np.count_nonzero(np.sign(a) * np.sign(values[j]) < 0)
    for matrix in (products, opposite):
        matrix += np.tril(matrix, -1).T
    norms = np.sqrt(np.maximum(np.diag(products), 1e-60))
    return {
        "tasks": [vector.task for vector in vectors],
        "same_start": len({vector.facts.pretrained_sha256 for vector in vectors}) == 1,
        "cosine": (products / np.outer(norms, norms)).tolist(),
        "sign_conflict": (opposite / max(entries, 1)).tolist(),
    }


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.dot(a, b))


def _as_text(result: dict[str, Any]) -> str:
    lines: list[str] = []
    for item in result["items"]:
        lines.append(item["path"])
        for key, value in item.items():
            if key == "path":
                continue
            if isinstance(value, dict):
                lines.append(f"  {key}:")
                lines += [f"    {name}: {_short(entry)}" for name, entry in value.items()]
            else:
                lines.append(f"  {key}: {_short(value)}")
        lines.append("")
    for title in ("cosine", "sign_conflict") if "conflicts" in result else ():
        tasks = result["conflicts"]["tasks"]
        width = max(map(len, tasks)) + 2
        lines.append(f"{title.replace('_', ' ')} between task vectors")
        lines.append(" " * width + "".join(task.rjust(width) for task in tasks))
        for task, row in zip(tasks, result["conflicts"][title]):
            lines.append(task.ljust(width) + "".join(f"{value:.3f}".rjust(width) for value in row))
        lines.append("")
    if "conflicts" in result and not result["conflicts"]["same_start"]:
        lines.append("warning: these task vectors come from different starting points and cannot be merged")
    return "\n".join(lines).rstrip()


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return (
            ", ".join(_short(v) for v in value)
            if all(not isinstance(v, dict) for v in value)
            else "\n      "
            + "\n      ".join(", ".join(f"{k} {_short(v)}" for k, v in entry.items()) for entry in value)
        )
    return str(value)
