"""LWI-VMS: checkpoints of its UNETR and of its UNETR++, of the first stage (a restored image) or of the second (labels).

The authors published neither code nor weights under a licence: what is made of them is theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.errors import UserError
from tools.importers.conversion import Conversion, named_tensors, read_checkpoint
from tools.network import instantiate

if TYPE_CHECKING:
    from torch import Tensor

RESTORED = "restored image"
UNETR, PLUS = "vit.patch_embedding.position_embeddings", "unetr_pp_encoder.downsample_layers.0.0.conv.weight"
ORGANS = [  # of Synapse, in the order of its labels
    "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
    "inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal gland", "left adrenal gland",
]  # fmt: skip
SIZES = {  # of UNETR++'s images, by its stem and its first number of tokens
    ((2, 4, 4), 32_768): [64, 128, 128],  # Synapse
    ((1, 4, 4), 73_728): [32, 192, 192],  # lung tumours
    ((1, 4, 4), 25_600): [16, 160, 160],  # ACDC
    ((4, 4, 4), 32_768): [128, 128, 128],  # BraTS
}
HU = [-175, 250]  # of UNETR, scaled to [0, 1]
SPACING = [1.5, 1.5, 2.0]
HEADS = 12  # of UNETR's attention, which its tensors do not tell
TERMS = "LWI-VMS has no licence: all rights are its authors'; ask them before any use beyond what the law allows"


def read(
    checkpoint: Path,
    labels: object = None,
    patch_size: Sequence[int] | None = None,
    spacing: Sequence[float] | None = None,
    intensity: Sequence[float] | None = None,
) -> Conversion:
    """Read a file of LWI-VMS; which network, which stage and how large, its tensors say.

    Args:
        checkpoint: the file.
        labels: names of the output channels 1, 2, …, "liver,spleen", where they are not those of Synapse.
        patch_size: that the network takes, voxels, where its tensors do not tell: for UNETR x, y, z; for UNETR++ z, y, x.
        spacing: for UNETR++ that of its plans, mm, z, y, x; for UNETR 1.5, 1.5, 2.
        intensity: for UNETR++ lower and upper bound, mean and standard deviation of its plans.

    Raises:
        UserError: damaged, neither of the two, or something that the file does not say and no option does.
    """
    content = read_checkpoint(checkpoint)
    whole = isinstance(content, Mapping) and "state_dict" in content
    tensors = named_tensors(content["state_dict"] if whole else content, checkpoint, "state_dict")
    if UNETR in tensors:
        if intensity is not None:
            raise UserError(f"{checkpoint} is a UNETR, whose intensities are known: --intensity is for UNETR++")
        build, known = _unetr, {"axcodes": "RAS", "spacing": SPACING, "intensity_range": HU}
        if spacing is not None:
            known["spacing"] = _numbers(checkpoint, "spacing", spacing, "[x, y, z], mm")
    elif PLUS in tensors:
        build, known = _unetr_pp, _normalisation(checkpoint, spacing, intensity)
    else:
        raise UserError(
            f"{checkpoint} is not of LWI-VMS: it has neither {UNETR} (UNETR) nor {PLUS} (UNETR++), but "
            f"{', '.join(list(tensors)[:3])}, …"
        )
    try:
        network_def, names, left_out, training = build(checkpoint, tensors, patch_size)
    except KeyError as error:
        raise UserError(f"{checkpoint}: tensor {error} is missing: it is not a whole network") from None
    head = next(name for name in names if name.endswith("out.conv.conv.bias") or name.endswith("out1.conv.conv.bias"))
    count = len(tensors[names[head]])
    organs = [RESTORED] if count == 1 else _labels(checkpoint, count, labels, "tumours of the lung" in training["data"])
    network_def["out_channels"] = 1 + len(organs)
    found, origins = _filled(checkpoint, tensors, network_def, names, left_out, restores=count == 1)
    left_out |= {
        str(name): "not a weight: of the training that made the file"
        for name in (content if whole else ())
        if name != "state_dict"
    }
    data = training.pop("data")
    if labels is not None:
        data = "images that the checkpoint does not name"
    size = list(network_def["img_size"])
    values = {"network_def": network_def, "patch_size": size}
    if count == 1:
        values |= {**known, **training, "width": network_def.get("width") or network_def["feature_size"]}
    else:
        values["preprocessing"] = {"_target_": "Compose", "transforms": _preprocessing(**known)}
    return Conversion(
        template="pretrain_lwi" if count == 1 else "merged_inference",
        labels={name: [number] for number, name in enumerate(organs, start=1)},
        tensors=found,
        origins=origins,
        left_out=left_out,
        values=values,
        image={"num_channels": network_def["in_channels"], "spatial_shape": size},
        metadata={
            "name": f"LWI-VMS, {'UNETR' if build is _unetr else 'UNETR++'}, {data}",
            "task": "Restoration of masked images" if count == 1 else f"Segmentation of {', '.join(organs)}",
            "description": f"A checkpoint of LWI-VMS, converted; a starting point for task vectors. {data}.",
            "license": f"weights: {TERMS}; code: Apache-2.0",
            "data_source": f"{data}; not distributed with the bundle",
            "pred_classes": "2 channels: background (constant 0, not used) and the restored image, linear"
            if count == 1
            else f"{count} channels: logits of a softmax, background first; argmax gives the label map",
            "lineage": {"data": {"dataset": data, "licence": "see the model card"}},
        },
        facts={"stage": "first (self-supervised)" if count == 1 else "second (supervised)", "terms": TERMS},
    )


Built = tuple[dict[str, Any], dict[str, str], dict[str, str], dict[str, Any]]


def _unetr(checkpoint: Path, tensors: Mapping[str, Tensor], patch_size: Sequence[int] | None) -> Built:
    """The network_def, for its tensors those of the file, what is left out, and entries of train.json with "data"."""
    _, tokens, hidden = tensors[UNETR].shape
    edge = next((n for n in range(1, isqrt(tokens) + 2) if n**3 == tokens), 0)
    if patch_size is None and not edge:
        raise UserError(f"{checkpoint} has {tokens} tokens, which are no cube: give --patch_size '[x, y, z]'")
    if hidden % HEADS:
        raise UserError(f"{checkpoint} has {hidden} hidden channels, which are not those of {HEADS} attention heads")
    first = tensors["encoder1.layer.conv1.conv.weight"]
    network_def = {
        "_target_": "monai.networks.nets.UNETR",
        "in_channels": _one_channel(checkpoint, first.shape[1]),
        "out_channels": 2,
        "img_size": _size(checkpoint, patch_size or [16 * edge] * 3, [16] * 3, tokens),
        "feature_size": first.shape[0],
        "hidden_size": hidden,
        "mlp_dim": tensors["vit.blocks.0.mlp.linear1.weight"].shape[0],
        "num_heads": HEADS,
        "proj_type": "perceptron",
    }
    names = {name: name for name in tensors}
    for part in ("weight", "bias"):
        theirs = f"out.conv.conv.{part}" if f"out.conv.conv.{part}" in tensors else f"out.conv.{part}"
        names[f"out.conv.conv.{part}"] = theirs
    left_out = _order_heads(tensors)
    for name in tensors:
        if name == "vit.patch_embedding.cls_token":
            left_out[name] = "never used by the published network"
        elif name.endswith(".1.conv3.conv.weight") and name.startswith(("encoder2.", "encoder3.")):
            left_out[name] = "a shortcut that the published network never uses"
    slabs = tensors["vit.temp_head1.bias"].shape[0] if "vit.temp_head1.bias" in tensors else 6
    data = "Synapse (BTCV) abdominal CT"
    return network_def, names, left_out, {"slabs": slabs, "shuffled_axis": 2, "data": data}


def _unetr_pp(checkpoint: Path, tensors: Mapping[str, Tensor], patch_size: Sequence[int] | None) -> Built:
    """The same for UNETR++."""
    import torch

    first = tensors[PLUS]
    stem, stage = tuple(first.shape[2:]), "unetr_pp_encoder.stages"
    tokens = tensors[f"{stage}.0.0.pos_embed"].shape[1]
    size = patch_size or SIZES.get((stem, tokens))
    if size is None:
        raise UserError(
            f"{checkpoint} has a stem of {stem} and {tokens} tokens, which no published network has: give "
            "--patch_size '[z, y, x]'"
        )
    shared = [name for name in tensors if ".epa_block.E." in name]
    separate = not all(torch.equal(tensors[name], tensors[name.replace(".E.", ".F.")]) for name in shared)
    lungs = f"{stage}.0.0.conv52.conv1.conv.weight" in tensors
    network_def = {
        "_target_": "scripts.unetr_pp.UNETRPlusPlus",
        "in_channels": _one_channel(checkpoint, first.shape[1]),
        "out_channels": 2,
        "img_size": _size(checkpoint, size, stem, tokens),
        "stem": list(stem),
        "width": first.shape[0] // 2,
        "depth": sum(name.startswith(f"{stage}.0.") and name.endswith(".pos_embed") for name in tensors),
        "num_heads": tensors[f"{stage}.0.0.epa_block.temperature"].shape[0],
        "projections": [tensors[f"{stage}.{i}.0.epa_block.E.bias"].shape[0] for i in range(4)],
        "attention_dropout": 0.1 if lungs else 0.15,
        "separate_projections": separate,
        "convolutions": 1 + lungs,
        "deep_supervision": False,
    }
    left_out = _order_heads(tensors)
    left_out |= {
        name: "an output of deep supervision, which inference does not use"
        for name in tensors
        if name.startswith(("out2.", "out3."))
    }
    training = {
        "slabs": tensors["temp_head1.bias"].shape[0] if "temp_head1.bias" in tensors else 4,
        "shuffled_axis": 0,
        "mask_block": 4,
        "features": [f"{stage}.{i}" for i in range(4)],
        "data": "tumours of the lung in CT (Medical Segmentation Decathlon)"
        if lungs
        else "Synapse (BTCV) abdominal CT",
    }
    return network_def, {name: name for name in tensors}, left_out, training


def _order_heads(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: "an order head of the first stage, beside the network" for name in tensors if "temp_head" in name}


def _one_channel(checkpoint: Path, channels: int) -> int:
    if channels != 1:
        raise UserError(f"{checkpoint} takes images of {channels} channels; those of LWI-VMS take 1")
    return 1


def _size(checkpoint: Path, size: object, step: Sequence[int], tokens: int) -> list[int]:
    """A patch size that gives so many tokens."""
    whole = isinstance(size, list | tuple) and len(size) == 3 and all(isinstance(n, int) and n > 0 for n in size)
    if not whole or any(n % s for n, s in zip(size, step)) or prod(n // s for n, s in zip(size, step)) != tokens:
        raise UserError(
            f"{checkpoint}: --patch_size {size} must be three multiples of {list(step)} that make {tokens} tokens"
        )
    return list(size)


def _normalisation(checkpoint: Path, spacing: object, intensity: object) -> dict[str, Any]:
    """What UNETR++'s images are before the network sees them, which only the plans of its training say."""
    spacing = _numbers(checkpoint, "spacing", spacing, "[z, y, x], mm, of its plans")
    intensity = _numbers(checkpoint, "intensity", intensity, "[lower, upper, mean, deviation] of its plans")
    low, high, mean, deviation = intensity
    if not (low < high and deviation > 0 and min(spacing) > 0):
        raise UserError(
            f"--intensity {intensity}, --spacing {spacing}: the bounds must rise, and deviation and spacing be positive"
        )
    return {
        "axcodes": "SPL",
        "spacing": spacing,
        "intensity_range": [low, high],
        "standardise": [(mean - low) / (high - low), deviation / (high - low)],
    }


def _numbers(checkpoint: Path, name: str, value: object, what: str) -> list[float]:
    """An option that is a list of as many numbers as its description has."""
    count = what.count(",", 0, what.index("]")) + 1
    if (
        not isinstance(value, list | tuple)
        or len(value) != count
        or not all(isinstance(number, int | float) for number in value)
    ):
        raise UserError(f"{checkpoint}: its file does not say everything: give --{name} '{what}'")
    return list(value)


def _labels(checkpoint: Path, count: int, labels: object, lungs: bool) -> list[str]:
    """Names of the output channels without background."""
    if labels is None and count == 1 + len(ORGANS):
        return ORGANS
    if labels is None and lungs and count == 2:
        return ["lung tumour"]
    names = [name.strip() for name in labels.split(",")] if isinstance(labels, str) else list(labels or ())
    if len(names) != count - 1 or len({str(name).lower() for name in names} - {"", "background"}) != len(names):
        raise UserError(f"{checkpoint} has {count - 1} labels: name them, each once, by --labels 'liver,spleen,…'")
    return [str(name) for name in names]


def _preprocessing(
    axcodes: str, spacing: list[float], intensity_range: list[float], standardise: list[float] | None = None
) -> list[dict[str, Any]]:
    """The transforms of pretrain_lwi, for a bundle without its knobs."""
    low, high = intensity_range
    image = {"keys": "image"}
    transforms = [
        {"_target_": "scripts.images.LoadImageOrSeriesd", **image},
        {"_target_": "EnsureChannelFirstd", **image},
        {"_target_": "EnsureTyped", **image, "dtype": "float32"},
        {"_target_": "Orientationd", **image, "axcodes": axcodes, "labels": None},
        {"_target_": "scripts.images.Spacingd", **image, "pixdim": spacing, "mode": "bilinear"},
        {
            "_target_": "ScaleIntensityRanged", **image,
            "a_min": low, "a_max": high, "b_min": 0.0, "b_max": 1.0, "clip": True,
        },
    ]  # fmt: skip
    if standardise:
        mean, deviation = standardise
        transforms.append({"_target_": "NormalizeIntensityd", **image, "subtrahend": mean, "divisor": deviation})
    return transforms


def _filled(
    checkpoint: Path,
    tensors: Mapping[str, Tensor],
    network_def: Mapping[str, Any],
    names: Mapping[str, str],
    left_out: Mapping[str, str],
    restores: bool,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the network, and where each is from.

    Args:
        checkpoint: for messages.
        tensors: of the file.
        network_def: of the network.
        names: for its tensors, those of the file.
        left_out: names in the file that are passed over.
        restores: the head has one row, that of the restored image, and gets one of zeros above it.
    """
    import torch

    found: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    shared = not network_def.get("separate_projections", True)
    for name, shape in _shapes(network_def).items():
        source = names.get(name, name)
        tensor = tensors.get(source)
        if tensor is not None and restores and name.startswith(("out.", "out1.")):
            found[name], origins[name] = (
                torch.cat([torch.zeros_like(tensor), tensor]),
                f"{source}, under a row of zeros",
            )
        elif tensor is None and ".norm_cross_attn." in name:
            found[name] = torch.full(shape, float(name.endswith("weight")))
            origins[name] = "new: MONAI's network has it and never uses it"
        elif tensor is not None and shared and ".epa_block.F." in name:
            first = name.replace(".F.", ".E.")
            found[name], origins[name] = found[first], f"{first}, under another name"
        else:
            found[name], origins[name] = tensor, source
        if found[name] is None or tuple(found[name].shape) != shape:
            have = "missing" if tensor is None else tuple(tensor.shape)
            raise UserError(f"{checkpoint}: tensor {source} is {have}, the network's is {shape}")
    used = {names.get(name, name) for name in found}
    for name in tensors:
        if name not in used and name not in left_out:
            raise UserError(f"{checkpoint}: nobody knows what tensor {name} is")
    return found, origins


def _shapes(network_def: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of the network's tensors."""
    import torch

    from tools.bundle_code.unetr_pp import UNETRPlusPlus

    if network_def["_target_"].startswith("scripts."):
        with torch.device("meta"):
            network = UNETRPlusPlus(**{key: value for key, value in network_def.items() if key != "_target_"})
    else:
        network = instantiate(network_def)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
