"""Sliding windows folded into the label map as they advance: memory for what windows still touch, not for classes × volume."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import combinations, product
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing, collate_meta_tensor, compute_importance_map
from monai.inferers import Inferer
from monai.utils import ensure_tuple_rep, fall_back_tuple
from torch import Tensor, nn

from .image_grid import image_grid, labels_onto_image_grid, onto_image_grid, thick_axis
from .inferers import MixedPrecisionInferer

Box = tuple[slice, ...]
Network = Callable[..., Tensor]


class SlidingWindow(Inferer):
    """What MONAI's ``SlidingWindowInferer`` and an argmax give, without the logits of the whole image in memory.

    The image is cut into cells wherever a window begins or ends. A cell exists from the first window that touches it to the
    last; then its logits are divided by the weights, and only the label stays. Windows go along the axis that has most of
    them, so that few cells exist at a time. Sums are float32 and, like those of MONAI, Σ weight · logit ÷ Σ weight; along other
    axes than the first their order differs from MONAI's, and with it the last bit of a logit.

    Args:
        roi_size: of the windows, voxels; a number, or one for each axis; where it is 0 or less, that of the image. Smaller
            images are padded by zeros on both sides.
        sw_batch_size: windows in one pass of the network.
        overlap: of neighbouring windows, a fraction of their size; a number, or one for each axis.
        mode: weights of a window's voxels, ``"gaussian"`` or ``"constant"``.
        windows: ``"monai"``: steps of equal length, the last window moved back to the border, a Gaussian that is nowhere below
            0.001. ``"nnunet"``: windows evenly spread, a Gaussian around voxel ``size // 2``; σ is an eighth of the size in both;
            smooth labels are not interpolated across slices that are more than three times as thick as wide.
        mirror_axes: spatial axes 0, 1, 2 that windows are flipped along, in all combinations, and averaged. Only for
            networks trained with such flips: others take left for right.
        skip_below: do not look at windows in which no voxel, as preprocessed, is above this value (air); they are background.
        output: ``"labels"``; ``"smooth_labels"``, on the grid of the image as it was loaded, where linearly interpolated logits
            compete, and all is background that preprocessing cropped; ``"fast_labels"``, on that grid too, where the masks of
            labels are interpolated, as in nnU-Net 1's fast mode; or ``"logits"``, float32.
        average: of windows that overlap and are mirrored, ``"logits"``, as in nnU-Net 2, or ``"probabilities"``: their softmax,
            as in nnU-Net 1; these then compete.
        precision: see ``MixedPrecisionInferer``.

    Shapes:
        Image ``(N, channels, D, H, W)`` to labels ``(N, 1, D, H, W)``, uint8, or int16 for more than 256 channels, or to logits
        ``(N, C, D, H, W)``; a MetaTensor to a MetaTensor. Smooth and fast labels are ``(N, 1, X, Y, Z)``, the image's as it was
        loaded.

    Raises:
        ValueError: another mode, kind of windows, output, average or precision; an overlap outside [0, 1); a network whose output
            is not one tensor of the window's size; smooth or fast labels of an image that is no MetaTensor, or was turned.

    Source: the windows of nnU-Net are described in Isensee et al., "nnU-Net: a self-configuring method for deep learning-based
    biomedical image segmentation", Nature Methods 2021.
    """

    def __init__(
        self,
        roi_size: Sequence[int] | int,
        sw_batch_size: int = 1,
        overlap: Sequence[float] | float = 0.5,
        mode: str = "gaussian",
        windows: str = "monai",
        mirror_axes: Sequence[int] = (),
        skip_below: float | None = None,
        output: str = "labels",
        average: str = "logits",
        precision: str = "bfloat16",
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("mode", mode, ("gaussian", "constant")),
            ("windows", windows, ("monai", "nnunet")),
            ("output", output, ("labels", "smooth_labels", "fast_labels", "logits")),
            ("average", average, ("logits", "probabilities")),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        if not all(0 <= part < 1 for part in ensure_tuple_rep(overlap, 1 if np.isscalar(overlap) else len(overlap))):
            raise ValueError(f"overlap must be at least 0 and below 1, got {overlap}")
        self.roi_size = roi_size
        self.sw_batch_size = sw_batch_size
        self.overlap = overlap
        self.mode = mode
        self.windows = windows
        self.mirror_axes = tuple(mirror_axes)
        self.skip_below = skip_below
        self.output = output
        self.on_image_grid = output in ("smooth_labels", "fast_labels")
        self.average = average
        self.mixed_precision = MixedPrecisionInferer(precision=precision)

    def __call__(self, inputs: Tensor, network: nn.Module | Network, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(network, nn.Module):  # servers take network_def, whose kernels are in the other format
            made_for_inference = any(weight.is_inference() for weight in network.parameters())
            with torch.inference_mode(made_for_inference):  # weights that can be trained stay such
                network.to(memory_format=torch.channels_last_3d)
        return self.stack(inputs, [nullcontext(network)], *args, **kwargs)

    def stack(
        self, inputs: Tensor, networks: Sequence[AbstractContextManager[Network]], *args: Any, **kwargs: Any
    ) -> Tensor:
        """As of one network that has the output channels of several, one network's after another's.

        Args:
            inputs: images ``(N, channels, D, H, W)``.
            networks: each is entered when its turn comes, so that they may be one network with different weights.
            args: passed on to the networks, like ``kwargs``.
        """
        with torch.no_grad():
            results = [self._one_image(inputs[n], networks, *args, **kwargs) for n in range(len(inputs))]
        if self.on_image_grid:
            return collate_meta_tensor(results)
        result = torch.stack(results) if len(results) > 1 else results[0][None]  # a copy of logits would be large
        return MetaTensor(result).copy_meta_from(inputs) if isinstance(inputs, MetaTensor) else result

    def _one_image(self, image: Tensor, networks: Sequence[AbstractContextManager[Network]], *args, **kwargs) -> Tensor:
        smooth = self.output == "smooth_labels"
        plain = image.as_tensor() if isinstance(image, MetaTensor) else image
        size, to_network_grid = image_grid(image) if self.on_image_grid else (plain.shape[1:], None)
        apart = self._apart(image, to_network_grid) if self.on_image_grid else None
        sweep = self._sweep(plain)[0]
        folded_size = size if smooth else plain.shape[1:]
        folded = Logits(size) if self.output == "logits" else LabelMap(folded_size, len(networks) > 1, plain.device)
        for number, context in enumerate(networks):
            with context as network:
                pieces = self.pieces(plain, network, *args, **kwargs)
                if smooth:
                    pieces = onto_image_grid(pieces, plain.shape[1:], sweep, size, to_network_grid, apart)
                for box, logits in pieces:
                    folded.add(number, box, logits)
                    del logits  # before the next windows come
        result = folded.result()
        if self.output == "fast_labels":
            result = labels_onto_image_grid(result[0], sweep, size, to_network_grid, apart)[None]
        if not self.on_image_grid:
            return result
        return MetaTensor(result, image.meta["original_affine"], {k: v for k, v in image.meta.items() if k != "affine"})

    def _apart(self, image: MetaTensor, to_network_grid: np.ndarray) -> int | None:
        """The axis across thick slices, where windows are nnU-Net's."""
        spacing = affine_to_spacing(image.affine).numpy()
        original = spacing * np.abs(to_network_grid[:3, :3]).max(1)
        return thick_axis(spacing, original) if self.windows == "nnunet" else None

    def _roi(self, image: Tensor) -> tuple[int, ...]:
        return fall_back_tuple(self.roi_size, image.shape[1:])

    def _sweep(self, image: Tensor) -> list[int]:
        """The axes, the one that holds most windows first: it is swept."""
        roi = self._roi(image)
        return sorted(range(len(roi)), key=lambda axis: -image.shape[1 + axis] / roi[axis])

    def pieces(self, image: Tensor, network: Network, *args: Any, **kwargs: Any) -> Iterator[tuple[Box, Tensor]]:
        """Boxes that tile an image ``(channels, D, H, W)``, each when no later window touches it.

        Yields:
            The box, and in it the blended logits ``(d, h, w, C)``, or probabilities where these are averaged; all zero where no
            window was looked at.
        """
        roi, sweep = self._roi(image), self._sweep(image)
        lacking = [max(side - length, 0) for side, length in zip(roi, image.shape[1:], strict=True)]
        before = [length // 2 for length in lacking]
        bounds = [(first, first + length) for first, length in zip(before, image.shape[1:], strict=True)]
        if any(lacking):
            sides = [(first, total - first) for first, total in zip(before, lacking, strict=True)]
            image = nn.functional.pad(image, [n for pair in reversed(sides) for n in pair])
        overlaps = ensure_tuple_rep(self.overlap, len(roi))
        starts = [window_starts(*sizes, self.windows) for sizes in zip(image.shape[1:], roi, overlaps, strict=True)]
        visits = [
            tuple(slice(start, start + side) for start, side in zip(corner, roi, strict=True))
            for corner in in_order(starts, sweep)
        ]
        if self.skip_below is not None:
            visits = [box for box in visits if image[(slice(None), *box)].max() > self.skip_below] or visits[:1]
        cells = Cells(visits, starts, roi, bounds, sweep[0])
        importance = self._importance(roi, image.device)[..., None]
        sums: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        scratch = torch.empty(0, device=image.device)  # used again: new memory costs more than the arithmetic
        for first in range(0, len(visits), self.sw_batch_size):
            boxes = visits[first : first + self.sw_batch_size]
            outputs = self._predict(
                torch.stack([image[(slice(None), *box)] for box in boxes]), network, *args, **kwargs
            )
            for number, (box, output) in enumerate(zip(boxes, outputs, strict=True), start=first):
                logits = output.movedim(0, -1)
                for cell in cells.of(box):
                    inside = tuple(
                        slice(part.start - side.start, part.stop - side.start)
                        for part, side in zip(cells.box(cell), box, strict=True)
                    )
                    part, weight = logits[inside], importance[inside]
                    if cell in sums:
                        if scratch.numel() < part.numel():
                            scratch = torch.empty(part.numel(), device=image.device)
                        total, weights = sums[cell]
                        total += scratch[: part.numel()].view(part.shape).copy_(part).mul_(weight)
                        weights += weight
                    else:
                        total = torch.empty(part.shape, device=image.device)
                        sums[cell] = total.copy_(part).mul_(weight), weight.clone()
                for cell in cells.finished_by(number):
                    place = cells.box(cell, origin=before)
                    if cell in sums:
                        total, weight = sums.pop(cell)
                        yield place, total.div_(weight)
                    else:  # skipped
                        shape = [part.stop - part.start for part in place]
                        yield place, torch.zeros(*shape, logits.shape[-1], device=image.device)
            del outputs, output, logits, part, total  # before the next ones come

    def _predict(self, batch: Tensor, network: Network, *args: Any, **kwargs: Any) -> Tensor:
        """Logits or probabilities of windows ``(B, C, d, h, w)``, averaged over the mirrored ones."""
        flips = [
            [2 + axis for axis in axes]
            for count in range(len(self.mirror_axes) + 1)
            for axes in combinations(self.mirror_axes, count)
        ]
        mean = None
        for flip in flips:
            output = self.mixed_precision.forward(network, batch.flip(flip) if flip else batch, *args, **kwargs)
            if not isinstance(output, Tensor) or output.shape[2:] != batch.shape[2:]:
                found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise ValueError(
                    f"the network must give one tensor of its window's size, got {found} for {tuple(batch.shape)}"
                )
            if self.average == "probabilities":
                output = output.float().softmax(1)
            if len(flips) == 1:
                return output
            part = (output.flip(flip) if flip else output).float() / len(flips)
            mean = part if mean is None else mean.add_(part)
        return mean

    def _importance(self, roi: tuple[int, ...], device: torch.device) -> Tensor:
        """Weight of each voxel of a window."""
        if self.windows == "monai" or self.mode == "constant":
            return compute_importance_map(roi, self.mode, sigma_scale=0.125, device=device)
        weight = torch.ones(1, dtype=torch.float64)
        for side in roi:
            distance = torch.arange(side, dtype=torch.float64) - side // 2
            weight = weight[..., None] * torch.exp(-0.5 * (8 * distance / side) ** 2)
        return weight[0].float().to(device)


def window_starts(length: int, side: int, overlap: float, kind: str) -> list[tuple[int, int]]:
    """Where windows of a size begin along an axis of a length at least as long, each with the step of the sweep it belongs to.

    MONAI's last window, moved back to the border, belongs to the step before: so much of it overlaps that window that
    visiting both together needs less memory.
    """
    span = length - side
    if span == 0:
        return [(0, 0)]
    if kind == "nnunet":
        steps = math.ceil(round(span / (side * (1 - overlap)), 6))
        return [(round(step * span / steps), step) for step in range(steps + 1)]
    interval = max(1, int(side * (1 - overlap)))
    starts = [min(step * interval, span) for step in range(math.ceil(span / interval) + 1)]
    return [(start, start // interval) for start in starts]


def in_order(starts: Sequence[Sequence[tuple[int, int]]], sweep: Sequence[int]) -> list[tuple[int, ...]]:
    """The corners of all windows, by steps along the axes of the sweep, its first axis slowest."""

    def rank(corner: tuple[tuple[int, int], ...]) -> list[int]:
        return [corner[axis][1] for axis in sweep] + [corner[axis][0] for axis in reversed(sweep)]

    return [tuple(start for start, _ in corner) for corner in sorted(product(*starts), key=rank)]


class Cells:
    """A volume cut wherever a window begins or ends, so that all voxels of a cell are seen by the same windows.

    Args:
        visits: the windows in the order in which they are looked at.
        starts: where windows may begin, for each axis.
        roi: size of the windows.
        bounds: first voxel and end of the image, for each axis; cells outside do not exist.
        axis: that is swept: a cell that no window sees is finished with its neighbours across it.
    """

    def __init__(
        self,
        visits: Sequence[Box],
        starts: Sequence[Sequence[tuple[int, int]]],
        roi: Sequence[int],
        bounds: Sequence[tuple[int, int]],
        axis: int,
    ) -> None:
        self.cuts = [
            sorted({first, end, *(cut for start, _ in along for cut in (start, start + side) if first < cut < end)})
            for along, side, (first, end) in zip(starts, roi, bounds, strict=True)
        ]
        last = np.full([len(cuts) - 1 for cuts in self.cuts], -1)
        for number, box in enumerate(visits):
            last[tuple(slice(*self._range(d, side)) for d, side in enumerate(box))] = number
        across = tuple(other for other in range(last.ndim) if other != axis)
        reached = np.maximum.accumulate(last.max(across, keepdims=True), axis).clip(min=0)
        self.finishing: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for cell, number in np.ndenumerate(np.where(last < 0, reached, last)):
            self.finishing[number].append(cell)

    def _range(self, axis: int, side: slice) -> tuple[int, int]:
        cuts = self.cuts[axis]
        return bisect_left(cuts, side.start), min(bisect_left(cuts, side.stop), len(cuts) - 1)

    def of(self, window: Box) -> Iterator[tuple[int, ...]]:
        """The cells that a window covers."""
        return product(*(range(*self._range(axis, side)) for axis, side in enumerate(window)))

    def box(self, cell: tuple[int, ...], origin: Sequence[int] | None = None) -> Box:
        """Where a cell lies, from an origin."""
        places = zip(self.cuts, cell, origin or [0] * len(cell), strict=True)
        return tuple(slice(cuts[i] - zero, cuts[i + 1] - zero) for cuts, i, zero in places)

    def finished_by(self, number: int) -> list[tuple[int, ...]]:
        """The cells whose last window is the one of this number."""
        return self.finishing.get(number, [])


class LabelMap:
    """The largest logit's channel, for logits that come piece by piece and network by network; the first one of equals.

    Args:
        size: of the map.
        several: more than one network's channels will come, so that their logits must be compared.
        device: of the map.
    """

    def __init__(self, size: Sequence[int], several: bool, device: torch.device) -> None:
        self.labels = torch.zeros(*size, dtype=torch.uint8, device=device)
        self.best = torch.full(tuple(size), -torch.inf, device=device) if several else None
        self.channels: dict[int, int] = {}

    def add(self, network: int, box: Box, logits: Tensor) -> None:
        """Take in logits ``(…, C)`` of a box; each network's after all of the one before."""
        self.channels[network] = logits.shape[-1]
        first = sum(self.channels.values()) - logits.shape[-1]
        if first + logits.shape[-1] > 256 and self.labels.dtype == torch.uint8:
            self.labels = self.labels.short()
        value, channel = logits.max(-1)
        label = (channel + first).to(self.labels.dtype)
        if self.best is not None:
            label = torch.where(value > self.best[box], label, self.labels[box])
            self.best[box] = torch.maximum(value, self.best[box])
        self.labels[box] = label

    def result(self) -> Tensor:
        return self.labels[None]


class Logits:
    """All logits of all networks.

    Args:
        size: of the image.
    """

    def __init__(self, size: Sequence[int]) -> None:
        self.size = size
        self.parts: list[Tensor] = []

    def add(self, network: int, box: Box, logits: Tensor) -> None:
        """Take in logits ``(…, C)`` of a box."""
        if network == len(self.parts):
            self.parts.append(logits.new_empty(*self.size, logits.shape[-1]))
        self.parts[network][box] = logits

    def result(self) -> Tensor:
        return torch.cat(self.parts, -1).movedim(-1, 0) if len(self.parts) > 1 else self.parts[0].movedim(-1, 0)
