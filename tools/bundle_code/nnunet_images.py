"""nnU-Net's preprocessing as MONAI transforms: crop to what is not zero, normalise, resample.

nnU-Net 2 does it in this order; nnU-Net 1 resamples before it normalises. Axes are those of MONAI's images, x, y, z; in
nnU-Net's plans they are z, y, x, and ``transpose_forward`` may order them anew.

Source: Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation", Nature
Methods 2021.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms import CropForegroundd, InvertibleTransform, MapTransform
from monai.transforms.utils import scale_affine
from monai.utils import TraceKeys, convert_to_numpy
from scipy import ndimage
from torch import Tensor

from .image_grid import thick_axis

SMALLEST = 1e-8  # deviation, and range, that nnU-Net divides by


class CropToNonzerod(CropForegroundd):
    """Crop to the bounding box of what is not zero in any channel; an image of zeros stays as it is.

    nnU-Net fills holes first, which does not change the box. Inverted, what was cropped is background.

    Args:
        keys: what is cropped.
        source_key: the image that decides.
        allow_missing_keys: pass over keys that are not there.
    """

    def __init__(self, keys: KeysCollection, source_key: str = "image", allow_missing_keys: bool = False) -> None:
        super().__init__(
            keys,
            source_key,
            select_fn=_not_zero,
            start_coord_key=None,
            end_coord_key=None,
            allow_missing_keys=allow_missing_keys,
        )


def _not_zero(image: Tensor) -> Tensor:
    mask = image != 0
    return mask if mask.any() else ~mask


class NormalizeChannelsd(MapTransform):
    """Normalise each channel of an image by a scheme of its own.

    Args:
        keys: images ``(C, …)``; the result is float32.
        schemes: for each channel a dictionary with ``"scheme"``:
            ``"ct"``: clip to ``"lower"`` and ``"upper"``, subtract ``"mean"``, divide by ``"std"``, all of the training dataset;
            ``"zscore"``: subtract the channel's mean, divide by its standard deviation; with ``"nonzero": true`` both are those
            of the voxels that are not zero in any channel, or enclosed by such, and the others stay as they are;
            ``"rescale"``: to 0 … 1; ``"divide"``: by ``"by"``; ``"none"``.
        allow_missing_keys: pass over keys that are not there.

    Raises:
        ValueError: another scheme; an image with another number of channels.
    """

    def __init__(
        self, keys: KeysCollection, schemes: Sequence[Mapping[str, Any]], allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        for scheme in schemes:
            if scheme["scheme"] not in SCHEMES:
                raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme['scheme']!r}")
        self.schemes = schemes

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self._normalized(result[key])
        return result

    def _normalized(self, image: Tensor) -> Tensor:
        if len(image) != len(self.schemes):
            raise ValueError(f"the image has {len(image)} channels, but there are {len(self.schemes)} schemes")
        channels = np.array(convert_to_numpy(image), dtype=np.float32)
        inside = None
        if any(scheme.get("nonzero") for scheme in self.schemes):
            inside = ndimage.binary_fill_holes((channels != 0).any(0))
        for channel, scheme in zip(channels, self.schemes, strict=True):
            options = {name: value for name, value in scheme.items() if name not in ("scheme", "nonzero")}
            where = inside if scheme.get("nonzero") else ...
            channel[where] = SCHEMES[scheme["scheme"]](channel[where], **options)
        return _like(image, torch.from_numpy(channels))


def _ct(channel: np.ndarray, lower: float, upper: float, mean: float, std: float) -> np.ndarray:
    return (channel.clip(lower, upper) - np.float32(mean)) / np.float32(max(std, SMALLEST))


def _zscore(channel: np.ndarray) -> np.ndarray:
    mean, std = channel.mean(dtype=np.float64), channel.std(dtype=np.float64)
    return (channel - np.float32(mean)) / np.float32(max(std, SMALLEST))


def _rescale(channel: np.ndarray) -> np.ndarray:
    above = channel - channel.min()
    return above / max(above.max(), np.float32(SMALLEST))


def _divide(channel: np.ndarray, by: float) -> np.ndarray:
    return channel / np.float32(by)


def _none(channel: np.ndarray) -> np.ndarray:
    return channel


SCHEMES = {"ct": _ct, "zscore": _zscore, "rescale": _rescale, "divide": _divide, "none": _none}


class ResampleToSpacingd(MapTransform, InvertibleTransform):
    """Resample by nnU-Net's rule: to the rounded number of voxels of a spacing, with the image's borders kept where they are.

    Splines through the voxels, not above or below the image's own range. Where slices are more than three times as thick as
    their voxels are wide, each is resampled by itself, and along the axis across them the nearest one is taken. MONAI's
    ``Spacingd`` keeps the centre of the first voxel instead, and often gives another number of voxels.

    Inverted (``Invertd``), label maps take the nearest voxel's label, other values are interpolated linearly.

    Args:
        keys: images or label maps ``(C, X, Y, Z)``, MetaTensors.
        spacing: of the result, mm, for each axis. Its voxels are a little larger or smaller, by the rounding.
        order: of the splines: 3 for images, 1 linear, 0 nearest, for label maps.
        allow_missing_keys: pass over keys that are not there.

    Raises:
        ValueError: an image that is no MetaTensor, so that its spacing is unknown.
    """

    def __init__(
        self, keys: KeysCollection, spacing: Sequence[float], order: int = 3, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.spacing = tuple(spacing)
        self.order = order

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self._resampled(result[key])
        return result

    def _resampled(self, image: Tensor) -> Tensor:
        if not isinstance(image, MetaTensor):
            raise ValueError("only an image with its geometry can be resampled: a MetaTensor from LoadImaged")
        before, today = tuple(image.shape[1:]), affine_to_spacing(image.affine).tolist()
        after = tuple(
            max(1, round(now / new * length)) for now, new, length in zip(today, self.spacing, before, strict=True)
        )
        resized = resize(convert_to_numpy(image), after, self.order, thick_axis(today, self.spacing))
        image = _like(image, torch.from_numpy(resized))
        info = {"mode": "linear"}  # of the inverse: Invertd makes it "nearest"
        return self.push_transform(
            image, sp_size=after, affine=scale_affine(before, after), extra_info=info, orig_size=before
        )

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Back to the number of voxels that there were."""
        result = dict(data)
        for key in self.key_iterator(result):
            image = result[key]
            done = self.pop_transform(image)
            before, after = tuple(image.shape[1:]), tuple(int(length) for length in done[TraceKeys.ORIG_SIZE])
            mode = "nearest-exact" if done[TraceKeys.EXTRA_INFO]["mode"] == "nearest" else "trilinear"
            restored = torch.nn.functional.interpolate(image.as_tensor()[None].float(), after, mode=mode)[0]
            if mode == "nearest-exact":
                restored = restored.to(image.dtype)
            result[key] = _like(image, restored)
            result[key].affine = image.affine @ torch.as_tensor(scale_affine(before, after), dtype=torch.float64)
        return result


def resize(image: np.ndarray, size: Sequence[int], order: int, apart: int | None = None) -> np.ndarray:
    """Splines between voxels whose borders, not centres, coincide: scikit-image's ``resize(mode="edge", anti_aliasing=False)``.

    Args:
        image: ``(C, X, Y, Z)``.
        size: voxels of the result along each axis.
        order: of the splines.
        apart: an axis along which nearest voxels are taken, while planes across it are resized one by one; None for none.

    Returns:
        ``(C, *size)`` of the image's dtype.
    """
    if tuple(size) == image.shape[1:]:
        return image
    result = np.empty((len(image), *size), image.dtype)
    for new, old in zip(result, image, strict=True):
        if apart is None:
            new[...] = _spline(old, size, order)
            continue
        plane = [length for axis, length in enumerate(size) if axis != apart]
        old, new = np.moveaxis(old, apart, 0), np.moveaxis(new, apart, 0)
        planes = old if list(old.shape[1:]) == plane else np.stack([_spline(one, plane, order) for one in old])
        places = (np.arange(len(new)) + 0.5) * (len(old) / len(new)) - 0.5
        new[...] = planes[np.floor(places + 0.5).astype(int).clip(0, len(old) - 1)]
    return result


def _spline(values: np.ndarray, size: Sequence[int], order: int) -> np.ndarray:
    factors = [new / old for new, old in zip(size, values.shape, strict=True)]
    between = ndimage.zoom(values.astype(np.float64), factors, order=order, mode="nearest", grid_mode=True)
    return between.clip(values.min(), values.max())


def _like(image: Tensor, values: Tensor) -> Tensor:
    return MetaTensor(values).copy_meta_from(image) if isinstance(image, MetaTensor) else values
