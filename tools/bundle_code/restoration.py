"""Learning from images without labels: which images, the loss of restoring them, and a picture of what is restored."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from monai.config import PathLike
from torch import Tensor, nn

from .images import list_images
from .inferers import full_size
from .nnunet_data import count_channels


def unlabelled_images(
    dataset_dir: PathLike | Sequence[PathLike], part: str, channels: int = 1, held_out: float = 0.1, seed: int = 0
) -> list[dict[str, Any]]:
    """The images of one or several folders that are trained on, or those that are held out.

    They are ordered by a hash of their file's name and the seed, wherever the folder lies; the first ones are held out.

    Args:
        dataset_dir: folders of images, or nnU-Net datasets, of which imagesTr is taken: images to test on stay unseen unless
            their folder is named.
        part: "train" or "val".
        channels: of an image.
        held_out: share of the images for "val", at least one of them.
        seed: of the choice.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError: fewer than two images, no such part, or a dataset whose images have other channels.
    """
    folders = [dataset_dir] if isinstance(dataset_dir, str | os.PathLike) else list(dataset_dir)
    images: list[dict[str, Any]] = []
    for folder in map(Path, folders):
        if (folder / "dataset.json").is_file() and (count := count_channels(folder)) != channels:
            raise ValueError(f"images of {folder} have {count} channels, the network takes {channels}")
        train = folder / "imagesTr"
        images += list_images(train if train.is_dir() else folder, channels)
    if len(images) < 2:
        raise ValueError(f"two images are needed at least, one of them to validate; {dataset_dir} has {len(images)}")

    def rank(item: dict[str, Any]) -> str:
        files = item["image"]
        name = Path(files if isinstance(files, str) else files[0]).name
        return hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()

    ranked = sorted(images, key=rank)
    count = min(max(1, round(held_out * len(images))), len(images) - 1)
    parts = {"val": ranked[:count], "train": ranked[count:]}
    if part not in parts:
        raise ValueError(f"part must be 'train' or 'val', got {part!r}")
    return parts[part]


def restored(logits: Tensor, linear: bool = False) -> Tensor:
    """The image that a network's output stands for: the sigmoids of channels 1 to C, in [0, 1]. Channel 0 is background.

    Args:
        logits: ``(N, 1 + C, …)``.
        linear: the channels as they are, for images that are not in [0, 1].

    Returns:
        ``(N, C, …)``.
    """
    return logits[:, 1:] if linear else torch.sigmoid(logits[:, 1:])


class RestorationLoss(nn.Module):
    """Mean squared error of the restored image: over all voxels, or over those that a mask names.

    Args:
        linear: see ``restored``.

    Shapes:
        logits ``(N, 1 + C, …)`` and the image before it was corrupted, ``(N, C, …)``, to a scalar; with one channel more, the
        last one of the image is the mask, 1 where the error counts.

    Raises:
        ValueError: other channels.
    """

    def __init__(self, linear: bool = False) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        logits, target = (x.as_tensor() if hasattr(x, "as_tensor") else x for x in (logits, target))
        channels = logits.shape[1] - 1
        if target.shape[1] not in (channels, channels + 1):
            raise ValueError(
                f"the network restores {channels} channel(s), the image has {target.shape[1]}: set out_channels of network_def "
                "to 1 + the number of image channels"
            )
        error = (restored(logits, self.linear) - target[:, :channels]) ** 2
        if target.shape[1] == channels:
            return error.mean()
        mask = target[:, channels:]
        return (error * mask).sum() / (mask.sum() * channels).clamp(min=1)


class RestorationPicture:
    """Draw images as they were, corrupted and restored, whenever they are validated: those of the first batch.

    Args:
        folder: ``restored_epoch_0001.png``, … go there.
        rows: how many images at most.
        linear: see ``restored``.
    """

    def __init__(self, folder: PathLike, rows: int = 4, linear: bool = False) -> None:
        self.folder = Path(folder)
        self.rows = rows
        self.linear = linear

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), self)

    def __call__(self, engine: Engine) -> None:
        if dist.is_initialized() and dist.get_rank() > 0:
            return
        output = engine.state.output
        original, corrupted = (output[key][: self.rows].float().cpu() for key in ("label", "image"))
        prediction = full_size(output["pred"])[: self.rows].float().cpu()
        columns = {"original": original, "corrupted": corrupted, "restored": restored(prediction, self.linear)}
        figure = Figure(figsize=(6, 2 * len(original) + 0.3), facecolor="black")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(original), len(columns), squeeze=False)
        for column, (title, images) in enumerate(columns.items()):
            for row in range(len(original)):
                plane = images[row, 0, ..., images.shape[-1] // 2].T
                scaled = title != "corrupted" and not self.linear  # the network's input may be standardised
                low, high = (0, 1) if scaled else (None, None)
                axes[row][column].imshow(plane, cmap="gray", vmin=low, vmax=high, origin="lower")
                axes[row][column].axis("off")
            axes[0][column].set_title(title, color="white", fontsize=9)
        figure.tight_layout(pad=0.3)
        self.folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.folder / f"restored_epoch_{engine.state.epoch:04d}.png", dpi=110, facecolor="black")
