"""Slices with the label maps of reference and models over them: a few cases, small enough to travel inside the page.

Image and label maps of a case are one picture each, all of its axial slices side by side; the browser takes them apart again and
cuts the other two planes itself.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from tools.bundle import Bundle
from tools.errors import UserError
from tools.evaluate import REFERENCE, find_cases, matched_channels
from tools.report_page.colours import organ_colours
from tools.report_page.evaluation import MERGE, START, Evaluation
from tools.report_page.page import Section, data_uri
from tools.summary_table import SPECIALISTS

if TYPE_CHECKING:
    from PIL import Image

FIRST = (REFERENCE, SPECIALISTS, MERGE, START)  # in this order, before other bundles
EDGE = 160  # voxels: longer edges are thinned out
BUDGET = 12_000_000  # characters of all pictures together
WEBP_QUALITY = 80


def slices_section(
    bundle: Bundle, evaluation: Evaluation, datasets: Sequence[str], count: int, renamed: Mapping[str, Any]
) -> Section:
    """The section.

    Args:
        bundle: the merge.
        evaluation: with label maps.
        datasets: nnU-Net datasets in which its cases are looked for.
        count: how many cases are shown, evenly from the lowest to the highest Dice.
        renamed: the dataset's labels for channels that are called otherwise, as for ``evaluate``.

    Raises:
        UserError: none of the cases is in the datasets, or a label map is not on its image's grid.
    """
    dice = _dice_by_case(evaluation)
    files = _files(datasets, dice, ("Ts", "all") if evaluation.where.endswith("(Ts)") else ("all", "Ts"))
    if not files:
        raise UserError(
            f"{', '.join(datasets)}: no case of {evaluation.folder} is there, so there are no images to show"
        )
    means = {case: np.mean([*dice[case][MERGE].values()]) for case in files if dice[case].get(MERGE)}
    ranked = sorted(means, key=means.__getitem__) or sorted(files)  # the others have none of the organs
    ranks = np.unique(np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)).tolist()
    names = evaluation.columns()
    columns = [REFERENCE, *sorted(names, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))]
    # labels are as far apart as can be, because some browsers change the gray values a little that a page reads from a picture
    stride = 255 // max(len(bundle.labels), 1)
    grays = [stride * number for number in range(1 + len(bundle.labels))]
    cases: dict[int, dict[str, Any]] = {}
    size = 0
    ends_first = sorted(ranks, key=lambda rank: rank not in (ranks[0], ranks[-1]))
    for rank in tqdm(ends_first, desc="slices", disable=None, leave=False):
        name = ranked[rank]
        dataset, paths = files[name]
        layers = [_reference(bundle, dataset, paths, renamed)]
        layers += [_segmented(bundle, evaluation, column, name) for column in columns[1:]]
        case = {"name": name, "dice": dice[name], **_pictures(name, paths, layers, grays)}
        size += len(case["image"]) + sum(map(len, case["maps"]))
        if size > BUDGET and cases:
            break
        cases[rank] = case
    data = {
        "labels": bundle.labels,
        "colours": organ_colours(len(bundle.labels)),
        "stride": stride,
        "columns": columns,
        "cases": [cases[rank] for rank in sorted(cases)],
    }
    facts = {
        "data": data,
        "total": len(dice),
        "shown": (REFERENCE, SPECIALISTS, MERGE) if SPECIALISTS in columns else (REFERENCE, MERGE),
        "edge": EDGE,
        "thinned": any(max(case["steps"]) > 1 for case in cases.values()),
    }
    return Section("slices", "Slices", facts)


def _dice_by_case(evaluation: Evaluation) -> dict[str, dict[str, dict[str, float]]]:
    """Dice by case, column and label, where the reference has the organ."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for score in evaluation.scores:
        by_column = found.setdefault(score.case, {})
        for column in evaluation.columns():
            if not math.isnan(score.dice) and evaluation.bundle_of(column, score.label) == score.bundle:
                by_column.setdefault(column, {})[score.label] = score.dice
    return found


def _files(
    datasets: Sequence[str], names: Mapping[str, Any], parts: Sequence[str]
) -> dict[str, tuple[str, dict[str, Any]]]:
    """For each case that a dataset has in one of these parts: the dataset, and the paths of image and reference."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for dataset in datasets:
        cases = []
        for part in parts:  # of which a dataset may have only one
            with suppress(UserError):
                cases.append(find_cases(dataset, part, "", 0))
        if not cases:
            raise UserError(f"{dataset} has no labelled case, neither in labelsTr nor in labelsTs")
        for named in cases:
            found |= {name: (dataset, paths) for name, paths in named.items() if name in names and name not in found}
    return found


@dataclass(frozen=True)
class _Layer:
    """A label map with the merge's channel numbers.

    Attributes:
        labels: on the image's grid; None if there is nothing to show.
        organs: the numbers of those organs that could be in it.
    """

    labels: np.ndarray | None
    organs: list[int]


def _reference(bundle: Bundle, dataset: str, paths: Mapping[str, Any], renamed: Mapping[str, Any]) -> _Layer:
    """What the dataset says."""
    from monai.transforms import LoadImage

    truth = np.asarray(LoadImage(ensure_channel_first=True)(paths["label"])[0])
    labels, organs = np.zeros(truth.shape, np.uint8), []
    for number, values in enumerate(matched_channels(bundle, dataset, renamed).values(), start=1):
        if values is not None:
            labels[np.isin(truth, values)] = number
            organs.append(number)
    return _Layer(labels, organs)


def _segmented(bundle: Bundle, evaluation: Evaluation, column: str, case: str) -> _Layer:
    """What a column's bundles say; where two specialists claim a voxel, the first task's is shown."""
    import nibabel

    labels, organs = None, []
    names = [evaluation.bundle_of(column, label) for label in bundle.labels]
    for name in reversed([*dict.fromkeys(names)]):
        path = evaluation.folder / "label_maps" / name / f"{case}.nii.gz"
        if not name or not path.is_file():
            continue
        numbers = np.zeros(1 << 16, np.uint8)  # of the merge, by the bundle's own
        for own, label in enumerate(evaluation.channels.get(name, []), start=1):
            if label in bundle.labels and names[number := bundle.labels.index(label)] == name:
                numbers[own] = number + 1
        found = numbers[np.asarray(nibabel.load(path).dataobj)]
        labels = found if labels is None else np.where(found, found, labels)
        organs += numbers[numbers > 0].tolist()
    return _Layer(labels, sorted(organs))


def _pictures(name: str, paths: Mapping[str, Any], layers: Sequence[_Layer], grays: Sequence[int]) -> dict[str, Any]:
    """Image and label maps, the reference first, as pictures, and how they are laid out.

    Voxels are ordered as a radiologist looks: first along x from the patient's right, then along y from the front, then along z
    from the feet.
    """
    import nibabel
    from monai.transforms import LoadImage

    image = LoadImage(ensure_channel_first=True)(paths["image"])
    affine, image = np.asarray(image.affine), np.asarray(image[0], np.float32)
    for layer in layers:
        if layer.labels is not None and layer.labels.shape != image.shape:
            raise UserError(f"case {name}: a label map is not on the grid of its image; evaluate on the same dataset")
    orientation = nibabel.orientations.io_orientation(affine)
    steps = [math.ceil(n / EDGE) for n in image.shape]

    def upright(array: np.ndarray) -> np.ndarray:
        thin = array[tuple(slice(step // 2, None, step) for step in steps)]
        return nibabel.orientations.apply_orientation(thin, orientation)[::-1, ::-1]

    order = np.argsort(orientation[:, 0])
    empty = np.zeros(image.shape, np.uint8)
    maps = [upright(empty if layer.labels is None else layer.labels) for layer in layers]
    reference = maps[0]
    gray = _windowed(upright(_smoothed(image, steps)), reference)
    across = math.ceil(math.sqrt(gray.shape[2] * gray.shape[1] / gray.shape[0]))
    return {
        "shape": gray.shape,
        "size": (nibabel.affines.voxel_sizes(affine) * steps)[order].round(4).tolist(),
        "steps": [steps[i] for i in order],
        "across": across,
        "first": [int(np.argmax(reference.sum(axis=tuple(a for a in range(3) if a != axis)))) for axis in range(3)],
        "image": _as_webp(gray, across),
        "maps": [_as_png(m, across, grays) for m in maps],
        "organs": [layer.organs for layer in layers],
    }


def _windowed(image: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Gray values 0 to 255: what is as bright as the organs in the middle, with room on both sides."""
    image = np.nan_to_num(image, posinf=0, neginf=0)
    low, high = np.percentile(image[reference > 0] if reference.any() else image, [2, 98])
    if reference.any():
        low, high = low - 0.6 * (high - low), high + 0.6 * (high - low)
    return np.clip((image - low) / max(high - low, 1e-6) * 255, 0, 255).astype(np.uint8)


def _smoothed(image: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    from scipy.ndimage import uniform_filter

    return uniform_filter(image, steps) if max(steps) > 1 else image


def _as_webp(volume: np.ndarray, across: int) -> str:
    """An image's gray values as a picture."""
    return _address(_sheet(volume, across), "WEBP", quality=WEBP_QUALITY)


def _as_png(volume: np.ndarray, across: int, grays: Sequence[int]) -> str:
    """A label map as a picture with a palette: lossless, and a few bits a voxel."""
    sheet = _sheet(volume, across)
    sheet.putpalette([value for gray in grays for value in (gray, gray, gray)])
    return _address(sheet, "PNG", optimize=True)


def _sheet(volume: np.ndarray, across: int) -> Image.Image:
    """All slices along z of a volume (X, Y, Z), in rows of ``across``."""
    from PIL import Image

    x, y, z = volume.shape
    down = math.ceil(z / across)
    tiles = np.zeros((down * across, y, x), np.uint8)
    tiles[:z] = volume.transpose(2, 1, 0)
    return Image.fromarray(tiles.reshape(down, across, y, x).transpose(0, 2, 1, 3).reshape(down * y, across * x))


def _address(picture: Image.Image, kind: str, **options: Any) -> str:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return data_uri(file.getvalue(), f"image/{kind.lower()}")
