"""Which tensors of a network are its head: those whose shape changes with the number of output channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

OUTPUT_ARGUMENTS = ("out_channels", "num_classes", "n_classes", "out_chans")


def output_argument(network_def: Mapping[str, Any]) -> str:
    """The argument of a ``network_def`` that sets the number of output channels.

    Raises:
        ValueError: none of the usual names is there.
    """
    for name in OUTPUT_ARGUMENTS:
        if name in network_def:
            return name
    raise ValueError(
        f"network_def ({network_def.get('_target_')}) has none of the arguments {', '.join(OUTPUT_ARGUMENTS)}, "
        "so its head cannot be found"
    )


def build(network_def: Mapping[str, Any], out_channels: int, device: str = "meta") -> nn.Module:
    """The network with another number of output channels; on the meta device it has shapes, but no memory."""
    definition = {**network_def, output_argument(network_def): out_channels}
    with torch.device(device):
        return ConfigParser({"network": definition}).get_parsed_content("network")


def find_head(network_def: Mapping[str, Any]) -> dict[str, int]:
    """Names of the head's tensors and, for each, the axis that counts output channels.

    Raises:
        ValueError: no tensor depends on the number of output channels, or one depends on it by more than its size
            along a single axis.
    """
    few, more = (
        {name: tensor.shape for name, tensor in build(network_def, count).state_dict().items()} for count in (2, 3)
    )
    head: dict[str, int] = {}
    for name, shape in few.items():
        if shape == more.get(name):
            continue
        axes = [axis for axis, (a, b) in enumerate(zip(shape, more.get(name, ()))) if a != b]
        if len(axes) != 1 or (shape[axes[0]], more[name][axes[0]]) != (2, 3):
            raise ValueError(f"tensor {name} does not simply count output channels: {tuple(shape)} for 2 of them")
        head[name] = axes[0]
    if not head:
        raise ValueError("no tensor of the network depends on the number of output channels")
    return head


def backbone_of(state: Mapping[str, Tensor], head: Mapping[str, int]) -> dict[str, Tensor]:
    """A state dict without its head."""
    return {name: tensor for name, tensor in state.items() if name not in head}
