"""``edit``: add, remove or re-weight tasks of a merged bundle, from the task vectors that it was made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from tools.bundle import Bundle
from tools.errors import UserError, nearest
from tools.merge import merge_recipe, split_paths
from tools.merge_methods import METHODS
from tools.network import matches
from tools.recipe import Recipe
from tools.task_vector import TaskVector


def edit(
    bundle: str,
    output: str,
    add: str | Sequence[str] = (),
    remove: str | Sequence[str] = (),
    overwrite: bool = False,
    **parameters: object,
) -> None:
    """Make a merged bundle anew with other tasks or other weights; the result is that of merging from scratch.

    Args:
        bundle: the merged bundle; its recipe says where its starting point and task vectors are.
        output: folder of the new bundle; with --overwrite it may be the old one.
        add: task vector files, separated by commas; their labels come last.
        remove: names of tasks, separated by commas.
        overwrite: replace the output if it exists.
        parameters: of the merge method, each a flag: --scale 0.3 for all tasks, or --scale "{spleen: 0.2}" for some.
    """
    merged = Bundle(bundle)
    path = merged.path / "docs" / "recipe.yaml"
    if not path.is_file():
        raise UserError(f"{bundle} is not a merged bundle: it has no docs/recipe.yaml")
    recipe = Recipe.read(path)
    tasks = _recorded_tasks(merged, recipe)
    removed = split_paths(remove)
    for task in removed:
        if task not in tasks:
            raise UserError(f"{bundle} has no task {task!r}{nearest(task, tasks)}; it has {', '.join(tasks)}")
    values = {name: _by_task(value, list(tasks)) for name, value in recipe.parameters.items()}
    kept = {task: vector for task, vector in tasks.items() if task not in removed}
    added = {TaskVector(vector).task: vector for vector in split_paths(add)}
    for task in added:
        if task in kept:
            raise UserError(f"{bundle} has a task {task!r} already; --remove it first")
    everything = {**kept, **added}
    if not everything:
        raise UserError("no task would be left")
    for name, value in parameters.items():
        value = yaml.safe_load(value) if isinstance(value, str) else value
        values[name] = _reweighted(name, value, values.get(name), recipe.method, everything)
    new = {name: _as_parameter(name, value, everything, recipe.method) for name, value in values.items()}
    overrides = [
        {**override, "parameters": _carried_over(override["parameters"], list(tasks), everything, recipe.parameters)}
        for override in recipe.overrides
    ]
    for name in parameters:
        _check_free(name, recipe, path)
    changes = {"vectors": list(everything.values()), "parameters": new, "overrides": overrides}
    merge_recipe(replace(recipe, **changes), output, overwrite=overwrite)
    if "recalibrated" in merged.metadata["lineage"]:
        print(f"{bundle} was recalibrated, which a merge undoes: run recalibrate again")


def _check_free(parameter: str, recipe: Recipe, path: Path) -> None:
    """Refuse to change a parameter that overrides set for every tensor: nothing would change, as in what ``distil`` made."""
    sets = [override["tensors"] for override in recipe.overrides if parameter in override["parameters"]]
    names = TaskVector(recipe.vectors[0]).weights
    if sets and all(any(matches(name, pattern) for pattern in sets) for name in names):
        raise UserError(
            f"{path} sets {parameter} for every tensor by its overrides, so that --{parameter} would change nothing: change "
            "those, and merge --recipe"
        )


def _recorded_tasks(merged: Bundle, recipe: Recipe) -> dict[str, str]:
    """The bundle's task vectors by task, after checking that the files are still those.

    Raises:
        UserError: the bundle is not a merged one, or a file is another one now.
    """
    recorded = merged.metadata.get("lineage", {}).get("vectors", [])
    if len(recorded) != len(recipe.vectors):
        raise UserError(f"{merged.path}: its recipe and its metadata do not name the same task vectors")
    for path, facts in zip(recipe.vectors, recorded, strict=True):
        if TaskVector(path).sha256 != facts["sha256"]:
            raise UserError(f"{path} is not the task vector that was merged into {merged.path} as {facts['task']}")
    return {facts["task"]: path for path, facts in zip(recipe.vectors, recorded, strict=True)}


def _carried_over(
    parameters: Mapping[str, Any], before: Sequence[str], after: Mapping[str, str], general: Mapping[str, Any]
) -> dict[str, Any]:
    """An override's parameters for other tasks: a task keeps its values, and a new one gets the recipe's own where that has one.

    Raises:
        UserError: the override has a value for each task, and the recipe none for all.
    """
    carried = dict(parameters)
    for name, value in parameters.items():
        if isinstance(value, list):
            old, new = dict(zip(before, value, strict=True)), general.get(name)
            missing = [task for task in after if task not in old]
            if missing and not isinstance(new, int | float):
                raise UserError(
                    f"the recipe's overrides have a {name} for each task, but none for {', '.join(missing)}"
                )
            carried[name] = [old.get(task, new) for task in after]
    return carried


def _by_task(value: Any, tasks: Sequence[str]) -> Any:
    return dict(zip(tasks, value, strict=True)) if isinstance(value, list) else value


def _reweighted(name: str, value: Any, old: Any, method: str, tasks: Mapping[str, str]) -> Any:
    """A parameter with new values for some tasks."""
    if not isinstance(value, dict):
        return list(value) if isinstance(value, tuple) else value
    value = {str(task): number for task, number in value.items()}  # a name may be a number
    for task in value:
        if task not in tasks:
            raise UserError(f"--{name}: no task {task!r}{nearest(str(task), tasks)}; there are {', '.join(tasks)}")
    default = METHODS[method].defaults.get(name) if old is None else old
    before = default if isinstance(default, dict) else dict.fromkeys(tasks, default)
    return {**before, **value}


def _as_parameter(name: str, value: Any, tasks: Mapping[str, str], method: str) -> Any:
    """A value for all tasks as it is, one by task as a list in the order of the tasks."""
    if not isinstance(value, dict):
        return value
    missing = [task for task in tasks if task not in value]
    if missing:
        raise UserError(
            f'{method} has a {name} for each task, but none for {", ".join(missing)}: add --{name} "{{{missing[0]}: ...}}"'
        )
    return [value[task] for task in tasks]
