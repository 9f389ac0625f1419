"""``new_pretraining``: a pre-training bundle for the labels of one dataset, or for images without labels."""

from __future__ import annotations

from pathlib import Path

from tools.bundle import Bundle, read_json
from tools.card import described
from tools.errors import UserError
from tools.instantiate import copy_template, data_facts, introduce, set_labels, set_values, update_metadata
from tools.labels import check_channels, parse_channels, resolve
from tools.output import complete_output


def new_pretraining(
    bundle: str,
    dataset_dir: str,
    output: str,
    labels: object = "all",
    overlay: str = "",
    patch_size: int = 0,
    overwrite: bool = False,
) -> None:
    """Copy a pre-training bundle and make it fit an nnU-Net dataset: its labels, or its images where the bundle needs no labels.

    Args:
        bundle: the bundle to copy, for example bundles/pretrain_amos.
        dataset_dir: nnU-Net raw dataset (dataset.json, imagesTr, labelsTr); for a bundle that needs no labels also a folder of
            images, or several separated by commas.
        output: folder of the new bundle.
        labels: "all", or a dictionary of channel names and labels: "{kidneys: [2, 3], liver: liver}".
        overlay: overlays of the bundle to write into its configs, for example "stable" or "small,stable".
        patch_size: edge of the training patches and inference windows, voxels, other than the bundle's.
        overwrite: replace the output if it exists.
    """
    source = Bundle(bundle)
    supervised = "labels" in read_json(source.path / "configs" / "train.json")
    if supervised:
        folders, label_map = [dataset_dir], _label_map(dataset_dir, labels)
    elif labels != "all":
        raise UserError(f"{source.path} is trained without labels: leave out --labels")
    else:
        folders = dataset_dir.split(",") if isinstance(dataset_dir, str) else list(dataset_dir)
        label_map = {}
        _check_images(folders, source.in_channels)
    for folder in folders:
        check_channels(folder, source)
    directories = [str(Path(folder).resolve()) for folder in folders]
    with complete_output(output, overwrite, inputs=[source.path, *folders]) as folder:
        copy_template(source.path, folder)
        if supervised:
            set_labels(folder, label_map, dataset_dir)
        set_values(folder, {"dataset_dir": directories[0] if len(directories) == 1 else directories})
        apply_overlays(folder, overlay)
        if patch_size:
            from tools.network_check import check_patch

            set_values(folder, {"patch_size": [patch_size] * 3})
            check_patch(Bundle(folder))
        _set_one_size(folder)
        data = _facts(folders)
        dataset, learned = data["dataset"], ", ".join(label_map) or "images without labels"
        update_metadata(
            folder,
            name=f"{dataset} pre-training",
            task=f"{'Supervised' if supervised else 'Self-supervised'} pre-training on {learned}, as the starting point of task "
            "vectors",
            description=f"A starting point for model merging, {source.name} trained on {dataset}.",
            data_source=f"{'nnU-Net dataset ' if supervised else ''}{dataset}; not distributed with the bundle",
            lineage={"data": data},
        )
        introduce(folder, f"Starting point: {dataset}", {"dataset": described(data), "learned from": learned})
    print(f"{output}: {f'{len(label_map)} labels ({learned})' if supervised else learned}")


def _label_map(dataset_dir: str, labels: object) -> dict[str, list[int | str]]:
    """The output channels that the user asked for, checked against the dataset."""
    from tools.bundle_code.nnunet_data import read_labels

    if labels == "all":
        try:
            labels = {name: [name] for name, values in read_labels(dataset_dir).items() if len(values) == 1}
        except (ValueError, FileNotFoundError) as error:
            raise UserError(str(error)) from None
    channels = parse_channels(labels)
    if not channels:
        raise UserError('--labels must be "all" or a dictionary such as "{kidneys: [2, 3], liver: liver}"')
    return resolve(dataset_dir, channels)


def _check_images(folders: list[str], channels: int) -> None:
    """Refuse folders without images, and images whose first one has other channels."""
    from monai.transforms import EnsureChannelFirst

    from tools.bundle_code.images import LoadImageOrSeriesd
    from tools.bundle_code.restoration import unlabelled_images

    try:
        images = unlabelled_images(folders, "train", channels)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from None
    for image in images:
        try:
            found = len(EnsureChannelFirst()(LoadImageOrSeriesd("image")(image)["image"]))
        except Exception:  # training names it and leaves it out
            continue
        if found != channels:
            raise UserError(f"{image['image']} has {found} channels, the network takes {channels}")
        return
    raise UserError(f"none of the images of {', '.join(folders)} can be read")


def _set_one_size(folder: Path) -> None:
    """Where metadata.json says that the network takes images of one size, make that the size of this bundle's patches."""
    formats = Bundle(folder).metadata["network_data_format"]
    sides = formats["inputs"]["image"], formats["outputs"]["pred"]
    if all(isinstance(length, int) for side in sides for length in side["spatial_shape"]):
        for side in sides:
            side["spatial_shape"] = read_json(folder / "configs" / "inference.json")["patch_size"]
        update_metadata(folder, network_data_format=formats)


def _facts(folders: list[str]) -> dict[str, str]:
    """What datasets say of themselves, as one; a folder of images without a dataset.json has its name."""
    said = [
        data_facts(f) if (Path(f) / "dataset.json").is_file() else {"dataset": Path(f).resolve().name} for f in folders
    ]
    names = dict.fromkeys(name for facts in said for name in facts)
    return {name: "; ".join(dict.fromkeys(facts[name] for facts in said if name in facts)) for name in names}


def apply_overlays(folder: Path, overlay: str | tuple) -> None:
    """Write the values of overlays, configs/<name>.json, into a bundle's configs.

    What a later one sets otherwise than an earlier one is printed: the order may not be what was meant.

    Raises:
        UserError: no such overlay, or one that changes more than top-level values.
    """
    names = overlay if isinstance(overlay, tuple | list) else str(overlay).split(",")
    before: dict[str, tuple[str, object]] = {}
    for name in filter(None, names):
        content = read_json(folder / "configs" / f"{name}.json")
        values = {key: value for key, value in content.items() if not key.startswith("_")}
        for key in values.keys() & before.keys():
            other, old = before[key]
            if old != values[key]:
                print(f"overlay {name} comes last: {key} is {values[key]}, not {old} as in {other}")
        before |= {key: (name, value) for key, value in values.items()}
        set_values(folder, values)
