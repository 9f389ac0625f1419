"""The 3D U-Net of Models Genesis, under its published names, for logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .group_norm import GroupNorm3d


class SampleNorm(GroupNorm3d):
    """Normalise each channel of each sample by its own mean and variance, with a trained scale and shift.

    The published network normalises by the statistics of the batch even when it predicts, so that an output depends on what
    else is in the batch. With a batch of one this is the same; in a larger one no window changes another. The running statistics
    of a published file were never used, and are passed over when it is loaded.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Unit(nn.Module):
    """3x3x3 convolution, normalisation, ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1)
        self.bn1 = SampleNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.bn1(self.conv1(x)))


class Down(nn.Module):
    """An encoder level: half of its channels, then all of them."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.ops = nn.Sequential(Unit(in_channels, out_channels // 2), Unit(out_channels // 2, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.ops(x)


class Up(nn.Module):
    """A decoder level: transposed convolution, concatenation [upsampled, skip], two units."""

    def __init__(self, deep_channels: int, skip_channels: int) -> None:
        super().__init__()
        self.up_conv = nn.ConvTranspose3d(deep_channels, deep_channels, kernel_size=2, stride=2)
        self.ops = nn.Sequential(Unit(deep_channels + skip_channels, skip_channels), Unit(skip_channels, skip_channels))

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        return self.ops(torch.cat((self.up_conv(deep), skip), 1))


class Out(nn.Module):
    """The head: a 1x1x1 convolution. The sigmoid of the published network is the caller's."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.final_conv = nn.Conv3d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.final_conv(x)


class GenesisUNet3D(nn.Module):
    """3D U-Net of four resolutions. With the published width of 32 and one output channel it has 19,073,665 parameters.

    Args:
        in_channels: image channels.
        out_channels: logits. In this project's bundles channel 0 is background: its row of the head starts as zeros and stays so,
            as the losses leave it out; a network with one channel has no background.
        width: the resolutions have ``2 * width`` to ``16 * width`` channels.

    Shapes:
        ``(N, in_channels, D, H, W)`` to ``(N, out_channels, D, H, W)``; each side a multiple of 8, one of
        them larger than 8.

    Raises:
        ValueError: another size.

    Source: Zhou et al., "Models Genesis", Medical Image Analysis 67:101840, 2021. Independent implementation.
    """

    def __init__(self, in_channels: int = 1, out_channels: int = 2, width: int = 32) -> None:
        super().__init__()
        self.down_tr64 = Down(in_channels, 2 * width)
        self.down_tr128 = Down(2 * width, 4 * width)
        self.down_tr256 = Down(4 * width, 8 * width)
        self.down_tr512 = Down(8 * width, 16 * width)
        self.up_tr256 = Up(16 * width, 8 * width)
        self.up_tr128 = Up(8 * width, 4 * width)
        self.up_tr64 = Up(4 * width, 2 * width)
        self.out_tr = Out(2 * width, out_channels)
        if out_channels > 1:
            with torch.no_grad():
                self.out_tr.final_conv.weight[0].zero_()
                self.out_tr.final_conv.bias[0].zero_()

    def forward(self, x: Tensor) -> Tensor:
        if any(side % 8 for side in x.shape[2:]) or max(x.shape[2:]) < 16:
            size = " x ".join(map(str, x.shape[2:]))
            raise ValueError(
                f"each side of the input must be a multiple of 8 voxels, and one larger than 8; got {size}"
            )
        skips = []
        for down in (self.down_tr64, self.down_tr128, self.down_tr256):
            skips.append(down(x))
            x = nn.functional.max_pool3d(skips[-1], 2)
        x = self.down_tr512(x)
        for up in (self.up_tr256, self.up_tr128, self.up_tr64):
            x = up(x, skips.pop())
        return self.out_tr(x)
