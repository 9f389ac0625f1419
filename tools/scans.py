"""A few scans to look at without their labels: of a folder of images, or of an nnU-Net dataset; and patches of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from tools.bundle import Bundle
from tools.errors import UserError, at_least
from tools.segmenter import preprocessed

if TYPE_CHECKING:
    from torch import Tensor, nn


def all_scans(images: str | Path, bundle: Bundle, part: str, split_file: str) -> list[dict[str, Any]]:
    """The scans of a folder of images, or of an nnU-Net dataset.

    Args:
        images: the folder.
        bundle: its network says how many channels an image has.
        part: of an nnU-Net dataset's split; empty for all labelled cases.
        split_file: JSON file with the split; empty for the dataset's own.

    Returns:
        For each a dictionary with the path, or paths, of the "image"; of a dataset with that of the "label" too.

    Raises:
        UserError: there are none.
    """
    from tools.bundle_code.images import list_images
    from tools.evaluate import find_cases

    if not Path(images).exists():
        raise UserError(f"{images} not found: --images must name a folder of images, or an nnU-Net dataset")
    if (Path(images) / "dataset.json").is_file():
        return list(find_cases(images, part or "all", split_file, 0).values())
    try:
        return list_images(images, bundle.in_channels)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from None


def choose_scans(
    images: str | Path, bundle: Bundle, part: str, split_file: str, count: int, seed: int
) -> list[dict[str, Any]]:
    """Choose so many of ``all_scans`` at random.

    Raises:
        UserError: there are none, or fewer than one is wanted.
    """
    at_least(1, scans=count)
    cases = all_scans(images, bundle, part, split_file)
    order = np.random.default_rng(seed).permutation(len(cases))
    return [cases[position] for position in sorted(order[:count])]


def patches_on_organs(
    bundle: Bundle,
    network: nn.Module,
    cases: Sequence[dict[str, Any]],
    size: Sequence[int],
    patches: int,
    seed: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Segment scans and crop patches around what the network sees, each organ as often as another.

    Args:
        bundle: of the preprocessing and the sliding window.
        network: in evaluation mode, with 1 + C outputs.
        cases: as ``choose_scans`` gives them.
        size: of the patches, voxels.
        patches: from each scan.
        seed: of their places.

    Yields:
        A patch (in, …), and the soft masks of the organs (C, …): the sigmoid of their margins over background.
    """
    import torch
    from monai.transforms import Compose, RandCropByLabelClassesd, SpatialPadd

    with bundle.code():
        parser = bundle.parser(inferer_output="logits")
        preprocessing, inferer = (parser.get_parsed_content(key) for key in ("preprocessing", "inferer"))
    device = next(network.parameters()).device
    crop = None
    for case in tqdm(cases, desc="scans", disable=None, leave=False):
        image = preprocessed(preprocessing, case["image"], bundle.in_channels)["image"].as_tensor()
        with torch.inference_mode():
            logits = inferer(image[None].to(device), network)[0].float().cpu()
        margins = logits[1:] - logits[:1]
        organ = torch.where(margins.amax(0) > 0, margins.argmax(0) + 1, 0)[None]
        if crop is None:
            several = {"num_classes": 1 + len(margins), "num_samples": patches, "warn": False}
            crop = Compose(
                [
                    SpatialPadd(("image", "mask", "organ"), size),
                    RandCropByLabelClassesd(("image", "mask"), "organ", size, **several),
                ]
            ).set_random_state(seed)
        for piece in crop({"image": image, "mask": margins.sigmoid(), "organ": organ}):
            yield piece["image"].as_tensor(), piece["mask"].as_tensor()
