"""STU-Net: the scalable U-Net of 14.6 million to 1.46 billion parameters, by one argument.

Tensor names, shapes and order are those of the published checkpoints. Their axes are z, y, x; those of images here are x, y, z.
``STRIDES`` and converted weights are in the order of the images, so that nothing else has to know of another one: a network on
(z, y, x) is this one with every stride triple, and the last three axes of every kernel, reversed.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SIZES = {"small": (16, 1), "base": (32, 1), "large": (64, 2), "huge": (96, 3)}  # channels at full resolution, blocks
GROWTH = (1, 2, 4, 8, 16, 16)  # of the channels, level by level
STRIDES = ((2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 1, 1))  # of the published weights, along x, y, z


class BasicResBlock(nn.Module):
    """Two 3x3x3 convolutions with instance normalisation around a shortcut, activation after the sum.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        stride: of the first convolution, and of the shortcut.
        projection: the shortcut is a 1x1x1 convolution without normalisation, not the input itself.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: Sequence[int] = (1, 1, 1), projection: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, out_channels, 3, tuple(stride), padding=1)
        self.norm1 = nn.InstanceNorm3d(out_channels, affine=True)
        self.act1 = nn.LeakyReLU(inplace=True)
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, padding=1)
        self.norm2 = nn.InstanceNorm3d(out_channels, affine=True)
        self.act2 = nn.LeakyReLU(inplace=True)
        self.projection = projection
        if projection:
            self.conv3 = nn.Conv3d(in_channels, out_channels, 1, tuple(stride))

    def forward(self, x: Tensor) -> Tensor:
        main = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        if self.projection:
            x = self.conv3(x)
        return self.act2(main.add_(x))


class Level(nn.Sequential):
    """The residual blocks of one resolution, the first with the stride.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        depth: number of blocks.
        stride: of the first one.
        checkpointing: see ``STUNet``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        depth: int,
        stride: Sequence[int] = (1, 1, 1),
        checkpointing: bool = False,
    ) -> None:
        first = BasicResBlock(in_channels, out_channels, stride, projection=True)
        super().__init__(first, *(BasicResBlock(out_channels, out_channels) for _ in range(depth - 1)))
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            if torch.jit.is_scripting():
                x = block(x)
            elif self.checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class Upsample(nn.Module):
    """A 1x1x1 convolution, then every voxel repeated: the published layer, whose convolution comes second, for less work."""

    def __init__(self, in_channels: int, out_channels: int, scale: Sequence[int]) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 1)
        self.scale = [float(factor) for factor in scale]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(self.conv(x), scale_factor=self.scale, mode="nearest")


class STUNet(nn.Module):
    """STU-Net.

    With one input and 105 output channels: small 14,596,941, base 58,262,669, large 440,302,605, huge 1,457,326,221 parameters.
    There are no buffers.

    Args:
        in_channels: image channels.
        out_channels: background and labels.
        size: ``"small"``, ``"base"``, ``"large"`` or ``"huge"``: short for ``channels`` and ``depth``.
        channels: level by level, the full resolution first; one more than ``strides``.
        depth: residual blocks of each level, in the encoder and in the decoder.
        strides: between the levels, each a number for each axis of the input. The published weights are on axes z, y, x with
            the reverse of the default.
        deep_supervision: in training, give the logits of all decoder levels.
        checkpointing: in training, compute the activations inside blocks again in the backward pass instead of keeping them;
            default: where a level has several blocks (large and huge).

    Shapes:
        ``(N, in_channels, X, Y, Z)`` to logits ``(N, out_channels, X, Y, Z)``; in training with ``deep_supervision`` to a list of
        logits, the finest first, the others smaller by the strides. Each side is a multiple of the product of its strides.

    Raises:
        ValueError: another size, ``channels`` and ``strides`` that do not fit, or an input whose sides do not divide, or which
            leaves one voxel at the lowest resolution, where instance normalisation has nothing to normalise.

    Source: Huang et al., "STU-Net: Scalable and Transferable Medical Image Segmentation Models Empowered by Large-Scale
    Supervised Pre-training", arXiv 2304.06716.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 105,
        size: str = "base",
        channels: Sequence[int] | None = None,
        depth: int | None = None,
        strides: Sequence[Sequence[int]] = STRIDES,
        deep_supervision: bool = True,
        checkpointing: bool | None = None,
    ) -> None:
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(map(repr, SIZES))}, got {size!r}")
        width, blocks = SIZES[size]
        channels = [width * growth for growth in GROWTH] if channels is None else list(channels)
        depth = blocks if depth is None else depth
        if len(channels) != len(strides) + 1:
            raise ValueError(
                f"{len(strides)} strides are between {len(strides) + 1} levels, got {len(channels)} channels"
            )
        self.deep_supervision = deep_supervision
        checkpointing = depth > 1 if checkpointing is None else checkpointing
        self.multiples = [prod(stride[axis] for stride in strides) for axis in range(3)]
        down = [(1, 1, 1), *strides]
        upwards = list(reversed(range(len(strides))))
        self.conv_blocks_context = nn.ModuleList(
            Level(inputs, outputs, depth, stride, checkpointing)
            for inputs, outputs, stride in zip([in_channels, *channels], channels, down, strict=False)
        )
        self.upsample_layers = nn.ModuleList(
            Upsample(channels[level + 1], channels[level], strides[level]) for level in upwards
        )
        self.conv_blocks_localization = nn.ModuleList(
            Level(2 * channels[level], channels[level], depth, checkpointing=checkpointing) for level in upwards
        )
        self.seg_outputs = nn.ModuleList(nn.Conv3d(channels[level], out_channels, 1) for level in upwards)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-normal convolutions (leaky ReLU, slope 0.01) and zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, a=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor):
        self.check_size(x)
        skips: list[Tensor] = []
        for encoder in self.conv_blocks_context:
            x = encoder(x)
            skips.append(x)
        skips.pop()
        levels: list[Tensor] = []
        for upsample, decoder in zip(self.upsample_layers, self.conv_blocks_localization):
            x = decoder(torch.cat([upsample(x), skips.pop()], 1))
            levels.append(x)
        if not torch.jit.is_scripting() and self.training and self.deep_supervision:
            return [head(level) for head, level in zip(self.seg_outputs, levels)][::-1]
        return self.seg_outputs[-1](x)

    def check_size(self, x: Tensor) -> None:
        """Raise the ``ValueError`` of an input that the network cannot take."""
        voxels = 1
        for side, multiple in zip(x.shape[2:], self.multiples):
            if side % multiple != 0:
                raise ValueError(
                    f"each side of the input must be a multiple of {self.multiples}, got {list(x.shape[2:])}: pad it, or use "
                    "sliding windows"
                )
            voxels *= side // multiple
        if voxels < 2:
            raise ValueError(
                f"an input of {list(x.shape[2:])} leaves one voxel at the lowest resolution; double one of its sides"
            )
