"""``card``: a bundle's model card, docs/README.md: what it was trained on, how it was made, what it was measured to do."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.bundle import Bundle, read_json
from tools.errors import UserError
from tools.instantiate import update_metadata
from tools.markdown import table
from tools.scores import read_scores
from tools.summary import BundleSummary, Estimate, summarise

MEASURED = "## Measured results\n"


def card(bundle: str, results: str) -> None:
    """Put the results of ``evaluate`` into a bundle's model card, docs/README.md, and into eval_metrics of its metadata.

    Args:
        bundle: that was evaluated; results that it already has are replaced.
        results: the output of evaluate.

    Raises:
        UserError: the results are not there, or are of another bundle or of other weights.
    """
    subject, folder = Bundle(bundle), Path(results)
    if not (folder / "evaluation.json").is_file() or not (folder / "scores.csv").is_file():
        raise UserError(f"{results} is no output of evaluate: it has no evaluation.json and scores.csv")
    evaluation = read_json(folder / "evaluation.json")
    name = evaluated_as(subject, evaluation)
    if not name:
        raise UserError(f"{results} has no results of {subject.path}: evaluate the bundle as it is now")
    scores = [score for score in read_scores(folder / "scores.csv") if score.bundle == name]
    summary = summarise(scores).bundles[name]
    if not summary.mean["dice"].cases:
        raise UserError(f"{results} has no Dice of {subject.path}: the reference has none of its organs")
    means = {label: round(v["dice"].mean, 4) for label, v in summary.labels.items() if v["dice"].cases}
    where = f"{evaluation['dataset']}, {evaluation['part']}"
    update_metadata(
        subject.path,
        eval_metrics={"mean_dice": round(summary.mean["dice"].mean, 4), "dice": means, "measured_on": where},
    )
    path = subject.path / "docs" / "README.md"
    text = path.read_text() if path.is_file() else f"# {subject.name}\n"
    path.write_text(_with_results(text, where, summary, evaluation["tolerance_mm"]))
    print(f"{path}: Dice of {len(means)} labels on {where}")


def evaluated_as(subject: Bundle, evaluation: Mapping[str, Any]) -> str:
    """The name that a bundle, as it is now, has in the evaluation.json of ``evaluate``; empty if it is not there."""
    known, own = evaluation.get("bundles"), subject.sha256()
    same = [name for name, sha256 in known.items() if sha256 == own] if isinstance(known, dict) else []
    return subject.name if subject.name in same else "".join(same[:1])


def write_card(folder: Path, lineage: Mapping[str, Any], label_map: Mapping[str, object]) -> None:
    """The card of a merged bundle.

    Args:
        folder: the bundle.
        lineage: as in its metadata.
        label_map: its output channels.
    """
    parameters = ", ".join(f"{name} = {value}" for name, value in lineage["parameters"].items()) or "none"
    if lineage.get("overrides"):
        parameters += f"; others for some tensors by {lineage['overrides']} overrides of the recipe"
    vectors = table(
        ["task vector", "labels", "fine-tuned on", "SHA-256"],
        (
            [v["task"], ", ".join(v["labels"]), described(v.get("data", {})), f"`{v['sha256'][:16]}…`"]
            for v in lineage["vectors"]
        ),
    )
    channels = "\n".join(f"{i}. {label}" for i, label in enumerate(label_map, start=1))
    start = described(lineage.get("pretrained_data", {}))
    (folder / "docs" / "README.md").write_text(
        f"# Merged model\n\nMerged by **{lineage['method']}** (parameters: {parameters}) onto the starting point "
        f"**{lineage['pretrained']}** (`{lineage['pretrained_sha256'][:16]}…`), trained on {start}.\n\n"
        f"{vectors}\n\n"
        f"Labels in the output (0 is background):\n\n{channels}\n\n"
        "Segment a folder of images:\n\n```bash\npython -m monai.bundle run --config_file configs/inference.json "
        "--bundle_root . --dataset_dir <images> --output_dir <label maps>\n```\n\n"
        "The recipe is in `recipe.yaml`, the full lineage in `configs/metadata.json`.\n\n"
        "## Limits\nResearch use; not for diagnosis. It was trained on the data above and on nothing else: on other scanners, "
        "protocols, ages and diseases it may fail without a sign. Its terms of use are those of all data and weights that "
        "it was made from; look at the licences above before commercial use.\n"
    )


def described(data: Mapping[str, str]) -> str:
    """A dataset as a card names it: with its licence and source, as far as they were recorded."""
    if not data:
        return "data that was not recorded"
    parts = [f"licence {data['licence']}" if data.get("licence") else "no licence stated", data.get("reference", "")]
    return f"{data.get('dataset', 'a dataset without a name')} ({'; '.join(part for part in parts if part)})"


def _with_results(text: str, where: str, summary: BundleSummary, tolerance: float) -> str:
    """A card with this table of results; it takes the place of an older one, else stands before the limits or at the end."""
    rows = [
        [
            label,
            f"{v['dice'].mean:.3f}",
            _interval(v["dice"]),
            f"{v['nsd'].mean:.3f}",
            f"{v['hd95_mm'].mean:.1f}",
            v["dice"].cases,
        ]
        for label, v in summary.labels.items()
        if v["dice"].cases
    ]
    columns = ["label", "Dice", "95 % interval", f"surface Dice, {tolerance:g} mm", "HD95, mm", "cases"]
    section = (
        f"{MEASURED}On {where}, by `python -m tools evaluate`; mean Dice over labels {summary.mean['dice'].mean:.3f}.\n\n"
        f"{table(columns, rows)}\n\n"
    )
    if MEASURED in text:
        return re.sub(
            rf"{MEASURED}.*?(?=^## |^---|\Z)", lambda _: section, text, count=1, flags=re.DOTALL | re.MULTILINE
        )
    place = re.search(r"^(## Limits|---)$", text, re.MULTILINE)
    position = place.start() if place else len(text)
    gap = "" if text[:position].endswith("\n\n") else "\n"
    return text[:position] + gap + section + text[position:]


def _interval(value: Estimate) -> str:
    return "too few cases" if math.isnan(value.low) else f"{value.low:.3f} to {value.high:.3f}"
