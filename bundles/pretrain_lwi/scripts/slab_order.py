"""Learning how a network starts from the images that it will later segment: slabs of a crop change places, blocks are masked, and
the network restores what was masked, while heads beside it name each slab's former place from the features of its encoder.

Source: Kunhimon et al., "Learnable Weight Initialization for Volumetric Medical Image Segmentation", Artificial Intelligence in
Medicine 151:102863, 2024. Independent implementation. The published program averages features over groups of voxels that each
span the whole shuffled axis; here each slab's own features are averaged, as the paper's figure shows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from math import prod
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.inferers import Inferer
from monai.transforms import MapTransform, RandomizableTransform
from monai.utils import convert_to_dst_type
from torch import Tensor, nn
from torch.nn import functional as F

from .inferers import autocast, full_size
from .restoration import RestorationLoss


class RandShuffleSlabsd(RandomizableTransform, MapTransform):
    """Cut images into slabs of equal thickness along one axis, change their order, and say where each came from.

    Each call draws an order of its own; one of the ``slabs``! leaves everything in its place.

    Args:
        keys: images ``(C, …)``, all shuffled alike.
        slabs: how many.
        axis: which spatial axis.
        order_key: entry to add, ``(1, …)``: for each voxel the number of the slab that it was in before.

    Raises:
        ValueError: the axis cannot be cut into so many equal slabs.
    """

    def __init__(
        self, keys: KeysCollection, slabs: int, axis: int, order_key: str = "order", allow_missing_keys: bool = False
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, 1.0)
        self.slabs = slabs
        self.axis = axis
        self.order_key = order_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        order = self.R.permutation(self.slabs)
        for key in self.key_iterator(d):
            shape = tuple(d[key].shape[1:])
            thickness = _thickness(shape[self.axis], self.slabs, f"the image's axis {self.axis}")
            source = (order[:, None] * thickness + np.arange(thickness)).ravel()
            d[key] = d[key][(slice(None),) * (1 + self.axis) + (source,)]
            came_from = order.repeat(thickness).reshape([-1 if axis == self.axis else 1 for axis in range(len(shape))])
            d[self.order_key] = convert_to_dst_type(
                np.broadcast_to(came_from, shape)[None].copy(), d[key], dtype=torch.float32
            )[0]
        return d


class SlabOrder(nn.Module):
    """A network, and beside it a linear head for each of some of its inner modules, which names the slabs' former places.

    The network is as it was: its ``state_dict`` and its output do not know of the heads.

    Args:
        network: for images of ``in_channels`` channels.
        features: names of modules of it, as ``named_modules`` has them: ``"vit.blocks.3"``, ``"swinViT.layers1.0"``. What they
            return is a volume ``(N, C, …)``, or tokens ``(N, tokens, C)`` of equal cubes of the image.
        slabs: how many.
        axis: the spatial axis that they lie along.
        in_channels: of the image.
        img_size: of the image, voxels, by which the sizes of features are found.

    Shapes:
        ``(N, in_channels, *img_size)`` to the network's output at full size, and to the logits of every head,
        ``(heads, N, slabs, slabs)``: for each place the former places.

    Raises:
        ValueError: the network has no such module, or its features cannot be told apart by slabs.
    """

    def __init__(
        self,
        network: nn.Module,
        features: Sequence[str],
        slabs: int,
        axis: int,
        in_channels: int,
        img_size: Sequence[int],
    ) -> None:
        super().__init__()
        self.network = network
        self.slabs = slabs
        self.axis = axis
        modules = dict(network.named_modules())
        for name in features:
            if name not in modules:
                like = [other for other in modules if other.endswith(name.rpartition(".")[2])][:3]
                raise ValueError(
                    f"the network has no module {name!r}" + (f"; it has {', '.join(like)}" if like else "")
                )
        self.features = {name: modules[name] for name in features}
        self.heads = nn.ModuleList(nn.Linear(channels, slabs) for channels in self._channels(in_channels, img_size))

    def _channels(self, in_channels: int, img_size: Sequence[int]) -> list[int]:
        """How many channels each of the modules returns, by running the network once."""
        parameter = next(self.network.parameters())
        training = self.network.training
        self.network.eval()
        try:
            with torch.no_grad():
                image = torch.zeros(1, in_channels, *img_size, device=parameter.device, dtype=parameter.dtype)
                return [pooled.shape[2] for pooled in self._watch(image)[1]]
        finally:
            self.network.train(training)

    def _watch(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The network's output at full size, and the features of each slab: for each module (N, slabs, C)."""
        seen: dict[str, Tensor] = {}
        size = image.shape[2:]

        def note(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                seen[name] = slab_features(as_volume(full_size(output), size, name), self.slabs, self.axis, name)

            return hook

        with ExitStack() as hooks:
            for name, module in self.features.items():
                hooks.callback(module.register_forward_hook(note(name)).remove)
            output = full_size(self.network(image))
        return output, [seen[name] for name in self.features]

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        output, features = self._watch(image)
        return output, torch.stack([head(pooled) for head, pooled in zip(self.heads, features, strict=True)])


def as_volume(features: Tensor, size: Sequence[int], name: str) -> Tensor:
    """Features as a volume ``(N, C, …)``: tokens ``(N, tokens, C)`` are put where their cubes of the image were.

    Args:
        features: a volume or tokens, of which the last axis of the image changes fastest.
        size: of the image, voxels.
        name: of the module, for messages.

    Raises:
        ValueError: neither of the two, or there is no cube that cuts the image into so many.
    """
    if features.ndim == 2 + len(size):
        return features
    if features.ndim != 3:
        raise ValueError(f"module {name!r} returns {tuple(features.shape)}: neither a volume nor tokens")
    n, tokens, channels = features.shape
    edge = max(round((prod(size) / tokens) ** (1 / len(size))), 1)
    grid = [length // edge for length in size]
    if prod(grid) != tokens or any(length % edge for length in size):
        raise ValueError(
            f"module {name!r} returns {tokens} tokens: {' x '.join(map(str, size))} voxels are not so many equal cubes"
        )
    return features.transpose(1, 2).reshape(n, channels, *grid)


def slab_features(volume: Tensor, slabs: int, axis: int, name: str) -> Tensor:
    """The mean of the features of each slab alone.

    Args:
        volume: ``(N, C, …)``.
        slabs: how many.
        axis: the spatial axis that they lie along.
        name: of the module, for messages.

    Returns:
        ``(N, slabs, C)``.

    Raises:
        ValueError: the axis cannot be cut into so many equal slabs.
    """
    _thickness(volume.shape[2 + axis], slabs, f"axis {axis} of the features of {name!r}")
    along = volume.movedim(2 + axis, 2)
    return along.reshape(*along.shape[:2], slabs, -1).mean(-1).transpose(1, 2)


def slab_order(order: Tensor, slabs: int, axis: int) -> Tensor:
    """The former place of each slab, out of the entry that ``RandShuffleSlabsd`` added.

    Shapes:
        ``(N, 1, …)`` to ``(N, slabs)``, integers.
    """
    along = order.movedim(2 + axis, 2).flatten(3)[:, 0, :, 0]
    return along[:, :: along.shape[1] // slabs].round().long()


class RestoreAndOrderInferer(Inferer):
    """One pass of :class:`SlabOrder` under mixed precision, in the channels-last format.

    Args:
        precision: ``"bfloat16"``, where the processor computes in it, or ``"float32"``.
    """

    def __init__(self, precision: str = "bfloat16") -> None:
        super().__init__()
        self.precision = precision

    def __call__(self, inputs: Tensor, network: nn.Module) -> tuple[Tensor, Tensor]:
        image = inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs
        with autocast(image.device, self.precision):
            output, orders = network(image.contiguous(memory_format=torch.channels_last_3d))
        return output.float(), orders.float()


class SlabOrderLoss(nn.Module):
    """Mean squared error of the restored image over all voxels, plus the cross-entropy of each head, averaged over slabs.

    Args:
        axis: the spatial axis that the slabs lie along.
        restoration: weight of the former.
        order: weight of the sum of the latter.

    Shapes:
        What :class:`SlabOrder` returns, and the target: the shuffled but unmasked image with the order behind it,
        ``(N, C + 1, …)``; to a scalar.
    """

    def __init__(self, axis: int, restoration: float = 1.0, order: float = 1.0) -> None:
        super().__init__()
        self.axis = axis
        self.restoration = restoration
        self.order = order
        self.error = RestorationLoss(linear=True)

    def forward(self, prediction: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        output, logits = prediction
        loss = self.restoration * self.error(output, target[:, :-1])
        places = slab_order(target[:, -1:], logits.shape[-1], self.axis).flatten()
        for head in logits:
            loss = loss + self.order * F.cross_entropy(head.flatten(0, 1), places)
        return loss


def order_accuracy(prediction: tuple[Tensor, Tensor], target: Tensor, axis: int) -> Tensor:
    """Share of the slabs whose former place a head names, over all heads; chance gives one divided by the number of slabs."""
    logits = prediction[1]
    places = slab_order(target[:, -1:], logits.shape[-1], axis)
    return (logits.argmax(-1) == places).float().mean()


def _thickness(length: int, slabs: int, what: str) -> int:
    """Raises ValueError when a length is not that of so many slabs."""
    if length % slabs or length < slabs:
        raise ValueError(
            f"{what} has length {length}, which is not {slabs} equal slabs: choose slabs and patch_size so that it is, or other "
            "features"
        )
    return length // slabs
