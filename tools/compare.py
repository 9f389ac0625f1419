"""``compare``: every merge method on the same task vectors, coefficients chosen on validation patients, scored on others."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tools.bundle import Bundle
from tools.errors import UserError, nearest, numbers
from tools.evaluate import owners, score_bundle, separate_cases
from tools.lineage import case_sha256, facts_sha256
from tools.merge import split_paths
from tools.merge_methods import METHODS
from tools.merge_scorer import MergeScorer
from tools.recipe import Recipe
from tools.scores import Score, read_scores, write_scores
from tools.summary import mean_dice, summarise
from tools.summary_table import SPECIALISTS, markdown
from tools.task_statistics import TaskStatistics, statistics_file
from tools.task_vector import TaskVector

SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5)
PAIRS_ONLY = ("slerp", "nuslerp")
NEW_HEADS = "starting point + new heads (λ = 0)"  # a row that is always there, as that of the specialists is
KNOWN = 0.05  # share of a specialist's Dice that new heads reach; an average keeps little of what is below (docs/results.md)


def compare(
    pretrained: str,
    vectors: str | Sequence[str],
    specialists: str | Sequence[str],
    dataset_dir: str,
    split_file: str,
    output: str,
    methods: str | Sequence[str] = (),
    scales: Sequence[float] = SCALES,
    others: str | Sequence[str] = (),
) -> None:
    """Merge by every method, choose each one's λ on the validation patients, and write the table for the test patients.

    A stopped run goes on. Each row can be repeated: its recipe is in the folder ``recipes``.

    Args:
        pretrained: the starting point, a bundle with weights.
        vectors: task vector files, separated by commas.
        specialists: the bundles that they come from, for the first row and the normalized accuracy.
        dataset_dir: nnU-Net raw dataset.
        split_file: JSON file with the split; its parts "val" and "test" are used.
        output: folder for results.md, results.json and the recipes.
        methods: merge methods, separated by commas; default: all for which there is what they need.
        scales: values of λ to choose from, for the methods that have one.
        others: more bundles to score, for example one that was trained on all tasks together.
    """
    chosen = split_paths(methods) or list(METHODS)
    for name in chosen:
        if name not in METHODS:
            raise UserError(f"no merge method {name!r}{nearest(name, METHODS)}; there are {', '.join(METHODS)}")
    trained = {Path(path).name: path for path in split_paths(others)}
    if {*trained} & {*METHODS, SPECIALISTS, NEW_HEADS} or len(trained) < len(split_paths(others)):
        raise UserError(
            f"the folders of --others must have names that differ, and are neither {SPECIALISTS!r} nor a merge method's: "
            "they name the rows"
        )
    if Path(output).exists() and not Path(output).is_dir():
        raise UserError(f"{output} is a file, and --output is to be a folder")
    files = split_paths(vectors)
    if len(files) > 2:
        chosen = [name for name in chosen if name not in PAIRS_ONLY]
    for name in [name for name in chosen if METHODS[name].needs_statistics]:
        if not all(statistics_file(path, name).is_file() for path in files):
            print(f"{name} is left out: not every task vector has its statistics (python -m tools statistics)")
            chosen.remove(name)
    values = numbers("scales", scales)
    _check_owners([Bundle(path) for path in split_paths(specialists)])
    scorer = _Scorer(Path(output), dataset_dir, split_file)
    own = [score for path in split_paths(specialists) for score in scorer.bundle(Path(path), "test")]
    rows = {SPECIALISTS: own}
    start = Recipe(pretrained, files, "task_arithmetic", {"scale": 0.0})
    rows[NEW_HEADS] = scorer.recipe(start, "test")
    rows |= {name: scorer.bundle(Path(path), "test") for name, path in trained.items()}
    notes: dict[str, str] = {}
    for name in chosen:
        tunable = "scale" in METHODS[name].parameters
        candidates = [
            Recipe(pretrained, files, name, {"scale": v} if tunable else {}) for v in (values if tunable else [0])
        ]
        if tunable:
            means = [mean_dice(scorer.recipe(candidate, "val")) for candidate in candidates]
            if np.isnan(means).all():
                raise UserError(f"no case of the part val of {split_file} has an organ of a task, so none can choose λ")
            best = candidates[int(np.argmax(means))]
            notes[name] = f"λ = {best.parameters['scale']:g}"
        else:
            best = candidates[0]
        scorer.keep(best)
        rows[name] = scorer.recipe(best, "test")
        print(f"{name} {notes.get(name, '')}: mean Dice {mean_dice(rows[name]):.3f}", flush=True)
    scores = [replace(score, bundle=title) for title, found in rows.items() for score in found]
    summary = summarise(scores, {score.label: SPECIALISTS for score in own})
    shares = summary.normalized_accuracy.get(NEW_HEADS, {"labels": {}})["labels"]
    text = markdown(summary, notes=notes) + unknown_organs(shares)
    (scorer.output / "results.md").write_text(text)
    (scorer.output / "results.json").write_text(
        json.dumps(summary.as_dict() | {"notes": notes}, indent=2, allow_nan=False)
    )
    print(f"\n{text}\nwritten: {output}/results.md, results.json, recipes/")


def unknown_organs(shares: Mapping[str, float]) -> str:
    """Which organs the starting point does not know, and what to do about them; nothing if it knows all.

    Args:
        shares: by label, of the specialist's Dice, what new heads on the starting point reach.
    """
    unknown = [label for label, share in shares.items() if share < KNOWN]
    if not unknown:
        return ""
    return (
        f"\n\nThe starting point with new heads reaches less than {KNOWN:.0%} of the specialists on {', '.join(unknown)}: "
        "features that it does not have, of which an average seldom keeps anything. `python -m tools pseudo_labels` makes one "
        "model of the specialists all the same."
    )


def _check_owners(specialists: Sequence[Bundle]) -> None:
    """Refuse two specialists of one label: which of them is the others' measure?"""
    for label, names in owners(specialists).items():
        if len(names) > 1:
            raise UserError(f"--specialists: {' and '.join(names)} both have a label {label!r}")


class _Scorer:
    """Dice of bundles and recipes; what an earlier run scored is not scored again."""

    def __init__(self, output: Path, dataset_dir: str, split_file: str) -> None:
        self.output = output
        self.dataset_dir = dataset_dir
        self._merges: MergeScorer | None = None
        validation, test = separate_cases(dataset_dir, "val", "test", split_file, 0)
        self.cases = {"val": validation, "test": test}
        self.contents = {part: _contents(dataset_dir, cases) for part, cases in self.cases.items()}
        for folder in ("recipes", "scores"):
            (output / folder).mkdir(parents=True, exist_ok=True)

    def recipe(self, recipe: Recipe, part: str) -> list[Score]:
        """What ``merge`` and ``evaluate`` would find, without writing the bundle."""
        vectors = [TaskVector(path) for path in recipe.vectors]
        inputs = [Bundle(recipe.pretrained).inference, *(vector.sha256 for vector in vectors)]
        if METHODS[recipe.method].needs_statistics:
            inputs += [TaskStatistics(vector, recipe.method).sha256 for vector in vectors]
        how = {name: value for name, value in recipe.as_dict().items() if name not in ("pretrained", "vectors")}
        scale = f"_{recipe.parameters['scale']:g}" if "scale" in recipe.parameters else ""
        path = self._path(f"{recipe.method}{scale}", part, [how, inputs])
        if not path.is_file():
            self._merges = self._merges or MergeScorer(recipe, self.dataset_dir)
            scores = self._merges.scores(recipe, self.cases[part])
            write_scores(path, [score for _, found in scores for score in found])
        return read_scores(path)

    def bundle(self, folder: Path, part: str) -> list[Score]:
        bundle = Bundle(folder)
        path = self._path(bundle.name, part, [bundle.sha256(), bundle.label_map])
        if not path.is_file():
            with tempfile.TemporaryDirectory() as temporary:
                write_scores(path, score_bundle(bundle, self.dataset_dir, self.cases[part], Path(temporary), {}))
        return read_scores(path)

    def keep(self, recipe: Recipe) -> None:
        """Write a recipe, so that its row can be repeated."""
        folder = self.output / "recipes"
        text = yaml.safe_dump(recipe.relative_to(folder).as_dict(), sort_keys=False)
        (folder / f"{recipe.method}.yaml").write_text(text)

    def _path(self, name: str, part: str, made_of: Sequence[Any]) -> Path:
        """The file for the scores of something, whose name changes with what it is made of and with the cases."""
        facts = [*made_of, self.contents[part]]
        return self.output / "scores" / f"{name}_{part}_{facts_sha256(facts)[:16]}.csv"


def _contents(dataset_dir: str, cases: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What scores on cases depend on: their files' contents, and what the dataset calls its labels."""
    from tools.bundle_code.nnunet_data import read_labels

    return {"labels": read_labels(dataset_dir), **{f"case {name}": case_sha256(case) for name, case in cases.items()}}
