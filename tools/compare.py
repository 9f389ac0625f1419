"""``compare``: every merge method on the same task vectors, coefficients chosen on validation patients, scored on others."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from tools.bundle import Bundle, read_json
from tools.errors import UserError, nearest
from tools.lineage import file_sha256
from tools.merge import merge_recipe, split_paths
from tools.merge_methods import METHODS
from tools.recipe import Recipe
from tools.task_statistics import TaskStatistics, statistics_file
from tools.task_vector import TaskVector

SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5)
PAIRS_ONLY = ("slerp", "nuslerp")


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        title: what it is.
        dice: mean Dice by label on the test patients.
        note: the coefficient that was chosen.
    """

    title: str
    dice: Mapping[str, float]
    note: str = ""


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
    files = split_paths(vectors)
    if len(files) > 2:
        chosen = [name for name in chosen if name not in PAIRS_ONLY]
    for name in [name for name in chosen if METHODS[name].needs_statistics]:
        if not all(statistics_file(path, name).is_file() for path in files):
            print(f"{name} is left out: not every task vector has its statistics (python -m tools statistics)")
            chosen.remove(name)
    values = [float(value) for value in (scales if isinstance(scales, tuple | list) else [scales])]
    scorer = _Scorer(Path(output), dataset_dir, split_file)
    own: dict[str, float] = {}
    for path in split_paths(specialists):
        own |= scorer.bundle(Path(path), "test")
    rows = [Row("specialists", own)]
    start = Recipe(pretrained, files, "task_arithmetic", {"scale": 0.0})
    rows.append(Row("starting point + new heads (λ = 0)", scorer.recipe(start, "test")))
    rows += [Row(Path(path).name, scorer.bundle(Path(path), "test")) for path in split_paths(others)]
    for name in chosen:
        tunable = "scale" in METHODS[name].parameters
        candidates = [
            Recipe(pretrained, files, name, {"scale": v} if tunable else {}) for v in (values if tunable else [0])
        ]
        if tunable:
            means = [_mean(scorer.recipe(candidate, "val")) for candidate in candidates]
            best = candidates[int(np.argmax(means))]
        else:
            best = candidates[0]
        scorer.keep(best)
        note = f"λ = {best.parameters['scale']:g}" if tunable else ""
        rows.append(Row(name, scorer.recipe(best, "test"), note))
        print(f"{name} {note}: mean Dice {_mean(rows[-1].dice):.3f}", flush=True)
    text = table(rows)
    (scorer.output / "results.md").write_text(text)
    facts = [{"title": row.title, "note": row.note, "dice": row.dice} for row in rows]
    (scorer.output / "results.json").write_text(json.dumps(facts, indent=2))
    print(f"\n{text}\nwritten: {output}/results.md, results.json, recipes/")


def table(rows: Sequence[Row]) -> str:
    """A Markdown table; the first row is the one that the others are compared with."""
    own = rows[0].dice
    labels = [label for label in own if all(label in row.dice for row in rows)]
    lines = ["| | " + " | ".join([*labels, "mean", "worst"]) + " |", "|---" * (len(labels) + 3) + "|"]
    for row in rows:
        shares = {label: row.dice[label] / max(own[label], 1e-6) for label in labels}
        cells = [
            f"{row.dice[label]:.3f}" + (f" ({shares[label]:.2f})" if row is not rows[0] else "") for label in labels
        ]
        mean = np.mean([row.dice[label] for label in labels])
        cells.append(f"{mean:.3f}" + (f" ({np.mean(list(shares.values())):.2f})" if row is not rows[0] else ""))
        cells.append(f"{min(shares.values()):.2f}" if row is not rows[0] else "")
        lines.append(f"| {row.title}{f' ({row.note})' if row.note else ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


class _Scorer:
    """Mean Dice of bundles and recipes; what an earlier run scored is not scored again."""

    def __init__(self, output: Path, dataset_dir: str, split_file: str) -> None:
        from tools.evaluate import find_cases

        self.output = output
        self.dataset_dir = dataset_dir
        self.cases = {part: find_cases(dataset_dir, part, split_file, 0) for part in ("val", "test")}
        (output / "recipes").mkdir(parents=True, exist_ok=True)
        self.path = output / "scores.json"
        self.known: dict[str, dict[str, float]] = read_json(self.path) if self.path.is_file() else {}

    def recipe(self, recipe: Recipe, part: str) -> dict[str, float]:
        vectors = [TaskVector(path) for path in recipe.vectors]
        inputs = [vector.sha256 for vector in vectors]
        if METHODS[recipe.method].needs_statistics:
            inputs += [TaskStatistics(vector, recipe.method).sha256 for vector in vectors]
        how = {name: value for name, value in recipe.as_dict().items() if name not in ("pretrained", "vectors")}
        key = json.dumps([how, inputs, self._cases_key(part)], sort_keys=True)
        if key not in self.known:
            with tempfile.TemporaryDirectory(dir=self.output) as folder:
                merged = Path(folder) / "merged"
                merge_recipe(recipe, merged, quiet=True)
                self._remember(key, self._score(Bundle(merged), part))
        return self.known[key]

    def bundle(self, path: Path, part: str) -> dict[str, float]:
        bundle = Bundle(path)
        bundle.weights()
        key = json.dumps([file_sha256(bundle.model_file), self._cases_key(part)])
        if key not in self.known:
            self._remember(key, self._score(bundle, part))
        return self.known[key]

    def keep(self, recipe: Recipe) -> None:
        """Write a recipe, so that its row can be repeated."""
        folder = self.output / "recipes"
        text = yaml.safe_dump(recipe.relative_to(folder).as_dict(), sort_keys=False)
        (folder / f"{recipe.method}.yaml").write_text(text)

    def _cases_key(self, part: str) -> list[str]:
        return [str(Path(self.dataset_dir).resolve()), *self.cases[part]]

    def _score(self, bundle: Bundle, part: str) -> dict[str, float]:
        from tools.evaluate import score_bundle, summarise

        with tempfile.TemporaryDirectory() as folder:
            scores = score_bundle(bundle, self.dataset_dir, self.cases[part], Path(folder) / "label_maps", {})
        means = summarise(scores)[bundle.name]
        return {label: value for label, value in means.items() if label != "mean"}

    def _remember(self, key: str, scores: dict[str, float]) -> None:
        self.known[key] = scores
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.known, indent=1))
        partial.replace(self.path)


def _mean(scores: Mapping[str, float]) -> float:
    return float(np.nanmean(list(scores.values())))
