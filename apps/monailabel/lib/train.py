"""Fine-tuning on corrected labels, in a copy of the bundle: what is served, and what was hashed, stays as it is."""

from __future__ import annotations

import logging
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.tasks.train.bundle import BundleTrainTask

from lib.bundles import channel_labels
from lib.segments import slicer_name

logger = logging.getLogger(__name__)

LEFT_OUT = shutil.ignore_patterns("checkpoints", "eval", "__pycache__", "splits_final.json")


class CopyTrainTask(BundleTrainTask):
    """Train a bundle on the studies' final labels, in a copy beside it, ``<bundle>_trained_<time>``.

    The copy is a bundle like any other, to be served, compared (``evaluate``) or shared as a task vector (``diff``).

    Args:
        path: the bundle.
        conf: the app's configuration.
    """

    def __init__(self, path: Path, conf: dict[str, str]) -> None:
        super().__init__(str(path), conf, load_strict=True)
        self.folder = path
        self.values: list[int] = []

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Train; see MONAI Label for what a request may say.

        Returns:
            The folder of the trained bundle.

        Raises:
            ValueError: there are no labels, or theirs are not the bundle's.
        """
        self.values = label_values(self.folder, datastore)
        trained = self.folder.with_name(f"{self.folder.name}_trained_{datetime.now():%Y%m%d_%H%M%S}")
        partial = trained.with_name(f"{trained.name}.partial")
        shutil.copytree(self.folder, partial, ignore=LEFT_OUT)
        try:
            super().__init__(str(partial), self.conf, load_strict=True)
            super().__call__(request, datastore)
            shutil.rmtree(partial / "checkpoints", ignore_errors=True)
            partial.rename(trained)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            super().__init__(str(self.folder), self.conf, load_strict=True)
        logger.info(f"the trained bundle is {trained}")
        return {"bundle": str(trained)}

    def _update_overrides(self, overrides: dict[str, Any]) -> dict[str, Any]:
        """What the bundle would take from an nnU-Net dataset comes from the studies."""
        images = overrides["train#dataset#data"]
        patches = self.bundle_config.get("patches_per_volume", 1)
        overrides["train#dataset#data"] = images * patches
        overrides["validate#dataset#data"] = overrides.get("validate#dataset#data") or images
        overrides["label_values"] = [[value] for value in self.values]
        return overrides


def label_values(bundle: Path, datastore: Datastore) -> list[int]:
    """The voxel value that each output channel 1..N has in the studies' final labels.

    Viewers number the segments that they save by position, over the labels of all models that are served; their names are saved
    too. Labels of a folder that came without names are taken to have the bundle's values; those of a DICOM server are numbered
    anew, without the empty ones.

    Raises:
        ValueError: there are no labels, a name or all names are missing, or images disagree.
    """
    own = list(channel_labels(bundle))
    found = {}
    for image in datastore.get_labeled_images():
        entries = datastore.get_label_info(image, DefaultLabelTag.FINAL).get("label_info")
        if not entries and isinstance(datastore, DICOMWebDatastore):
            raise ValueError(
                f"the segments of {image} were not saved through this server, and have no names here: submit them"
            )
        entries = entries or [{"name": name} for name in own]
        saved = [slicer_name(str(entry.get("name", ""))) for entry in entries]
        if missing := [name for name in own if slicer_name(name) not in saved]:
            raise ValueError(
                f"the label of {image} has no {', '.join(missing)}, which {bundle.name} learns: add it, even if empty"
            )
        found[image] = [1 + saved.index(slicer_name(name)) for name in own]
    if not found:
        raise ValueError("there are no final labels to train on: submit some first")
    first, *others = found
    if differing := [image for image in others if found[image] != found[first]]:
        raise ValueError(
            f"the segments of {differing[0]} are in another order than those of {first}: save them in one order"
        )
    return found[first]
