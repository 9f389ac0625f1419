"""Labelled cases through a bundle's own preprocessing, inferer and postprocessing, with any weights in its network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.bundle import Bundle
from tools.errors import UserError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Case:
    """A labelled case, ready to be segmented.

    Attributes:
        name: case identifier.
        data: what the preprocessing made of the image.
        reference: the label map on the grid of the image file, integers (X, Y, Z).
        affine: voxel to world, 4x4, RAS millimetres.
    """

    name: str
    data: Mapping[str, Any]
    reference: np.ndarray
    affine: np.ndarray


class Segmenter:
    """A bundle's inference without its network.

    Args:
        bundle: its inference.json says how; to be used within its ``code()``.
    """

    def __init__(self, bundle: Bundle) -> None:
        from monai.transforms import Compose, EnsureChannelFirst, LoadImage

        parser = bundle.parser()
        parser["postprocessing"] = {
            "_target_": "Compose",
            "transforms": [
                t for t in bundle.inference["postprocessing"]["transforms"] if "SaveImage" not in t["_target_"]
            ],
        }
        self.inferer = parser.get_parsed_content("inferer")
        self.preprocessing = parser.get_parsed_content("preprocessing")
        self.postprocessing = parser.get_parsed_content("postprocessing")
        self.load_label = Compose([LoadImage(), EnsureChannelFirst()])
        self.dtype = np.uint8 if len(bundle.labels) < 256 else np.uint16

    def load(self, name: str, files: Mapping[str, Any]) -> Case:
        """Read and preprocess a case.

        Args:
            name: case identifier.
            files: path, or paths, of the "image", and path of the "label".
        """
        data = self.preprocessing({"image": files["image"]})
        reference = self.load_label(files["label"])
        labels = np.asarray(reference[0]).round().astype(np.int32)
        return Case(name, data, labels, np.asarray(reference.affine))

    def __call__(self, case: Case, network: nn.Module) -> np.ndarray:
        """The label map that a network makes of a case: integers (X, Y, Z) on the grid of the image file.

        Raises:
            UserError: the reference is not on that grid.
        """
        import torch
        from monai.data import MetaTensor

        data = dict(case.data)
        with torch.inference_mode():
            output = self.inferer(data["image"][None].to(next(network.parameters()).device), network)[0]
            data["pred"] = MetaTensor(output.cpu(), meta=getattr(output, "meta", data["image"].meta))
            prediction = self.postprocessing(data)["pred"]
        same_grid = prediction.shape[1:] == case.reference.shape and np.allclose(
            prediction.affine, case.affine, atol=1e-3
        )
        if not same_grid:
            raise UserError(f"case {case.name}: the label map is not on the grid of its image")
        return np.asarray(prediction[0]).astype(self.dtype)
