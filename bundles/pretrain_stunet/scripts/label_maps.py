"""A folder of label maps: one for each image, whole or not there, with a record of what made them and from which images."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.config import KeysCollection, PathLike
from monai.data import FolderLayoutBase
from monai.transforms import SaveImaged

from .images import FILE_ENDINGS


class LabelMaps(FolderLayoutBase):
    """Where label maps go: ``<folder>/<image>_seg.nii.gz``.

    MONAI's ``FolderLayout`` takes what follows the last dot of a name for its ending; the folder of a DICOM series often has the
    name of a unique identifier, so that ``1.2.3.1`` and ``1.2.3.2`` would be one file.

    Args:
        folder: for label maps.
        extension: which says their format too.
        postfix: follows the name of the image.
    """

    def __init__(self, folder: PathLike, extension: str = ".nii.gz", postfix: str = "seg") -> None:
        self.folder = Path(folder)
        self.extension = extension if extension.startswith(".") else f".{extension}"
        self.postfix = postfix

    def filename(self, subject: PathLike = "subject", idx: int | None = None, **kwargs: Any) -> Path:
        """The label map of an image, which is a file or a DICOM series, and of a patch of it, where ``idx`` is given."""
        number = "" if idx is None else f"_{idx}"
        return self.folder / f"{image_name(subject)}_{self.postfix}{number}{self.extension}"

    def of_images(self, items: Sequence[Mapping[str, Any]]) -> dict[Path, Mapping[str, Any]]:
        """Each item of a dataset by the label map of its image; label maps that lie among the images are none of these.

        Raises:
            ValueError: two images would have the same one.
        """
        found: dict[Path, Mapping[str, Any]] = {}
        own = {os.path.abspath(self.filename(first_file(item))) for item in items}
        for item in items:
            if os.path.abspath(first_file(item)) in own:
                continue
            path = self.filename(first_file(item))
            if path in found:
                raise ValueError(
                    f"{first_file(found[path])} and {first_file(item)} would both have the label map {path.name}: "
                    "rename one, or put them in different folders"
                )
            found[path] = item
        return found


def image_name(image: PathLike) -> str:
    """What an image, which is a file or a DICOM series, is called: its file or folder without an image format's ending."""
    name = Path(os.path.abspath(image)).name
    return name.removesuffix(next((ending for ending in FILE_ENDINGS if name.endswith(ending)), ""))


def first_file(item: Mapping[str, Any]) -> str:
    """What an image is named by: its file or folder, or the file of its first channel."""
    files = item["image"]
    return files if isinstance(files, str) else files[0]


def unfinished_folder(path: Path) -> Path:
    """The hidden folder in which a label map is written before it is moved to its place."""
    return path.with_name(f".{path.name}.unfinished")


class KeepsSlices:
    """In front of one of MONAI's writers: an image of one slice stays one of three axes, at its place along the third."""

    @classmethod
    def convert_to_channel_last(cls, data: Any, *args: Any, **kwargs: Any) -> Any:
        converted = super().convert_to_channel_last(data, *args, **{**kwargs, "squeeze_end_dims": False})
        return converted[..., 0] if converted.shape[-1] == 1 else converted


class SaveImageOrNothingd(SaveImaged):
    """MONAI's ``SaveImaged``, whose file is there when it is complete, and not before.

    It is written to a hidden folder beside its place, and then moved.

    Args:
        keys: of the label map.
        folder_layout: where it goes.
        kwargs: see ``SaveImaged``.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, keys: KeysCollection, folder_layout: LabelMaps, **kwargs: Any) -> None:
        super().__init__(
            keys, folder_layout=folder_layout, output_ext=folder_layout.extension, print_log=False, **kwargs
        )
        # MONAI goes on with the next writer where one fails; ITK's, after nibabel's, says nothing when a disk is full
        writer = self.saver.writers[0]
        self.saver.writers = [type(writer.__name__, (KeepsSlices, writer), {})]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        for key in self.key_iterator(data):
            self._save(
                data[key], self.saver.folder_layout.filename(**self.saver.fname_formatter(data[key].meta, self.saver))
            )
        return dict(data)

    def _save(self, image: Any, path: Path) -> None:
        unfinished = unfinished_folder(path)
        try:
            unfinished.mkdir(parents=True, exist_ok=True)
            try:
                self.saver(image, filename=str(unfinished / path.name).removesuffix(self.saver.output_ext))
            except RuntimeError as error:  # MONAI's message holds the traceback
                raise OSError(f"{path} cannot be written ({str(error).strip().splitlines()[-1]})") from None
            for file in sorted(unfinished.iterdir(), key=lambda file: file.name == path.name):  # .mhd after its .raw
                file.replace(path.with_name(file.name))
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


class Record:
    """``label_maps.json``: what made the label maps of a folder, and from which images, so that none are mixed unawares.

    Args:
        folder: of the label maps.
        models: files of weights; their SHA-256 is recorded.
        settings: whatever else decides what a label map becomes, as plain values.
    """

    def __init__(self, folder: Path, models: Sequence[PathLike], settings: Mapping[str, Any]) -> None:
        self.path = folder / "label_maps.json"
        self.made_by = {"models": {Path(file).name: sha256(file) for file in models}, "settings": dict(settings)}
        self.made_by = json.loads(json.dumps(self.made_by))  # tuples to lists

    def check(self, images: Mapping[Path, Mapping[str, Any]]) -> None:
        """Whether the label maps that are there may be kept.

        Args:
            images: items of a dataset by label map.

        Raises:
            ValueError: they were made by something else, or from other images, or nobody knows by what.
        """
        remedy = "take another --output_dir, or make them again by --overwrite True"
        recorded = self._read()
        kept = {name: file for name, file in recorded["images"].items() if (self.path.parent / name).is_file()}
        if kept and (differing := self._differing(recorded)):
            raise ValueError(f"{self.path.parent} has label maps made with another {', '.join(differing)}: {remedy}")
        for path, item in images.items():
            made_from, image = kept.get(path.name), os.path.abspath(first_file(item))
            if path.is_file() and made_from is None:
                raise ValueError(f"{path} is there, but {self.path.name} does not say what made it: {remedy}")
            if made_from not in (None, image):
                raise ValueError(f"{path} was made from {made_from}, not from {image}: {remedy}")

    def begin(self, images: Collection[Path], own: Collection[Path], overwrite: bool) -> None:
        """Write the record before the first label map.

        Args:
            images: items of a dataset by label map.
            own: the label maps that this process makes.
            overwrite: remove them, and all of ``images`` where something else made them.
        """
        recorded = self._read()
        same = not self._differing(recorded)
        for path in (own if same else images) if overwrite else ():
            path.unlink(missing_ok=True)
        for path in own:  # what a run that was killed left
            shutil.rmtree(unfinished_folder(path), ignore_errors=True)
        made_from = {path.name: os.path.abspath(first_file(item)) for path, item in images.items()}
        content = {**self.made_by, "images": {**(recorded["images"] if same else {}), **made_from}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(content, indent=2))
        temporary.replace(self.path)

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):  # not there, or damaged
            return {"models": {}, "settings": {}, "images": {}}

    def _differing(self, recorded: Mapping[str, Any]) -> list[str]:
        return [
            key
            for part, ours in self.made_by.items()
            for key in sorted({*ours, *recorded[part]})
            if ours.get(key) != recorded[part].get(key)
        ]


def sha256(path: PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
