"""Hide the spare channels of a merged network whose head has several layers."""

from __future__ import annotations

from torch import Tensor, nn


def without_spare_channels(network: nn.Module, out_channels: int) -> nn.Module:
    """Let a network return its first output channels only; its tensors stay as they are, by name and shape.

    A head of several layers that was stacked of several tasks' needs hidden channels for the background of each, of which it
    shows one. Survives ``torch.jit.script`` where the network returns one tensor.

    Args:
        network: changed in place; returns (N, channels, …), or a list or tuple of such.
        out_channels: that it then returns.
    """
    network.shown_channels = out_channels
    network.register_forward_hook(_shown)
    return network


def _shown(self, inputs: tuple[Tensor], output: Tensor):
    if isinstance(output, Tensor):
        return output[:, : self.shown_channels]
    return [one[:, : self.shown_channels] for one in output]
