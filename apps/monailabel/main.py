"""The MONAI Label app that serves bundles of this project, and others, to 3D Slicer and OHIF.

``--conf bundles <bundle, or folder of bundles>`` says which; ``--conf train true`` also offers training. See docs/serving.md.
"""
# ruff: noqa: E402

from __future__ import annotations

from typing import Any

from lib.cpu_torchvision import import_torchvision

import_torchvision()  # before anything of MONAI Label, in the server and in each process that it starts

import torch
from lib.bundles import find_bundles
from lib.dicom import NamedSegmentsDatastore, voxel_values
from lib.infer import StrictBundleInferTask
from lib.segments import dicom_segments
from lib.train import CopyTrainTask
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.tasks.activelearning.first import First
from monailabel.tasks.activelearning.random import Random


class BundleApp(MONAILabelApp):
    """Serve bundles that are on this computer; nothing is looked up or downloaded.

    Args:
        app_dir: this folder.
        studies: folder of images, or address of a DICOMweb server.
        conf: ``bundles``, and ``train``.

    Raises:
        ValueError: no bundle, or one that cannot be served.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.bundles = find_bundles(conf.get("bundles", ""))
        super().__init__(
            app_dir,
            studies,
            conf,
            name="Merged segmentation models",
            description="Segmentation by MONAI bundles; research use, not for diagnosis",
        )

    def init_remote_datastore(self) -> Datastore:
        datastore = super().init_remote_datastore()
        if type(datastore) is DICOMWebDatastore:  # MONAI Label makes it, with its settings and passwords
            datastore.__class__ = NamedSegmentsDatastore
        return datastore

    def init_infers(self) -> dict[str, StrictBundleInferTask]:
        self.segmenters = {name: StrictBundleInferTask(path, self.conf) for name, path in self.bundles.items()}
        if not any(task.is_valid() for task in self.segmenters.values()):
            raise ValueError(f"{', '.join(self.segmenters)}: nothing of this can be served; why not is said above")
        return self.segmenters

    def init_trainers(self) -> dict[str, CopyTrainTask]:
        if self.conf.get("train", "false").lower() != "true":
            return {}
        tasks = {name: CopyTrainTask(path, self.conf) for name, path in self.bundles.items()}
        return {name: task for name, task in tasks.items() if task.is_valid()}

    def init_strategies(self) -> dict[str, First | Random]:
        return {"first": First(), "random": Random()}

    def infer(self, request: dict[str, Any], datastore: Any = None) -> dict[str, Any]:
        """Segment an image; and where the answer is to become a DICOM SEG, say which segments it has.

        MONAI Label makes the DICOM SEG after this from the request's list ``label_info``, so the list itself is corrected.
        """
        result = super().infer(request, datastore)
        if isinstance(asked := request.get("label_info"), list) and result.get("file"):
            labels = self.segmenters[request["model"]].labels
            asked[:] = dicom_segments(voxel_values(result["file"]), labels, request["model"], asked)
        return result

    def batch_infer(self, request: dict[str, Any], datastore: Any = None) -> dict[str, Any]:
        """Segment many images; MONAI Label would divide by the number of GPUs where there is none."""
        several = request.get("multi_gpu", True) and torch.cuda.device_count() > 1
        return super().batch_infer({**request, "multi_gpu": several}, datastore)
