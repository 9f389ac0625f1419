"""``merge``: task vectors and their starting point into one bundle that segments all of their organs."""

from __future__ import annotations

import inspect
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tools import __version__
from tools.bundle import Bundle
from tools.card import write_card
from tools.errors import UserError, nearest
from tools.heads import stacked_heads
from tools.instantiate import (
    copy_template,
    set_labels,
    set_modulated,
    set_spare_channels,
    set_starting_point,
    update_metadata,
    without_compiling,
)
from tools.lineage import backbone_sha256, file_sha256
from tools.merge_engine import MergeEngine, does_not_fit, merged_buffers
from tools.merge_methods import METHODS
from tools.merge_plan import describe_methods, plan_table
from tools.modulators import write_modulators
from tools.network import LINEARIZED
from tools.output import complete_output
from tools.recipe import Recipe
from tools.task_vector import TaskVector
from tools.weights_file import DTYPES, WeightsFile, to_bytes, write_torch

HEADS_FILE = "heads.safetensors"  # in docs/ of a merged bundle, beside its recipe
TEMPLATE = Path(__file__).parents[1] / "bundles" / "merged_inference"


def merge(
    output: str = "",
    recipe: str = "",
    pretrained: str = "",
    vectors: str | Sequence[str] = (),
    method: str = "",
    sparsify: object = None,
    postprocess: object = None,
    seed: int = 0,
    modulate: bool = False,
    other_start: bool = False,
    dry_run: bool = False,
    list: bool = False,
    overwrite: bool = False,
    **parameters: object,
) -> None:
    """Merge task vectors onto their starting point and write a bundle that runs at once.

    Args:
        output: folder of the merged bundle.
        recipe: YAML file with pretrained, vectors, method and parameters; instead of the flags below.
        pretrained: the starting point, a bundle with weights.
        vectors: task vector files, separated by commas, in the order of the output channels.
        method: a merge method; see --list. Default: average.
        parameters: the method's own, each a flag: --scale 0.4, or one number per task, --scale 0.3,0.5; see --list --method.
        sparsify: a sparsifier in front of the method, with default parameters or as "{method: dare, parameters: {density: 0.3}}".
        postprocess: corrections after the method, separated by commas, or each like --sparsify in a list.
        seed: of the sparsifier.
        modulate: keep a mask for each task (method emr, or task_arithmetic), with which the merged model becomes each task in
            turn: one pass a task, nearly as good as the specialists.
        other_start: merge vectors although they come from another starting point than the one given.
        dry_run: check everything, print what would be done with each part of the network, and write nothing.
        list: print the merge methods, or with --method the description of one, and stop.
        overwrite: replace the output if it exists.
    """
    if list:
        print(describe_methods(method))
        return
    if not recipe:
        method = method or "average"
        _check_names(method, parameters)
    if not output and not dry_run:
        raise UserError("--output is missing")
    if recipe:
        if pretrained or vectors or parameters or method or sparsify or postprocess or seed or modulate or other_start:
            raise UserError("--recipe says what is merged and how; leave the flags for that out")
        plan = Recipe.read(recipe)
    else:
        if not pretrained:
            raise UserError("--pretrained (or --recipe) is missing")
        values = {name: _value(value) for name, value in parameters.items()}
        steps = {"sparsify": sparsify or {}, "postprocess": _listed(postprocess)}
        steps |= {"seed": seed, "modulate": modulate, "other_start": other_start}
        plan = Recipe(str(pretrained), split_paths(vectors), method, values, **steps)
    merge_recipe(plan, str(output), overwrite, dry_run)


def merge_recipe(
    recipe: Recipe,
    output: str | Path,
    overwrite: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> None:
    """Carry out a recipe.

    Args:
        recipe: what to merge, and how.
        output: folder of the merged bundle.
        overwrite: replace the output if it exists.
        dry_run: print the plan and write nothing.
        quiet: do not say what was written.

    Raises:
        UserError: an input is missing, damaged, of another starting point or network, two vectors have the same task or a
            label of the same name, the method refuses its parameters, or the output is an input.
    """
    start = Bundle(recipe.pretrained)
    weights = start.weights()
    vectors = [TaskVector(path) for path in recipe.vectors]
    structure = vectors[0].facts.structure
    check_vectors(recipe.vectors, vectors, start, weights, recipe.other_start)
    label_map = _stack_labels(recipe.vectors, vectors)
    engine = MergeEngine(recipe, weights, vectors)
    whole = stacked_heads(structure, heads_of(recipe, vectors)) | merged_buffers(recipe.vectors, vectors)
    if dry_run:
        print(plan_table(engine, label_map))
        return
    with complete_output(output, overwrite, inputs=[recipe.pretrained, *recipe.vectors]) as folder:
        copy_template(TEMPLATE, folder)
        set_starting_point(folder, start, structure, out_channels=1 + len(label_map))
        set_labels(folder, label_map)
        set_spare_channels(folder, structure.spare_channels(len(vectors)))
        if start.network_def()["_target_"] == LINEARIZED:
            without_compiling(folder)
        write_weights(folder / "models" / "model.pt", engine, whole)
        if recipe.modulate:
            write_modulators(folder / "models" / "modulators.pt", engine)
            set_modulated(folder)
        sha256 = backbone_sha256(weights, structure) if recipe.other_start else vectors[0].facts.pretrained_sha256
        lineage = {
            "tool_version": __version__,
            "method": recipe.method,
            "parameters": {**METHODS[recipe.method].defaults, **recipe.parameters},
            **({"overrides": len(recipe.overrides)} if recipe.overrides else {}),
            "pretrained": start.name,
            "pretrained_sha256": sha256,
            "pretrained_data": start.data,
            "vectors": [
                {
                    "task": v.task,
                    "file": Path(p).name,
                    "sha256": v.sha256,
                    "labels": v.facts.labels,
                    "data": v.facts.data,
                    **measured,
                }
                for p, v, measured in zip(recipe.vectors, vectors, engine.measured(), strict=True)
            ],
            "structure": structure.as_dict(),
            **({"heads_sha256": file_sha256(recipe.heads)} if recipe.heads else {}),
        }
        tasks = ", ".join(vector.task for vector in vectors)
        update_metadata(
            folder,
            name=f"{tasks}, merged by {recipe.method}",
            task=f"Segmentation of {', '.join(label_map)}",
            description=f"Merged from the task vectors {tasks} and their starting point {start.name} by {recipe.method}.",
            lineage=lineage,
        )
        if recipe.heads:
            shutil.copyfile(recipe.heads, folder / "docs" / HEADS_FILE)
            recipe = replace(recipe, heads=str(Path(output) / "docs" / HEADS_FILE))
        portable = recipe.relative_to(Path(output) / "docs")
        (folder / "docs" / "recipe.yaml").write_text(yaml.safe_dump(portable.as_dict(), sort_keys=False))
        write_card(folder, lineage, label_map)
    if not quiet:
        print(f"{output}: {len(vectors)} task vectors merged by {recipe.method}, labels {', '.join(label_map)}")


def heads_of(recipe: Recipe, vectors: Sequence[TaskVector]) -> list[dict[str, np.ndarray]]:
    """The tasks' heads in canonical form: those that the recipe's file has for a task vector, else the vector's own.

    Raises:
        UserError: the file is missing or damaged, or a head in it is not finite or has another shape.
    """
    if not recipe.heads:
        return [vector.head for vector in vectors]
    learned = WeightsFile(recipe.heads)
    heads = []
    for vector in vectors:
        heads.append(dict(vector.head))
        for name, own in vector.head.items():
            key = head_key(vector, name)
            if key in learned.entries:
                heads[-1][name] = learned.array(key).astype(np.float32)
                if heads[-1][name].shape != own.shape:
                    raise UserError(
                        f"{recipe.heads}: the head of task {vector.task} has another shape than its task vector's"
                    )
    return heads


def head_key(vector: TaskVector, name: str) -> str:
    """What a tensor of a learned head is called in the file: it belongs to one task vector and to no other of its name."""
    return f"{vector.sha256}/{name}"


def write_weights(path: Path, engine: MergeEngine, whole: Mapping[str, np.ndarray]) -> None:
    """Write the merged ``model.pt``.

    Args:
        path: the file.
        engine: merges the backbone.
        whole: the other tensors: stacked head and integer buffers.
    """
    entries, aliases = engine.start.entries, engine.structure.aliases
    layout = {}
    for name, entry in entries.items():
        first = aliases.get(name, name)
        if first in whole:
            dtype = engine.dtype(first) if entry.is_floating else entry.dtype
            layout[name] = dtype, whole[first].shape
        else:
            layout[name] = engine.dtype(first), entry.shape

    def data() -> Iterator[tuple[str, Iterator[np.ndarray]]]:
        yield from engine.pieces()
        for name in engine.structure.constants:
            yield name, iter([to_bytes(engine.start.array(name), layout[name][0])])
        for name, tensor in whole.items():
            if layout[name][0] == "float16" and np.abs(tensor).max(initial=0) > np.finfo(np.float16).max:
                raise does_not_fit(name)
            yield name, iter([to_bytes(tensor, layout[name][0])])

    write_torch(path, layout, _with_progress(data(), engine, layout), aliases)


def _with_progress(
    data: Iterator[tuple[str, Iterator[np.ndarray]]],
    engine: MergeEngine,
    layout: Mapping[str, tuple[str, tuple[int, ...]]],
) -> Iterator[tuple[str, Iterator[np.ndarray]]]:
    """The same data, with a progress bar of the merged entries on a terminal."""
    if not sys.stderr.isatty():
        yield from data
        return
    from tqdm import tqdm

    widths = {name: np.dtype(DTYPES[dtype]).itemsize for name, (dtype, _) in layout.items()}
    with tqdm(
        total=sum(prod(layout[name][1]) for name in layout), desc=engine.method.name, unit_scale=True, leave=False
    ) as bar:

        def counted(name: str, pieces: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
            for piece in pieces:
                yield piece
                bar.update(piece.size // widths[name])

        for name, pieces in data:
            yield name, counted(name, pieces)


def check_vectors(
    paths: Sequence[str], vectors: Sequence[TaskVector], start: Bundle, weights: WeightsFile, other_start: bool = False
) -> None:
    """Refuse vectors of another network than the starting point's, of another start than the first vector, or of one task.

    Whether the first vector came from this starting point, the merge itself checks, block by block.

    Raises:
        UserError: names the file, and what differs.
    """
    first = vectors[0]
    structure = first.facts.structure
    floating = {n: e.shape for n, e in weights.entries.items() if n not in structure.not_merged and e.is_floating}
    owner: dict[str, str] = {}
    for path, vector in zip(paths, vectors, strict=True):
        whose = f"{path} (task {vector.task})"
        if vector.task in owner:
            raise UserError(
                f"both {owner[vector.task]} and {path} are of a task {vector.task!r}: diff --task gives another name"
            )
        owner[vector.task] = str(path)
        if not vector.same_start(first) and not other_start:
            names = [f"{v.facts.pretrained_name} {v.facts.pretrained_sha256[:12]}" for v in (vector, first)]
            raise UserError(
                f"{whose} comes from another starting point than {first.path} (task {first.task}): {names[0]}, not {names[1]}"
            )
        if vector.facts.structure != structure:
            raise UserError(f"{whose} has another kind of network or head than task {first.task}")
        own, others = {*structure.constants, *structure.aliases}, {*structure.aliases.values()}
        if name := next(iter((own & structure.head.keys()) | ((own | others) - weights.entries.keys())), ""):
            raise UserError(f"{whose} is of another kind of network than {start.name}: what is tensor {name}?")
        shapes = {name: tensor.shape for name, tensor in vector.tensors.items()}
        if shapes != floating:
            name = next(n for n in [*shapes, *floating] if shapes.get(n) != floating.get(n))
            raise UserError(
                f"{whose} comes from another starting point than {start.name}: tensor {name} is "
                f"{shapes.get(name, 'missing')} in the first and {floating.get(name, 'missing')} in the second"
            )
    for name in structure.head:
        if name not in weights.entries:
            raise UserError(f"{start.model_file} is not whole: it lacks the tensor {name} of the head")
        weights.read(name)  # it is replaced, but a starting point with NaN in it is nobody's
    if other_start:
        weights.verify()  # else every block is compared with what the vectors came from


def _stack_labels(paths: Sequence[str], vectors: Sequence[TaskVector]) -> dict[str, list[int | str]]:
    label_map: dict[str, list[int | str]] = {}
    owner: dict[str, str] = {}
    for path, vector in zip(paths, vectors, strict=True):
        for label in vector.facts.labels:
            if label.lower() in owner:
                raise UserError(f"both {owner[label.lower()]} and {path} have a label {label!r}; labels must differ")
            owner[label.lower()] = path
            label_map[label] = vector.facts.label_map.get(label, [label])
    return label_map


def split_paths(words: Any) -> list[str]:
    """A list from the command line, with commas or without."""
    items = str(words).split(",") if isinstance(words, str | int | float) else [str(word) for word in words]
    return [item.strip() for item in items if item.strip()]


def _check_names(method: str, parameters: Mapping[str, object]) -> None:
    """Refuse a flag that is neither one of merge nor a parameter of the method."""
    own = METHODS[method].parameters if method in METHODS else parameters
    flags = [*inspect.signature(merge).parameters, *(name for entry in METHODS.values() for name in entry.parameters)]
    for name in parameters:
        if name not in own:
            takes = f"the parameters of {method} are {', '.join(own)}" if own else f"{method} has no parameters"
            raise UserError(f"unknown flag --{name}{nearest(name, set(flags) - {name})}; {takes}")


def _listed(value: Any) -> list[Any]:
    if not value:
        return []
    return value.split(",") if isinstance(value, str) else [*value] if isinstance(value, list | tuple) else [value]


def _value(value: Any) -> Any:
    """A parameter from the command line as YAML would have it."""
    return [*value] if isinstance(value, tuple) else value
