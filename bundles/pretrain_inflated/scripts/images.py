"""The images of a folder, whatever their format: NIfTI, NRRD, MetaImage files and DICOM series; and their resampling."""

from __future__ import annotations

import logging
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import itk
import monai.transforms
import torch
from monai.config import KeysCollection, PathLike
from monai.data import CacheDataset, ITKReader
from monai.transforms import LoadImaged
from monai.utils import ensure_tuple

logger = logging.getLogger(__name__)

FILE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
UNEVEN = "ITK_non_uniform_sampling_deviation"  # mm, which ITK notes of a series
NOT_IMAGES = ("SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "SR", "PR", "KO", "REG")


def list_images(folder: PathLike, channels: int = 1) -> list[dict[str, Any]]:
    """One entry per image: a file, a DICOM series (a folder), or the channel files of one case.

    Args:
        folder: a folder of images (its subfolders may be DICOM series), a DICOM series, an nnU-Net dataset (its imagesTs,
            else its imagesTr is taken) or one image file.
        channels: with more than one, files are grouped by case as nnU-Net names them: ``case_0000``, ``case_0001``, …

    Raises:
        FileNotFoundError: no image there, or a case without all its channels.
    """
    root = Path(folder)
    if not root.exists():
        raise FileNotFoundError(f"{root} not found: --dataset_dir must name a folder of images, or an image")
    if root.is_file():
        return [{"image": str(root)}]
    for part in ("imagesTs", "imagesTr"):
        if (root / "dataset.json").is_file() and (root / part).is_dir() and any((root / part).iterdir()):
            return list_images(root / part, channels)
    files = sorted(p for p in root.iterdir() if p.name.endswith(FILE_ENDINGS) and not p.name.startswith("."))
    slices = list(islice(_dicom_files(root), 2))
    if len(slices) > 1 or (slices and not files):
        if files:
            logger.warning(f"{root} is read as a DICOM series; {', '.join(path.name for path in files)} in it are not")
        return [{"image": str(root)}]
    series = sorted(p for p in root.iterdir() if p.is_dir() and is_dicom_series(p))
    images = _group_channels(files, channels) if channels > 1 else [{"image": str(path)} for path in files]
    images += [{"image": str(path)} for path in series]
    if not images:
        raise FileNotFoundError(f"no image in {root} (looked for {', '.join(FILE_ENDINGS)} and DICOM series)")
    return images


def _group_channels(files: list[Path], channels: int) -> list[dict[str, Any]]:
    cases: dict[str, dict[int, str]] = {}
    others: list[dict[str, Any]] = []
    for path in files:
        match = re.fullmatch(r"(.+)_(\d{4})(\..+)", path.name)
        if match:
            cases.setdefault(match[1], {})[int(match[2])] = str(path)
        else:
            others.append({"image": str(path)})  # with all channels in it
    for name, found in cases.items():
        if sorted(found) != list(range(channels)):
            raise FileNotFoundError(f"case {name} has channels {sorted(found)}, the network needs 0 to {channels - 1}")
    return others + [{"image": [found[n] for n in range(channels)]} for _, found in sorted(cases.items())]


def is_dicom_series(folder: Path) -> bool:
    """Whether a folder holds DICOM files: ``*.dcm``, or files that carry the DICOM mark; one that cannot be opened does not."""
    return next(_dicom_files(folder), None) is not None


def _dicom_files(folder: Path) -> Iterator[Path]:
    try:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.is_file() and not path.name.startswith(".") and not path.name.endswith(FILE_ENDINGS):
                with path.open("rb") as file:
                    if path.suffix.lower() == ".dcm" or (file.read(132)[128:] == b"DICM" and path.name != "DICOMDIR"):
                        yield path
    except PermissionError as error:
        logger.warning(f"{folder} is passed over: {error.strerror}")


def image_series(folder: Path) -> list[str]:
    """The files, in slice order, of the largest image series of a folder; segmentations, structures and doses are not images.

    Raises:
        FileNotFoundError: there is no image series.
    """
    names = itk.GDCMSeriesFileNames.New()
    names.SetUseSeriesDetails(True)
    names.SetDirectory(str(folder))
    series = [list(names.GetFileNames(uid)) for uid in names.GetSeriesUIDs()]
    series = sorted((files for files in series if _modality(files[0]) not in NOT_IMAGES), key=len)
    if not series:
        raise FileNotFoundError(f"no DICOM image series in {folder}")
    if len(series) > 1:
        logger.warning(f"{folder} holds {len(series)} image series; the largest, {len(series[-1])} slices, is read")
    return series[-1]


def _modality(path: str) -> str:
    reader = itk.GDCMImageIO.New(FileName=path)
    reader.ReadImageInformation()
    header = reader.GetMetaDataDictionary()
    return header["0008|0060"].strip() if header.HasKey("0008|0060") else ""


class DicomSeriesReader(ITKReader):
    """MONAI's ITK reader for folders: reads the image series and passes over the other DICOM objects beside it."""

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        return all(Path(name).is_dir() for name in ensure_tuple(filename))

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any):
        series = [itk.imread(image_series(Path(name)), **{**self.kwargs, **kwargs}) for name in ensure_tuple(data)]
        for name, image in zip(ensure_tuple(data), series, strict=True):
            facts = image.GetMetaDataDictionary()
            uneven = float(facts[UNEVEN]) / image.GetSpacing()[2] if facts.HasKey(UNEVEN) else 0
            if uneven > 0.1:
                raise ValueError(
                    f"{name}: its slices are not evenly spaced ({uneven:.1f} slices off): some are missing, or the series holds "
                    "several acquisitions"
                )
        return series if len(series) > 1 else series[0]


class LoadImageOrSeriesd(LoadImaged):
    """MONAI's ``LoadImaged``, with :class:`DicomSeriesReader` for folders; files are read as ``LoadImaged`` does."""

    def __init__(self, keys: KeysCollection, **kwargs: Any) -> None:
        super().__init__(keys, **kwargs)
        self.register(DicomSeriesReader())

    def __call__(self, data: Mapping[Hashable, Any], reader: Any = None) -> dict[Hashable, Any]:
        result = super().__call__(data, reader)
        for key in self.key_iterator(result):
            image = result[key]
            if image.is_floating_point() and not (finite := torch.isfinite(image)).all():
                count = int((~finite).sum())
                logger.warning(f"{data[key]}: {count} voxels are NaN or infinite; they are read as 0")
                image[~finite] = 0
        return result


def reason(error: BaseException) -> str:
    """What an error was first raised by, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not re.search(r"\.cxx:\d+:$", line)]  # where in ITK's code is no reason
    return ": ".join([type(error).__name__, *told[:1]])


class ReadableImages(CacheDataset):
    """MONAI's ``CacheDataset`` without the images that cannot be read, each of which is named.

    Args:
        data: dictionaries with "image"; the same image may be there several times.
        channels: that an image must have after the transforms that are not random.
        kwargs: those of ``CacheDataset``. Images that are not cached (``cache_rate``) are not looked at.

    Raises:
        ValueError: none can be read, or one has other channels.
    """

    def __init__(self, data: Sequence[Mapping[Hashable, Any]], channels: int = 1, **kwargs: Any) -> None:
        self.channels = channels
        super().__init__(data, hash_as_key=True, **kwargs)

    def set_data(self, data: Sequence[Mapping[Hashable, Any]]) -> None:
        super().set_data(data)
        broken = {key for key, item in zip(self._hash_keys, self._cache, strict=True) if item is None}
        if broken:
            self.data = [item for item in self.data if self.hash_func(item) not in broken]
        if not len(self.data):
            names = ", ".join(sorted({str(item["image"]) for item in data})[:3])
            raise ValueError(f"none of the images of this part can be read ({names}, …): remove them from the folder")

    def _load_cache_item(self, idx: int) -> Any:
        try:
            item = super()._load_cache_item(idx)
        except Exception as error:  # libraries raise nearly anything on a damaged file
            logger.warning(f"{self.data[idx]['image']} cannot be read and is left out ({reason(error)})")
            return None
        if len(item["image"]) != self.channels:
            raise ValueError(
                f"{self.data[idx]['image']} has {len(item['image'])} channels, the network takes {self.channels}"
            )
        return item


class Spacingd(monai.transforms.Spacingd):
    """MONAI's ``Spacingd``, for items that say more about an image than its metadata, such as MONAI Label's ``image_path``.

    MONAI 1.6 takes every entry whose name begins with ``image_`` for metadata to be updated, and fails on one that is no
    dictionary. Such entries are kept out of its sight.
    """

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        others = {
            name: value
            for name, value in data.items()
            if name not in self.keys
            and not isinstance(value, dict)
            and str(name).startswith(tuple(f"{key}_" for key in self.keys))
        }
        return super().__call__({name: value for name, value in data.items() if name not in others}, lazy) | others
