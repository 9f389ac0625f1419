"""How segments are called and coloured: by the names that 3D Slicer knows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from monailabel.datastore.utils.colors import GENERIC_ANATOMY_COLORS

SYNONYMS = {  # how data sets call what has another name in Slicer's table of anatomy
    "adrenal": "adrenal gland",
    "bladder": "urinary bladder",
    "eye": "eyeball",
    "gall bladder": "gallbladder",
    "lung upper lobe": "superior lobe of lung",
    "lung middle lobe": "middle lobe of lung",
    "lung lower lobe": "inferior lobe of lung",
    "oesophagus": "esophagus",
    "small intestine": "small bowel",
    "spinalcord": "spinal cord",
    "thyroid": "thyroid gland",
}
SIDES = {"left": "left", "l": "left", "right": "right", "r": "right"}
SEGMENT = {"CodeValue": "123037004", "CodingSchemeDesignator": "SCT", "CodeMeaning": "Anatomical Structure"}
RED = (255, 0, 0)


def displayed_labels(labels: Mapping[str, int]) -> dict[str, int]:
    """Label values by the names that viewers show.

    Viewers choose colours by name: a label that Slicer knows is spelled as there (``kidney_left``: "left kidney"), any other
    stays as it is; so do two that would get one name.

    Args:
        labels: values by label.
    """
    names = {label: slicer_name(label) for label in labels}
    chosen = list(names.values())
    return {names[label] if chosen.count(names[label]) == 1 else label: value for label, value in labels.items()}


def slicer_name(label: str) -> str:
    """The name in Slicer's table of anatomy for what a label means; the label itself if it is not there."""
    words = label.lower().replace("_", " ").replace("-", " ").split()
    sides = [SIDES[word] for word in words if word in SIDES]
    organ = " ".join(word for word in words if word not in SIDES)
    organ = SYNONYMS.get(organ, organ)
    side = sides[0] if len(sides) == 1 else ""
    for name in (" ".join(words), f"{side} {organ}".strip(), organ.replace("lobe of lung", f"lobe of {side} lung")):
        if len(sides) < 2 and name in GENERIC_ANATOMY_COLORS:
            return name
    return label


def dicom_segments(
    present: Iterable[int],
    labels: Mapping[str, int],
    model: str,
    asked: Sequence[Mapping[str, Any]] = (),
    algorithm: str = "AUTOMATIC",
) -> list[dict[str, Any]]:
    """What MONAI Label's converter to DICOM SEG needs to know about the segments of one label map, in the order that it takes.

    It goes through the values that occur and takes one entry after the other. Given an entry for every label, an absent organ
    would leave its name to the next. It would also code all as spleen; here the code says "anatomical structure", and the
    segment's label which one.

    Args:
        present: values that occur in the label map.
        labels: values by label.
        model: its name.
        asked: the client's own entries; a description or colour is taken from the one of the label's name.
        algorithm: how they were made, "AUTOMATIC" or, where a person corrected them, "SEMIAUTOMATIC".
    """
    names = {value: name for name, value in labels.items()}
    theirs = {str(entry.get("name", "")).lower(): entry for entry in asked}
    entries = []
    for value in sorted(set(present) - {0}):
        name = names.get(value, f"label {value}")
        entry = theirs.get(name.lower(), {})
        color = [int(part) for part in entry.get("color", GENERIC_ANATOMY_COLORS.get(name, RED))][:3]
        attribute = {
            "labelID": value,
            "SegmentLabel": name,
            "SegmentDescription": entry.get("description", name),
            "SegmentAlgorithmType": algorithm,
            "SegmentAlgorithmName": model,
            "SegmentedPropertyCategoryCodeSequence": SEGMENT,
            "SegmentedPropertyTypeCodeSequence": SEGMENT,
            "recommendedDisplayRGBValue": color,
        }
        entries.append({"name": name, "model_name": model, "segmentAttribute": attribute})
    return entries
