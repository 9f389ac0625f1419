"""A bundle's own preprocessing, inferer and postprocessing, around any weights in its network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.bundle import Bundle
from tools.errors import UserError, naming

if TYPE_CHECKING:
    from torch import nn


class Segmenter:
    """A bundle's inference without its network, so that one image can be segmented with many weights.

    Args:
        bundle: its inference.json says how; to be used within its ``code()``.
    """

    def __init__(self, bundle: Bundle) -> None:
        parser = bundle.parser()
        parser["postprocessing"] = {
            "_target_": "Compose",
            "transforms": [
                t for t in bundle.inference["postprocessing"]["transforms"] if "SaveImage" not in t["_target_"]
            ],
        }
        self._inferer = parser.get_parsed_content("inferer")
        self._preprocessing = parser.get_parsed_content("preprocessing")
        self._postprocessing = parser.get_parsed_content("postprocessing")
        self._channels = bundle.in_channels
        self._dtype = np.uint8 if len(bundle.labels) < 256 else np.uint16

    def load(self, image: Any) -> Mapping[str, Any]:
        """Read and preprocess an image.

        Args:
            image: path, or one for each channel.

        Returns:
            What a call takes, as often as wanted.

        Raises:
            UserError: it cannot be read, or has other channels than the network takes.
        """
        return preprocessed(self._preprocessing, image, self._channels)

    def __call__(self, loaded: Mapping[str, Any], network: nn.Module) -> tuple[np.ndarray, np.ndarray]:
        """The label map that a network makes of an image: integers (X, Y, Z) on the grid of the file, and its affine."""
        import torch
        from monai.data import MetaTensor

        data = dict(loaded)
        with torch.inference_mode():
            output = self._inferer(data["image"][None].to(next(network.parameters()).device), network)[0]
            data["pred"] = MetaTensor(output.cpu(), meta=getattr(output, "meta", data["image"].meta))
            prediction = self._postprocessing(data)["pred"]
        return np.asarray(prediction[0]).astype(self._dtype), np.asarray(prediction.affine)


def preprocessed(preprocessing: Any, image: Any, channels: int) -> Mapping[str, Any]:
    """What a bundle's preprocessing makes of an image.

    Raises:
        UserError: it cannot be read, or has other channels.
    """
    with naming(image):
        data = preprocessing({"image": image})
    if len(data["image"]) != channels:
        raise UserError(f"{image} has {len(data['image'])} channels, the network takes {channels}")
    return data


def write_label_map(path: Path, label_map: np.ndarray, affine: np.ndarray) -> None:
    """Write a NIfTI file (X, Y, Z), which is complete or not there."""
    import nibabel

    partial = path.with_name(f".{path.name}")
    nibabel.save(nibabel.Nifti1Image(label_map, affine), partial)
    partial.replace(path)
