"""STU-Net's published checkpoints, and what its code trained with nnU-Net 1, as bundles.

Published axes are z, y, x, in the order of ``transpose_forward``; images' are x, y, z. Kernels, strides and sizes are put in the
images' order once, here. Strides cannot be seen from weights: a network with others takes the same tensors, and is another
function.

Source: Huang et al., "STU-Net: Scalable and Transferable Medical Image Segmentation Models Empowered by Large-Scale Supervised
Pre-training", arXiv 2304.06716; https://github.com/uni-medical/STU-Net.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tools.bundle import read_json
from tools.errors import UserError, nearest
from tools.importers.conversion import (
    Conversion,
    check_geometry,
    check_stem,
    named_tensors,
    read_checkpoint,
    repeated,
)
from tools.labels import parse_channels
from tools.vendor import BUNDLES

if TYPE_CHECKING:
    from torch import Tensor

TEMPLATE = "pretrain_stunet"
STEM = tuple(f"conv_blocks_context.0.0.{layer}.weight" for layer in ("conv1", "conv3"))  # what takes the image
HEADS = "seg_outputs."
NOT_WEIGHTS = {
    "epoch": "number of epochs that it was trained",
    "optimizer_state_dict": "momentum of the optimiser",
    "lr_scheduler_state_dict": "state of the learning rate schedule",
    "plot_stuff": "training curves",
    "best_stuff": "the best results so far",
    "amp_grad_scaler": "state of the gradient scaler",
}
CT = {"lower": "percentile_00_5", "upper": "percentile_99_5", "mean": "mean", "std": "sd"}  # ours, nnU-Net 1's


def read(
    checkpoint: Path,
    plans: str = "",
    labels: object = None,
    in_channels: int = 0,
    stem: str = "repeat",
) -> Conversion:
    """A checkpoint of STU-Net by nnU-Net 1.

    Args:
        checkpoint: ``<name>.model``.
        plans: its ``<name>.model.pkl``, which has strides, spacing and normalisation; default: the one beside it.
        labels: of 104 labels, those to keep by name: "[liver, spleen]"; of others, their names in order; or names with the
            numbers of the labels to keep: "{liver: 5}". Default: TotalSegmentator's 104 names, or numbers.
        in_channels: of the images, where the checkpoint's network takes one: its first layer is repeated for each.
        stem: "repeat", as the published code does it, or "mean": divided by their number, so that equal channels give what one
            gave.

    Raises:
        UserError: damaged, or not of STU-Net; no plans, or those of another size; a label that there is not.
    """
    from tools.bundle_code.stunet import SIZES

    check_stem(in_channels, stem)
    content = read_checkpoint(checkpoint)
    if not isinstance(content, Mapping) or "state_dict" not in content:
        raise UserError(f"{checkpoint} is no checkpoint of nnU-Net 1: it has no state_dict")
    weights = named_tensors(content["state_dict"], checkpoint, "state_dict")
    channels, depth, found_channels, classes = _architecture(weights, checkpoint)
    size = next((name for name, (width, blocks) in SIZES.items() if _is_of_size(channels, depth, width, blocks)), "")
    path = Path(plans or f"{checkpoint}.pkl")
    info = read_plans(path)
    trainer = str(info.get("name", "unknown"))
    for name in SIZES:
        if f"_{name}" in trainer and name != size:
            raise UserError(f"{path} is of {trainer}, but {checkpoint} has the channels {channels} and depth {depth}")
    try:
        stage, axes, schemes = _stage(info, found_channels)
        strides = [list(map(int, stride)) for stride in stage["pool_op_kernel_sizes"]]
        strides = [[stride[axis] for axis in axes] for stride in (strides + [[1, 1, 1]] * 5)[: len(channels) - 1]]
        patch_size = [int(stage["patch_size"][axis]) for axis in axes]
        spacing = [float(stage["current_spacing"][axis]) for axis in axes]
        outputs = {"num_classes": classes - 1, "num_modalities": found_channels}
        others = {name: int(info["plans"].get(name, number)) for name, number in outputs.items()}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"{path} has not what a bundle needs ({type(error).__name__}: {error}): name the .model.pkl of the checkpoint by "
            "--plans"
        ) from None
    if others != outputs:
        raise UserError(
            f"{path} is of another training: {others['num_classes']} classes of {others['num_modalities']} channels, but "
            f"{checkpoint} has {classes - 1} of {found_channels}; strides cannot be seen from weights, so name its own by --plans"
        )
    check_geometry(path, patch_size, spacing, strides)
    _check_tensors(weights, channels, depth, found_channels, classes, checkpoint)
    names, rows = _labels(labels, classes)
    images = in_channels or found_channels
    if found_channels not in (1, images):
        raise UserError(f"the network of {checkpoint} takes {found_channels} channels, and only one can be repeated")
    tensors, origins = _converted(weights, axes, rows, images // found_channels, stem)
    left_out = {name: why for name, why in NOT_WEIGHTS.items() if content.get(name) is not None}
    if len(rows) < classes:
        left_out[f"{classes - len(rows)} of {classes} rows of {HEADS}*"] = "labels that were not asked for"
    standard = read_json(BUNDLES / TEMPLATE / "configs" / "metadata.json")["totalsegmentator_labels"]
    title = f"STU-Net {size}".strip()
    multiples = [prod(stride[axis] for stride in strides) for axis in range(3)]
    return Conversion(
        template=TEMPLATE,
        labels={name: [name] if name in standard else [row] for name, row in zip(names, rows[1:], strict=True)},
        tensors=tensors,
        origins=origins,
        left_out=left_out,
        values={
            **({"size": size} if size else {"channels": channels, "depth": depth}),
            "strides": strides,
            "patch_size": patch_size,
            "spacing": spacing,
            "network_def#in_channels": images,
            "preprocessing#transforms#-1#schemes": schemes * (images // found_channels),
        },
        image={
            "num_channels": images,
            "channel_def": {str(number): f"channel {number}" for number in range(images)}
            if images > 1
            else {"0": "image"},
            "spatial_shape": [f"{2 * multiple}*n" for multiple in multiples],
        },
        metadata={
            "name": title,
            "task": f"Segmentation of {len(names)} structures",
            "description": f"{title}, converted from {checkpoint.name}: a starting point for task vectors.",
            "image_classes": f"{images} channel(s) at {' × '.join(f'{side:g}' for side in spacing)} mm, normalised one by one",
            "pred_classes": f"{1 + len(names)} channels: logits of a softmax, background first; argmax gives the label map",
            "totalsegmentator_labels": {name: standard[name] for name in names if name in standard},
            "lineage": {"data": {"dataset": "TotalSegmentator 1"}} if classes == 1 + len(standard) else {},
        },
        facts={
            "trainer": f"{trainer}, {content.get('epoch', 'unknown')} epochs",
            "size": size or f"channels {channels}, depth {depth}",
            "strides": f"{strides} along x, y, z, from {path.name}",
            "terms of use": "the published weights are Apache-2.0; the data that they were trained on has its own",
        },
    )


def read_plans(path: Path) -> dict[str, Any]:
    """The content of a ``.model.pkl``: plain Python, and NumPy's arrays and numbers; nothing else that a pickle could run.

    Raises:
        UserError: no such file, damaged, or it names something else.
    """
    if not path.is_file():
        raise UserError(
            f"{path} not found: strides, spacing and normalisation are in it and cannot be seen from weights; name it by --plans "
            "(the published ones are in plan_files/ of https://github.com/uni-medical/STU-Net)"
        )
    try:
        with path.open("rb") as file:
            info = PlansUnpickler(file).load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error})") from None
    if not isinstance(info, dict) or not isinstance(info.get("plans"), dict):
        raise UserError(f"{path} has no plans of nnU-Net 1; name the .model.pkl of the checkpoint by --plans")
    return info


class PlansUnpickler(pickle.Unpickler):
    """Reads pickles that name nothing but the five things that plans are made of."""

    def find_class(self, module: str, name: str) -> Any:
        import numpy as np

        harmless = {
            "collections.OrderedDict": OrderedDict,
            "numpy.dtype": np.dtype,
            "numpy.ndarray": np.ndarray,
            **{
                f"numpy.{core}.multiarray.{part}": getattr(np._core.multiarray, part)
                for core in ("core", "_core")  # of NumPy 1 and 2
                for part in ("_reconstruct", "scalar")
            },
        }
        if f"{module}.{name}" not in harmless:
            raise UserError(f"it names {module}.{name}, which plans do not need and which might do anything")
        return harmless[f"{module}.{name}"]


def _architecture(weights: Mapping[str, Tensor], checkpoint: Path) -> tuple[list[int], int, int, int]:
    """Channels of the levels, blocks of each, and the numbers of input and output channels."""
    firsts = [f"conv_blocks_context.{level}.0.conv1.weight" for level in range(len(weights))]
    kernels = [weights[name] for name in firsts if name in weights]
    head = f"{HEADS}{len(kernels) - 2}.bias"
    if not kernels or head not in weights:
        raise UserError(f"{checkpoint} is not of STU-Net: it lacks {firsts[0]} or {head}")
    depth = sum(f"conv_blocks_context.0.{block}.conv1.weight" in weights for block in range(len(weights)))
    return [len(kernel) for kernel in kernels], depth, kernels[0].shape[1], len(weights[head])


def _is_of_size(channels: Sequence[int], depth: int, width: int, blocks: int) -> bool:
    from tools.bundle_code.stunet import GROWTH

    return (list(channels), depth) == ([width * growth for growth in GROWTH], blocks)


def _stage(info: Mapping[str, Any], in_channels: int) -> tuple[Mapping[str, Any], list[int], list[dict[str, Any]]]:
    """The plans of the resolution that was trained, the published axis of each axis here, each channel's normalisation."""
    plans = info["plans"]
    stages = plans["plans_per_stage"]
    trained = info["init"][5] if "init" in info else max(stages)
    axes = [list(plans["transpose_forward"]).index(2 - axis) for axis in range(3)]
    schemes = []
    for channel in range(in_channels):
        name = plans["normalization_schemes"][channel]
        scheme: dict[str, Any] = {"scheme": {"CT": "ct", "noNorm": "none"}.get(name, "zscore")}
        if name == "CT":
            of = plans["dataset_properties"]["intensityproperties"][channel]
            scheme |= {ours: float(of[theirs]) for ours, theirs in CT.items()}
        elif name != "noNorm" and plans["use_mask_for_norm"][channel]:
            scheme["nonzero"] = True
        schemes.append(scheme)
    return stages[trained], axes, schemes


def _check_tensors(
    weights: Mapping[str, Tensor], channels: Sequence[int], depth: int, in_channels: int, classes: int, checkpoint: Path
) -> None:
    """Refuse a checkpoint whose tensors are not those of the network that its first ones promise."""
    from torch import device

    from tools.bundle_code.stunet import STUNet

    with device("meta"):
        strides = [(2, 2, 2)] * (len(channels) - 1)
        network = STUNet(in_channels, classes, channels=channels, depth=depth, strides=strides)
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for name, shape in wanted.items():
        found = tuple(weights[name].shape) if name in weights else "missing"
        if found != shape:
            raise UserError(
                f"{checkpoint}: tensor {name} is {found}, but {shape} in STU-Net with channels {list(channels)} and depth {depth}"
            )
    if extra := [name for name in weights if name not in wanted]:
        raise UserError(f"{checkpoint}: tensor {extra[0]} is none of STU-Net")


def _labels(wanted: object, classes: int) -> tuple[list[str], list[int]]:
    """Names of the channels 1..C that are kept, and the rows of the heads to keep, background's first."""
    standard = list(read_json(BUNDLES / TEMPLATE / "configs" / "metadata.json")["totalsegmentator_labels"])
    known = standard if classes == 1 + len(standard) else [str(number) for number in range(1, classes)]
    if wanted is None:
        return known, list(range(classes))
    numbered = parse_channels(wanted)
    if numbered is not None:
        for name, number in numbered.items():
            if not isinstance(number, int) or not 1 <= number < classes:
                raise UserError(f"--labels: {name} is label {number!r}, but the checkpoint has 1 to {classes - 1}")
        return [str(name) for name in numbered], [0, *map(int, numbered.values())]
    names = _listed(wanted)
    if not names or len(set(names)) != len(names):
        raise UserError(f"--labels must name some labels, each once; got {wanted}")
    if known is not standard:
        if len(names) != classes - 1:
            raise UserError(
                f"--labels names {len(names)} labels, the checkpoint has {classes - 1}: name each once, in order, or some with "
                'their numbers: "{liver: 5}"'
            )
        return names, list(range(classes))
    for name in names:
        if name not in known:
            raise UserError(f"--labels: there is no label {name!r}{nearest(name, known)}")
    return names, [0, *(1 + known.index(name) for name in names)]


def _listed(names: object) -> list[str]:
    """Names as the command line gives them: a list, one name, or text such as ``[liver, spleen]`` or ``liver,spleen``."""
    if isinstance(names, str):
        names = yaml.safe_load(names) if names.startswith("[") else names.split(",")
    return [str(name).strip() for name in (names if isinstance(names, list | tuple) else [names])]


def _converted(
    weights: Mapping[str, Tensor], axes: Sequence[int], rows: Sequence[int], copies: int, stem: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The network's tensors on the images' axes, in the order of the checkpoint, and what each was made from."""
    tensors: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    for name, tensor in weights.items():
        said = [f"`{name}`"]
        if tensor.dim() == 5 and tensor[0, 0].numel() > 1:
            tensor = tensor.permute(0, 1, *(2 + axis for axis in axes))
            said.append("axes turned from z, y, x")
        if name in STEM and copies > 1:
            tensor, how = repeated(tensor, copies, stem)
            said.append(how)
        if name.startswith(HEADS) and list(rows) != list(range(len(tensor))):
            tensor = tensor[list(rows)]
            said.append(f"rows {', '.join(map(str, rows))}")
        tensors[name], origins[name] = tensor, ", ".join(said)
    return tensors, origins
