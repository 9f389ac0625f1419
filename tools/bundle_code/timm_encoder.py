"""Encoders of slices from timm, for what MONAI has not, such as BEiT. timm is needed here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class TimmEncoder(nn.Module):
    """Features of four depths of a timm model, with timm's names of tensors.

    Args:
        in_channels: of the image.
        name: of the model in timm, for example ``"beit_base_patch16_224"``.
        img_size: of the image.
        features: the four blocks of a transformer (counted from 0), or stages.
        options: of the model, for ``timm.create_model``.

    Shapes:
        ``(N, in_channels, *img_size)`` to four maps ``(N, C, H, W)``.

    Raises:
        ImportError: timm cannot be imported.
    """

    def __init__(
        self,
        in_channels: int,
        name: str,
        img_size: Sequence[int],
        features: Sequence[int] = (3, 5, 7, 11),
        **options: Any,
    ) -> None:
        super().__init__()
        try:
            import timm
        except (ImportError, RuntimeError) as error:  # RuntimeError: compiled for another torch
            raise ImportError(
                f"the encoder {name} is timm's, which cannot be imported ({error}): pip install timm, and what it imports, built "
                "for the torch that is installed"
            ) from error
        self.network = timm.create_model(
            name, features_only=True, feature_cls="getter", out_indices=tuple(features), in_chans=in_channels,
            img_size=tuple(img_size), **options,
        )  # fmt: skip
        self.channels = self.network.feature_info.channels()
        self.is_pyramid = len(set(self.network.feature_info.reduction())) > 1

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.network(x)
