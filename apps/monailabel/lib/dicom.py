"""A DICOMweb server whose segmentations keep the names that they were saved with."""

from __future__ import annotations

from typing import Any

import numpy as np
from monai.transforms import LoadImage
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.interfaces.datastore import DefaultLabelTag

from lib.segments import dicom_segments


class NamedSegmentsDatastore(DICOMWebDatastore):
    """MONAI Label's store for a DICOMweb server, which on saving gives the first name to the first segment that is not empty."""

    def save_label(
        self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any], label_id: str = ""
    ) -> str:
        """Save a segmentation, the final one on the DICOM server too.

        Args:
            image_id: its series.
            label_filename: the label map.
            label_tag: kind of label.
            label_info: its ``label_info`` lists all segments, that of value 1 first, or only those that are not empty.
            label_id: its name in the store.
        """
        entries = label_info.get("label_info")
        if entries and label_tag == DefaultLabelTag.FINAL:
            present = voxel_values(label_filename)
            numbers = range(1, len(entries) + 1) if max(present, default=0) <= len(entries) else present
            names = {entry["name"]: number for entry, number in zip(entries, numbers, strict=False)}
            model = entries[0].get("model_name", "MONAI Label")
            described = dicom_segments(present, names, model, entries, algorithm="SEMIAUTOMATIC")
            label_info = {**label_info, "label_info": described}
        saved = super().save_label(image_id, label_filename, label_tag, label_info, label_id)
        if entries:
            self.update_label_info(saved, label_tag, {"label_info": entries})
        return saved


def voxel_values(path: str) -> list[int]:
    """The values that occur in a label map, background left out."""
    values = np.unique(np.asarray(LoadImage(image_only=True)(path)))
    return values[values != 0].astype(int).tolist()
