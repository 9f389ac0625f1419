"""UNETR++: a U-Net whose blocks attend to channels and to voxels with the same queries and keys, at a cost linear in voxels.

The names of its tensors, the order in which queries, keys and values lie, and every quirk are those of the published weights, so
that these load strictly.

Source: Shaker et al., "UNETR++: Delving into Efficient and Accurate 3D Medical Image Segmentation", IEEE TMI 43:3377, 2024.
Independent implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import gcd, prod

import torch
from monai.networks.blocks.dynunet_block import UnetOutBlock, UnetResBlock, get_conv_layer
from torch import Tensor, nn
from torch.nn import functional as F

STAGES = 4


class UNETRPlusPlus(nn.Module):
    """The network. It takes images of one size only: position embeddings and projections have a row for every voxel.

    Args:
        in_channels: of the image.
        out_channels: of the output.
        img_size: of the image, voxels; a multiple of 8 times ``stem`` along each axis.
        stem: by how much the first convolution makes the image smaller along each axis.
        width: channels at full resolution; below the stem there are 2, 4, 8 and 16 times as many.
        depth: blocks of each resolution.
        num_heads: of the attention.
        projections: to how many voxels keys and values are projected, for each resolution below the stem.
        attention_dropout: chance that a weight of the attention is left out.
        separate_projections: project values by other weights than keys (published for lung tumours; else they share them).
        convolutions: residual blocks of convolutions after the attention, 1 or 2 (published for lung tumours).
        deep_supervision: in training also return the outputs at the resolutions of the stem and half of it.

    Shapes:
        ``(N, in_channels, *img_size)`` to ``(N, out_channels, *img_size)``; in training with ``deep_supervision`` a list of
        three, the largest first.

    Raises:
        ValueError: ``img_size`` does not fit ``stem``, or an image is of another size.
    """

    __constants__ = ("deep_supervision",)  # for TorchScript

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        img_size: Sequence[int],
        stem: Sequence[int] = (2, 4, 4),
        width: int = 16,
        depth: int = 3,
        num_heads: int = 4,
        projections: Sequence[int] = (64, 64, 64, 32),
        attention_dropout: float = 0.15,
        separate_projections: bool = False,
        convolutions: int = 1,
        deep_supervision: bool = True,
    ) -> None:
        super().__init__()
        if any(size % (step * 2 ** (STAGES - 1)) for size, step in zip(img_size, stem, strict=True)):
            smallest = " x ".join(str(step * 2 ** (STAGES - 1)) for step in stem)
            raise ValueError(f"UNETR++ needs images of a multiple of {smallest} voxels, img_size is {list(img_size)}")
        self.img_size = list(img_size)
        self.deep_supervision = deep_supervision
        dims = [width * 2 ** (i + 1) for i in range(STAGES)]
        sizes = [[n // step // 2**i for n, step in zip(img_size, stem, strict=True)] for i in range(STAGES)]

        def blocks(stage: int) -> nn.Sequential:
            return nn.Sequential(
                *(
                    PairedAttentionBlock(
                        prod(sizes[stage]),
                        dims[stage],
                        num_heads,
                        projections[stage],
                        attention_dropout,
                        separate_projections,
                        convolutions,
                    )
                    for _ in range(depth)
                )
            )

        self.unetr_pp_encoder = Encoder(in_channels, dims, tuple(stem), [blocks(i) for i in range(STAGES)])
        self.encoder1 = UnetResBlock(3, in_channels, width, kernel_size=3, stride=1, norm_name="instance")
        self.decoder5 = Up(dims[3], dims[2], 2, blocks(2))
        self.decoder4 = Up(dims[2], dims[1], 2, blocks(1))
        self.decoder3 = Up(dims[1], dims[0], 2, blocks(0))
        last = UnetResBlock(3, width, width, kernel_size=3, stride=1, norm_name="instance")
        self.decoder2 = Up(dims[0], width, tuple(stem), last)
        self.out1 = UnetOutBlock(3, width, out_channels)
        if deep_supervision:
            self.out2 = UnetOutBlock(3, dims[0], out_channels)
            self.out3 = UnetOutBlock(3, dims[1], out_channels)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if list(x.shape[2:]) != self.img_size:
            raise ValueError(f"UNETR++ was made for images of {self.img_size} voxels, got {list(x.shape[2:])}")
        first, second, third, fourth = self.unetr_pp_encoder(x)
        quarter = self.decoder4(self.decoder5(fourth, third), second)
        half = self.decoder3(quarter, first)
        output = self.out1(self.decoder2(half, self.encoder1(x)))
        if self.deep_supervision and self.training:
            return [output, self.out2(half), self.out3(quarter)]
        return output


class Encoder(nn.Module):
    """Four resolutions, each a convolution that makes the image smaller, and blocks; it returns all four, the largest first."""

    def __init__(self, in_channels: int, dims: Sequence[int], stem: tuple[int, ...], stages: list[nn.Module]) -> None:
        super().__init__()
        first = nn.Sequential(
            get_conv_layer(3, in_channels, dims[0], kernel_size=stem, stride=stem),
            nn.GroupNorm(gcd(in_channels, dims[0]), dims[0]),
        )
        others = [
            nn.Sequential(get_conv_layer(3, dims[i], dims[i + 1], 2, 2), nn.GroupNorm(dims[i], dims[i + 1]))
            for i in range(STAGES - 1)
        ]
        self.downsample_layers = nn.ModuleList([first, *others])
        self.stages = nn.ModuleList(stages)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = []
        for smaller, stage in zip(self.downsample_layers, self.stages):
            x = stage(smaller(x))
            outputs.append(x)
        return outputs


class Up(nn.Module):
    """A transposed convolution, the encoder's image of that size added, and blocks."""

    def __init__(self, in_channels: int, out_channels: int, scale: int | tuple[int, ...], blocks: nn.Module) -> None:
        super().__init__()
        self.transp_conv = get_conv_layer(3, in_channels, out_channels, scale, scale, is_transposed=True)
        self.decoder_block = nn.ModuleList([blocks])

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.decoder_block[0](self.transp_conv(x) + skip)


class PairedAttentionBlock(nn.Module):
    """Attention over the voxels of an image, then convolutions, both added to what came in.

    Shapes:
        ``(N, channels, D, H, W)`` with D · H · W = ``tokens`` to the same.
    """

    def __init__(
        self,
        tokens: int,
        channels: int,
        num_heads: int,
        projection: int,
        attention_dropout: float,
        separate_projections: bool,
        convolutions: int,
    ) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, channels))
        self.gamma = nn.Parameter(1e-6 * torch.ones(channels))
        self.norm = nn.LayerNorm(channels)
        self.epa_block = PairedAttention(
            tokens, channels, num_heads, projection, attention_dropout, separate_projections
        )
        residual = partial(UnetResBlock, 3, channels, channels, kernel_size=3, stride=1, norm_name="batch")
        self.conv51 = residual()
        self.conv52 = residual() if convolutions == 2 else nn.Identity()
        self.conv8 = nn.Sequential(nn.Dropout3d(0.1), nn.Conv3d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2) + self.pos_embed
        tokens = tokens + self.gamma * self.epa_block(self.norm(tokens))
        attended = tokens.transpose(1, 2).reshape(x.shape)
        return attended + self.conv8(self.conv52(self.conv51(attended)))


class PairedAttention(nn.Module):
    """Efficient paired attention: channels attend to channels, and voxels to a few projected voxels, with one q and one k.

    Both are scaled by learned temperatures, not by the root of the channels as the paper says. What the voxels attended to is
    put together with channels and voxels mixed up, as the authors' program does: the published weights need that.

    Shapes:
        ``(N, tokens, channels)`` to the same.
    """

    def __init__(
        self,
        tokens: int,
        channels: int,
        num_heads: int,
        projection: int,
        dropout: float,
        separate_projections: bool,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.temperature2 = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkvv = nn.Linear(channels, 4 * channels, bias=False)
        self.E = nn.Linear(tokens, projection)
        self.F = nn.Linear(tokens, projection) if separate_projections else self.E
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(channels, channels // 2)
        self.out_proj2 = nn.Linear(channels, channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, channels = x.shape
        split = self.qkvv(x).reshape(n, tokens, 4, self.num_heads, channels // self.num_heads)
        q, k, v_channel, v_spatial = split.permute(2, 0, 3, 4, 1).unbind(0)  # each (N, heads, d, tokens)
        few_k, few_v = self.E(k), self.F(v_spatial)  # (N, heads, d, projection); k is not yet normalised
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        between_channels = (q @ k.transpose(-1, -2) * self.temperature).softmax(-1)
        by_channel = (self.dropout(between_channels) @ v_channel).permute(0, 3, 1, 2).reshape(n, tokens, channels)
        between_voxels = (q.transpose(-1, -2) @ few_k * self.temperature2).softmax(-1)
        by_voxel = self.dropout(between_voxels) @ few_v.transpose(-1, -2)  # (N, heads, tokens, d)
        mixed_up = by_voxel.permute(0, 3, 1, 2).reshape(n, tokens, channels)
        return torch.cat([self.out_proj(mixed_up), self.out_proj2(by_channel)], -1)
