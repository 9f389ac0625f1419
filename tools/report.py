"""``report``: one HTML page about a merge, complete in itself: what was merged, how good it is, how it looks, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from tools.bundle import Bundle
from tools.errors import UserError, at_least
from tools.labels import renamed_labels
from tools.lineage import backbone_sha256, file_sha256
from tools.merge import split_paths
from tools.output import complete_output
from tools.recipe import Recipe
from tools.task_vector import TaskVector
from tools.weights_file import WeightsFile


def report(
    bundle: str,
    output: str,
    evaluation: str = "",
    search: str = "",
    flatness: str = "",
    dataset_dir: str | Sequence[str] = (),
    vectors: str | Sequence[str] = (),
    cases: int = 4,
    labels: object = None,
    overwrite: bool = False,
) -> None:
    """Write one HTML page about a merged bundle; it opens from disk and loads nothing.

    Without the folders below, their parts are left out, and the page says which command gives them.

    Args:
        bundle: the merged bundle.
        output: HTML file to write.
        evaluation: output of evaluate, with this bundle among those that were evaluated.
        search: output of search.
        flatness: output of flatness.
        dataset_dir: nnU-Net datasets that were evaluated on, separated by commas; for slices.
        vectors: the task vectors, separated by commas; default: where the bundle's recipe says.
        cases: how many cases are shown as slices.
        labels: the dataset's labels for channels that are called otherwise, as for evaluate: "{liver: 6}".
        overwrite: replace the output if it exists.
    """
    from tools.report_page.agreement import agreement_section
    from tools.report_page.coefficients import coefficients_section
    from tools.report_page.evaluation import Evaluation
    from tools.report_page.landscape import landscape_section
    from tools.report_page.lineage import lineage_section
    from tools.report_page.page import Missing, Section, render
    from tools.report_page.scores import key_figures, scores_section
    from tools.report_page.slices import slices_section

    at_least(1, cases=cases)
    with complete_output(output, overwrite) as page:
        subject = Bundle(bundle)
        lineage = _lineage(subject)
        model_sha256 = file_sha256(subject.weights().path)
        known, start = _parents(subject, lineage, split_paths(vectors))
        datasets, renamed = split_paths(dataset_dir), renamed_labels(labels, [subject])
        results = Evaluation.read(evaluation, str(lineage["pretrained"]), subject) if evaluation else None
        parts: list[Section | Missing] = [
            scores_section(results)
            if results
            else Missing(
                "Dice by task", f"python -m tools evaluate --bundle {bundle},<specialists> …, then --evaluation"
            ),
            slices_section(subject, results, datasets, cases, renamed)
            if results and datasets
            else Missing("Slices", "--dataset_dir <the dataset that was evaluated on>, with --evaluation"),
            agreement_section(known, start)
            if len(known) > 1
            else Missing("Agreement of the task vectors", "--vectors <two or more task vectors of this merge>"),
            coefficients_section(search)
            if search
            else Missing("Coefficients", "python -m tools search …, then --search"),
            landscape_section(flatness)
            if flatness
            else Missing("Loss landscape", "python -m tools flatness …, then --flatness"),
            lineage_section(subject, lineage, known, model_sha256),
        ]
        page.write_text(
            render(
                str(subject.metadata.get("name") or subject.name),
                _lede(lineage, results.where if results else ""),
                key_figures(results) if results else [],
                [part for part in parts if isinstance(part, Section)],
                [part for part in parts if isinstance(part, Missing)],
            )
        )
        size = page.stat().st_size
    left_out = [part.title for part in parts if isinstance(part, Missing)]
    print(f"{output}: {size / 1e6:.1f} MB" + (f"; not in it: {', '.join(left_out)}" if left_out else ""))


def _lineage(bundle: Bundle) -> Mapping[str, Any]:
    """What a merged bundle was made of.

    Raises:
        UserError: it is no merged bundle, or its metadata are not as ``merge`` writes them.
    """
    lineage = bundle.metadata.get("lineage")
    if not isinstance(lineage, dict) or "vectors" not in lineage:
        raise UserError(f"{bundle.path} is no merged bundle: its metadata have no lineage with task vectors")
    where = f"{bundle.path}/configs/metadata.json: lineage"
    for name in ("method", "pretrained", "pretrained_sha256"):
        if not isinstance(lineage.get(name), str):
            raise UserError(f"{where}#{name} is missing; python -m tools verify says what else is wrong")
    vectors = lineage["vectors"]
    whole = isinstance(vectors, list) and all(
        isinstance(v, dict) and {"task", "sha256", "labels"} <= set(v) for v in vectors
    )
    if not whole or not isinstance(lineage.get("parameters", {}), dict):
        raise UserError(f"{where} is not as merge writes it; python -m tools verify says what is wrong")
    return lineage


def _parents(
    bundle: Bundle, lineage: Mapping[str, Any], named: Sequence[str]
) -> tuple[list[TaskVector], WeightsFile | None]:
    """Those of the merge's task vectors that are there, and the weights of its starting point if they are.

    Args:
        bundle: the merge.
        lineage: of its metadata.
        named: files of task vectors; where the recipe says, if there are none.

    Raises:
        UserError: a named file is no parent of the merge.
    """
    parents = {vector["sha256"] for vector in lineage["vectors"]}
    recipe, vectors = None, []
    with suppress(UserError):  # a bundle that was sent alone has its recipe, but not what is named in it
        recipe = Recipe.read(bundle.path / "docs" / "recipe.yaml")
    if named:
        vectors = [TaskVector(path) for path in named]
        for path, vector in zip(named, vectors, strict=True):
            if vector.sha256 not in parents:
                raise UserError(
                    f"{path} (task {vector.task}) is none of the task vectors that {bundle.path} was merged from"
                )
    else:
        for path in recipe.vectors if recipe else []:
            with suppress(UserError):
                vectors.append(TaskVector(path))
        vectors = [vector for vector in vectors if vector.sha256 in parents]
    start = None
    with suppress(UserError):
        weights = Bundle(recipe.pretrained).weights() if recipe and vectors else None
        if weights and backbone_sha256(weights, vectors[0].facts.structure) == lineage["pretrained_sha256"]:
            start = weights
    return vectors, start


def _lede(lineage: Mapping[str, Any], where: str) -> str:
    count = len(lineage["vectors"])
    return (
        f"One model, merged from {count} task vector{'s' if count != 1 else ''} and the starting point {lineage['pretrained']}"
        + (f"; scored on {where}." if where else ".")
    )
