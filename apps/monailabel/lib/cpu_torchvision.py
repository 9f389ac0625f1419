"""Make torchvision importable beside a PyTorch that was built for another device.

PyPI's torchvision is built for CUDA. Beside a CPU-only PyTorch its compiled operators do not load, and it then fails while it is
imported, on describing two operators that are not there. MONAI Label draws pictures with torchvision and uses no operator, so it
is enough to declare these two. With a torchvision that loads nothing is changed.
"""

from __future__ import annotations

import importlib
import sys

import torch

DECLARED = ("nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor",)
DECLARED += tuple(schema.replace("nms", "qnms", 1) for schema in DECLARED)


def import_torchvision() -> None:
    """Import torchvision, with its two operators declared where they cannot be loaded.

    Raises:
        RuntimeError: it fails for another reason.
    """
    global _library  # the declarations last as long as this object
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in DECLARED:
            _library.define(schema)
        importlib.import_module("torchvision")
