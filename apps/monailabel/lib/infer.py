"""Segmentation with the weights that are in the bundle now, or not at all."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from fastapi import HTTPException
from monailabel.tasks.infer.bundle import BundleInferTask

from lib.bundles import WEIGHTS, channel_labels
from lib.segments import displayed_labels

logger = logging.getLogger(__name__)

Files = tuple[tuple[str, int, int], ...]


class StrictBundleInferTask(BundleInferTask):
    """MONAI Label's task for a bundle, which reads it again when a file of it has changed, and refuses weights that do not fit.

    MONAI Label itself takes the weights file with the shortest name, keeps weights until a file has another time of change,
    whichever file that is, and answers with random weights where names of tensors do not fit or the file is gone.

    A bundle that cannot be read, at the start or later, is left out of the list of models, and the log says why.

    Args:
        path: the bundle.
        conf: the app's configuration.
    """

    def __init__(self, path: Path, conf: dict[str, str]) -> None:
        self.folder = path
        self.conf = conf
        self.description = ""
        self.files: Files = ()
        self.loaded: Path | None = None
        self.is_valid()

    def refresh(self) -> None:
        """Read the bundle if it is not as it was read before: configs, code, weights.

        Raises:
            ValueError: the bundle has no weights, or its labels are not numbered without gaps.
            Exception: whatever its configs and code raise.
        """
        files = _files(self.folder)
        if files == self.files:
            return
        if not (self.folder / WEIGHTS).is_file():
            raise ValueError(f"{self.folder / WEIGHTS} not found")
        super().__init__(str(self.folder), self.conf, type="segmentation", load_strict=True)
        self.labels = displayed_labels(channel_labels(self.folder))
        others = sorted(p.name for p in self.folder.glob("models/*.pt") if p.name not in ("model.pt", "modulators.pt"))
        self.config()["model_filename"] = ["model.pt", *others]
        self.loaded, self.files = None, files

    def is_valid(self) -> bool:
        """Whether the bundle can be served as it is now; why not is in the log."""
        try:
            self.refresh()
        except Exception:
            logger.exception(f"{self.folder} is not served")
            return False
        return super().is_valid()

    def __call__(self, request: dict[str, Any], callbacks: Any = None) -> tuple[str | None, dict[str, Any]]:
        """Segment an image.

        Raises:
            HTTPException: 500, with what is wrong, which clients show; MONAI Label would say "Internal Server Error".
        """
        try:
            self.refresh()
            label_type = "uint8" if len(self.labels) < 256 else "uint16"
            return super().__call__({"result_dtype": label_type, **request}, callbacks)
        except Exception as error:
            logger.exception(f"{self.folder.name} cannot segment {request.get('image')}")
            raise HTTPException(
                500, f"{self.folder.name}: {' '.join(str(error).split()) or type(error).__name__}"
            ) from error

    def run_pre_transforms(self, data: dict[str, Any], transforms: Any) -> dict[str, Any]:
        """Preprocess, with what MONAI Label knows about the image out of the transforms' sight.

        MONAI 1.6 takes every entry whose name begins with ``image_`` for metadata, and its ``Spacingd`` fails on ``image_path``.
        """
        others = {
            name: value
            for name, value in data.items()
            if name.startswith(f"{self.input_key}_") and not isinstance(value, dict)
        }
        data = super().run_pre_transforms({name: data[name] for name in data if name not in others}, transforms)
        data.update(others)
        return data

    def run_inferer(self, data: dict[str, Any], convert_to_batch: bool = True, device: str = "cuda") -> dict[str, Any]:
        """Run the network with the weights that were asked for.

        Raises:
            ValueError: there is no such file, or it does not fit the network.
        """
        name = data.get("model_filename", "model.pt")
        name = name if isinstance(name, str) else name[0]
        if name not in self.config()["model_filename"]:
            raise ValueError(f"no weights {name!r}: there are {', '.join(self.config()['model_filename'])}")
        path = self.folder / "models" / name
        if path != self.loaded:
            self.clear_cache()
            self._check_weights(path)
            self.loaded = path
        return super().run_inferer(data, convert_to_batch, device)

    def _check_weights(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            theirs = {key: tuple(tensor.shape) for key, tensor in state.get("model", state).items()}
        except Exception as error:
            raise ValueError(
                f"{path} is not a readable file of weights ({' '.join(str(error).split())[:200]})"
            ) from None
        own = {key: tuple(tensor.shape) for key, tensor in self.network.state_dict().items()}
        if wrong := sorted(key for key in own.keys() | theirs.keys() if own.get(key) != theirs.get(key)):
            raise ValueError(
                f"{path} does not fit the network: {len(wrong)} tensors are missing, too many, or have another shape "
                f"({', '.join(wrong[:3])}{', …' if len(wrong) > 3 else ''})"
            )


def _files(bundle: Path) -> Files:
    """What tells one state of a bundle from another: path, time of change and size of its files."""
    paths = (path for part in ("configs", "scripts", "models") for path in sorted(bundle.glob(f"{part}/[!.]*.*")))
    stats = {path: path.stat() for path in paths}
    return tuple((str(path), stat.st_mtime_ns, stat.st_size) for path, stat in stats.items())
