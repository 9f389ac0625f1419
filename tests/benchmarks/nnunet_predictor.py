"""nnU-Net's own predictor on an image of noise, in nnU-Net's own environment; prints seconds, writes the label map.

``python -m tests.benchmarks.nnunet_predictor <file of labels>``, whose network, image and windows are ``inference.py``'s.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from tests.benchmarks.inference import IMAGE, WINDOWS, contiguous, unet


def predict(output: str) -> None:
    """Segment as ``nnUNetv2_predict -device cpu --disable_tta`` does once the image is preprocessed."""
    torch.manual_seed(0)
    network, image = contiguous(unet().eval()), torch.rand(IMAGE)
    predictor = nnUNetPredictor(
        tile_step_size=WINDOWS["overlap"],
        use_gaussian=True,
        use_mirroring=False,
        perform_everything_on_device=False,
        device=torch.device("cpu"),
        allow_tqdm=False,
    )
    classes = network.head.out_channels
    labels = {"background": 0, **{f"organ {number}": number for number in range(1, classes)}}
    configuration = {"patch_size": [WINDOWS["roi_size"]] * 3, "architecture": {}}  # the network is given, not built
    plans = PlansManager({"configurations": {"3d_fullres": configuration}})
    dataset = {"labels": labels, "channel_names": {"0": "CT"}}
    predictor.manual_initialization(network, plans, plans.get_configuration("3d_fullres"), None, dataset, "", None)
    predictor.predict_sliding_window_return_logits(image[0, :, :100, :100, :100])  # what is set up once
    began = time.perf_counter()
    label_map = predictor.predict_sliding_window_return_logits(image[0]).argmax(0)
    print(time.perf_counter() - began)
    Path(output).write_bytes(label_map.to(torch.uint8).numpy().tobytes())


if __name__ == "__main__":
    predict(*sys.argv[1:])
