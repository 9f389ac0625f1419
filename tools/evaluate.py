"""``evaluate``: Dice per case and class on a labelled dataset, in the images' own geometry, and pictures to look at."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tools.bundle import Bundle
from tools.errors import UserError
from tools.instantiate import data_facts
from tools.labels import check_channels, parse_channels, parse_sources
from tools.lineage import file_sha256
from tools.output import complete_output


@dataclass(frozen=True)
class Score:
    """One row of dice.csv.

    Attributes:
        bundle: name of the bundle's folder.
        case: case identifier.
        label: output channel.
        dice: Dice similarity coefficient; NaN when the reference does not have the organ.
        reference_ml: volume of the organ in the reference, millilitres.
        predicted_ml: volume in the prediction, millilitres.
    """

    bundle: str
    case: str
    label: str
    dice: float
    reference_ml: float
    predicted_ml: float


def evaluate(
    bundle: str,
    dataset_dir: str,
    output: str,
    part: str = "all",
    split_file: str = "",
    fold: int = 0,
    labels: object = None,
    overlays: bool = True,
    overwrite: bool = False,
) -> None:
    """Run bundles on labelled cases and write dice.csv, summary.json, evaluation.json, label maps and one picture per case.

    Classes are matched by the label names that a bundle was trained on, so a specialist is scored on its own organ and a
    merged model on all of its own. A class that the dataset does not have is left out, and said so.

    Args:
        bundle: a bundle with weights, or several separated by commas.
        dataset_dir: nnU-Net raw dataset.
        output: folder to write.
        part: "all" (labelsTr), "Ts" (labelsTs), or a part of the split: "train", "val", "test".
        split_file: JSON file with the split; default: the dataset's splits_final.json.
        fold: index into the split.
        labels: the dataset's labels for channels that are called otherwise: "{liver: 6}".
        overlays: draw reference and predictions, one PNG per case.
        overwrite: replace the output if it exists.
    """
    bundles = (
        [Bundle(path) for path in str(bundle).split(",")] if isinstance(bundle, str) else [Bundle(b) for b in bundle]
    )
    if len({b.name for b in bundles}) != len(bundles):
        raise UserError("the bundles' folders must have different names")
    for b in bundles:
        check_channels(dataset_dir, b)
    renamed = parse_channels(labels) or {}
    cases = find_cases(dataset_dir, part, split_file, fold)
    with complete_output(output, overwrite, sign="summary.json") as folder:
        scores: list[Score] = []
        for b in bundles:
            scores += score_bundle(b, dataset_dir, cases, folder / "label_maps" / b.name, renamed)
        with (folder / "dice.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(scores[0])))
            writer.writeheader()
            writer.writerows(asdict(score) for score in scores)
        summary = summarise(scores)
        (folder / "summary.json").write_text(json.dumps(summary, indent=2))
        facts = {"dataset": data_facts(dataset_dir)["dataset"], "part": f"{len(cases)} cases ({part})"}
        facts["weights"] = {b.name: file_sha256(b.model_file) for b in bundles}
        (folder / "evaluation.json").write_text(json.dumps(facts, indent=2))
        if overlays:
            for name, case in cases.items():
                _draw(folder, bundles, name, case, dataset_dir, renamed)
    for b in bundles:
        means = summary[b.name]
        print(
            f"{b.name}: mean Dice {means['mean']:.3f} on {len(cases)} cases; "
            + ", ".join(f"{label} {value:.3f}" for label, value in means.items() if label != "mean")
        )
    print(f"written: {output}/dice.csv, summary.json, label_maps/" + (", one PNG per case" if overlays else ""))


def score_bundle(
    bundle: Bundle, dataset_dir: str | Path, cases: Mapping[str, Mapping[str, Any]], label_maps: Path, labels: Mapping
) -> list[Score]:
    """Segment cases with a bundle, write its label maps and score the classes that the dataset has.

    Args:
        bundle: with weights.
        dataset_dir: nnU-Net raw dataset.
        cases: image and label paths by case.
        label_maps: folder for one NIfTI file per case.
        labels: the dataset's labels for channels that are called otherwise.
    """
    import nibabel

    channels = matched_channels(bundle, dataset_dir, labels)
    left_out = [label for label, values in channels.items() if values is None]
    if left_out:
        print(f"{bundle.name}: not scored, because the dataset does not have them: {', '.join(left_out)}")
    label_maps.mkdir(parents=True)
    scores = []
    for name, prediction, reference, affine in segment(bundle, cases):
        nibabel.save(nibabel.Nifti1Image(prediction, affine), label_maps / f"{name}.nii.gz")
        millilitres = abs(np.linalg.det(affine[:3, :3])) / 1000
        for channel, (label, values) in enumerate(channels.items(), start=1):
            if values is None:
                continue
            predicted, truth = prediction == channel, np.isin(reference, values)
            volumes = np.sum(truth) * millilitres, np.sum(predicted) * millilitres
            scores.append(
                Score(
                    bundle.name, name, label, round(dice(predicted, truth), 6), *(round(float(v), 4) for v in volumes)
                )
            )
    return scores


def dice(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Dice similarity coefficient of two boolean masks; NaN when the reference ``truth`` is empty."""
    return float(2 * np.sum(predicted & truth) / (predicted.sum() + truth.sum())) if truth.any() else float("nan")


def segment(
    bundle: Bundle, cases: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Run a bundle's own preprocessing, inferer and postprocessing; yields case, prediction, reference and affine.

    Prediction and reference are integer arrays ``(X, Y, Z)`` on the grid of the image file.

    Raises:
        UserError: the weights do not fit the bundle's network, or a label map is not on its image's grid.
    """
    import torch
    from monai.data import MetaTensor
    from monai.transforms import Compose, EnsureChannelFirst, LoadImage
    from tqdm import tqdm

    network = bundle.network().to(memory_format=torch.channels_last_3d)
    device = next(network.parameters()).device
    with bundle.code(), torch.inference_mode():
        parser = bundle.parser()
        parser["postprocessing"] = {
            "_target_": "Compose",
            "transforms": [
                t for t in bundle.inference["postprocessing"]["transforms"] if "SaveImage" not in t["_target_"]
            ],
        }
        inferer = parser.get_parsed_content("inferer")
        preprocessing = parser.get_parsed_content("preprocessing")
        postprocessing = parser.get_parsed_content("postprocessing")
        load_label = Compose([LoadImage(), EnsureChannelFirst()])
        for name, case in tqdm(cases.items(), desc=bundle.name, disable=None, leave=False):
            data = preprocessing({"image": case["image"]})
            output = inferer(data["image"][None].to(device), network)[0]
            data["pred"] = MetaTensor(output.cpu(), meta=getattr(output, "meta", data["image"].meta))
            prediction = postprocessing(data)["pred"]
            reference = load_label(case["label"])
            same_grid = prediction.shape == reference.shape and np.allclose(
                prediction.affine, reference.affine, atol=1e-3
            )
            if not same_grid:
                raise UserError(f"case {name}: the label map is not on the grid of its image")
            yield (
                name,
                np.asarray(prediction[0]).astype(np.uint8 if len(bundle.labels) < 256 else np.uint16),
                np.asarray(reference[0]).round().astype(np.int32),
                np.asarray(reference.affine),
            )


def summarise(scores: Sequence[Score]) -> dict[str, dict[str, float]]:
    """Mean Dice over cases for each bundle and label, and the mean over labels; absent organs do not count."""
    summary: dict[str, dict[str, float]] = {}
    for score in scores:
        summary.setdefault(score.bundle, {}).setdefault(score.label, [])
        if not np.isnan(score.dice):
            summary[score.bundle][score.label].append(score.dice)
    for means in summary.values():
        for label, values in means.items():
            means[label] = float(np.mean(values)) if values else float("nan")
        means["mean"] = float(np.nanmean(list(means.values())))
    return summary


def find_cases(dataset_dir: str | Path, part: str, split_file: str, fold: int) -> dict[str, dict]:
    """Image and label paths by case, of a part of a split.

    Raises:
        UserError: the dataset or the split is not there, or the part has no cases.
    """
    from tools.bundle_code.nnunet_data import all_cases, split_cases

    try:
        if part in ("all", "Ts"):
            return all_cases(dataset_dir, "Tr" if part == "all" else "Ts")
        if split_file and not Path(split_file).is_file():
            raise UserError(f"{split_file} not found")
        wanted = split_cases(dataset_dir, part, split_file or None, fold)
        named = all_cases(dataset_dir)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from None
    if not wanted:
        raise UserError(f"part {part!r} of the split has no cases to evaluate")
    return {name: case for name, case in named.items() if case in wanted}


def matched_channels(bundle: Bundle, dataset_dir: str | Path, labels: Mapping) -> dict[str, list[int] | None]:
    """The dataset's voxel values for each channel; None where it does not have them."""
    from tools.bundle_code.nnunet_data import label_values

    matched: dict[str, list[int] | None] = {}
    for label, sources in bundle.label_map.items():
        candidates = [parse_sources(labels[label])] if label in labels else [sources, [label]]
        matched[label] = None
        for candidate in candidates:
            try:
                matched[label] = label_values(dataset_dir, {label: candidate})[0]
                break
            except ValueError:
                continue
    if all(values is None for values in matched.values()):
        raise UserError(
            f"{dataset_dir} has none of the labels of {bundle.path} ({', '.join(matched)}); map them by --labels"
        )
    return matched


def _draw(
    folder: Path,
    bundles: Sequence[Bundle],
    name: str,
    case: Mapping[str, Any],
    dataset_dir: str | Path,
    labels: Mapping,
) -> None:
    import nibabel
    from monai.transforms import LoadImage

    from tools.pictures import draw_case

    image = LoadImage(ensure_channel_first=True)(case["image"])
    truth = np.asarray(LoadImage(ensure_channel_first=True)(case["label"])[0])
    reference: dict[str, np.ndarray] = {}
    columns = {"reference": reference}
    for bundle in bundles:
        channels = matched_channels(bundle, dataset_dir, labels)
        label_map = np.asarray(nibabel.load(folder / "label_maps" / bundle.name / f"{name}.nii.gz").dataobj)
        columns[bundle.name] = {label: label_map == i for i, label in enumerate(channels, start=1)}
        reference |= {label: np.isin(truth, values) for label, values in channels.items() if values is not None}
    draw_case(np.asarray(image[0]), np.asarray(image.affine), columns, folder / f"{name}.png", title=name)
