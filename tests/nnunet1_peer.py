"""What nnU-Net 1 itself makes of an image with STU-Net; the tests compare pretrain_stunet's inference with it.

``python -m tests.nnunet1_peer <job.json>``, with nnU-Net 1 on the path: ``network`` is a file with its arguments and state on
axes z, y, x, ``image`` the image; ``patch_size``, ``spacing``, ``mirror`` are as nnU-Net's. Then ``<output>/<mode>.nii.gz`` are
its label maps in its modes normal, fast and fastest, ``data.npy`` is the preprocessed image, ``predicted.npy`` the labels on its
grid.
"""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

np.bool, np.int, np.float, np.object = np.bool_, int, float, object  # names that nnU-Net 1 uses, and NumPy 2 has not

from nnunet.inference.segmentation_export import (  # noqa: E402
    save_segmentation_nifti,
    save_segmentation_nifti_from_softmax,
)
from nnunet.network_architecture.neural_network import SegmentationNetwork  # noqa: E402
from nnunet.preprocessing.preprocessing import GenericPreprocessor  # noqa: E402

from tools.bundle_code.stunet import STUNet  # noqa: E402


class Network(SegmentationNetwork):
    """STU-Net with nnU-Net's own sliding windows."""

    def __init__(self, arguments: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.network = STUNet(**arguments)
        self.network.load_state_dict(state)
        self.conv_op = torch.nn.Conv3d
        self.num_classes = arguments["out_channels"]
        self.inference_apply_nonlin = lambda logits: logits.softmax(1)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)


def main(job: dict[str, Any]) -> None:
    """Preprocess, predict and export by nnU-Net's functions, with the arguments that its commands give them."""
    output = Path(job["output"])
    preprocessor = GenericPreprocessor(OrderedDict([(0, "nonCT")]), OrderedDict([(0, False)]), [0, 1, 2], None)
    data, _, properties = preprocessor.preprocess_test_case([job["image"]], np.array(job["spacing"]))
    np.save(output / "data.npy", data)
    predicted, probabilities = Network(**torch.load(job["network"])).predict_3D(
        data,
        do_mirroring=job["mirror"],
        mirror_axes=(0, 1, 2),
        use_sliding_window=True,
        step_size=0.5,
        patch_size=tuple(job["patch_size"]),
        use_gaussian=True,
        pad_border_mode="constant",
        pad_kwargs={"constant_values": 0},
        mixed_precision=False,
    )
    np.save(output / "predicted.npy", predicted)
    save_segmentation_nifti_from_softmax(probabilities, str(output / "smooth_labels.nii.gz"), properties, order=1)
    save_segmentation_nifti(predicted, str(output / "fast_labels.nii.gz"), properties, order=1)
    save_segmentation_nifti(predicted, str(output / "labels.nii.gz"), properties, order=0)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
