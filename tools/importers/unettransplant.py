"""Checkpoints of U-Net Transplant: starting points, and task vectors with the head and the labels of their task.

Source: Lumetti et al., "U-Net Transplant: The Role of Pre-training for Model Merging in 3D Medical Segmentation", MICCAI 2025.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.bundle import read_json
from tools.errors import UserError, nearest
from tools.importers.conversion import Conversion, named_tensors, read_checkpoint
from tools.labels import parse_channels, parse_sources
from tools.lineage import backbone_sha256
from tools.network import Structure, instantiate
from tools.vendor import BUNDLES
from tools.weights_file import WeightsFile

if TYPE_CHECKING:
    from torch import Tensor

TEMPLATE = "merged_inference"
DATASETS = (  # by the number in the name of their head, as in task_heads.0.weight
    "AMOS",
    "SegThor",
    "Skull",
    "TotalSegmentator",
    "ZhimingCui",
    "BTCV_Abdomen",
    "BTCV_Cervix",
    "AbdomenCT-1K",
    "ToothFairy2",
)
ORGANS = [
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior vena cava",
]
ADRENALS = ["right adrenal gland", "left adrenal gland"]
CANALS = ["left inferior alveolar canal", "right inferior alveolar canal"]
JAW = ["lower jawbone", "upper jawbone", *CANALS, "left maxillary sinus", "right maxillary sinus", "pharynx"]
TEETH = {number: f"tooth {number}" for quadrant in (10, 20, 30, 40) for number in range(quadrant + 1, quadrant + 9)}
LABELS = {  # of the datasets whose values are known
    "AMOS": dict(enumerate([*ORGANS, "pancreas", *ADRENALS, "duodenum", "urinary bladder", "prostate or uterus"], 1)),
    "BTCV_Abdomen": dict(enumerate([*ORGANS, "portal and splenic veins", "pancreas", *ADRENALS], 1)),
    "ToothFairy2": dict(enumerate([*JAW, "bridge", "crown", "implant"], 1)) | TEETH,
}
LABELS["ZhimingCui"] = LABELS["ToothFairy2"]  # as in the published code
HEAD = Structure({"head.weight": 0, "head.bias": 0})
NORMALIZATIONS = ("percentile", "zscore")
NO_WEIGHTS = {
    "optimizer_state_dict": "state of the optimiser",
    "scheduler_state_dict": "state of the schedule",
    "epoch": "a number",
}


class PickledTask:
    """Takes the attributes of ``task.Task.Task``, the class that the checkpoints hold an instance of, and does nothing."""


def read(
    checkpoint: Path, part: str = "", dataset: str = "", labels: object = None, normalization: str = "percentile"
) -> Conversion:
    """A ``Pretrain_*.pth``, or a ``TaskVector_*.pth``, which holds a starting point and what fine-tuning added to it.

    Args:
        checkpoint: the file.
        part: of a task vector "specialist", or "start", its starting point, whose head is then new; ``diff`` of the two bundles
            is the task vector.
        dataset: whose head is taken, if there are several.
        labels: the head's channels in order, where the file and the known datasets do not say them: "liver,spleen", or with the
            voxel values that each stands for "{kidneys: [2, 3]}". A starting point without a head gets a new one for them.
        normalization: "percentile", to [0, 1] between the 0.5 and 99.5 percentiles, as in the published training code; or
            "zscore" after that clipping, with which others report that the published weights work. It is not settled which.

    Raises:
        UserError: damaged, another kind of file, or something in it would have to be executed.
    """
    if normalization not in NORMALIZATIONS:
        raise UserError(f"--normalization must be one of {', '.join(NORMALIZATIONS)}, got {normalization!r}")
    content = read_checkpoint(checkpoint, [(PickledTask, "task.Task.Task")])
    is_vector = isinstance(content, Mapping) and "delta_state_dict" in content
    if not is_vector and not (isinstance(content, Mapping) and "backbone_state_dict" in content):
        raise UserError(
            f"{checkpoint} has no backbone_state_dict and no delta_state_dict: it is not of U-Net Transplant"
        )
    parts = ("specialist", "start") if is_vector else ("start",)
    part = part or parts[0]
    if part not in parts:
        raise UserError(f"--part must be one of {', '.join(parts)} for {checkpoint.name}, got {part!r}")

    backbone, origins = _vector_backbone(checkpoint, content, part) if is_vector else _backbone(checkpoint, content)
    first = backbone["encoders.0.basic_module.conv1.weight"]
    left_out = {name: why for name, why in NO_WEIGHTS.items() if name in content}
    if not is_vector:
        dropped = [name for name in content["backbone_state_dict"] if "final_conv" in name]
        left_out |= dict.fromkeys(dropped, "not part of the backbone")
    if content.get("heads_state_dict"):
        dataset, weight, bias = _head(checkpoint, content, dataset)
    elif part == "start" and labels is not None:
        dataset, weight, bias = dataset or "unknown", None, None
    else:
        raise UserError(f"{checkpoint} has no heads_state_dict: say by --labels what its starting point was trained on")
    task = next((one for one in content.get("task") or [] if isinstance(one, PickledTask)), PickledTask())
    count = None if bias is None else len(bias)
    channels, rows = _channels(checkpoint, dataset, task, count, labels, is_vector)
    lineage: dict[str, Any] = {} if is_vector and part == "start" else {"data": {"dataset": dataset}}
    if part == "specialist":
        start, _ = _vector_backbone(checkpoint, content, "start")
        lineage |= {
            "task": str(getattr(task, "task_name", "") or ", ".join(channels)),
            "pretrained": f"the starting point in {checkpoint.name}",
            "pretrained_sha256": _sha256(start),
        }
    if bias is None or (is_vector and part == "start"):
        head = {"head.weight": first.new_zeros(1 + len(channels), len(first), 1, 1, 1)}
        head["head.bias"] = first.new_zeros(1 + len(channels))
        head_origins = dict.fromkeys(head, "new: zeros; the file has no head of its starting point")
        left_out |= {f"task_heads.{DATASETS.index(dataset)}.*": "the specialist's"} if bias is not None else {}
    else:
        head, head_origins = _canonical(dataset, weight, bias, rows)
        dead = [row for row in range(len(bias)) if row not in rows]
        left_out |= {f"channel {row} of the head": f"{dataset} has no label {row + 1}" for row in dead}
    clipped = "scaled to [0, 1] between its 0.5 and 99.5 percentiles"
    return Conversion(
        template=TEMPLATE,
        labels=channels,
        tensors=backbone | head,
        origins=origins | head_origins,
        left_out=left_out,
        values={
            "network_def": _network_def(first, 1 + len(channels)),
            "preprocessing": _preprocessing(normalization),
            "patch_size": [96, 96, 96],
        },
        image={"num_channels": first.shape[1], "value_range": [0, 1] if normalization == "percentile" else []},
        metadata={
            "name": f"U-Net Transplant, {lineage.get('task', f'starting point trained on {dataset}')}",
            "task": f"Segmentation of {', '.join(channels)}",
            "description": f"The {part} of a checkpoint of U-Net Transplant, converted.",
            "data_source": f"{dataset}; not distributed with the bundle",
            "image_classes": f"one channel CT, {clipped}{', then z-scored' if normalization == 'zscore' else ''}",
            "lineage": lineage,
        },
        facts={
            "part": part,
            "dataset of the head": dataset,
            "width": str(len(first)),
            "normalisation": f"{normalization}; which one the published weights want, percentile or zscore, is not settled",
        },
    )


def _head(checkpoint: Path, content: Mapping[str, Any], dataset: str) -> tuple[str, Tensor, Tensor]:
    """Dataset, kernel and bias of the head."""
    state = named_tensors(content.get("heads_state_dict"), checkpoint, "heads_state_dict")
    found = {}
    for name in state:
        match = re.fullmatch(r"task_heads\.(\d+)\.(weight|bias)", name)
        if not match or int(match[1]) >= len(DATASETS):
            raise UserError(
                f"{checkpoint}: heads_state_dict has {name}, and only task_heads.0 to {len(DATASETS) - 1} are known"
            )
        found[DATASETS[int(match[1])]] = f"task_heads.{match[1]}"
    if dataset and dataset not in found:
        raise UserError(f"{checkpoint} has no head of {dataset}{nearest(dataset, found)}; it has {', '.join(found)}")
    if not dataset and len(found) > 1:
        raise UserError(f"{checkpoint} has heads of {', '.join(found)}: choose one by --dataset")
    dataset = dataset or next(iter(found))
    weight, bias = (state.get(f"{found[dataset]}.{part}") for part in ("weight", "bias"))
    if weight is None or bias is None or weight.dim() != 5 or bias.shape != weight.shape[:1]:
        raise UserError(f"{checkpoint}: {found[dataset]} is not a 1x1x1 convolution with a bias")
    return dataset, weight, bias


def _channels(
    checkpoint: Path, dataset: str, task: PickledTask, count: int | None, labels: object, is_vector: bool
) -> tuple[dict[str, list[int | str]], list[int]]:
    """The bundle's labels with the dataset's own that each stands for, and the rows of the head that they are."""
    known = LABELS.get(dataset, {})
    if labels is not None:
        named = parse_channels(labels) or {str(name): name for name in parse_sources(labels)}
        if count not in (None, len(named)):
            raise UserError(f"--labels names {len(named)} channels, the head of {checkpoint} has {count}")
        return {str(name): parse_sources(sources) for name, sources in named.items()}, list(range(len(named)))
    if not is_vector:  # trained on all labels 1, 2, 3 …, of which datasets leave out some
        values = [value for value in range(1, count + 1) if value in known or not known]
        return {known.get(v, f"{dataset} {v}"): [known.get(v, v)] for v in values}, [v - 1 for v in values]
    predicted = getattr(task, "labels_to_predict", None) or {}
    outputs = sorted({output for source, output in predicted.items() if source != 0})
    outputs = outputs[1:] if len(outputs) == count + 1 and outputs[0] == 0 else outputs
    if len(outputs) != count:
        raise UserError(
            f"{checkpoint} says labels for {len(outputs)} channels, its head has {count}: name them in order by --labels"
        )
    channels = {}
    for output in outputs:
        sources = [known.get(value, value) for value, own in predicted.items() if own == output]
        named = str(sources[0]) if len(sources) == 1 and sources[0] in known.values() else ""
        named = named or (str(getattr(task, "task_name", "")) if count == 1 else "")
        channels[named or " and ".join(map(str, sources))] = sources
    return channels, list(range(count))


def _backbone(checkpoint: Path, content: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Of a starting point: tensors by name, and where each was."""
    state = named_tensors(content["backbone_state_dict"], checkpoint, "backbone_state_dict")
    state = {name: tensor for name, tensor in state.items() if not name.startswith("final_conv")}
    shapes = _shapes(checkpoint, next(iter(state.values()), None))
    if odd := sorted(set(state) ^ set(shapes)):
        raise UserError(f"{checkpoint} is not the network of U-Net Transplant: {odd[0]} is missing, or too much")
    _check_shapes(checkpoint, state, shapes)
    return {name: state[name] for name in shapes}, {name: f"`{name}`" for name in shapes}


def _vector_backbone(
    checkpoint: Path, content: Mapping[str, Any], part: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Of a task vector: starting point, or starting point plus difference; tensors by their number in the network's order."""
    start, delta = (_numbered(checkpoint, content.get(key), key) for key in ("pretrain_state_dict", "delta_state_dict"))
    shapes = _shapes(checkpoint, start[0])
    for tensors in (start, delta):
        if len(tensors) != len(shapes):
            raise UserError(
                f"{checkpoint} has {len(tensors)} tensors, the network of U-Net Transplant has {len(shapes)}"
            )
        _check_shapes(checkpoint, dict(zip(shapes, tensors)), shapes)
    if part == "start":
        return dict(zip(shapes, start)), {name: f"`pretrain_state_dict` {n}" for n, name in enumerate(shapes)}
    origins = {name: f"`pretrain_state_dict` {n} + `delta_state_dict` {n}" for n, name in enumerate(shapes)}
    return {name: one + other for name, one, other in zip(shapes, start, delta)}, origins


def _numbered(checkpoint: Path, state: Any, where: str) -> list[Tensor]:
    """The tensors of a ParameterList, "10" after "9"."""
    tensors = named_tensors(state, checkpoint, where)
    numbers = [str(number) for number in range(len(tensors))]
    if sorted(tensors) != sorted(numbers):
        raise UserError(f"{checkpoint}: {where} does not number its tensors from 0 to {len(tensors) - 1}")
    return [tensors[number] for number in numbers]


def _network_def(first: Tensor, out_channels: int) -> dict[str, Any]:
    """The network whose first kernel this is."""
    return {
        "_target_": "scripts.residual_unet.ResidualUNet3D",
        "in_channels": first.shape[1],
        "out_channels": out_channels,
        "width": first.shape[0],
        "dropout": 0.0,
    }


def _shapes(checkpoint: Path, first: Tensor | None) -> dict[str, tuple[int, ...]]:
    """Of the backbone's tensors, by name in the network's order."""
    if first is None or first.dim() != 5:
        raise UserError(f"{checkpoint} is not the network of U-Net Transplant: it does not begin with a kernel")
    ours = {**_network_def(first, 2), "_target_": "tools.bundle_code.residual_unet.ResidualUNet3D"}
    tensors = instantiate(ours).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if name not in HEAD.head}


def _check_shapes(checkpoint: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for number, (name, shape) in enumerate(shapes.items()):
        if tuple(tensors[name].shape) != shape:
            found = tuple(tensors[name].shape)
            raise UserError(
                f"{checkpoint}: tensor {number}, {name}, is {found}; U-Net Transplant's is {shape} at this width"
            )


def _canonical(
    dataset: str, weight: Tensor, bias: Tensor, rows: Sequence[int]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The head with a row of zeros for the background, and where it was."""
    head = {}
    for name, tensor in (("weight", weight), ("bias", bias)):
        head[f"head.{name}"] = tensor.new_zeros(1 + len(rows), *tensor.shape[1:])
        head[f"head.{name}"][1:] = tensor[list(rows)]
    there = f"task_heads.{DATASETS.index(dataset)}"
    return head, {
        f"head.{name}": f"`{there}.{name}`, under a row of zeros for the background" for name in ("weight", "bias")
    }


def _sha256(backbone: Mapping[str, Tensor]) -> str:
    """The identity of a starting point, as its own bundle has it."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pt"
        torch.save({name: tensor.contiguous() for name, tensor in backbone.items()}, file)
        return backbone_sha256(WeightsFile(file), HEAD)


def _preprocessing(normalization: str) -> dict[str, Any]:
    """The template's, which scales to [0, 1]."""
    preprocessing = read_json(BUNDLES / TEMPLATE / "configs" / "inference.json")["preprocessing"]
    if normalization == "zscore":
        preprocessing["transforms"].append({"_target_": "NormalizeIntensityd", "keys": "image", "channel_wise": True})
    return preprocessing
