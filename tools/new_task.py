"""``new_task``: a bundle that fine-tunes one task from a starting point."""

from __future__ import annotations

import shutil
from pathlib import Path

from tools.bundle import Bundle
from tools.card import described
from tools.errors import UserError
from tools.instantiate import (
    copy_template,
    data_facts,
    introduce,
    set_labels,
    set_starting_point,
    set_values,
    update_metadata,
)
from tools.labels import check_channels, parse_channels, resolve
from tools.lineage import backbone_sha256
from tools.new_pretraining import apply_overlays
from tools.output import complete_output

TEMPLATE = Path(__file__).parents[1] / "bundles" / "taskvector_template"

TEETH = "11-18,21-28,31-38,41-48"
PRESETS = {  # the published tasks of U-Net Transplant (MICCAI 2025): voxel values in BTCV and in ToothFairy2
    "btcv_spleen": ("spleen", 1),
    "btcv_kidneys": ("kidneys", "2,3"),
    "btcv_liver": ("liver", 6),
    "btcv_stomach": ("stomach", 7),
    "toothfairy2_mandible": ("mandible", 1),
    "toothfairy2_pharynx": ("pharynx", 7),
    "toothfairy2_canals": ("inferior alveolar canals", "3,4"),
    "toothfairy2_teeth": ("teeth", TEETH),
}


def new_task(
    pretrained: str,
    dataset_dir: str,
    output: str,
    task: str = "",
    labels: object = None,
    preset: str = "",
    overlay: str = "",
    overwrite: bool = False,
) -> None:
    """Make a complete, self-contained bundle that fine-tunes one task from any starting-point bundle.

    Args:
        pretrained: the starting point, a bundle with weights.
        dataset_dir: nnU-Net raw dataset (dataset.json, imagesTr, labelsTr).
        output: folder of the new bundle.
        task: name of the task; it names the output channel.
        labels: the dataset's label(s) that make up the task, by name or voxel value: 6, "2,3", "11-18,21-28"; or a
            dictionary for several channels: "{liver: 6, tumour: 7}". Default: the label called like the task.
        preset: a published task instead of task and labels: btcv_spleen, btcv_kidneys, btcv_liver, btcv_stomach,
            toothfairy2_mandible, toothfairy2_pharynx, toothfairy2_canals, toothfairy2_teeth.
        overlay: overlays of taskvector_template to write into the configs, for example "small".
        overwrite: replace the output if it exists.
    """
    start = Bundle(pretrained)
    weights, structure = start.weights(), start.structure()
    weights.verify()
    if preset:
        if preset not in PRESETS:
            raise UserError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
        task, labels = task or PRESETS[preset][0], PRESETS[preset][1] if labels is None else labels
    if not task:
        raise UserError("--task (or --preset) is missing: it names the task, and its output channel")
    label_map = resolve(dataset_dir, parse_channels(labels) or {task: task if labels is None else labels})
    check_channels(dataset_dir, start)
    with complete_output(output, overwrite, inputs=[start.path, dataset_dir]) as folder:
        copy_template(TEMPLATE, folder)
        set_starting_point(folder, start, structure, out_channels=1 + len(label_map))
        set_labels(folder, label_map, dataset_dir)
        set_values(folder, {"dataset_dir": str(Path(dataset_dir).resolve())})
        apply_overlays(folder, overlay)
        (folder / "models" / "pretrained").mkdir()
        shutil.copyfile(start.model_file, folder / "models" / "pretrained" / "model.pt")
        data = data_facts(dataset_dir)
        dataset = data["dataset"]
        update_metadata(
            folder,
            name=f"{task}, fine-tuned from {start.name}",
            task=f"Segmentation of {', '.join(label_map)}",
            data_source=f"nnU-Net dataset {dataset}; not distributed with the bundle",
            description=f"Fine-tuned from {start.name} on {dataset}; its task vector can be merged with others.",
            lineage={
                "task": task,
                "pretrained": start.name,
                "pretrained_sha256": backbone_sha256(weights, structure),
                "structure": structure.as_dict(),
                "data": data,
                "pretrained_data": start.data,
            },
        )
        facts = {
            "starting point": f"{start.name}, trained on {described(start.data)}",
            "dataset": described(data),
            "labels": ", ".join(label_map),
        }
        introduce(folder, f"Specialist: {task}", facts)
    print(f"{output}: task {task} ({', '.join(label_map)}) from {start.name}")
