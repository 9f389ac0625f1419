"""Modulators: what a unified task vector needs to become each of its tasks again, a bit for each weight and one number."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np

from tools.merge_engine import MergeEngine
from tools.weights_file import to_bytes, write_torch

# for a merge method the masks that belong to it: of which entries a task's vector is made
MASKS = {
    "emr": lambda delta, unified: delta * unified > 0,
    "task_arithmetic": lambda delta, unified: np.abs(delta) >= TALL * np.abs(unified - delta),
}
TALL = 0.4  # λ of TALL-masks, 0.2 to 0.6 in the paper


def write_modulators(path: Path, engine: MergeEngine) -> None:
    """Write the unified task vector of a merge with the mask and the scale of each task.

    EMR (Huang et al., NeurIPS 2024): masks where the signs agree, and scales that give each task's vector its mean magnitude
    back. TALL-masks (Wang et al., ICML 2024): masks where the task's own change outweighs the others', no scales.

    Args:
        path: the file, as ``scripts.modulation.ModulatedInferer`` reads it.
        engine: of a recipe with the method emr or task_arithmetic and one scale for all tasks.
    """
    vectors, method = engine.vectors, engine.method.name
    names = [name for name in engine.names if engine.treatment(name) == "merged"]
    sums = np.zeros((2, len(vectors)))
    if method == "emr":
        for name in names:
            unified, masks = _tensor(engine, name)
            for task, (vector, mask) in enumerate(zip(vectors, masks, strict=True)):
                sums[:, task] += np.abs(vector.delta(name)).sum(), np.abs(unified * mask).sum()
    scales = np.divide(sums[0], sums[1], out=np.ones(len(vectors)), where=sums[1] > 0)
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in names:
        shape = vectors[0].tensors[name].shape
        layout[f"unified/{name}"] = "float32", shape
        layout[f"mask/{name}"] = "uint8", (len(vectors), -(-prod(shape) // 8))
    facts = {
        "scale": scales.astype(np.float32),
        "shared": np.float32((engine.method.defaults | engine.recipe.parameters)["scale"]),
        "channels": np.array([len(vector.facts.labels) for vector in vectors], np.int64),
    }
    layout |= {name: ("int64" if name == "channels" else "float32", np.shape(value)) for name, value in facts.items()}

    def data() -> Iterator[tuple[str, list[np.ndarray]]]:
        for name in names:
            unified, masks = _tensor(engine, name)
            yield f"unified/{name}", [to_bytes(unified, "float32")]
            yield f"mask/{name}", [np.packbits(mask.reshape(-1)) for mask in masks]
        for name, value in facts.items():
            yield name, [to_bytes(np.asarray(value), layout[name][0])]

    write_torch(path, layout, data())


def _tensor(engine: MergeEngine, name: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """One tensor of the unified vector, and its mask for each task."""
    deltas = [vector.delta(name) for vector in engine.vectors]
    unified = engine.method.function(None, deltas, **{**engine.parameters_for(name), "scale": 1.0})
    return unified, [MASKS[engine.method.name](delta, unified) for delta in deltas]
