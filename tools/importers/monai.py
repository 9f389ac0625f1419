"""Any MONAI bundle with weights, such as the model zoo's, as a bundle of this project's form.

Most need no conversion: ``new_task``, ``diff`` and ``merge`` take them as they are. This is for those whose weights are called or
wrapped in another way, and for running one with this project's inference.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tools.bundle import Bundle
from tools.errors import UserError
from tools.importers.conversion import Conversion, check_stem, inner_state, named_tensors, read_checkpoint, repeated
from tools.instantiate import window_size
from tools.labels import parse_sources
from tools.lineage import file_sha256
from tools.network import build, describe, output_argument

KEPT = "name task description authors copyright license data_source references intended_use image_classes".split()


def read(
    checkpoint: Path,
    weights: str = "models/model.pt",
    labels: object = None,
    in_channels: int = 0,
    stem: str = "repeat",
) -> Conversion:
    """A bundle folder whose inference.json has ``network_def``, ``preprocessing`` and ``inferer``.

    Args:
        checkpoint: the folder.
        weights: the file of weights in it.
        labels: names of the output channels 1, 2, …, "liver,spleen", where its metadata.json has none.
        in_channels: of the images, where the network takes one channel: its first layer is repeated for each.
        stem: "repeat", or "mean": divided by their number, so that equal channels give what one gave.

    Raises:
        UserError: what is missing, or cannot be had in a bundle here.
    """
    check_stem(in_channels, stem)
    bundle = Bundle(checkpoint)
    network_def, preprocessing = bundle.network_def(), bundle.resolved("preprocessing")
    try:
        image = bundle.metadata["network_data_format"]["inputs"]["image"]
        channels = bundle.metadata["network_data_format"]["outputs"]["pred"].get("channel_def", {})
        count = int(network_def[output_argument(network_def)])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{checkpoint}: metadata.json or network_def lack what a bundle has ({error})") from None
    names = _names(checkpoint, channels, count, labels)
    content = read_checkpoint(checkpoint / weights)
    state, key = inner_state(content)
    tensors = named_tensors(state, checkpoint / weights, f"{key} of {weights}" if key else weights)
    with bundle.code():
        describe(network_def)  # so that a head that cannot be found is noticed here
        expected = build(network_def, count).state_dict()
    for name in expected:
        if name not in tensors or tensors[name].shape != expected[name].shape:
            found = tuple(tensors[name].shape) if name in tensors else "missing"
            raise UserError(
                f"{checkpoint / weights}: tensor {name} is {found}, in network_def {tuple(expected[name].shape)}"
            )
    others = {name: "not part of network_def" for name in tensors if name not in expected}
    if state is not content:
        others |= {str(key): "no weights of the network" for key, value in content.items() if value is not state}
    taken, origins = {name: tensors[name] for name in expected}, {name: f"`{name}`" for name in expected}
    if in_channels > 1:
        network_def, preprocessing, image = _for_channels(bundle, network_def, preprocessing, dict(image), in_channels)
        with bundle.code():
            wider = build(network_def, count).state_dict()
        for name, tensor in taken.items():
            if wider[name].shape != tensor.shape:
                taken[name], how = repeated(tensor, in_channels, stem)
                origins[name] += f", {how}"
    packages = (
        bundle.metadata.get("required_packages_version") or bundle.metadata.get("optional_packages_version") or {}
    )
    return Conversion(
        template="merged_inference",
        labels={name: [name] for name in names},
        tensors=taken,
        origins=origins,
        left_out=others,
        values={"network_def": network_def, "preprocessing": preprocessing, "patch_size": window_size(bundle)},
        image=dict(image),
        packages=[name for name in packages if _is_installed(name)],
        scripts=checkpoint / "scripts",
        metadata={
            **{key: bundle.metadata[key] for key in KEPT if key in bundle.metadata},
            "pred_classes": f"{count} channels, background first; argmax gives the label map",
            "lineage": {"weights_sha256": file_sha256(checkpoint / weights)},
        },
        facts={key: str(bundle.metadata.get(key, "unknown")) for key in ("name", "version", "authors", "license")},
    )


def _for_channels(
    bundle: Bundle, network_def: Mapping[str, Any], preprocessing: Any, image: dict[str, Any], channels: int
) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """Network, preprocessing and the description of images for more channels than one."""
    argument = next((name for name in ("in_channels", "input_channels") if network_def.get(name) == 1), "")
    if not argument:
        raise UserError(f"{bundle.path}: only the first layer of a network that takes 1 channel can be repeated")
    preprocessing = deepcopy(preprocessing)
    for transform in preprocessing.get("transforms", []) if isinstance(preprocessing, dict) else []:
        if len(transform.get("schemes", ())) == 1:  # of normalisation, one for each channel
            transform["schemes"] = [dict(transform["schemes"][0]) for _ in range(channels)]
    description = {
        "num_channels": channels,
        "channel_def": {str(number): f"channel {number}" for number in range(channels)},
    }
    return {**network_def, argument: channels}, preprocessing, image | description


def _names(checkpoint: Path, channels: Mapping[str, Any], count: int, labels: object) -> list[str]:
    """Of the output channels 1, 2, …"""
    if labels is not None:
        names = [str(name) for name in parse_sources(labels)]
    else:
        names = [str(channels[key]) for key in sorted(channels, key=int) if key != "0"] if channels else []
        first = str(channels.get("0", "background"))
        if first.lower() != "background":
            raise UserError(
                f"{checkpoint}: output channel 0 is {first!r}, not background: its channels do not compete in an argmax; a label "
                "map of such a network needs another rule than bundles here have"
            )
    if len(names) != count - 1:
        raise UserError(
            f"{checkpoint} has {count} output channels, background and {count - 1}, but names {len(names)}: name them in order "
            "by --labels"
        )
    return names


def _is_installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False
