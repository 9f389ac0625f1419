"""A few scans to look at without their labels: of a folder of images, or of an nnU-Net dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tools.bundle import Bundle
from tools.errors import UserError


def choose_scans(
    images: str | Path, bundle: Bundle, part: str, split_file: str, count: int, seed: int
) -> list[dict[str, Any]]:
    """Choose scans at random.

    Args:
        images: folder of images, or an nnU-Net dataset.
        bundle: its network says how many channels an image has.
        part: of an nnU-Net dataset's split; empty for all labelled cases.
        split_file: JSON file with the split; empty for the dataset's own.
        count: how many.
        seed: of the choice.

    Returns:
        For each a dictionary with the path, or paths, of the "image".

    Raises:
        UserError: there are none.
    """
    from tools.bundle_code.images import list_images
    from tools.evaluate import find_cases

    if not Path(images).exists():
        raise UserError(f"{images} not found: --images must name a folder of images, or an nnU-Net dataset")
    if (Path(images) / "dataset.json").is_file():
        cases = list(find_cases(images, part or "all", split_file, 0).values())
    else:
        try:
            cases = list_images(images, bundle.in_channels)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(str(error)) from None
    order = np.random.default_rng(seed).permutation(len(cases))
    return [cases[position] for position in sorted(order[:count])]
