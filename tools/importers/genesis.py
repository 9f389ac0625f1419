"""Models Genesis: Genesis_Chest_CT.pt, a 3D U-Net, and genesis_nnunet_luna16_006.model, nnU-Net 1's network (MONAI's DynUNet).

The weights are their authors', for academic use only and patent-pending: what is made of them is no different.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.errors import UserError
from tools.importers.conversion import Conversion, named_tensors, read_checkpoint
from tools.network import describe, instantiate

if TYPE_CHECKING:
    from torch import Tensor

LABEL = "restored image"
UNET, NNUNET = "down_tr64.ops.0.conv1.weight", "conv_blocks_context.0.blocks.0.conv.weight"
HU = (-1000, 1000)  # that [0, 1] stands for
MEAN_HU, STD_HU = -775.8457, 251.9326  # nnU-Net's of LUNA16, taken from the input after it was corrupted
FACTS = {
    "data": "LUNA16, 623 chest CTs (https://luna16.grand-challenge.org)",
    "terms": "weights of Models Genesis (Arizona State University): academic, non-commercial use only, patent-pending",
}


def read(checkpoint: Path, strides: Sequence[int | Sequence[int]] | None = None) -> Conversion:
    """Read a file of Models Genesis; which of the two networks it is, and how wide, its tensors say.

    Args:
        checkpoint: the file.
        strides: of nnU-Net's stages below the first, where they shall be others than the file's. By the published rule all blocks
            of convolutions must then fit, upsampling that does not fit starts at random.

    Raises:
        UserError: damaged, neither of the two, or its blocks of convolutions do not fit.
    """
    content = read_checkpoint(checkpoint)
    whole = isinstance(content, Mapping) and "state_dict" in content
    tensors = named_tensors(content["state_dict"] if whole else content, checkpoint, "state_dict")
    if UNET in tensors:
        if strides is not None:
            raise UserError(f"{checkpoint} is the U-Net of Models Genesis: --strides are for the file of nnU-Net")
        conversion = _unet(checkpoint, tensors)
    elif NNUNET in tensors:
        conversion = _nnunet(checkpoint, tensors, strides)
    else:
        raise UserError(
            f"{checkpoint} is not of Models Genesis: it has neither {UNET} (Genesis_Chest_CT.pt) nor {NNUNET} "
            f"(genesis_nnunet_luna16_006.model), but {', '.join(list(tensors)[:3])}, …"
        )
    for name in content if whole else ():
        if name != "state_dict":
            conversion.left_out[str(name)] = "not a weight: of the training that made the file"
    conversion.metadata |= {
        "pred_classes": "2 channels: background (constant 0, not used) and the logit of the restored image; its sigmoid is the "
        "image in [0, 1]",
        "data_source": FACTS["data"] + "; not distributed with the bundle",
        "license": "weights: academic, non-commercial use only (Models Genesis, Arizona State University); code: Apache-2.0",
        "lineage": {"data": {"dataset": "LUNA16", "licence": "see the model card"}},
    }
    conversion.facts |= FACTS
    return conversion


def _unet(checkpoint: Path, tensors: Mapping[str, Tensor]) -> Conversion:
    width, in_channels = tensors[UNET].shape[:2]
    network_def = {
        "_target_": "scripts.genesis_unet.GenesisUNet3D",
        "in_channels": _one_channel(checkpoint, in_channels),
        "out_channels": 2,
        "width": width,
    }
    names = {name: name for name in _fresh(network_def)}
    left_out = {name: "running statistics, which the published network never used" for name in tensors if _unused(name)}
    values = {"network_def": network_def, "width": width}
    return _conversion(checkpoint, tensors, network_def, names, "out_tr.final_conv.", values, left_out)


def _unused(name: str) -> bool:
    return name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")


def _nnunet(checkpoint: Path, tensors: Mapping[str, Tensor], strides: Any) -> Conversion:
    depth = len({name.split(".")[1] for name in tensors if name.startswith("conv_blocks_context.")})
    try:
        filters = [tensors[f"conv_blocks_context.{i}.blocks.0.conv.weight"].shape[0] for i in range(depth - 1)]
        filters.append(tensors[f"conv_blocks_context.{depth - 1}.1.blocks.0.conv.weight"].shape[0])
        own = [list(tensors[f"tu.{i}.weight"].shape[2:]) for i in reversed(range(depth - 1))]
    except KeyError as error:
        raise UserError(f"{checkpoint}: {error} is missing: it is not a whole network of nnU-Net 1") from None
    if strides is None:
        strides = own
    elif not isinstance(strides, list | tuple) or len(strides) != len(own):
        raise UserError(f"--strides {strides} must be a list of {len(own)}, as the file's are: {own}")
    for stride in strides:
        steps = [*stride] if isinstance(stride, list | tuple) else [stride] * 3
        if len(steps) != 3 or not all(type(step) is int and step > 0 for step in steps):
            raise UserError(f"--strides must be whole numbers from 1 on, one or three for each level; got {strides}")
    network_def = {
        "_target_": "monai.networks.nets.DynUNet",
        "spatial_dims": 3,
        "in_channels": _one_channel(checkpoint, tensors[NNUNET].shape[1]),
        "out_channels": 2,
        "kernel_size": [3] * depth,
        "strides": [1, *strides],
        "upsample_kernel_size": list(strides),
        "filters": filters,
        "norm_name": ["INSTANCE", {"affine": True}],
        "act_name": ["leakyrelu", {"inplace": True, "negative_slope": 0.01}],
        "deep_supervision": False,
        "res_block": False,
        "trans_bias": False,
    }
    names = {ours: name for name in tensors if (ours := dynunet_name(name, depth))}
    left_out = {}
    for name in tensors:
        if name.endswith(".conv.bias"):
            left_out[name] = "a bias before instance normalisation, which takes it away"
        elif name.startswith("seg_outputs.") and name != f"seg_outputs.{depth - 2}.weight":
            left_out[name] = "a deep head that was never trained"
    low, high = HU
    values = {
        "network_def": network_def,
        "standardise": [round((MEAN_HU - low) / (high - low), 9), round(STD_HU / (high - low), 9)],
    }
    return _conversion(checkpoint, tensors, network_def, names, "output_block.conv.conv.", values, left_out)


def dynunet_name(name: str, depth: int) -> str | None:
    """The name in MONAI's DynUNet of a tensor of nnU-Net 1's Generic_UNet; None for what DynUNet does not have.

    Args:
        name: in nnU-Net.
        depth: number of resolutions.
    """
    if match := re.fullmatch(r"tu\.(\d+)\.weight", name):
        return f"upsamples.{match[1]}.transp_conv.conv.weight"
    if name == f"seg_outputs.{depth - 2}.weight":
        return "output_block.conv.conv.weight"
    tensor = r"(?:conv\.(weight)|instnorm\.(weight|bias))"
    if match := re.fullmatch(rf"conv_blocks_context\.(\d+)\.blocks\.(\d)\.{tensor}", name):
        level, block, kernel, norm = match.groups()
        place = "input_block" if level == "0" else f"downsamples.{int(level) - 1}"
    elif match := re.fullmatch(rf"conv_blocks_context\.{depth - 1}\.(\d)\.blocks\.0\.{tensor}", name):
        block, kernel, norm = match.groups()
        place = "bottleneck"
    elif match := re.fullmatch(rf"conv_blocks_localization\.(\d+)\.(\d)\.blocks\.0\.{tensor}", name):
        level, block, kernel, norm = match.groups()
        place = f"upsamples.{level}.conv_block"
    else:
        return None
    number = int(block) + 1
    return f"{place}.conv{number}.conv.{kernel}" if kernel else f"{place}.norm{number}.{norm}"


def _one_channel(checkpoint: Path, channels: int) -> int:
    if channels != 1:
        raise UserError(f"{checkpoint} takes images of {channels} channels; those of Models Genesis take 1")
    return 1


def _fresh(network_def: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a new network, the same every time."""
    import torch

    from tools.bundle_code.genesis_unet import GenesisUNet3D

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if network_def["_target_"].startswith("scripts."):
            arguments = {key: value for key, value in network_def.items() if key != "_target_"}
            return GenesisUNet3D(**arguments).state_dict()
        return instantiate(network_def, ("cpu",)).state_dict()


def _conversion(
    checkpoint: Path,
    tensors: Mapping[str, Tensor],
    network_def: Mapping[str, Any],
    names: Mapping[str, str],
    head: str,
    values: dict[str, Any],
    left_out: dict[str, str],
) -> Conversion:
    """Fill a network by the published rule: blocks of convolutions must fit, all else is taken where it does.

    Args:
        checkpoint: for messages.
        tensors: of the file.
        network_def: of the new network.
        names: for its tensors, those of the file.
        head: what the names of its head begin with; its row 0, background, is zero.
        values: of the bundle.
        left_out: what nothing is made from.
    """
    import torch

    fresh = _fresh(network_def)
    aliases = describe(network_def).aliases if "DynUNet" in network_def["_target_"] else {}
    found: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    for name, new in fresh.items():
        if name in aliases:
            continue
        source = names.get(name)
        tensor = tensors.get(source) if source else None
        if name.startswith(head):
            row = tensor[-1:] if tensor is not None else torch.zeros_like(new[1:])
            if row.shape != new[1:].shape:
                raise UserError(
                    f"{checkpoint}: {source} is {tuple(tensor.shape)}, its rows should be {tuple(new.shape[1:])}"
                )
            found[name] = torch.cat([torch.zeros_like(row), row.to(new.dtype)])
            origins[name] = "new: zeros" if tensor is None else f"the last row of {source}, under a row of zeros"
        elif tensor is not None and tensor.shape == new.shape:
            found[name], origins[name] = tensor, source
        elif "transp_conv" in name and tensor is not None:
            found[name], origins[name] = new, f"new, at random: {source} is {tuple(tensor.shape)}"
            left_out[source] = f"the network's is {tuple(new.shape)}"
        else:
            what = source or f"what becomes {name}"
            shape = "missing" if tensor is None else tuple(tensor.shape)
            raise UserError(
                f"{checkpoint}: {what} is {shape}, the network's is {tuple(new.shape)}: nothing was loaded, because the "
                "blocks of convolutions must all fit"
            )
    used = {names[name] for name in found if name in names}
    for name in tensors:
        if name not in used and name not in left_out:
            raise UserError(f"{checkpoint}: nobody knows what tensor {name} is")
    for name, first in aliases.items():
        found[name], origins[name] = found[first], f"{first}, under another name"
    return Conversion("pretrain_genesis", {LABEL: [LABEL]}, found, origins, left_out, values)
