"""``convert``: a published checkpoint of another framework becomes a bundle."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tools import __version__
from tools.bundle import Bundle, read_json, write_json
from tools.errors import UserError, nearest
from tools.importers.conversion import Conversion
from tools.instantiate import assemble_scripts, copy_template, introduce, set_labels, set_values, update_metadata
from tools.lineage import file_sha256
from tools.markdown import table
from tools.network_check import check_fit
from tools.output import complete_output
from tools.vendor import BUNDLES
from tools.weights_file import WeightsFile

SOURCES = {
    "stunet": "STU-Net, nnU-Net 1: <name>.model, with <name>.model.pkl beside it or in --plans",
    "genesis": "Models Genesis: Genesis_Chest_CT.pt or genesis_nnunet_luna16_006.model",
    "lwi": "LWI-VMS: UNETR (*.pt) or UNETR++ (model_final_checkpoint.model), first or second stage",
    "unettransplant": "U-Net Transplant: Pretrain_*.pth or TaskVector_*.pth",
    "nnunet": "nnU-Net 2: fold_*/checkpoint_*.pth of a trained model's folder, which has plans.json and dataset.json",
    "monai": "any MONAI bundle with weights, such as the model zoo's: its folder",
}
# of what a file holds instead of a checkpoint
UNFORESEEN = (TypeError, KeyError, IndexError, AttributeError, RuntimeError)


def convert(
    source: str = "",
    checkpoint: str = "",
    output: str = "",
    overwrite: bool = False,
    list: bool = False,
    **options: Any,
) -> None:
    """Turn a checkpoint of another framework into a bundle that trains, merges and runs like any other here.

    Nothing that the checkpoint holds is executed. Every tensor of it is accounted for: docs/conversion.md in the bundle says
    what became of each.

    Args:
        source: where it comes from: stunet, genesis, lwi, unettransplant, nnunet or monai; see --list.
        checkpoint: the file, or for monai the folder.
        output: folder of the new bundle.
        overwrite: replace the output if it exists.
        list: print the sources, or with --source the description of one and its options, and stop.
        options: of the source, each a flag; see --list --source.
    """
    if source and source not in SOURCES:
        raise UserError(f"no source {source!r}{nearest(source, SOURCES)}; there are {', '.join(SOURCES)}")
    if list and not source:
        print("\n".join(f"{name:<16} {text}" for name, text in SOURCES.items()))
        return
    given = {"--source": source, "--checkpoint": list or checkpoint, "--output": list or output}
    if missing := [flag for flag, value in given.items() if not value]:
        raise UserError(f"{', '.join(missing)} missing; see python -m tools convert --help")
    read = import_module(f"tools.importers.{source}").read
    if list:
        print(inspect.getdoc(read))
        return
    known = [*inspect.signature(read).parameters][1:]
    for name in options:
        if name not in known:
            there = f"it has {', '.join(f'--{n}' for n in known)}" if known else "it has none"
            raise UserError(f"source {source} has no option --{name}{nearest(name, known)}; {there}")
    path = Path(checkpoint)
    with complete_output(output, overwrite, inputs=[path]) as folder:
        try:
            conversion = read(path, **options)
        except UNFORESEEN as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UserError(f"{path} is damaged, or not from {SOURCES[source].split(':')[0]} ({reason})") from error
        write_conversion(folder, source, SOURCES[source].split(":")[0], path, conversion)
    new = sum(origin.startswith("new") for origin in conversion.origins.values())
    print(
        f"{output}: {len(conversion.tensors) - new} tensors of {path.name}, {new} new, {len(conversion.left_out)} left out "
        f"(docs/conversion.md), {len(conversion.labels)} labels"
    )


def write_conversion(folder: Path, source: str, described: str, checkpoint: Path, conversion: Conversion) -> None:
    """Make the bundle, and be sure that its network takes the weights.

    Args:
        folder: of the new bundle.
        source: the word for where the checkpoint is from, for the lineage.
        described: the same, for people.
        checkpoint: the file or folder.
        conversion: what was found in it.

    Raises:
        UserError: the network and the weights do not fit, or code is missing.
    """
    import torch

    copy_template(BUNDLES / conversion.template, folder)
    set_labels(folder, conversion.labels)
    set_values(folder, conversion.values)
    assemble_scripts(folder, conversion.scripts, json.dumps(conversion.values))
    _set_inputs(folder, conversion)
    own = {
        id(tensor): tensor.detach().clone(memory_format=torch.contiguous_format)
        for tensor in conversion.tensors.values()
    }
    torch.save({name: own[id(tensor)] for name, tensor in conversion.tensors.items()}, folder / "models" / "model.pt")
    converted = {"source": source, "file": checkpoint.name, "tool_version": __version__}
    if checkpoint.is_file():
        converted["sha256"] = file_sha256(checkpoint)
    lineage = {**conversion.metadata.pop("lineage", {}), "converted_from": converted}
    update_metadata(folder, **{"copyright": "that of the checkpoint's authors", **conversion.metadata}, lineage=lineage)
    facts = {"source": described, **conversion.facts}
    if (folder / "configs" / "train.json").is_file():
        introduce(folder, f"Converted: {checkpoint.name}", facts)
    else:
        (folder / "docs" / "README.md").write_text(_card(f"Converted: {checkpoint.name}", facts, conversion))
    (folder / "docs" / "conversion.md").write_text(_account(checkpoint, conversion))
    bundle = Bundle(folder)
    check_fit(bundle, WeightsFile(bundle.model_file), run_code=True)


def _set_inputs(folder: Path, conversion: Conversion) -> None:
    """What images the network takes, and which packages the bundle needs."""
    metadata = read_json(folder / "configs" / "metadata.json")
    formats = metadata["network_data_format"]
    formats["inputs"]["image"] |= conversion.image
    formats["outputs"]["pred"]["spatial_shape"] = formats["inputs"]["image"]["spatial_shape"]
    metadata["required_packages_version"] |= {name: _installed(name) for name in conversion.packages}
    write_json(folder / "configs" / "metadata.json", metadata)
    inference = read_json(folder / "configs" / "inference.json")
    inference["dataset"]["data"]["channels"] = formats["inputs"]["image"]["num_channels"]
    write_json(folder / "configs" / "inference.json", inference)


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        raise UserError(
            f"the bundle needs the package {package}, which is not installed: pip install {package}"
        ) from None


def _card(title: str, facts: Mapping[str, str], conversion: Conversion) -> str:
    """The README of a bundle without a training of its own."""
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    channels = [f"{number}. {label}" for number, label in enumerate(conversion.labels, start=1)]
    return "\n".join(
        [
            f"# {title}\n",
            *lines,
            "\nWhat became of each of its tensors: `conversion.md`. Labels in the output (0 is background):\n",
            *channels,
            "\nSegment a folder of images, or fine-tune it for a task on an nnU-Net dataset:\n",
            "```bash",
            "python -m monai.bundle run --config_file configs/inference.json --bundle_root . --dataset_dir <images> \\",
            "    --output_dir <label maps>",
            "python -m tools new_task --pretrained . --dataset_dir <dataset> --task <label> --output <new bundle>",
            "```\n",
            "Knobs are at the top of `configs/inference.json`.\n",
            "## Limits",
            "Research use; not for diagnosis. The code is Apache-2.0; the terms of use of the weights are those of their authors "
            "and of the data that they were trained on: look at them before commercial use.\n",
        ]
    )


def _account(checkpoint: Path, conversion: Conversion) -> str:
    """What became of every tensor, as Markdown."""
    rows = (
        [f"`{name}`", " × ".join(map(str, tensor.shape)), conversion.origins[name]]
        for name, tensor in conversion.tensors.items()
    )
    text = f"# What became of {checkpoint.name}\n\n{table(['tensor', 'shape', 'from'], rows)}\n"
    if conversion.left_out:
        left_out = ([f"`{name}`", reason] for name, reason in conversion.left_out.items())
        text += f"\nLeft out:\n\n{table(['of the checkpoint', 'why'], left_out)}\n"
    return text
