"""nnU-Net's two U-Nets, PlainConvUNet and ResidualEncoderUNet: the same tensors by name, each once, and the same function.

Of the heads that nnU-Net trains at every resolution there is the one at full size, as ``head``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Convolution(nn.Module):
    """Convolution, instance normalisation and, if asked for, leaky ReLU.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: odd, for each axis.
        stride: for each axis.
        bias: of the convolution.
        activation: end with the leaky ReLU.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int] = (1, 1, 1),
        stride: Sequence[int] = (1, 1, 1),
        bias: bool = True,
        activation: bool = True,
    ) -> None:
        super().__init__()
        padding = tuple(size // 2 for size in kernel_size)
        self.conv = nn.Conv3d(in_channels, out_channels, tuple(kernel_size), tuple(stride), padding, bias=bias)
        self.norm = nn.InstanceNorm3d(out_channels, affine=True)
        self.nonlin = nn.LeakyReLU(0.01, inplace=True) if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlin(self.norm(self.conv(x)))


class Convolutions(nn.Module):
    """Several ``Convolution``, the first of which changes channels and resolution."""

    def __init__(
        self,
        count: int,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (1, 1, 1),
    ) -> None:
        super().__init__()
        first = Convolution(in_channels, out_channels, kernel_size, stride)
        more = (Convolution(out_channels, out_channels, kernel_size) for _ in range(count - 1))
        self.convs = nn.Sequential(first, *more)

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(x)


class ResidualBlock(nn.Module):
    """Two ``Convolution`` around a residual, which is averaged where resolution changes and projected where channels do."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Sequence[int], stride: Sequence[int]) -> None:
        super().__init__()
        self.conv1 = Convolution(in_channels, out_channels, kernel_size, stride)
        self.conv2 = Convolution(out_channels, out_channels, kernel_size, activation=False)
        self.nonlin2 = nn.LeakyReLU(0.01, inplace=True)
        steps: list[nn.Module] = [nn.AvgPool3d(tuple(stride), tuple(stride))] if max(stride) > 1 else []
        if in_channels != out_channels:
            steps.append(Convolution(in_channels, out_channels, bias=False, activation=False))
        self.skip = nn.Sequential(*steps)

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlin2(self.conv2(self.conv1(x)) + self.skip(x))


class ResidualBlocks(nn.Module):
    """Several ``ResidualBlock``, the first of which changes channels and resolution."""

    def __init__(
        self, count: int, in_channels: int, out_channels: int, kernel_size: Sequence[int], stride: Sequence[int]
    ) -> None:
        super().__init__()
        first = ResidualBlock(in_channels, out_channels, kernel_size, stride)
        more = (ResidualBlock(out_channels, out_channels, kernel_size, (1, 1, 1)) for _ in range(count - 1))
        self.blocks = nn.Sequential(first, *more)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Encoder(nn.Module):
    """From an image to features at every resolution, the finest first."""

    def __init__(
        self,
        in_channels: int,
        features: Sequence[int],
        kernel_sizes: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        blocks: Sequence[int],
        residual: bool,
    ) -> None:
        super().__init__()
        self.stem = Convolutions(1, in_channels, features[0], kernel_sizes[0]) if residual else nn.Identity()
        inputs = [features[0] if residual else in_channels, *features]
        self.stages = nn.ModuleList(
            ResidualBlocks(*stage) if residual else nn.Sequential(Convolutions(*stage))
            for stage in zip(blocks, inputs, features, kernel_sizes, strides)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class Decoder(nn.Module):
    """From features at every resolution to those at the finest: up, join, convolve."""

    def __init__(
        self,
        features: Sequence[int],
        kernel_sizes: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        convolutions: Sequence[int],
    ) -> None:
        super().__init__()
        levels = range(len(features) - 2, -1, -1)
        self.stages = nn.ModuleList(
            Convolutions(count, 2 * features[level], features[level], kernel_sizes[level])
            for count, level in zip(convolutions, levels)
        )
        self.transpconvs = nn.ModuleList(
            nn.ConvTranspose3d(
                features[level + 1], features[level], tuple(strides[level + 1]), tuple(strides[level + 1])
            )
            for level in levels
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        x = features.pop()
        for up, stage in zip(self.transpconvs, self.stages):
            x = stage(torch.cat([up(x), features.pop()], 1))
        return x


class NnUNet(nn.Module):
    """nnU-Net's U-Net, with convolutions or residual blocks in its encoder.

    Args:
        in_channels: of the image.
        out_channels: background and labels.
        features: channels at each resolution, the finest first.
        kernel_sizes: at each resolution, for each axis.
        strides: from the resolution before, for each axis; the first is 1.
        blocks: convolutions, or residual blocks, at each resolution of the encoder.
        decoder_convolutions: at each resolution of the decoder, the coarsest first; one fewer than resolutions.
        residual: residual blocks.

    Shapes:
        ``(N, in_channels, X, Y, Z)`` to ``(N, out_channels, X, Y, Z)``; sizes are multiples of the strides' product.

    Source: Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation", Nature
    Methods 2021; residual encoders: "nnU-Net Revisited: A Call for Rigorous Validation in 3D Medical Image Segmentation",
    MICCAI 2024.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        features: Sequence[int],
        kernel_sizes: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        blocks: Sequence[int],
        decoder_convolutions: Sequence[int],
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(in_channels, features, kernel_sizes, strides, blocks, residual)
        self.decoder = Decoder(features, kernel_sizes, strides, decoder_convolutions)
        self.head = nn.Conv3d(features[0], out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decoder(self.encoder(x)))
