"""``new_pretraining``: a pre-training bundle for the labels of one dataset."""

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
    """Copy a pre-training bundle and make it fit the labels of an nnU-Net dataset.

    Args:
        bundle: the bundle to copy, for example bundles/pretrain_amos.
        dataset_dir: nnU-Net raw dataset (dataset.json, imagesTr, labelsTr).
        output: folder of the new bundle.
        labels: "all", or a dictionary of channel names and labels: "{kidneys: [2, 3], liver: liver}".
        overlay: overlays of the bundle to write into its configs, for example "stable" or "small,stable".
        patch_size: edge of the training patches and inference windows, voxels, other than the bundle's.
        overwrite: replace the output if it exists.
    """
    from tools.bundle_code.nnunet_data import read_labels

    source = Bundle(bundle)
    if labels == "all":
        try:
            labels = {name: [name] for name, values in read_labels(dataset_dir).items() if len(values) == 1}
        except (ValueError, FileNotFoundError) as error:
            raise UserError(str(error)) from None
    channels = parse_channels(labels)
    if not channels:
        raise UserError('--labels must be "all" or a dictionary such as "{kidneys: [2, 3], liver: liver}"')
    label_map = resolve(dataset_dir, channels)
    check_channels(dataset_dir, source)
    with complete_output(output, overwrite) as folder:
        copy_template(source.path, folder)
        set_labels(folder, label_map)
        set_values(folder, {"dataset_dir": str(Path(dataset_dir).resolve())})
        apply_overlays(folder, overlay)
        if patch_size:
            set_values(folder, {"patch_size": [patch_size] * 3})
        data = data_facts(dataset_dir)
        dataset = data["dataset"]
        update_metadata(
            folder,
            name=f"{dataset} pre-training",
            task=f"Supervised pre-training on {', '.join(label_map)}, as the starting point of task vectors",
            description=f"A starting point for model merging, {source.name} trained on {dataset}.",
            data_source=f"nnU-Net dataset {dataset}; not distributed with the bundle",
            lineage={"data": data},
        )
        introduce(folder, f"Starting point: {dataset}", {"dataset": described(data), "labels": ", ".join(label_map)})
    print(f"{output}: {len(label_map)} labels ({', '.join(label_map)})")


def apply_overlays(folder: Path, overlay: str | tuple) -> None:
    """Write the values of overlays, configs/<name>.json, into a bundle's configs.

    Raises:
        UserError: no such overlay, or one that changes more than top-level values.
    """
    names = overlay if isinstance(overlay, tuple | list) else str(overlay).split(",")
    for name in filter(None, names):
        values = read_json(folder / "configs" / f"{name}.json")
        set_values(folder, {key: value for key, value in values.items() if not key.startswith("_")})
