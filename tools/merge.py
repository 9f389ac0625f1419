"""``merge``: task vectors and their starting point into one bundle that segments all of their organs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tools import __version__
from tools.bundle import Bundle
from tools.errors import UserError
from tools.merge_methods import METHODS
from tools.output import complete_output
from tools.recipe import Recipe
from tools.task_vector import TaskVector

TEMPLATE = Path(__file__).parents[1] / "bundles" / "merged_inference"


def merge(
    output: str = "",
    recipe: str = "",
    pretrained: str = "",
    vectors: str | Sequence[str] = (),
    method: str = "average",
    scale: object = None,
    density: float | None = None,
    scope: str | None = None,
    other_start: bool = False,
    list: bool = False,
    overwrite: bool = False,
) -> None:
    """Merge task vectors onto their starting point and write a bundle that runs at once.

    Args:
        output: folder of the merged bundle.
        recipe: YAML file with pretrained, vectors, method and parameters; instead of the flags below.
        pretrained: the starting point, a bundle with weights.
        vectors: task vector files, separated by commas, in the order of the output channels.
        method: average, task_arithmetic or ties; see --list.
        scale: the method's scaling coefficient λ, one number or one per task: "0.3,0.5".
        density: the method's share of entries to keep.
        scope: the method's scope, "global" or "tensor".
        other_start: merge vectors although they come from another starting point than the one given.
        list: print the merge methods and stop.
        overwrite: replace the output if it exists.
    """
    if list:
        for name, entry in METHODS.items():
            parameters = ", ".join(f"{key}={value}" for key, value in entry.defaults.items())
            print(f"{name}({parameters}): {entry.summary} {entry.reference}.")
        return
    if not output:
        raise UserError("--output is missing")
    if recipe:
        plan = Recipe.read(recipe)
    else:
        flags = {"scale": _numbers(scale), "density": density, "scope": scope}
        parameters = {name: value for name, value in flags.items() if value is not None}
        plan = Recipe(pretrained, _paths(vectors), method, parameters)
    merge_recipe(plan, output, other_start, overwrite)


def merge_recipe(recipe: Recipe, output: str | Path, other_start: bool = False, overwrite: bool = False) -> None:
    """Carry out a recipe.

    Args:
        recipe: what to merge, and how.
        output: folder of the merged bundle.
        other_start: accept vectors of another starting point.
        overwrite: replace the output if it exists.

    Raises:
        UserError: an input is missing, damaged, of another starting point or network, or two vectors have a label of
            the same name.
    """
    import torch

    from tools.instantiate import copy_template, set_labels, set_starting_point, update_metadata
    from tools.lineage import backbone_sha256, file_sha256

    start = Bundle(recipe.pretrained)
    vectors = [TaskVector.load(path) for path in recipe.vectors]
    state = start.state()
    head_axes = vectors[0].head_axes
    sha256 = backbone_sha256(state, head_axes)
    for path, vector in zip(recipe.vectors, vectors, strict=True):
        _check_vector(path, vector, sha256, start, state, vectors[0], other_start)
    label_map = _stack_labels(recipe.vectors, vectors)

    with complete_output(output, overwrite) as folder:
        copy_template(TEMPLATE, folder)
        set_starting_point(folder, start, out_channels=1 + len(label_map))
        set_labels(folder, label_map)
        merged = merged_backbone(recipe, state, vectors)
        merged |= {name: stacked_head([v.head[name] for v in vectors], axis) for name, axis in head_axes.items()}
        weights = {name: torch.from_numpy(np.ascontiguousarray(merged[name])) for name in state if name in merged}
        weights |= {name: tensor for name, tensor in state.items() if name not in merged}
        torch.save({name: weights[name] for name in state}, folder / "models" / "model.pt")
        lineage = {
            "tool_version": __version__,
            "method": recipe.method,
            "parameters": {**METHODS[recipe.method].defaults, **recipe.parameters},
            "pretrained": start.name,
            "pretrained_sha256": sha256,
            "vectors": [
                {"task": v.task, "file": Path(p).name, "sha256": file_sha256(p), "labels": v.labels}
                for p, v in zip(recipe.vectors, vectors, strict=True)
            ],
            "merged_sha256": backbone_sha256(weights, head_axes),
        }
        tasks = ", ".join(vector.task for vector in vectors)
        update_metadata(
            folder,
            name=f"{tasks}, merged by {recipe.method}",
            task=f"Segmentation of {', '.join(label_map)}",
            description=f"Merged from the task vectors {tasks} and their starting point {start.name} by {recipe.method}.",
            lineage=lineage,
        )
        (folder / "docs" / "recipe.yaml").write_text(yaml.safe_dump(recipe.as_dict(), sort_keys=False))
        _write_card(folder, lineage, label_map)
    print(f"{output}: {len(vectors)} task vectors merged by {recipe.method}, labels {', '.join(label_map)}")


def merged_backbone(
    recipe: Recipe, state: Mapping[str, Any], vectors: Sequence[TaskVector], progress: bool = True
) -> dict[str, np.ndarray]:
    """θ0 + the merged delta, tensor by tensor.

    Args:
        recipe: gives method and parameters.
        state: the starting point, torch tensors by name.
        vectors: their backbones are merged.
        progress: show a progress bar on a terminal.

    Returns:
        The merged tensors by name, in the starting point's dtype; only those that the vectors have.
    """
    import torch
    from tqdm import tqdm

    entry = METHODS[recipe.method]
    parameters = {**entry.defaults, **recipe.parameters}
    if entry.prepare:
        parameters |= entry.prepare([vector.backbone for vector in vectors], **parameters)
    merged = {}
    for name in tqdm(vectors[0].backbone, desc=recipe.method, disable=None if progress else True, leave=False):
        base = state[name].double().numpy()
        delta = entry.function(base, [vector.delta(name) for vector in vectors], **parameters)
        merged[name] = torch.from_numpy(np.ascontiguousarray(base + delta)).to(state[name].dtype).numpy()
    return merged


def stacked_head(heads: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """Heads in canonical form, one under another: a background row of zeros, then every task's organ rows.

    Args:
        heads: the same head tensor of each task, its background row zero.
        axis: counts output channels.
    """
    organs = [np.delete(head, 0, axis=axis) for head in heads]
    background = np.zeros_like(np.take(heads[0], [0], axis=axis))
    return np.concatenate([background, *organs], axis=axis)


def _check_vector(
    path: str,
    vector: TaskVector,
    sha256: str,
    start: Bundle,
    state: Mapping[str, Any],
    first: TaskVector,
    other_start: bool,
) -> None:
    if vector.pretrained_sha256 != sha256 and not other_start:
        raise UserError(
            f"{path} (task {vector.task}) comes from another starting point: {vector.pretrained_name} "
            f"{vector.pretrained_sha256[:12]}, not {start.name} {sha256[:12]}"
        )
    if vector.head_axes != first.head_axes:
        raise UserError(f"{path} (task {vector.task}) has another kind of head than task {first.task}")
    shapes = {name: tensor.shape for name, tensor in vector.backbone.items()}
    floating = {n: tuple(t.shape) for n, t in state.items() if n not in vector.head_axes and t.is_floating_point()}
    if shapes != floating:
        name = next(n for n in [*shapes, *floating] if shapes.get(n) != floating.get(n))
        raise UserError(f"{path} (task {vector.task}) does not fit {start.name}: tensor {name} differs in shape")


def _stack_labels(paths: Sequence[str], vectors: Sequence[TaskVector]) -> dict[str, list[int | str]]:
    label_map: dict[str, list[int | str]] = {}
    owner: dict[str, str] = {}
    for path, vector in zip(paths, vectors, strict=True):
        for label in vector.labels:
            if label.lower() in owner:
                raise UserError(f"both {owner[label.lower()]} and {path} have a label {label!r}; labels must differ")
            owner[label.lower()] = path
            label_map[label] = vector.label_map.get(label, [label])
    return label_map


def _write_card(folder: Path, lineage: Mapping[str, Any], label_map: Mapping[str, object]) -> None:
    parameters = ", ".join(f"{name} = {value}" for name, value in lineage["parameters"].items()) or "none"
    rows = "\n".join(f"| {v['task']} | {', '.join(v['labels'])} | `{v['sha256'][:16]}…` |" for v in lineage["vectors"])
    channels = "\n".join(f"{i}. {label}" for i, label in enumerate(label_map, start=1))
    (folder / "docs" / "README.md").write_text(
        f"# Merged model\n\nMerged by **{lineage['method']}** (parameters: {parameters}) onto the starting point "
        f"**{lineage['pretrained']}** (`{lineage['pretrained_sha256'][:16]}…`).\n\n"
        f"| task vector | labels | SHA-256 |\n|---|---|---|\n{rows}\n\n"
        f"Labels in the output (0 is background):\n\n{channels}\n\n"
        "Segment a folder of images:\n\n```bash\npython -m monai.bundle run --config_file configs/inference.json "
        "--bundle_root . --dataset_dir <images> --output_dir <label maps>\n```\n\n"
        "The recipe is in `recipe.yaml`, the full lineage in `configs/metadata.json`. Research use; not for diagnosis.\n"
    )


def _paths(vectors: Any) -> list[str]:
    items = vectors.split(",") if isinstance(vectors, str) else [str(v) for v in vectors]
    return [item.strip() for item in items if item.strip()]


def _numbers(scale: Any) -> float | list[float] | None:
    if scale is None or isinstance(scale, int | float):
        return scale
    try:
        items = scale.split(",") if isinstance(scale, str) else scale
        return [float(item) for item in items]
    except (TypeError, ValueError):
        raise UserError(f"--scale must be one number, or one per task as in 0.3,0.5; got {scale!r}") from None
