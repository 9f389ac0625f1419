"""Patches of labelled scans around their organs, the same to several bundles, with each bundle's own channel numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from tools.bundle import Bundle
from tools.errors import UserError, naming
from tools.labels import check_channels
from tools.scans import choose_scans
from tools.segmenter import preprocessed

if TYPE_CHECKING:
    from torch import Tensor


def labelled_patches(
    bundles: Sequence[Bundle],
    dataset_dir: str | Path,
    part: str,
    split_file: str,
    scans: int,
    patches: int,
    size: Sequence[int],
    seed: int,
    renamed: Mapping[str, object],
) -> tuple[Tensor, list[Tensor]]:
    """Crop patches that are centred on the organs of some bundles, each label of the dataset as often as another.

    Args:
        bundles: they must preprocess images alike.
        dataset_dir: nnU-Net raw dataset.
        part: of its split; "all" for all labelled cases.
        split_file: JSON file with the split; empty for the dataset's own.
        scans: how many, chosen at random.
        patches: from each of them.
        size: of the patches, voxels.
        seed: of scans and places.
        renamed: the dataset's labels for channels that are called otherwise.

    Returns:
        Images (N, in, …), float32, and for each bundle its label maps (N, 1, …).

    Raises:
        UserError: the dataset lacks labels or a bundle's organ, the bundles preprocess differently, or no scan has an organ.
    """
    import torch
    from monai.transforms import (
        Compose,
        EnsureChannelFirstd,
        LoadImaged,
        RandCropByLabelClassesd,
        ResampleToMatchd,
        SpatialPadd,
    )

    from tools.bundle_code.nnunet_data import CheckGridd, LabelsToChannelsd

    values = [channel_values(bundle, dataset_dir, renamed) for bundle in bundles]
    first = bundles[0]
    for bundle in bundles:
        check_channels(dataset_dir, bundle)
        if bundle.resolved("preprocessing") != first.resolved("preprocessing"):
            raise UserError(
                f"{bundle.path} preprocesses images otherwise than {first.path}: measure them one at a time"
            )
    organs = [[value] for value in sorted({v for channels in values for channel in channels for v in channel})]
    with first.code():
        preprocessing = first.parser().get_parsed_content("preprocessing")
    load_label = Compose(
        [
            LoadImaged("label"),
            EnsureChannelFirstd("label"),
            CheckGridd("label"),
            ResampleToMatchd("label", key_dst="image", mode="nearest"),
        ]
    )
    crop = Compose(
        [
            SpatialPadd(("image", "label", "organ"), size),
            RandCropByLabelClassesd(
                ("image", "label"), "organ", size, ratios=[0] + [1] * len(organs), num_classes=1 + len(organs),
                num_samples=patches, warn=False,
            ),
        ]
    ).set_random_state(seed)  # fmt: skip
    pieces: list[dict[str, Tensor]] = []
    cases = choose_scans(dataset_dir, first, part, split_file, scans, seed)
    for case in tqdm(cases, desc="labelled scans", disable=None, leave=False):
        image = preprocessed(preprocessing, case["image"], first.in_channels)
        with naming(case["label"]):
            scan = load_label({**image, "label": case["label"]})
        scan["organ"] = LabelsToChannelsd("organ", organs)({"organ": scan["label"]})["organ"]
        if scan["organ"].any():
            pieces += crop({key: scan[key].as_tensor() for key in ("image", "label", "organ")})
    if not pieces:
        raise UserError(
            f"none of the {len(cases)} scans of {dataset_dir} has an organ of {first.path}; take more --scans"
        )
    images, labels = (torch.stack([torch.as_tensor(piece[key]) for piece in pieces]) for key in ("image", "label"))
    images, labels = (tensor.as_tensor() if hasattr(tensor, "as_tensor") else tensor for tensor in (images, labels))
    return images.float(), [LabelsToChannelsd("label", own)({"label": labels})["label"] for own in values]


def channel_values(bundle: Bundle, dataset_dir: str | Path, renamed: Mapping[str, object]) -> list[list[int]]:
    """The dataset's voxel values for each channel of a bundle.

    Raises:
        UserError: there are no labels, or a channel's are not among them.
    """
    from tools.bundle_code.nnunet_data import read_labels
    from tools.evaluate import found_channels

    try:
        known = read_labels(dataset_dir)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from None
    found = found_channels(bundle, dataset_dir, renamed)
    for label, values in found.items():
        if values is None:
            raise UserError(
                f"{dataset_dir} has no label for {label!r} of {bundle.path}, but {', '.join(known)}; map it by --labels"
            )
    return list(found.values())
