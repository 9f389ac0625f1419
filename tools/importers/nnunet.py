"""A model that nnU-Net 2 trained, as a bundle: its network, its preprocessing, its windows.

nnU-Net's axes are z, y, x, in the order of ``transpose_forward``; MONAI's are x, y, z. Kernels, strides and sizes are put in
MONAI's order once, here, so that nothing has to be transposed afterwards.

Source: Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation", Nature
Methods 2021.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.bundle import read_json
from tools.errors import UserError
from tools.importers.conversion import Conversion, check_geometry, named_tensors, read_checkpoint
from tools.instantiate import stated_facts
from tools.network import instantiate

if TYPE_CHECKING:
    from torch import Tensor

NETWORKS = {"PlainConvUNet": "n_conv_per_stage", "ResidualEncoderUNet": "n_blocks_per_stage"}
FIXED = {  # arguments of its networks, of which bundle code has these values
    "conv_op": ("Conv3d",),
    "norm_op": ("InstanceNorm3d",),
    "norm_op_kwargs": ({"eps": 1e-5, "affine": True},),
    "dropout_op": (None,),
    "dropout_op_kwargs": (None, {}),
    "nonlin": ("LeakyReLU",),
    "nonlin_kwargs": ({"inplace": True}, {}, None),
    "conv_bias": (True,),
    "nonlin_first": (False,),
    "deep_supervision": (True, False),
}
SCHEMES = {
    "CTNormalization": "ct",
    "ZScoreNormalization": "zscore",
    "RescaleTo01Normalization": "rescale",
    "RGBTo01Normalization": "divide",
    "NoNormalization": "none",
}
RESAMPLING = {"resampling_fn_data": 3, "resampling_fn_probabilities": 1}  # and the order of their splines
NOT_WEIGHTS = {
    "optimizer_state": "state of the optimiser",
    "grad_scaler_state": "state of the gradient scaler",
    "logging": "training curves",
}


def read(checkpoint: Path, plans: str = "", dataset_json: str = "") -> Conversion:
    """A checkpoint of nnU-Net 2, 3d_fullres or 3d_lowres, PlainConvUNet or ResidualEncoderUNet.

    Args:
        checkpoint: ``fold_*/checkpoint_*.pth``.
        plans: its plans.json; default: the one in the folder above, else what the checkpoint itself recorded.
        dataset_json: its dataset.json; likewise.

    Raises:
        UserError: damaged, or something that a bundle cannot have: 2D, a cascade's second stage, regions instead of labels,
            another network, normalisation or resampling.
    """
    content = read_checkpoint(checkpoint)
    if not isinstance(content, Mapping) or "network_weights" not in content:
        raise UserError(f"{checkpoint} is no checkpoint of nnU-Net 2: it has no network_weights")
    recorded = content["init_args"] if isinstance(content.get("init_args"), Mapping) else {}
    plans_of = _described(checkpoint, plans, "plans", recorded)
    dataset = _described(checkpoint, dataset_json, "dataset_json", recorded)
    try:
        configuration = _configuration(plans_of, recorded.get("configuration", "3d_fullres"))
        axes = [list(plans_of["transpose_forward"]).index(2 - axis) for axis in range(3)]
        labels = _labels(dataset)
        channels = [str(name) for name in (dataset.get("channel_names") or dataset["modality"]).values()]
        preprocessing = _preprocessing(plans_of, configuration, axes, len(channels))
        network_def = _network_def(configuration, axes, len(channels), 1 + len(labels))
        patch_size = [int(configuration["patch_size"][axis]) for axis in axes]
        mirror_axes = sorted(axes.index(axis) for axis in content.get("inference_allowed_mirroring_axes") or ())
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"{checkpoint}: its plans.json or dataset.json are not nnU-Net's ({type(error).__name__}: {error})"
        ) from None
    check_geometry(f"{checkpoint}: plans.json", patch_size, preprocessing[-1]["spacing"], network_def["strides"])
    weights = named_tensors(content["network_weights"], checkpoint, "network_weights")
    tensors, origins, others = _in_order(weights, network_def, axes, f"{checkpoint} ({content.get('trainer_name')})")
    facts = {
        "trainer": content.get("trainer_name", "unknown"),
        "plans": f"{plans_of.get('plans_name', 'unnamed')}, {recorded.get('configuration', '3d_fullres')}",
        "fold": recorded.get("fold", "unknown"),
        "epochs": content.get("current_epoch", "unknown"),
    }
    data = stated_facts(dataset, plans_of.get("dataset_name", "unnamed"))
    return Conversion(
        template="merged_inference",
        labels={name: [name] for name in labels},
        tensors=tensors,
        origins=origins,
        left_out=others | {name: why for name, why in NOT_WEIGHTS.items() if name in content},
        values={
            "network_def": network_def,
            "preprocessing": {"_target_": "Compose", "transforms": preprocessing},
            "patch_size": patch_size,
            "windows": "nnunet",
            "mirror_axes": mirror_axes,
            "inferer_output": "smooth_labels",
        },
        image={
            "num_channels": len(channels),
            "channel_def": {str(number): name for number, name in enumerate(channels)},
            "modality": ", ".join(channels),
            "format": "hounsfield" if all(name.lower() == "ct" for name in channels) else "magnitude",
            "value_range": [],
            "spatial_shape": patch_size,
        },
        packages=["scipy"],
        metadata={
            "name": f"nnU-Net, {data['dataset']}",
            "task": f"Segmentation of {', '.join(labels)}",
            "description": f"A model that nnU-Net 2 trained on {data['dataset']}, converted; a starting point for task vectors.",
            "data_source": f"nnU-Net dataset {data['dataset']}; not distributed with the bundle",
            "image_classes": f"{', '.join(channels)}, normalised as nnU-Net's plans say",
            "pred_classes": f"{1 + len(labels)} channels: logits of a softmax, background first; argmax gives the label map",
            "references": [
                "Isensee et al., nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation, "
                "Nature Methods 2021"
            ],
            "lineage": {"data": data},
        },
        facts={name: str(value) for name, value in facts.items()},
    )


def _described(checkpoint: Path, option: str, name: str, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """plans.json or dataset.json: the file that was named, that of the model's folder, or what the checkpoint recorded."""
    file = f"{name.removesuffix('_json')}.json"
    if option:
        return read_json(Path(option))
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        if (folder / file).is_file():
            return read_json(folder / file)
    if isinstance(recorded.get(name), dict):
        return recorded[name]
    raise UserError(f"no {file} beside {checkpoint} or in the folder above: name it by --{name}")


def _configuration(plans: Mapping[str, Any], name: str, heirs: tuple[str, ...] = ()) -> dict[str, Any]:
    """A configuration of the plans, with what it inherits."""
    if name not in plans["configurations"] or name in heirs:
        raise UserError(f"the plans have no configuration {name}, or it inherits from itself")
    own = plans["configurations"][name]
    parent = own.get("inherits_from")
    whole = {**(_configuration(plans, parent, (*heirs, name)) if parent else {}), **own}
    if not heirs:
        if len(whole["patch_size"]) != 3:
            raise UserError(f"configuration {name} is 2D: there are bundles for 3D networks only")
        if whole.get("previous_stage"):
            raise UserError(
                f"configuration {name} is the second stage of a cascade, which needs the first one's labels"
            )
    return whole


def _labels(dataset: Mapping[str, Any]) -> list[str]:
    """Names of the output channels 1..C."""
    values = {str(name): value for name, value in dataset["labels"].items()}
    regions = [name for name, value in values.items() if isinstance(value, list | tuple) and len(value) > 1]
    if regions or dataset.get("regions_class_order"):
        raise UserError(
            f"it was trained on regions ({', '.join(regions)}), which may overlap; in a bundle's label map every voxel has "
            "one label, the one of the largest logit"
        )
    numbers = {name: int(value[0] if isinstance(value, list) else value) for name, value in values.items()}
    names = sorted((n for n in numbers if numbers[n] != 0 and n != "ignore"), key=numbers.__getitem__)
    if [numbers[name] for name in names] != [*range(1, 1 + len(names))]:
        raise UserError(f"the labels in dataset.json must be numbered from 1 on, each number once; they are {numbers}")
    return names


def _preprocessing(
    plans: Mapping[str, Any], configuration: Mapping[str, Any], axes: Sequence[int], channels: int
) -> list[dict[str, Any]]:
    if configuration.get("preprocessor_name", "DefaultPreprocessor") != "DefaultPreprocessor":
        raise UserError(f"there is no bundle code for nnU-Net's preprocessor {configuration['preprocessor_name']}")
    for function, order in RESAMPLING.items():
        name = configuration.get(function, "resample_data_or_seg_to_shape")
        options = {"is_seg": False, "order": order, "order_z": 0, "force_separate_z": None}
        options |= configuration.get(f"{function}_kwargs", {})
        wanted = {"is_seg": False, "order": order, "order_z": 0, "force_separate_z": None}
        if name != "resample_data_or_seg_to_shape" or options != wanted:
            raise UserError(f"there is no bundle code for its {function}, {name} with {options}")
    intensities = (
        plans.get("foreground_intensity_properties_per_channel")
        or plans.get("foreground_intensity_properties_by_modality")
        or {}
    )
    masked = configuration.get("use_mask_for_norm", [False] * channels)
    if len(configuration["normalization_schemes"]) != channels:
        raise UserError(
            f"the plans normalise {len(configuration['normalization_schemes'])} channels, dataset.json has {channels}"
        )
    schemes = []
    for channel, name in enumerate(configuration["normalization_schemes"]):
        if name not in SCHEMES:
            raise UserError(f"there is no bundle code for its normalisation {name}; there are {', '.join(SCHEMES)}")
        scheme: dict[str, Any] = {"scheme": SCHEMES[name]}
        if name == "CTNormalization":
            of = intensities[str(channel)]
            keys = {"lower": "percentile_00_5", "upper": "percentile_99_5", "mean": "mean", "std": "std"}
            scheme |= {ours: float(of[theirs]) for ours, theirs in keys.items()}
        elif name == "RGBTo01Normalization":
            scheme["by"] = 255
        elif name == "ZScoreNormalization" and masked[channel]:
            scheme["nonzero"] = True
        schemes.append(scheme)
    spacing = [float(configuration["spacing"][axis]) for axis in axes]
    reoriented = plans.get("image_reader_writer") == "NibabelIOWithReorient"
    orientation = {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": None}
    return [
        {"_target_": "scripts.images.LoadImageOrSeriesd", "keys": "image"},
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
        {"_target_": "EnsureTyped", "keys": "image", "dtype": "float32"},
        *([orientation] if reoriented else []),
        {"_target_": "scripts.nnunet_images.CropToNonzerod", "keys": "image"},
        {"_target_": "scripts.nnunet_images.NormalizeChannelsd", "keys": "image", "schemes": schemes},
        {"_target_": "scripts.nnunet_images.ResampleToSpacingd", "keys": "image", "spacing": spacing},
    ]


def _network_def(
    configuration: Mapping[str, Any], axes: Sequence[int], in_channels: int, out_channels: int
) -> dict[str, Any]:
    name, arguments = _architecture(configuration)
    if name not in NETWORKS:
        raise UserError(f"its network is {name}; only {' and '.join(NETWORKS)} can be converted")
    stages = arguments["n_stages"]
    sizes = ("n_stages", "features_per_stage", "kernel_sizes", "strides", NETWORKS[name], "n_conv_per_stage_decoder")
    for key, value in arguments.items():
        found = value.rpartition(".")[2] if isinstance(value, str) else value
        if key not in sizes and not (value is None and key not in FIXED) and found not in FIXED.get(key, ()):
            raise UserError(f"there is no bundle code for a network whose {key} is {value}")

    def each(key: str, count: int) -> list[Any]:
        value = arguments[key]
        return list(value) if isinstance(value, list | tuple) else [value] * count

    def turned(key: str) -> list[list[int]]:
        triples = (size if isinstance(size, list | tuple) else [size] * 3 for size in each(key, stages))
        return [[int(size[axis]) for axis in axes] for size in triples]

    definition = {
        "_target_": "scripts.nnunet_unet.NnUNet",
        "in_channels": in_channels,
        "out_channels": out_channels,
        "features": each("features_per_stage", stages),
        "kernel_sizes": turned("kernel_sizes"),
        "strides": turned("strides"),
        "blocks": each(NETWORKS[name], stages),
        "decoder_convolutions": each("n_conv_per_stage_decoder", stages - 1),
        "residual": name == "ResidualEncoderUNet",
    }
    if definition["strides"][0] != [1, 1, 1]:
        raise UserError(
            f"its network begins with a stride of {arguments['strides'][0]}: its output is smaller than the image"
        )
    return definition


def _architecture(configuration: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Class and arguments; plans before nnU-Net 2.4 say them in other words and leave out what was the same for all."""
    if "architecture" in configuration:
        architecture = configuration["architecture"]
        return architecture["network_class_name"].rpartition(".")[2], architecture["arch_kwargs"]
    name = configuration["UNet_class_name"]
    stages = len(configuration["n_conv_per_stage_encoder"])
    features = [configuration["UNet_base_num_features"] * 2**stage for stage in range(stages)]
    return name, {
        "n_stages": stages,
        "features_per_stage": [min(number, configuration["unet_max_num_features"]) for number in features],
        "kernel_sizes": configuration["conv_kernel_sizes"],
        "strides": configuration["pool_op_kernel_sizes"],
        NETWORKS.get(name, ""): configuration["n_conv_per_stage_encoder"],
        "n_conv_per_stage_decoder": configuration["n_conv_per_stage_decoder"],
    }


def _in_order(
    weights: Mapping[str, Tensor], network_def: Mapping[str, Any], axes: Sequence[int], whose: str
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, str]]:
    """The network's tensors with MONAI's axes, what each was made from, and what was left out.

    nnU-Net's modules are each registered twice or more, so that most tensors have several names.
    """
    shapes = instantiate({**network_def, "_target_": "tools.bundle_code.nnunet_unet.NnUNet"}).state_dict()
    heads = len(network_def["decoder_convolutions"])
    names = {name: name.replace("head.", f"decoder.seg_layers.{heads - 1}.") for name in shapes}
    order = [0, 1, *(2 + axis for axis in axes)]
    tensors, origins = {}, {}
    for name, theirs in names.items():
        if theirs not in weights:
            raise UserError(
                f"{whose} has no tensor {theirs}, which its plans' network has: its trainer built another one"
            )
        kernel = weights[theirs].dim() == 5
        tensors[name] = weights[theirs].permute(order) if kernel else weights[theirs]
        origins[name] = f"`{theirs}`{', axes turned' if kernel and max(weights[theirs].shape[2:]) > 1 else ''}"
        if tensors[name].shape != shapes[name].shape:
            found = tuple(weights[theirs].shape)
            raise UserError(f"{whose}: tensor {theirs} is {found}, its plans' network has another shape there")
    left_out = {}
    for name in weights.keys() - set(names.values()):
        first = re.sub(r"all_modules\.([01])", lambda match: ("conv", "norm")[int(match[1])], name)
        first = first.removeprefix("decoder.") if first.startswith("decoder.encoder.") else first
        if first in weights and first != name and weights[first].equal(weights[name]):
            left_out[name] = f"another name of `{first}`"
        elif re.fullmatch(r"decoder\.seg_layers\.\d+\.(weight|bias)", name):
            left_out[name] = "a head at a lower resolution, of which only training makes use"
        else:
            raise UserError(
                f"{whose} has a tensor {name}, which its plans' network has not: its trainer built another one"
            )
    return tensors, origins, dict(sorted(left_out.items()))
