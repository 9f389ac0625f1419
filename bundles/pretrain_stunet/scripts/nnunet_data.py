"""Training cases, labels and splits straight from an nnU-Net raw dataset folder (version 1 or 2)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type, convert_to_tensor

LabelChoice = Mapping[str, int | str | Sequence[int | str]]


def read_labels(dataset_dir: str | Path) -> dict[str, list[int]]:
    """The label names of a dataset and their voxel values, background and the ignore label left out.

    Both ``{"1": "liver"}`` (version 1) and ``{"liver": 1}`` or ``{"liver": [1, 2]}`` (version 2, regions) are read.

    Raises:
        FileNotFoundError: there is no dataset.json.
        ValueError: dataset.json is not JSON or has no labels.
    """
    return {
        name: values
        for name, values in _label_entries(dataset_dir)
        if name.lower() not in ("background", "ignore") and values != [0]
    }


def ignored_value(dataset_dir: str | Path) -> int | None:
    """The voxel value of nnU-Net's label "ignore", for voxels that nobody labelled; None where the dataset has none."""
    ignored = [values for name, values in _label_entries(dataset_dir) if name.lower() == "ignore"]
    return next((value for values in ignored for value in values), None)


def _label_entries(dataset_dir: str | Path) -> Iterator[tuple[str, list[int]]]:
    """Names and voxel values of all labels in dataset.json."""
    path = Path(dataset_dir) / "dataset.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} not found: --dataset_dir must name an nnU-Net raw dataset (dataset.json inside)"
        )
    try:
        entries = json.loads(path.read_text())["labels"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} has no readable 'labels' entry ({error})") from None
    for key, value in entries.items():
        name, values = (str(value), [int(key)]) if str(key).isdigit() else (str(key), value)
        yield name, [int(v) for v in values] if isinstance(values, list | tuple) else [int(values)]


def count_channels(dataset_dir: str | Path) -> int:
    """The number of image channels that dataset.json names; 1 when it names none."""
    path = Path(dataset_dir) / "dataset.json"
    description = json.loads(path.read_text()) if path.is_file() else {}
    return len(description.get("channel_names") or description.get("modality") or {"0": ""})


def label_key(name: str) -> str:
    """A label name without case and separators, so that ``Kidney_Left`` and ``kidney left`` are one."""
    return re.sub(r"[\s_\-]+", " ", name).strip().lower()


def label_values(dataset_dir: str | Path, labels: LabelChoice) -> list[list[int]]:
    """The voxel values behind each output channel 1..C.

    Args:
        dataset_dir: nnU-Net raw dataset.
        labels: output channel names in order, each with its source label(s) by name or by voxel value,
            for example ``{"kidneys": [2, 3]}`` or ``{"parotids": ["parotid_left", "parotid_right"]}``.

    Raises:
        ValueError: a label that the dataset does not have, or one that is asked for twice.
    """
    known = read_labels(dataset_dir)
    by_key = {label_key(name): values for name, values in known.items()}
    present = {value for values in known.values() for value in values}
    channels: list[list[int]] = []
    for name, sources in labels.items():
        sources = [sources] if isinstance(sources, int | str) else list(sources)
        values: list[int] = []
        for source in sources:
            found = [source] if isinstance(source, int) and source in present else by_key.get(label_key(str(source)))
            if not found:
                raise ValueError(
                    f"label {source!r} of channel {name!r} is not in {Path(dataset_dir) / 'dataset.json'}, "
                    f"which has {', '.join(f'{n}={v if len(v) > 1 else v[0]}' for n, v in known.items())}"
                )
            values.extend(found)
        channels.append(values)
    flat = [value for values in channels for value in values]
    if len(flat) != len(set(flat)):
        raise ValueError(f"a label may feed one output channel only, but {dict(labels)} uses one twice")
    return channels


Grid = tuple[Sequence[int], np.ndarray]  # a shape, and an affine from voxels to mm


def check_grid(name: str, grid: Grid, image_grid: Grid) -> None:
    """Refuse a label map that does not lie on its image's voxels; by a tenth of one files of different programs may differ.

    Args:
        name: of the label map, for the message.
        grid: of the label map.
        image_grid: of the image.

    Raises:
        ValueError: names it, and says how far it is off.
    """
    (shape, affine), (image_shape, image_affine) = grid, image_grid
    if tuple(shape) != tuple(image_shape):
        sizes = [" × ".join(map(str, size)) for size in (shape, image_shape)]
        raise ValueError(f"{name} is not on the grid of its image: {sizes[0]} voxels instead of {sizes[1]}")
    corners = np.array([*np.ndindex(*[2] * len(shape))]) * (np.array(shape) - 1)
    places = np.ones((len(corners), len(affine)))
    places[:, :-1] = np.pad(corners, ((0, 0), (0, len(affine) - 1 - len(shape))))  # of a flat image the third is 0
    apart = places @ (np.asarray(affine) - np.asarray(image_affine)).T
    off = np.linalg.norm(apart, axis=1).max() / np.linalg.norm(np.asarray(image_affine)[:-1, :-1], axis=0).min()
    if not off <= 0.1:
        raise ValueError(
            f"{name} is not on the grid of its image: the same voxel lies up to {off:.2g} voxels elsewhere; resample it to the "
            "image, or copy the image's affine to it if only that is wrong"
        )


class CheckGridd(MapTransform):
    """Refuse label maps that are not on their image's grid: resampled to it they would be wrong, or all background.

    Args:
        keys: label maps, as they were loaded.
        image: key of the image, which may have been resampled since it was loaded.
    """

    def __init__(self, keys: KeysCollection, image: str = "image", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image = image

    def __call__(self, data: Mapping) -> dict:
        grids = {}
        for key in (self.image, *self.key_iterator(data)):
            meta = data[key].meta
            grids[key] = tuple(np.asarray(meta["spatial_shape"]).tolist()), np.asarray(meta["original_affine"])
        for key in self.key_iterator(data):
            check_grid(str(data[key].meta.get("filename_or_obj", key)), grids[key], grids[self.image])
        return dict(data)


class LabelsToChannelsd(MapTransform):
    """Replace a label map's own values by output channel numbers: ``values[0]`` becomes 1, …, everything else 0.

    Args:
        keys: label maps, any integer-valued shape.
        values: voxel values per channel, as from :func:`label_values`.
    """

    def __init__(self, keys: KeysCollection, values: Sequence[Sequence[int]], allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        highest = max(value for channel in values for value in channel)
        self.table = torch.zeros(highest + 2, dtype=torch.uint8 if len(values) < 256 else torch.int16)
        for channel, channel_values in enumerate(values, start=1):
            self.table[list(channel_values)] = channel

    def __call__(self, data: Mapping) -> dict:
        d = dict(data)
        for key in self.key_iterator(d):
            values = convert_to_tensor(d[key], track_meta=False).round().long()
            values = torch.where((values >= 0) & (values < len(self.table)), values, 0)
            d[key] = convert_to_dst_type(self.table[values], d[key], dtype=self.table.dtype)[0]
        return d


def all_cases(dataset_dir: str | Path, part: str = "Tr") -> dict[str, dict]:
    """The labelled cases of a dataset by identifier: ``{"liver_001": {"image": …, "label": …}}``.

    An image of several channels (``liver_001_0000``, ``liver_001_0001``) is a list of paths in channel order.

    Args:
        dataset_dir: nnU-Net raw dataset.
        part: ``"Tr"`` (imagesTr, labelsTr) or ``"Ts"``.

    Raises:
        FileNotFoundError: no labelled case, or a label without all its image channels.
    """
    root = Path(dataset_dir)
    description = json.loads((root / "dataset.json").read_text()) if (root / "dataset.json").is_file() else {}
    ending = description.get("file_ending", ".nii.gz")
    channels = count_channels(root)
    cases: dict[str, dict] = {}
    if part == "Tr" and isinstance(description.get("dataset"), dict):  # version 2: files named one by one
        for name, files in description["dataset"].items():
            images, label = ([os.path.expandvars(f) for f in fs] for fs in (files["images"], [files["label"]]))
            cases[name] = _case(name, [root / f for f in images], root / label[0])
    else:
        for label in sorted((root / f"labels{part}").glob(f"*{ending}")):
            name = label.name[: -len(ending)]
            if name.startswith("."):
                continue
            images = [root / f"images{part}" / f"{name}_{channel:04d}{ending}" for channel in range(channels)]
            plain = root / f"images{part}" / label.name
            cases[name] = _case(name, [plain] if channels == 1 and plain.is_file() else images, label)
    if not cases:
        raise FileNotFoundError(f"no labelled case in {root / f'labels{part}'} (looked for *{ending})")
    return cases


def _case(name: str, images: list[Path], label: Path) -> dict:
    missing = [str(path) for path in [*images, label] if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"case {name}: {', '.join(missing)} not found")
    return {"image": str(images[0]) if len(images) == 1 else [str(path) for path in images], "label": str(label)}


def split_cases(
    dataset_dir: str | Path, part: str, split_file: str | Path | None = None, fold: int = 0, seed: int = 12345
) -> list[dict]:
    """The cases of one part of an explicit split.

    The split is read from ``split_file`` if that exists, else from the dataset's own ``splits_final.json``, else five
    seeded folds are made and written to ``split_file``. All are in nnU-Net's format: a list of
    ``{"train": [identifiers], "val": [identifiers]}``, where further parts (``"test"``) are allowed.

    Args:
        dataset_dir: nnU-Net raw dataset.
        part: ``"train"``, ``"val"``, or another part that the split file has.
        split_file: JSON file to read, or to write when no split exists.
        fold: index into the list.
        seed: of the split that is made when none exists.

    Raises:
        ValueError: the file is no split, has no such fold or part, or names cases that are not in the dataset.
    """
    cases = all_cases(dataset_dir)
    existing = [Path(p) for p in (split_file, Path(dataset_dir) / "splits_final.json") if p and Path(p).is_file()]
    if existing:
        folds = _read_folds(existing[0])
    else:
        folds = make_folds(list(cases), seed)
        if split_file:
            temporary = Path(f"{split_file}.{os.getpid()}.tmp")
            temporary.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(folds, indent=4))
            temporary.replace(split_file)
    where = existing[0] if existing else split_file
    if not 0 <= fold < len(folds) or part not in folds[fold]:
        raise ValueError(f"{where} has no part {part!r} in fold {fold}")
    unknown = sorted(set(folds[fold][part]) - set(cases))
    if unknown:
        raise ValueError(f"{where} names cases that {dataset_dir} does not have: {', '.join(unknown[:5])}")
    return [cases[name] for name in folds[fold][part]]


def _read_folds(path: Path) -> list[dict[str, list[str]]]:
    try:
        folds = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from None
    if not isinstance(folds, list) or not all(isinstance(fold, dict) for fold in folds):
        raise ValueError(
            f'{path} is no split: it must be a list of {{"train": [cases], "val": [cases]}}, one for each fold'
        )
    return folds


def make_folds(names: Sequence[str], seed: int, count: int = 5) -> list[dict[str, list[str]]]:
    """Seeded cross-validation folds over sorted identifiers; with fewer than ``count`` cases, one fold per case.

    Raises:
        ValueError: fewer than two cases.
    """
    if len(names) < 2:
        raise ValueError(
            f"a training and a validation part need two labelled cases at least; the dataset has {len(names)}"
        )
    shuffled = [sorted(names)[i] for i in np.random.RandomState(seed).permutation(len(names))]
    parts = [sorted(shuffled[i::count]) for i in range(min(count, len(names)))]
    return [{"train": sorted(set(names) - set(val)), "val": val} for val in parts]
