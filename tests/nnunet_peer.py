"""What nnU-Net itself makes of plans and images, in nnU-Net's own environment; the tests compare bundles with it.

``python -m tests.nnunet_peer <jobs.json>``: a list of jobs. Each has a trained model's ``folder``, which is made with random
weights if it has no checkpoint, from ``plans``, ``dataset_json`` and ``seed``; and an ``image`` (a list of channel files), which
is predicted. ``<folder>/predicted.npz`` then has the preprocessed image, the logits and the label map; these two twice: as
nnU-Net gives them, and with sums in float32 where nnU-Net's are float16.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference import predict_from_raw_data as prediction
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


def make(folder: Path, job: dict[str, Any]) -> None:
    """A trained model's folder with random weights, as nnU-Net's trainer writes it; its axes of mirroring are ``mirror``."""
    torch.manual_seed(job["seed"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(job["plans"]))
    (folder / "dataset.json").write_text(json.dumps(job["dataset_json"]))
    plans = {**job["plans"], "continue_training": False}
    trainer = nnUNetTrainer(plans, job["configuration"], 0, job["dataset_json"], torch.device("cpu"))
    labels, channels = trainer.label_manager, len(job["dataset_json"]["channel_names"])
    trainer.network = trainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, channels, labels.num_segmentation_heads, True
    )
    trainer.optimizer, _ = trainer.configure_optimizers()
    with torch.no_grad():
        for parameter in trainer.network.parameters():  # nothing stays at 0 or 1
            parameter += 0.05 * torch.randn_like(parameter)
            parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    trainer.inference_allowed_mirroring_axes = tuple(job["mirror"])
    trainer.logger.log("mean_fg_dice", np.float32(0.5), 0)
    trainer._best_ema = np.float64(0.5)
    (folder / "fold_0").mkdir()
    trainer.save_checkpoint(str(folder / "fold_0" / "checkpoint_final.pth"))


def predict(folder: Path, image: list[str]) -> dict[str, np.ndarray]:
    """As ``nnUNetv2_predict`` does on the CPU, one case at a time."""
    predictor = prediction.nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), (0,), "checkpoint_final.pth")
    manager, configuration = predictor.plans_manager, predictor.configuration_manager
    preprocessor = configuration.preprocessor_class(verbose=False)
    data, _, properties = preprocessor.run_case(image, None, manager, configuration, predictor.dataset_json)
    results = {"data": data}
    half, gaussian = torch.half, prediction.compute_gaussian
    for name in ("", "_float32"):
        if name:
            torch.half = torch.float32
            prediction.compute_gaussian = partial(gaussian, dtype=torch.float32)
        try:
            logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data))
        finally:
            torch.half, prediction.compute_gaussian = half, gaussian
        results[f"logits{name}"] = logits.numpy()
        results[f"labels{name}"] = np.asarray(
            convert_predicted_logits_to_segmentation_with_correct_shape(
                logits, manager, configuration, predictor.label_manager, properties
            )
        )
    return results


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        folder = Path(job["folder"])
        if not (folder / "fold_0" / "checkpoint_final.pth").is_file():
            make(folder, job)
        if job["image"]:
            np.savez(folder / "predicted.npz", **predict(folder, job["image"]))
