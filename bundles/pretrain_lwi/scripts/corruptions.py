"""Corruptions of images in [0, 1], to be undone by a network: those of Models Genesis, and the masking of masked autoencoders.

All of them leave what they are given as it is and return a new array, so that the target, too, may be that. They draw from their
own ``R``: the same seed gives the same corruption.

Source: Zhou et al., "Models Genesis", Medical Image Analysis 67:101840, 2021. Rates and sizes are those of the authors' published
programs, noise included (their paper speaks of a constant value). Independent implementation.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from monai.utils import convert_to_dst_type
from numpy.random import Generator, RandomState

Shape = Sequence[int]

BLOCKS = 10_000  # of the local shuffle, whatever the size of the image: blocks grow with it
MARGIN = 3  # voxels between a painted window and the border
AGAIN, WINDOWS = 0.95, 5  # chance of one more window, and how many there are at most
SMALLEST = 14  # voxels that the windows of out-painting need along each axis


class RandLocalShuffled(RandomizableTransform, MapTransform):
    """Shuffle voxels inside many small blocks: the texture goes, the shape stays.

    Every block is read from the untouched image and written to a copy, so that blocks do not compound; where they overlap the
    last one wins. Along an axis of d voxels a block has 1 to d // 10. Channels are shuffled one by one.

    Args:
        keys: images ``(C, …)``.
        prob: chance that a channel is shuffled.
        blocks: how many.

    Raises:
        ValueError: an axis has fewer than 10 voxels.
    """

    def __init__(
        self, keys: KeysCollection, prob: float = 0.5, blocks: int = BLOCKS, allow_missing_keys: bool = False
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, 1.0)
        self.channel_prob = prob
        self.blocks = blocks

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            image = _copy(d[key])
            check_size(image.shape[1:], 10, "the local shuffle")
            for channel in image:
                if self.R.rand() < self.channel_prob:
                    channel[...] = shuffle_blocks(channel, self.R, self.blocks)
            d[key] = _as(image, d[key])
        return d


class RandBezierIntensityd(RandomizableTransform, MapTransform):
    """Map intensities by a random monotone curve, one for all channels: rising in one half of the cases, falling in the other.

    Args:
        keys: images ``(C, …)`` in [0, 1]; what lies outside is clamped.
        prob: chance of it.
        points: of the curve's table; with 1000 it is exact to 2.4e-5.
    """

    def __init__(
        self, keys: KeysCollection, prob: float = 0.9, points: int = 1000, allow_missing_keys: bool = False
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        self.points = points

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            self.randomize(None)
            if self._do_transform:
                x, y = bezier_curve(self.R.rand(2, 2), falling=self.R.rand() < 0.5, points=self.points)
                d[key] = _as(np.interp(_copy(d[key]), x, y), d[key])
        return d


class RandPaintd(RandomizableTransform, MapTransform):
    """Replace windows by noise, or all but windows: in-painting or out-painting, each channel by itself.

    Args:
        keys: images ``(C, …)``.
        prob: chance that a channel is painted.
        outer: share of out-painting.

    Raises:
        ValueError: an axis has fewer than 14 voxels.
    """

    def __init__(
        self, keys: KeysCollection, prob: float = 0.9, outer: float = 0.8, allow_missing_keys: bool = False
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, 1.0)
        self.channel_prob = prob
        self.outer = outer

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            image = _copy(d[key])
            check_size(image.shape[1:], SMALLEST, "painting")
            for channel in image:
                if self.R.rand() < self.channel_prob:
                    outside = self.R.rand() < self.outer
                    noisy = outer_noise(channel.shape, self.R) if outside else inner_noise(channel.shape, self.R)
                    channel[noisy] = self.R.rand(np.count_nonzero(noisy))
            d[key] = _as(image, d[key])
        return d


class RandMaskBlocksd(RandomizableTransform, MapTransform):
    """Set a share of the blocks of a grid to 0, in all channels, and say where: the task of a masked autoencoder.

    Args:
        keys: images ``(C, …)``, all masked alike.
        block_size: edge of a block, voxels; those at the end of an axis may be smaller.
        fraction: share of the blocks, rounded to whole ones.
        mask_key: entry to add, ``(1, …)``: 1 where the images were masked, else 0.

    Raises:
        ValueError: the images have so few blocks that none, or all, would be masked.

    Source: Wald et al., "Revisiting MAE pre-training for 3D medical image segmentation", CVPR 2025 (16³ blocks, 75 %).
    """

    def __init__(
        self,
        keys: KeysCollection,
        block_size: int = 16,
        fraction: float = 0.75,
        mask_key: str = "mask",
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, 1.0)
        self.block_size = block_size
        self.fraction = fraction
        self.mask_key = mask_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        shape = tuple(d[self.first_key(d)].shape[1:])
        masked = block_mask(shape, self.block_size, self.fraction, self.R)
        for key in self.key_iterator(d):
            d[key] = _as(np.where(masked, 0, _copy(d[key])), d[key])
            d[self.mask_key] = convert_to_dst_type(masked[None], d[key], dtype=torch.float32)[0]
        return d


def shuffle_blocks(image: np.ndarray, R: RandomState, blocks: int = BLOCKS) -> np.ndarray:
    """A copy of an image in which voxels are shuffled inside random blocks, each read from the image itself.

    Blocks of one size are shuffled together. Their voxels go to a list in the order of the blocks, from which all are written at
    once, so that the last one wins.

    Args:
        image: any number of axes, each of 10 voxels at least.
        R: random numbers.
        blocks: how many.
    """
    shape = np.array(image.shape)
    sizes = np.stack([R.randint(1, d // 10 + 1, blocks) for d in shape], 1)
    starts = (R.rand(*sizes.shape) * (shape - sizes + 1)).astype(np.int64)
    volumes = sizes.prod(1)
    ends = np.cumsum(volumes)
    to, source = np.empty((2, ends[-1]), np.int32)
    corner = np.ravel_multi_index(tuple(starts.T), image.shape).astype(np.int32)
    kinds = np.ravel_multi_index(tuple(sizes.T - 1), tuple(shape // 10))
    order = np.argsort(kinds, kind="stable")
    bounds = np.flatnonzero(np.diff(kinds[order], prepend=-1, append=-1))
    generator = Generator(np.random.SFC64(R.randint(2**31)))
    for low, high in pairwise(bounds):
        same = order[low:high]
        inside = _offsets(sizes[same[0]], image.shape)
        place = (ends[same] - inside.size)[:, None] + np.arange(inside.size)
        first = corner[same, None]
        to[place] = first + inside
        source[place] = first + generator.permuted(np.broadcast_to(inside, place.shape), axis=1)
    shuffled = image.copy()
    shuffled.reshape(-1)[to] = image.reshape(-1)[source]  # of several values for one voxel NumPy keeps the last
    return shuffled


def _offsets(size: np.ndarray, shape: Shape) -> np.ndarray:
    """How far the voxels of a block lie behind its first one in a flat image."""
    return np.ravel_multi_index(tuple(np.indices(size).reshape(len(size), -1)), shape).astype(np.int32)


def bezier_curve(inner: np.ndarray, falling: bool, points: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """A table of the cubic Bézier curve from (0, 0) to (1, 1): its x, rising, and its y, read backwards for a falling map.

    Both coordinates are monotone for control points inside the unit square, so that nothing has to be sorted.

    Args:
        inner: the two control points in between, (2, 2): each its x and y.
        falling: map 0 to 1 and 1 to 0.
        points: of the table.
    """
    s = np.linspace(0, 1, points)
    first, second = 3 * s * (1 - s) ** 2, 3 * s**2 * (1 - s)
    x, y = (first * inner[0, axis] + second * inner[1, axis] + s**3 for axis in (0, 1))
    return x, y[::-1] if falling else y


def inner_noise(shape: Shape, R: RandomState) -> np.ndarray:
    """Where in-painting paints: up to five windows (none in 5 % of the cases), each d // 6 to d // 3 voxels long."""
    noisy = np.zeros(shape, bool)
    for _ in range(_further(R, WINDOWS)):
        noisy[_window([R.randint(d // 6, d // 3 + 1) for d in shape], shape, R)] = True
    return noisy


def outer_noise(shape: Shape, R: RandomState) -> np.ndarray:
    """Where out-painting paints: outside of one to five windows, each shorter than the image by 3d // 7 to 4d // 7 voxels."""
    noisy = np.ones(shape, bool)
    for _ in range(1 + _further(R, WINDOWS - 1)):
        noisy[_window([d - R.randint(3 * d // 7, 4 * d // 7 + 1) for d in shape], shape, R)] = False
    return noisy


def _further(R: RandomState, most: int) -> int:
    """How many times in a row there is one more window."""
    stops = np.flatnonzero(R.rand(most) >= AGAIN)
    return int(stops[0]) if stops.size else most


def _window(size: Shape, shape: Shape, R: RandomState) -> tuple[slice, ...]:
    starts = [R.randint(MARGIN, d - n - MARGIN + 1) for n, d in zip(size, shape, strict=True)]
    return tuple(slice(start, start + n) for start, n in zip(starts, size, strict=True))


def block_mask(shape: Shape, block_size: int, fraction: float, R: RandomState) -> np.ndarray:
    """True in a share of the blocks of a grid.

    Raises:
        ValueError: none, or all of them.
    """
    grid = [-(-d // block_size) for d in shape]
    count = round(fraction * prod(grid))
    if not 0 < count < prod(grid):
        raise ValueError(
            f"an image of {' x '.join(map(str, shape))} voxels has {prod(grid)} blocks of {block_size} voxels, of which {count} "
            "would be masked: make mask_block smaller"
        )
    mask = np.zeros(prod(grid), bool)
    mask[R.permutation(prod(grid))[:count]] = True
    mask = mask.reshape(grid)
    for axis in range(len(shape)):
        mask = mask.repeat(block_size, axis)
    return mask[tuple(slice(d) for d in shape)]


def check_size(shape: Shape, smallest: int, what: str) -> None:
    """Raises ValueError when an axis has too few voxels for a corruption."""
    if min(shape) < smallest:
        raise ValueError(
            f"{what} needs {smallest} voxels along each axis, the image has {' x '.join(map(str, shape))}: make patch_size larger"
        )


def _copy(image: Any) -> np.ndarray:
    """An array of its own."""
    return np.array(image.cpu() if isinstance(image, torch.Tensor) else image)


def _as(result: np.ndarray, image: Any) -> Any:
    """In the type, and with the metadata, of the image."""
    return convert_to_dst_type(result, image)[0]
