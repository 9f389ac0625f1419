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
from tools.mergeability import mergeability, report
from tools.mergeability import plot as draw
from tools.network import part_of
from tools.output import complete_output
from tools.task_vector import TaskVector
from tools.weights_file import WeightsFile


def inspect(*paths: str, json: bool = False, plot: str = "", overwrite: bool = False) -> None:
    """Print lineage, labels, sizes and norms; for several task vectors also how much they agree, before they are merged.

    Args:
        paths: bundles or task vectors (.safetensors). With the starting point among them, the lengths of the task vectors are
            relative to it.
        json: print JSON.
        plot: a PNG file to draw the comparison of several task vectors into.
        overwrite: replace that file if it exists.
    """
    if not paths:
        raise UserError("name one or more bundles or task vectors")
    files = [(str(path), None if Path(str(path)).is_dir() else TaskVector(str(path))) for path in paths]
    vectors = [vector for _, vector in files if vector]
    facts = [
        {"path": path, **describe_vector(vector)} if vector else describe_bundle(Bundle(path), vectors)
        for path, vector in files
    ]
    result: dict[str, Any] = {"items": facts}
    if len(vectors) > 1:
        result["conflicts"] = mergeability(vectors, _starting_point(facts, vectors))
    print(json_module.dumps(result, indent=2) if json else _as_text(result))
    if plot:
        if "conflicts" not in result:
            raise UserError("--plot draws the comparison of task vectors; name two of them at least")
        with complete_output(plot, overwrite) as path:
            draw(result["conflicts"], path)


def _starting_point(facts: list[dict[str, Any]], vectors: Sequence[TaskVector]) -> WeightsFile | None:
    """The weights of the bundle that the task vectors come from, if it is among what is inspected."""
    for item in facts:
        weights = item.get("weights")
        if weights and weights["backbone_sha256"] == vectors[0].facts.pretrained_sha256:
            return Bundle(item["path"]).weights()
    return None


def describe_bundle(bundle: Bundle, vectors: Sequence[TaskVector] = ()) -> dict[str, Any]:
    """Labels, lineage and weights of a bundle.

    Args:
        bundle: whose network is built to know its tensors, unless that is recorded.
        vectors: of one that has the tensors of the bundle its structure is taken, which saves building the network.
    """
    facts: dict[str, Any] = {
        "path": str(bundle.path),
        "kind": "bundle",
        "name": bundle.metadata.get("name", bundle.name),
        "labels": bundle.labels,
        "lineage": bundle.metadata.get("lineage", {}),
        "weights": None,
    }
    if bundle.model_file.is_file():
        weights = bundle.weights()
        structure = (
            next((s for s in (v.facts.structure for v in vectors if _fits(v, weights))), None) or bundle.structure()
        )
        weights.verify()
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


def _fits(vector: TaskVector, weights: WeightsFile) -> bool:
    """Whether a task vector has the tensors of these weights."""
    left_out = vector.facts.structure.not_merged
    floating = {
        name: entry.shape for name, entry in weights.entries.items() if entry.is_floating and name not in left_out
    }
    return floating == {name: tensor.shape for name, tensor in vector.tensors.items()}


def describe_vector(vector: TaskVector) -> dict[str, Any]:
    """Labels, lineage and size of a task vector, and its norm for each part of the network."""
    squares: dict[str, float] = {}
    for name in vector.weights:
        part = part_of(name)
        squares[part] = squares.get(part, 0.0) + sum(
            float(np.dot(block.values, block.values)) for block in vector.blocks(name)
        )
    if not np.isfinite(sum(squares.values())):
        for name in vector.tensors:
            vector.check_finite(name)
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
    if "conflicts" in result:
        lines.append(report(result["conflicts"]).lstrip())
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
