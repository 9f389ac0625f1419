"""Bring logits, or labels, from the network's grid onto the image's own, slab by slab, by linear interpolation."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from math import prod

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor

PIECE = 2**24  # logits that are interpolated at a time
BORDER = 0.501  # of a voxel: what lies further outside of a volume is not part of it
ROUNDING = 1e-6  # of interpolated masks
THICK = 3  # times as thick as wide are slices across which nnU-Net does not interpolate


def image_grid(image: Tensor) -> tuple[tuple[int, ...], np.ndarray]:
    """The spatial size of an image when it was loaded, and the matrix (4, 4) from its voxels to those of today.

    Raises:
        ValueError: it is not a MetaTensor that still knows its file.
    """
    meta = image.meta if isinstance(image, MetaTensor) else {}
    if "original_affine" not in meta or "spatial_shape" not in meta:
        raise ValueError("smooth_labels need an image with its geometry: a MetaTensor from LoadImaged")
    original, today = (np.asarray(affine, np.float64) for affine in (meta["original_affine"], image.affine))
    return tuple(int(length) for length in meta["spatial_shape"]), np.linalg.inv(today) @ original


def thick_axis(spacing: Sequence[float], other: Sequence[float]) -> int | None:
    """The axis along which nnU-Net takes nearest voxels when it goes from one grid to another, or None.

    Args:
        spacing: of the one, for each axis. If its slices are not thick, the other grid's decide.
        other: of the other, along the same axes.
    """
    for sizes in (np.asarray(spacing, float), np.asarray(other, float)):
        if sizes.max() > THICK * sizes.min():
            thick = np.flatnonzero(np.isclose(sizes, sizes.max(), rtol=1e-5))
            return int(thick[0]) if len(thick) == 1 else None
    return None


def onto_image_grid(
    pieces: Iterable[tuple[tuple[slice, ...], Tensor]],
    size: Sequence[int],
    sweep: int,
    image_size: Sequence[int],
    matrix: np.ndarray,
    apart: int | None = None,
) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """Interpolate a volume that comes in pieces; on its outer half voxel it goes on as at its outermost centres.

    Args:
        pieces: boxes that tile the volume, each with logits ``(d, h, w, C)``, roughly in the order of one axis.
        size: of the volume.
        sweep: that axis.
        image_size: of the image's grid.
        matrix: from voxels of the image's grid to those of the volume, (4, 4); axes may be swapped, flipped, scaled and shifted.
        apart: an axis of the volume along which the nearest voxel is taken.

    Returns:
        Boxes that tile what of the image's grid lies in the volume, each with its logits.

    Raises:
        ValueError: the matrix turns axes.
    """
    image_axes = [int(np.abs(matrix[axis, :3]).argmax()) for axis in range(3)]
    rest = matrix[:3, :3].copy()
    rest[range(3), image_axes] = 0
    if sorted(image_axes) != [0, 1, 2] or (np.abs(rest) @ np.asarray(image_size) > 0.05).any():
        raise ValueError("smooth_labels need a preprocessing that keeps the directions of the image's axes")
    lines = [
        Line(matrix[axis, other], matrix[axis, 3], image_size[other], size[axis], nearest=axis == apart)
        for axis, other in enumerate(image_axes)
    ]
    planar = [axis for axis in range(3) if axis != sweep]
    order = [image_axes[axis] for axis in (sweep, *planar)]
    rows, columns = (lines[axis] for axis in planar)
    inside = lines[sweep].inside
    waiting = deque((inside.start + np.argsort(lines[sweep].lower[inside], kind="stable")).tolist())
    before = None
    for start, slab in _slabs(pieces, sweep, size):
        end = start + len(slab)
        while waiting and lines[sweep].upper[waiting[0]] < end:
            number = waiting.popleft()
            low, high, fraction = (a[number] for a in (lines[sweep].lower, lines[sweep].upper, lines[sweep].fraction))
            plane = slab[low - start] if low >= start else before
            if fraction:
                plane = torch.lerp(plane, slab[high - start], float(fraction))
            step = max(1, PIECE // (max(plane.shape[1], columns.count) * plane.shape[2]))
            for first in range(rows.inside.start, rows.inside.stop, step):
                part = slice(first, min(first + step, rows.inside.stop))
                logits = columns.along(1, rows.along(0, plane, part), columns.inside)
                places = dict(zip(order, (slice(number, number + 1), part, columns.inside), strict=True))
                yield tuple(places[axis] for axis in range(3)), logits[None].permute(*np.argsort(order).tolist(), 3)
        before = slab[-1].clone()


def labels_onto_image_grid(
    labels: Tensor, sweep: int, image_size: Sequence[int], matrix: np.ndarray, apart: int | None = None
) -> Tensor:
    """Interpolate the mask of each label: where that gives a half or more is the label, the larger one of two; else background.

    Args:
        labels: a label map of the volume, ``(d, h, w)``.
        sweep: the axis along which it is done, slab by slab.
        image_size: see ``onto_image_grid``, like ``matrix`` and ``apart``.

    Returns:
        The label map on the image's grid, background where that lies outside of the volume.

    Raises:
        ValueError: the matrix turns axes.
    """
    present = labels.unique().flip(0)  # the first of equals is the largest label
    planes = max(1, PIECE * labels.shape[sweep] // (labels.numel() * len(present)))

    def masks() -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        for first in range(0, labels.shape[sweep], planes):
            box = [slice(0, length) for length in labels.shape]
            box[sweep] = slice(first, min(first + planes, labels.shape[sweep]))
            yield tuple(box), (labels[tuple(box)][..., None] == present).float()

    result = torch.zeros(tuple(image_size), dtype=labels.dtype, device=labels.device)
    for box, shares in onto_image_grid(masks(), labels.shape, sweep, image_size, matrix, apart):
        share, number = shares.max(-1)
        result[box] = torch.where(share > 0.5 - ROUNDING, present[number], 0)
    return result


class Line:
    """Linear interpolation along one axis.

    Args:
        scale: voxels of the volume for each of the image's grid; negative where the axis is flipped.
        offset: where the image's first voxel lies in the volume.
        count: voxels of the image's grid.
        length: voxels of the volume.
        nearest: take the nearest voxel instead.

    Attributes:
        inside: the voxels of the image's grid that lie in the volume.
        lower: the two voxels of the volume around each of the grid, with ``upper``.
        fraction: how far each lies from the lower to the upper one.
    """

    def __init__(self, scale: float, offset: float, count: int, length: int, nearest: bool = False) -> None:
        places = (scale * np.arange(count) + offset).round(6)
        within = np.flatnonzero((places >= -BORDER) & (places <= length - 1 + BORDER))
        self.inside = slice(int(within[0]), int(within[-1]) + 1) if len(within) else slice(0, 0)
        places = (np.floor(places + 0.5) if nearest else places).clip(0, length - 1)
        self.count = count
        self.lower = places.astype(np.int64)
        self.fraction = (places - self.lower).astype(np.float32)
        self.upper = self.lower + (self.fraction > 0)

    def along(self, axis: int, values: Tensor, part: slice) -> Tensor:
        """The values at a part of the grid's voxels, along an axis of ``values`` (0 or 1 of 3)."""
        lower, upper, fraction = (
            torch.from_numpy(numbers[part]).to(values.device) for numbers in (self.lower, self.upper, self.fraction)
        )
        low = values.index_select(axis, lower)
        if not fraction.any():
            return low
        return torch.lerp(low, values.index_select(axis, upper), fraction.reshape(-1, *[1] * (2 - axis)))


def _slabs(
    pieces: Iterable[tuple[tuple[slice, ...], Tensor]], axis: int, size: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """Pieces put together to slabs across the volume: the first voxel along the axis, and logits with that axis first."""
    plane = [length for other, length in enumerate(size) if other != axis]
    slabs: dict[int, Tensor] = {}
    missing: dict[int, int] = {}
    following = 0
    for box, logits in pieces:
        start, depth = box[axis].start, logits.shape[axis]
        if start not in slabs:
            slabs[start] = logits.new_empty(depth, *plane, logits.shape[-1])
            missing[start] = depth * prod(plane)
        others = [side for other, side in enumerate(box) if other != axis]
        slabs[start][(slice(None), *others)] = logits.movedim(axis, 0)
        missing[start] -= prod(logits.shape[:-1])
        while missing.get(following) == 0:
            slab = slabs.pop(following)
            yield following, slab
            following += len(slab)
