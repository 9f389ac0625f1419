"""``inspect``: what a bundle or a task vector is."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools.bundle import Bundle
from tools.errors import UserError
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
            vectors.append(TaskVector.load(path))
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
        from tools.bundle_code.heads import find_head
        from tools.lineage import backbone_sha256

        state = bundle.state()
        with bundle.code():
            head = find_head(bundle.network_def())
        facts["weights"] = {
            "tensors": len(state),
            "parameters": sum(tensor.numel() for tensor in state.values()),
            "MiB": round(bundle.model_file.stat().st_size / 2**20, 2),
            "head": list(head),
            "backbone_sha256": backbone_sha256(state, head),
        }
    return facts


def describe_vector(vector: TaskVector) -> dict[str, Any]:
    """Labels, lineage and size of a task vector, and its norm for each part of the network."""
    blocks: dict[str, float] = {}
    for name, tensor in vector.backbone.items():
        block = ".".join(name.split(".")[:2])
        blocks[block] = blocks.get(block, 0.0) + float(np.square(tensor, dtype=np.float64).sum())
    return {
        "kind": "task vector",
        "task": vector.task,
        "labels": vector.labels,
        "label_map": vector.label_map,
        "pretrained": vector.pretrained_name,
        "pretrained_sha256": vector.pretrained_sha256,
        "tool_version": vector.tool_version,
        "parameters": sum(tensor.size for tensor in vector.backbone.values()),
        "norm": float(np.sqrt(sum(blocks.values()))),
        "norm_by_block": {block: float(np.sqrt(square)) for block, square in blocks.items()},
    }


def conflicts(vectors: Sequence[TaskVector]) -> dict[str, Any]:
    """How much task vectors disagree: cosines, and the share of entries on whose sign two of them differ.

    Raises:
        UserError: they are not of the same network.
    """
    names = list(vectors[0].backbone)
    if any(
        {n: t.shape for n, t in v.backbone.items()} != {n: t.shape for n, t in vectors[0].backbone.items()}
        for v in vectors
    ):
        raise UserError("these task vectors are not of the same network")
    flat = [np.concatenate([vector.backbone[name].ravel() for name in names]) for vector in vectors]
    norms = [max(float(np.linalg.norm(f)), 1e-30) for f in flat]
    cosine = [[float(np.dot(a, b)) / (na * nb) for b, nb in zip(flat, norms)] for a, na in zip(flat, norms)]
    sign = [[float(np.mean(np.sign(a) * np.sign(b) < 0)) for b in flat] for a in flat]
    return {
        "tasks": [vector.task for vector in vectors],
        "same_start": len({vector.pretrained_sha256 for vector in vectors}) == 1,
        "cosine": cosine,
        "sign_conflict": sign,
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
