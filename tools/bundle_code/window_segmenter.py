"""Volumes segmented slice by slice, by a 2D network that sees each slice with its neighbours (TransSeg).

Source: Zhang et al., "Adapting Pre-trained Vision Transformers from 2D to 3D through Weight Inflation Improves Medical Image
Segmentation", ML4H 2022. Independent implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.networks.layers.utils import get_norm_layer
from torch import Tensor, nn
from torch.nn import functional as F

POOLED = (1, 2, 3, 6)  # sizes to which UPerNet's deepest features are pooled


class WindowSegmenter(nn.Module):
    """A 2D encoder and decoder that give the labels of the middle one of some neighbouring slices; for volumes, all slices.

    The slices of a window are the channels of one 2D image, so that only the patch embedding is larger than that of the 2D
    network: its kernel (O, channels · window, k, k) is one of (O, channels, window, k, k) whose depth is the window's. At the
    ends of a volume, or of a patch, the last slice stands for those beyond it. Because the network takes volumes and gives
    volumes, training, sliding windows, merging and servers treat it like any other.

    Args:
        in_channels: of the image.
        out_channels: of the output.
        encoder: builds the 2D encoder from its number of channels; see ``slice_encoders``.
        window: neighbouring slices that are seen, an odd number; 1 is the 2D network.
        width: channels of the decoder.
        norm: of the decoder, as MONAI's ``get_norm_layer`` takes it. Published is ``"batch"``.
        dropout: chance that a channel of the decoder's output is left out.
        chunk: slices in one pass when the network is not trained, which bounds the memory for deep volumes.

    Shapes:
        ``(N, in_channels, H, W, D)`` to ``(N, out_channels, H, W, D)``. Slices lie along the last axis, as axial ones do in
        RAS orientation.

    Raises:
        ValueError: an even window.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        encoder: Callable[..., nn.Module],
        window: int = 5,
        width: int = 768,
        norm: str | Sequence[Any] = ("group", {"num_groups": 8}),
        dropout: float = 0.1,
        chunk: int = 16,
    ) -> None:
        super().__init__()
        if window % 2 == 0:
            raise ValueError(f"a window has a middle slice, so an odd number of them; got {window}")
        self.window = window
        self.chunk = chunk
        self.encoder = encoder(in_channels=window * in_channels)
        channels = self.encoder.channels
        self.neck = None if self.encoder.is_pyramid else Neck(channels, norm)
        self.decoder = UPerNet(channels, width, norm)
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(width, out_channels, 1)

    def to(self, *args: Any, **kwargs: Any) -> WindowSegmenter:
        """As ``nn.Module`` has it; the channels-last format of 3D networks is that of 2D ones here, as the kernels are 2D."""
        if kwargs.get("memory_format") is torch.channels_last_3d:
            kwargs["memory_format"] = torch.channels_last
        return super().to(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        places = window_places(x.shape[-1], self.window).to(x.device)
        chunks = [places] if self.training else places.split(self.chunk)
        return torch.cat([self._middle_slices(x[..., chunk]) for chunk in chunks], -1)

    def _middle_slices(self, windows: Tensor) -> Tensor:
        """Windows (N, C, H, W, D, window) to the logits of their middle slices (N, classes, H, W, D)."""
        count = windows.shape[4]
        images = windows.permute(0, 4, 1, 5, 2, 3).flatten(2, 3).flatten(0, 1)
        features = self.encoder(images.contiguous(memory_format=torch.channels_last))
        if self.neck is not None:
            features = self.neck(features)
        logits = self.head(self.dropout(self.decoder(features)))
        return resize(logits, images.shape[2:]).unflatten(0, (-1, count)).movedim(1, -1)


def window_places(depth: int, window: int) -> Tensor:
    """The slices that the window of each slice has, (depth, window): the last ones stand for those beyond them."""
    return (torch.arange(depth)[:, None] + torch.arange(window) - window // 2).clamp(0, depth - 1)


class Neck(nn.Module):
    """Four maps of one size become 4, 2, 1 and 1/2 times as large: the levels that a decoder of pyramids expects.

    Args:
        channels: of each map.
        norm: see ``WindowSegmenter``.
    """

    def __init__(self, channels: Sequence[int], norm: str | Sequence[Any]) -> None:
        super().__init__()
        finest, fine = channels[:2]
        self.levels = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(finest, finest, 2, 2),
                    get_norm_layer(norm, 2, finest),
                    nn.GELU(),
                    nn.ConvTranspose2d(finest, finest, 2, 2),
                ),
                nn.ConvTranspose2d(fine, fine, 2, 2),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [level(feature) for level, feature in zip(self.levels, features, strict=True)]


class UPerNet(nn.Module):
    """A decoder of four levels: the deepest pooled to several sizes, then added to finer ones on the way up, and all fused.

    Args:
        channels: of each level, the finest first.
        width: of the decoder.
        norm: see ``WindowSegmenter``.

    Shapes:
        Four maps (N, channels, H, W), each about half as large as the one before, to (N, width, H, W) of the first one's size.

    Source: Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018, figure 4. Independent implementation.
    """

    def __init__(self, channels: Sequence[int], width: int, norm: str | Sequence[Any]) -> None:
        super().__init__()
        self.pooled = nn.ModuleList([_convolution(channels[-1], width, 1, norm) for _ in POOLED])
        self.bottleneck = _convolution(channels[-1] + len(POOLED) * width, width, 3, norm)
        self.lateral = nn.ModuleList([_convolution(count, width, 1, norm) for count in channels[:-1]])
        self.smooth = nn.ModuleList([_convolution(width, width, 3, norm) for _ in channels[:-1]])
        self.fuse = _convolution(len(channels) * width, width, 3, norm)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        deepest, size = features[-1], features[0].shape[2:]
        pools = [conv(F.adaptive_avg_pool2d(deepest, side)) for side, conv in zip(POOLED, self.pooled, strict=True)]
        level = self.bottleneck(torch.cat([deepest, *(resize(pool, deepest.shape[2:]) for pool in pools)], 1))
        levels = [resize(level, size)]
        for feature, lateral, smooth in list(zip(features[:-1], self.lateral, self.smooth, strict=True))[::-1]:
            level = lateral(feature) + resize(level, feature.shape[2:])
            levels.append(resize(smooth(level), size))
        return self.fuse(torch.cat(levels[::-1], 1))


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, without moving the corners' centres onto each other."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def _convolution(inputs: int, outputs: int, size: int, norm: str | Sequence[Any]) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False),
        get_norm_layer(norm, 2, outputs),
        nn.ReLU(inplace=True),
    )
