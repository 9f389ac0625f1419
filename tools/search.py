"""``search``: the coefficients of a merge, chosen on validation patients, and what they are worth on others.

Every combination of given values, as the λ planes of U-Net Transplant (Lumetti et al., MICCAI 2025), or Optuna's TPE for many
coefficients. Coefficients that are learned by gradients are what ``distil`` makes.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tools.bundle import Bundle, read_json
from tools.errors import UserError, at_least, naming, nearest
from tools.evaluate import separate_cases
from tools.lineage import backbone_sha256, case_sha256, facts_sha256, file_sha256
from tools.merge import check_vectors, merge_recipe, split_paths
from tools.merge_engine import MergeEngine
from tools.merge_scorer import CaseDice, MergeScorer, case_dice, mean_dice
from tools.output import complete_output
from tools.recipe import Recipe
from tools.search_results import draw_heat_map, facts_of, held_out, write_trials
from tools.search_space import LARGEST_GRID, SearchSpace, Value
from tools.search_study import ENOUGH_CASES, Row, Search, open_study, shown
from tools.task_vector import TaskVector

SAMPLERS = ("tpe", "grid")
LEARNED = {"supervised": "labels", "entropy": "entropy", "distil": "teachers"}  # what distil calls them
TRIALS = 100
POINTS = 21  # of each coefficient: the planes of U-Net Transplant
TITLES = {"default": "default", "equal_share": "1/T", "best": "best"}  # of what search.json calls so
SAME = 1e-3  # Dice by which another processor may round differently


def search(
    dataset_dir: str,
    output: str,
    pretrained: str = "",
    vectors: str | Sequence[str] = (),
    method: str = "task_arithmetic",
    recipe: str = "",
    sampler: str = "tpe",
    space: object = None,
    per_task: object = None,
    groups: str | Sequence[str] = (),
    points: int = POINTS,
    trials: int = 0,
    timeout: float = 0,
    prune: bool = True,
    part: str = "val",
    test_part: str = "",
    split_file: str = "",
    fold: int = 0,
    labels: object = None,
    scans: int = 0,
    storage: str = "",
    study: str = "search",
    seed: int = 0,
) -> None:
    """Choose the coefficients of a merge by the Dice of validation cases, and write the best recipe.

    First the method's default λ and 1/T are tried, so the best is never worse than they are on the validation cases. A stopped
    search goes on when it is started again, and several machines that are given the same --storage search together.

    Args:
        dataset_dir: nnU-Net raw dataset.
        output: folder for best.yaml, trials.csv, search.json and, of two coefficients, heat_map.png.
        pretrained: the starting point, a bundle with weights.
        vectors: task vector files, separated by commas, in the order of the output channels.
        method: a merge method; see merge --list.
        recipe: YAML file with all of that, and what else shall stay as it is; instead of the three.
        sampler: "tpe" (Optuna's), or "grid" for all combinations.
        space: what is chosen, ranges or lists of values: "{scale: 0..2, density: [0.1, 0.2, 0.5]}", or "0..2" for the
            coefficient alone; default: the method's coefficient, from 0 to 1.
        per_task: parameters with a value for each task, separated by commas, or "none"; default: scale and weights where the
            method has one for each task.
        groups: patterns of tensors, separated by commas, such as "encoder,decoder": each gets coefficients of its own, and
            what none matches has its own too; of several that match a tensor, the last one holds.
        points: values that a grid makes of each range.
        trials: how many there shall be, those of earlier runs and other machines too; default: 100, or the whole grid.
        timeout: seconds after which no trial begins; default: none.
        prune: of tpe, with five cases or more: stop a trial that is worse than the best on the cases so far.
        part: the validation cases: a part of the split.
        test_part: also score the default and the best recipe on this part, which must not share cases with the other.
        split_file: JSON file with the split; default: the dataset's splits_final.json.
        fold: index into the split.
        labels: the dataset's labels for organs that are called otherwise: "{liver: 6}".
        scans: use only so many of the validation cases, chosen at random; default: all.
        storage: a database's URL, or a file that all machines see, to search together; default: a file in the output folder.
        study: its name in the storage.
        seed: of the sampler, and of the choice of scans.
    """
    _check_sampler(sampler)
    at_least(2, points=points)
    at_least(0, scans=scans, trials=trials, timeout=timeout)
    base = _base(recipe, pretrained, vectors, method)
    tasks, tensors, identity = _inputs(base)
    alone = None if per_task is None else [name for name in split_paths(per_task or "") if name.lower() != "none"]
    chosen = SearchSpace(base, tasks, tensors, space, alone, split_paths(groups), points if sampler == "grid" else 0)
    if sampler == "grid" and chosen.size > LARGEST_GRID and not trials:
        raise UserError(
            f"{len(chosen.coefficients)} coefficients make a grid of {chosen.size:,} points; "
            "give fewer values by --points or --space, or use --sampler tpe"
        )
    for note in chosen.notes:
        print(note)
    every, test = separate_cases(dataset_dir, part, test_part, split_file, fold)
    cases = _some(every, scans, seed)
    folder = Path(output)
    where = shown(storage) if "://" in storage else str(Path(storage).resolve()) if storage else "study.journal"
    named = {"storage": where, "name": study}
    _check_folder(folder, named, base.method)
    scorer = MergeScorer(base, dataset_dir, labels)
    if test:
        _check_organs(test, scorer.channels, test_part)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        **identity,
        "sampler": sampler,
        "space": chosen.as_dict(),
        "dataset": Path(dataset_dir).resolve().name,
        "cases": list(cases),
        "channels": scorer.channels,
        "files": facts_sha256([case_sha256(case) for case in cases.values()]),
        "inference": facts_sha256(scorer.bundle.inference),
    }
    pruned = bool(prune) and sampler == "tpe" and len(cases) >= ENOUGH_CASES
    opened = open_study(storage or str(folder / "study.journal"), study, settings, seed, bool(storage), pruned)
    print(f"{len(chosen.coefficients)} coefficients, scored on {len(cases)} of {len(every)} cases ({part})")
    left_out = [label for label, values in scorer.channels.items() if values is None]
    if left_out:
        print(f"not scored, because the dataset does not have them: {', '.join(left_out)}")
    running = Search(opened, chosen, scorer, cases, sampler == "grid")
    running.run(trials or (0 if sampler == "grid" else TRIALS), timeout)
    facts = {
        "method": base.method,
        "sampler": sampler,
        "tasks": tasks,
        "space": chosen.as_dict(),
        "study": named,
        "dataset": settings["dataset"],
        "validation": {"part": part, "cases": list(cases), "of": len(every)},
    }
    _report(folder, running, facts, (test_part, test) if test else None)


def _check_folder(folder: Path, study: Mapping[str, str], method: str) -> None:
    """Refuse a folder with the results of another search."""
    path = folder / "search.json"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, and --output is to be a folder")
    found = read_json(path) if path.is_file() else {"study": study, "method": method}
    if (found.get("study"), found.get("method")) != (study, method):
        raise UserError(
            f"{path} is of another search ({found.get('method')}, {found.get('study')}); choose another --output"
        )


def _check_sampler(sampler: str) -> None:
    if sampler in LEARNED:
        raise UserError(
            f"coefficients are learned by another command: python -m tools distil --objective {LEARNED[sampler]}"
        )
    if sampler not in SAMPLERS:
        raise UserError(f"no sampler {sampler!r}{nearest(sampler, SAMPLERS)}; there are {' and '.join(SAMPLERS)}")


def _base(recipe: str, pretrained: str, vectors: str | Sequence[str], method: str) -> Recipe:
    if recipe:
        if pretrained or vectors or method != "task_arithmetic":
            raise UserError("--recipe says what is merged and how; leave --pretrained, --vectors and --method out")
        return Recipe.read(recipe)
    if not pretrained:
        raise UserError("--pretrained (or --recipe) is missing")
    return Recipe(str(pretrained), split_paths(vectors), method)


def _inputs(base: Recipe) -> tuple[list[str], list[str], dict[str, Any]]:
    """The tasks, the names of the tensors that are merged, and what identifies the files."""
    start = Bundle(base.pretrained)
    weights, tasks = start.weights(), [TaskVector(path) for path in base.vectors]
    check_vectors(base.vectors, tasks, start, weights, base.other_start)
    engine = MergeEngine(base, weights, tasks)
    tensors = [name for name in engine.names if engine.treatment(name) in ("merged", "scaled mean")]
    how = {name: value for name, value in base.as_dict().items() if name not in ("pretrained", "vectors")}
    if base.heads:
        how["heads"] = file_sha256(base.heads)
    vectors = [task.sha256 for task in tasks]
    facts = tasks[0].facts
    pretrained = backbone_sha256(weights, facts.structure) if base.other_start else facts.pretrained_sha256
    identity = {"recipe": how, "pretrained": pretrained, "vectors": vectors}
    return [task.task for task in tasks], tensors, identity


def _check_organs(cases: Mapping[str, dict], channels: Mapping[str, Sequence[int] | None], part: str) -> None:
    """Refuse held-out cases without any of the organs, before the hours of a search."""
    from monai.transforms import LoadImage

    values = [value for found in channels.values() for value in found or ()]
    for case in cases.values():
        with naming(case["label"]):
            label = np.asarray(LoadImage()(case["label"])).round()
        if np.isin(label, values).any():
            return
    raise UserError(f"--test_part {part}: none of its cases has any of the organs {', '.join(channels)}")


def _some(cases: Mapping[str, dict], count: int, seed: int) -> dict[str, dict]:
    if not count:
        return dict(cases)
    names = list(cases)
    order = np.random.default_rng(seed).permutation(len(names))[:count]
    return {names[position]: cases[names[position]] for position in sorted(order)}


def _report(folder: Path, search: Search, facts: dict[str, Any], test: tuple[str, dict[str, dict]] | None) -> None:
    """Write everything, after merging the best recipe from its file and scoring it again."""
    space, scorer = search.space, search.scorer
    rows, best = [*search.rows()], search.best()
    marked = {name: search.row(start) for name, start in zip(TITLES, space.starts)} | {"best": best}
    labels = [label for label, values in scorer.channels.items() if values is not None]
    recipe = space.recipe(best.values)
    states = [row.state for row in rows]
    facts["trials"] = {state: states.count(state) for state in ("complete", "pruned", "failed")}
    facts["seconds"] = round(sum(row.seconds for row in rows), 1)
    facts |= {name: _facts(row) for name, row in marked.items()}
    facts["merged_again"] = facts_of(mean_dice(_merged_again(recipe, scorer, search.cases)))
    if test:
        part, cases = test
        recipes = {name: space.recipe(row.values) for name, row in marked.items()}
        files, kept = (recipe.pretrained, recipe.vectors), {"heads": recipe.heads, "other_start": recipe.other_start}
        recipes["heads_alone"] = Recipe(*files, "task_arithmetic", {"scale": 0.0}, **kept)
        scores = {
            name: {case: case_dice(found) for case, found in scorer.scores(recipe, cases)}
            for name, recipe in recipes.items()
        }
        facts["held_out"] = {"part": part, "cases": list(cases), **held_out(scores)}
    written = ["best.yaml", "trials.csv", "search.json"]
    with complete_output(folder / "best.yaml", overwrite=True) as path:
        path.write_text(yaml.safe_dump(recipe.relative_to(folder).as_dict(), sort_keys=False))
    with complete_output(folder / "trials.csv", overwrite=True) as path:
        write_trials(path, rows, [c.name for c in space.coefficients], labels)
    with complete_output(folder / "search.json", overwrite=True) as path:
        path.write_text(json.dumps(facts, indent=2))
    if len(space.coefficients) == 2 and all(isinstance(v, int | float) for v in best.values.values()):
        title = f"{facts['method']}, validation cases: {len(search.cases)}"
        complete = [row for row in rows if row.state == "complete"]
        points = {TITLES[name]: row.values for name, row in marked.items()}
        with complete_output(folder / "heat_map.png", overwrite=True) as path:
            draw_heat_map(path, complete, space.coefficients, points, title)
        written.append("heat_map.png")
    _print(facts)
    print(
        f"written: {folder}/{', '.join(written)}; python -m tools merge --recipe {folder}/best.yaml --output <bundle>"
    )


def _facts(row: Row) -> dict[str, Any]:
    return {"trial": row.number, "values": row.values, **facts_of(row.dice)}


def _merged_again(recipe: Recipe, scorer: MergeScorer, cases: Mapping[str, dict]) -> dict[str, CaseDice]:
    """Merge a recipe from a file to a bundle and score that."""
    with tempfile.TemporaryDirectory() as temporary:
        path, merged = Path(temporary) / "best.yaml", Path(temporary) / "merged"
        path.write_text(yaml.safe_dump(recipe.relative_to(path.parent).as_dict(), sort_keys=False))
        merge_recipe(Recipe.read(path), merged, quiet=True)
        return {name: case_dice(scores) for name, scores in scorer.bundle_scores(Bundle(merged), cases).items()}


def _print(facts: Mapping[str, Any]) -> None:
    trials = ", ".join(f"{count} {state}" for state, count in facts["trials"].items() if count)
    print(f"trials: {trials}")
    for name, title in TITLES.items():
        if name in facts:
            print(f"{title}: mean Dice {facts[name]['mean_dice']:.4f}, {_values(facts[name]['values'])}")
    again, found = facts["merged_again"]["mean_dice"], facts["best"]["mean_dice"]
    if math.isclose(again, found, abs_tol=SAME):
        print(f"merged from best.yaml and scored again: {again:.4f}")
    else:
        print(
            f"warning: merged from best.yaml and scored again it is {again:.4f}; "
            "did another machine, with another processor, score the trial?"
        )
    if "held_out" in facts:
        print(facts["held_out"]["statement"])


def _values(values: Mapping[str, Value]) -> str:
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )
