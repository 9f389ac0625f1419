"""A network that is linear in how far its backbone is from a point: what is fine-tuned on it, and merged, adds up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.bundle import ConfigComponent
from monai.data import MetaTensor
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call


class TangentNetwork(nn.Module):
    """The first-order Taylor expansion of a network in its backbone, around a point θ0; its head is as it was.

    The output is f(x; θ0, h) + J(x; θ0, h) (θ - θ0), with J the derivative by the backbone and h the head: where the head is one
    linear layer, h of the linearised features. Merged task vectors then add what they do to the features, and none changes
    what another one does. A pass takes two to four times as long as the network's own, and the weights are there twice.

    Args:
        network: its parameters are θ and h; the point is what θ is now.
        head: names of its tensors that stay as they are.

    Raises:
        ValueError: the network has running statistics, or no such head.

    Source: Ortiz-Jimenez et al., "Task Arithmetic in the Tangent Space: Improved Editing of Pre-Trained Models", NeurIPS 2023,
    who linearise the whole network; here each task brings a head that has learned from nothing, so that only the backbone is.
    """

    def __init__(self, network: nn.Module, head: Sequence[str]) -> None:
        super().__init__()
        parameters = dict(network.named_parameters())
        if unknown := [name for name in head if name not in parameters]:
            raise ValueError(f"the network has no tensor {unknown[0]} that could be its head")
        floating = [name for name, buffer in network.named_buffers() if buffer.is_floating_point()]
        if floating:
            raise ValueError(f"{floating[0]} is no parameter: a network with running statistics is not linearised")
        self.network = network
        self.point = nn.Module()
        self.linear = [name for name in parameters if name not in head]
        for name in self.linear:
            *outer, last = name.split(".")
            place = self.point
            for part in outer:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = getattr(place, part)
            place.register_buffer(last, parameters[name].detach().clone())

    def forward(self, *inputs: Any, **options: Any) -> Any:
        point = dict(self.point.named_buffers())
        with torch.inference_mode(False), torch.set_grad_enabled(torch.is_grad_enabled()), forward_ad.dual_level():
            tensors = {}
            for name, parameter in self.network.named_parameters():
                tensors[id(parameter)] = now = _usable(parameter)
                if name in self.linear:
                    start = _usable(point[name])
                    tensors[id(parameter)] = forward_ad.make_dual(start, now - start)
            # each place once: functional_call does not put back what a network has under several names
            places = {
                f"{outer}.{name}" if outer else name: tensors[id(parameter)]
                for outer, module in self.network.named_modules()
                for name, parameter in module.named_parameters(recurse=False)
            }
            output = functional_call(self.network, places, tuple(map(_usable, inputs)), options, tie_weights=False)
            return _first_order(output)


def tangent_network(of: str, head: Sequence[str], **arguments: Any) -> TangentNetwork:
    """``TangentNetwork`` of a network that a config names.

    Args:
        of: what its ``_target_`` would be.
        head: see ``TangentNetwork``.
        arguments: of the network.
    """
    return TangentNetwork(ConfigComponent({"_target_": of, **arguments}).instantiate(), head)


def _usable(value: Any) -> Any:
    """A tensor as derivatives need it: not made in inference mode, and contiguous, as PyTorch's of group normalisation does."""
    if not isinstance(value, Tensor):
        return value
    value = value.as_tensor() if isinstance(value, MetaTensor) else value
    return (value.clone() if value.is_inference() else value).contiguous()


def _first_order(output: Any) -> Any:
    """Value and derivative of each tensor of an output, summed."""
    if isinstance(output, Tensor):
        value, derivative = forward_ad.unpack_dual(output)
        return value if derivative is None else value + derivative
    if isinstance(output, Mapping):
        return {name: _first_order(one) for name, one in output.items()}
    return type(output)(_first_order(one) for one in output)
