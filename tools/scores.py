"""Scores of label maps against their references: Dice, normalised surface Dice and HD95 by MONAI, in millimetres."""

from __future__ import annotations

import csv
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tools.errors import UserError, naming

if TYPE_CHECKING:
    from tools.bundle_code.nnunet_data import Grid


@dataclass(frozen=True)
class Score:
    """One row of scores.csv; what is not defined or was not measured is NaN, and an empty cell in the file.

    An organ that the reference does not have has neither Dice, NSD nor HD95; what was predicted is a false-positive volume. One
    that the reference has and nobody predicted has Dice 0, NSD 0 and as HD95 the diagonal of its image, than which no distance
    in it is longer.

    Attributes:
        bundle: name of the bundle's folder.
        case: case identifier.
        label: output channel.
        dice: Dice similarity coefficient.
        nsd: normalised surface Dice, the share of both surfaces that lies within a tolerance of the other one.
        hd95_mm: the larger of the 95th percentiles of the distances from each surface's voxels to the other surface.
        reference_ml: volume of the organ in the reference, millilitres.
        predicted_ml: volume in the prediction, millilitres.
    """

    bundle: str
    case: str
    label: str
    dice: float
    nsd: float
    hd95_mm: float
    reference_ml: float
    predicted_ml: float


def score_label_map(
    bundle: str,
    case: str,
    label_map: str | Path,
    reference: str | Path,
    channels: Mapping[str, Sequence[int] | None],
    tolerance: float | None,
    ignored: int | None = None,
) -> list[Score]:
    """Score every class of a label map.

    Args:
        bundle: that made it.
        case: case identifier.
        label_map: NIfTI file of output channels.
        reference: label map of a dataset.
        channels: for each output channel from 1 on the reference's voxel values; None for what the dataset does not have.
        tolerance: of the normalised surface Dice, mm; None measures Dice and volumes only.
        ignored: the reference's value for voxels of which nobody knows what they are; they do not count.

    Raises:
        UserError: the reference cannot be read, or the two are not on the same grid.
    """
    import nibabel

    image = nibabel.load(label_map)
    prediction, affine = np.asarray(image.dataobj), image.affine
    truth, grid = load_reference(reference)
    check_grid(f"case {case}: {reference}", (truth.shape, grid), (prediction.shape, affine))
    counted = truth != ignored if ignored is not None else True
    spacing = nibabel.affines.voxel_sizes(affine)
    millilitres = abs(np.linalg.det(affine[:3, :3])) / 1000
    scores = []
    for channel, (label, values) in enumerate(channels.items(), start=1):
        if values is None:
            continue
        predicted, organ = (prediction == channel) & counted, np.isin(truth, values)
        nsd, hd95 = (math.nan,) * 2 if tolerance is None else surface_scores(predicted, organ, spacing, tolerance)
        volumes = [float(np.count_nonzero(mask) * millilitres) for mask in (organ, predicted)]
        scores.append(rounded_score(bundle, case, label, dice(predicted, organ), nsd, hd95, *volumes))
    return scores


def rounded_score(bundle: str, case: str, label: str, *values: float) -> Score:
    """A score of so many digits as say something; a volume, however small, is not 0 by it."""
    *measured, reference, predicted = values
    volumes = [float(f"{volume:.6g}") for volume in (reference, predicted)]
    return Score(bundle, case, label, *(round(value, 6) for value in measured), *volumes)


def load_reference(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """A label map of a dataset, as integers ``(X, Y, Z)``, and its affine.

    Raises:
        UserError: it cannot be read, or has several volumes.
    """
    from monai.transforms import LoadImage

    with naming(path):
        image = LoadImage(ensure_channel_first=True)(path)
    if len(image) != 1:
        raise UserError(f"{path} has {len(image)} volumes, a label map has one: numbers, not a channel for each label")
    return np.asarray(image[0]).round().astype(np.int32), np.asarray(image.affine, dtype=float)


def check_grid(name: str, grid: Grid, image_grid: Grid) -> None:
    """Refuse a label map that does not lie on its image's voxels; see ``nnunet_data.check_grid``.

    Raises:
        UserError: names it, and says how far it is off.
    """
    from tools.bundle_code import nnunet_data

    try:
        nnunet_data.check_grid(name, grid, image_grid)
    except ValueError as error:
        raise UserError(str(error)) from None


def dice(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Dice similarity coefficient of two boolean masks; NaN when the reference ``truth`` is empty."""
    from monai.metrics import compute_dice

    return math.nan if not truth.any() else float(compute_dice(*_cropped(predicted, truth)))


def surface_scores(
    predicted: np.ndarray, truth: np.ndarray, spacing: Sequence[float], tolerance: float
) -> tuple[float, float]:
    """Normalised surface Dice and HD95 of two boolean masks; for empty ones see ``Score``.

    Args:
        predicted: mask ``(X, Y, Z)``.
        truth: the reference, likewise.
        spacing: of the voxels along X, Y and Z, mm.
        tolerance: of the normalised surface Dice, mm.

    Source: areas of surface elements as in Nikolov et al., "Clinically applicable segmentation of head and neck anatomy for
    radiotherapy", JMIR 2021, whose code is DeepMind's ``surface-distance``; HD95 counts every voxel of a surface once.
    """
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    if not truth.any():
        return math.nan, math.nan
    if not predicted.any():
        return 0.0, float(np.linalg.norm(np.multiply(truth.shape, spacing)))
    masks, size = _cropped(predicted, truth), tuple(map(float, spacing))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an argument that MONAI itself sets
        nsd = compute_surface_dice(*masks, [tolerance], include_background=True, spacing=size, use_subvoxels=True)
        hd95 = compute_hausdorff_distance(*masks, include_background=True, spacing=size, percentile=95)
    return float(nsd), float(hd95)


def _cropped(*masks: np.ndarray):
    """Masks, cut to the box that holds them all, as tensors ``(1, 1, X, Y, Z)``: MONAI makes floats of whatever it is given."""
    import torch
    from scipy.ndimage import find_objects

    (box,) = find_objects(np.logical_or.reduce(masks).view(np.uint8))
    return [torch.from_numpy(np.ascontiguousarray(mask[box]))[None, None] for mask in masks]


def write_scores(path: Path, scores: Sequence[Score]) -> None:
    """A CSV file with a row for each score; it is complete or not there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Score))
        for score in scores:
            writer.writerow("" if isinstance(v, float) and math.isnan(v) else v for v in asdict(score).values())
    partial.replace(path)


def read_scores(path: Path) -> list[Score]:
    """What ``write_scores`` wrote.

    Raises:
        UserError: the file is not there, or has other columns.
    """
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        return [Score(**{f.name: _cell(row[f.name], str(f.type)) for f in fields(Score)}) for row in rows]
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise UserError(f"{path} is no scores.csv of evaluate ({type(error).__name__}: {error})") from None


def _cell(text: str, kind: str) -> str | float:
    return text if kind == "str" else float(text or "nan")
