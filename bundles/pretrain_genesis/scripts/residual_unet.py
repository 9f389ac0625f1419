"""The residual 3D U-Net of U-Net Transplant: an encoder/decoder backbone and a 1x1x1 head in one network.

Tensor names, shapes and order of the backbone are those of the published checkpoints, so that these load strictly.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .group_norm import GroupNorm3d


class NormConv(nn.Module):
    """Group normalisation, 3x3x3 convolution without bias, channel dropout.

    Args:
        channels: channels in and out; normalised in 8 groups, or in one when there are fewer than 8.
        dropout: probability of zeroing a whole channel.
    """

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.groupnorm = GroupNorm3d(8 if channels >= 8 else 1, channels)
        self.conv = nn.Conv3d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.dropout = nn.Dropout3d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.conv(self.groupnorm(x)))


class PointwiseConv3d(nn.Conv3d):
    """A 1x1x1 convolution that always answers in the channels-last memory format.

    A one-channel image has no format of its own, so that ``Conv3d`` would answer in the contiguous one, and the whole
    first level would be converted back and forth.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, input: Tensor) -> Tensor:
        channels_last = nn.functional.linear(input.permute(0, 2, 3, 4, 1), self.weight.flatten(1), self.bias)
        return channels_last.permute(0, 4, 1, 2, 3)


class ResidualBlock(nn.Module):
    """Two ``NormConv`` around a residual that is taken after the 1x1x1 convolution which changes the channels."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        same = in_channels == out_channels
        self.conv1 = nn.Identity() if same else PointwiseConv3d(in_channels, out_channels)
        self.conv2 = NormConv(out_channels, dropout)
        self.conv3 = NormConv(out_channels, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.after_residual(self.conv1(x))

    def after_residual(self, residual: Tensor) -> Tensor:
        return torch.relu_(self.conv3(torch.relu_(self.conv2(residual))) + residual)


class Encoder(nn.Module):
    """One encoder level: halve the resolution (every level but the first), then a residual block."""

    def __init__(self, in_channels: int, out_channels: int, pool: bool, dropout: float) -> None:
        super().__init__()
        self.pooling = nn.MaxPool3d(2) if pool else nn.Identity()
        self.basic_module = ResidualBlock(in_channels, out_channels, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.basic_module(self.pooling(x))


class Decoder(nn.Module):
    """One decoder level: nearest-neighbour upsampling to the skip's size, concatenation [skip, upsampled], residual block.

    The block's 1x1x1 convolution is applied to the two halves before they meet, to the deep one before it is upsampled:
    the same result (both are linear and pointwise) without the widest tensor of the network.
    """

    def __init__(self, skip_channels: int, deep_channels: int, dropout: float) -> None:
        super().__init__()
        self.basic_module = ResidualBlock(skip_channels + deep_channels, skip_channels, dropout)

    def forward(self, skip: Tensor, deep: Tensor) -> Tensor:
        weight, bias = self.basic_module.conv1.weight, self.basic_module.conv1.bias
        from_skip = nn.functional.conv3d(skip, weight[:, : skip.shape[1]], bias)
        from_deep = nn.functional.conv3d(deep, weight[:, skip.shape[1] :])
        upsampled = nn.functional.interpolate(from_deep, size=skip.shape[2:], mode="nearest")
        return self.basic_module.after_residual(from_skip + upsampled)


class ResidualUNet3D(nn.Module):
    """Residual 3D U-Net with the canonical segmentation head: channel 0 is background, its logit the constant 0.

    At the default width of 64 and 4 levels the backbone has 23,882,688 parameters in 56 tensors. There are no buffers.

    Args:
        in_channels: image channels.
        out_channels: 1 + number of organs. Row 0 of the head (weight and bias) starts as zeros and, left out of the
            loss, stays exactly zero; so a plain argmax means "the organ with the largest positive logit, else nothing".
        width: channels at full resolution; level ``i`` has ``width * 2**i``.
        levels: resolutions, the full one included.
        dropout: probability of the channel dropout after every 3x3x3 convolution. (The published code uses 0.1
            whatever its configuration says.)

    Shapes:
        ``(N, in_channels, D, H, W)`` to ``(N, out_channels, D, H, W)``; each spatial size at least ``2**(levels - 1)``.

    Raises:
        ValueError: an input smaller than that, or ``out_channels`` below 2.

    Source: Lumetti et al., "U-Net Transplant: The Role of Pre-training for Model Merging in 3D Medical Segmentation",
    MICCAI 2025.
    """

    def __init__(
        self, in_channels: int = 1, out_channels: int = 2, width: int = 64, levels: int = 4, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if out_channels < 2:
            raise ValueError(f"out_channels counts background and organs, so it is at least 2; got {out_channels}")
        channels = [width * 2**level for level in range(levels)]
        inputs = [in_channels, *channels]
        self.encoders = nn.ModuleList(
            Encoder(inputs[level], channels[level], pool=level > 0, dropout=dropout) for level in range(levels)
        )
        self.decoders = nn.ModuleList(
            Decoder(channels[level], channels[level + 1], dropout) for level in reversed(range(levels - 1))
        )
        self.head = nn.Conv3d(width, out_channels, kernel_size=1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-normal convolutions (leaky ReLU, slope 0.01), zero biases, and a zero background row in the head."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, a=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.head.weight[0].zero_()

    def forward(self, x: Tensor) -> Tensor:
        smallest = 2 ** (len(self.encoders) - 1)
        for side in x.shape[2:]:
            if side < smallest:
                raise ValueError(f"each side of the input must be at least {smallest} voxels, got {side}")
        skips = []
        for encoder in self.encoders:
            x = encoder(x)
            skips.append(x)
        skips.pop()
        for decoder in self.decoders:
            x = decoder(skips.pop(), x)
        return self.head(x)
