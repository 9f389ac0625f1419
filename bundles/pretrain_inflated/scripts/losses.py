"""Segmentation losses: Dice + binary cross-entropy of a canonical head, Dice + focal loss, and deep supervision for any loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.losses import DiceLoss, FocalLoss
from torch import Tensor, nn


class DiceBCELoss(nn.Module):
    """Soft Dice on sigmoids plus binary cross-entropy with logits, 1:1, over channels 1..C.

    Channel 0 (background) has no part in it, so a head row that starts as zeros stays exactly zero.

    Args:
        present_only: average the Dice term over the organs that are present in a patch. Without it (the published
            recipe) an absent organ adds ``1 - 1 / (1 + sum of its probabilities)``.

    Shapes:
        logits ``(N, 1 + C, ...)`` and an integer label map ``(N, 1, ...)`` with values 0..C, to a scalar.

    Source: Lumetti et al., U-Net Transplant, MICCAI 2025 (Dice with smoothing 1 per sample and channel + BCE).
    """

    def __init__(self, present_only: bool = False) -> None:
        super().__init__()
        self.present_only = present_only
        self.dice = DiceLoss(sigmoid=True, smooth_nr=1.0, smooth_dr=1.0, reduction="none")

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        logits, target = _plain(logits)[:, 1:].contiguous(), _plain(target)  # one layout for both: channels first
        organs = torch.arange(1, logits.shape[1] + 1, device=target.device).view(1, -1, *[1] * (target.ndim - 2))
        target = (target == organs).to(logits.dtype)
        dice = self.dice(logits, target).flatten(2).mean(2)
        if self.present_only:
            present = target.flatten(2).amax(2)
            dice = (dice * present).sum() / present.sum().clamp(min=1)
        return dice.mean() + nn.functional.binary_cross_entropy_with_logits(logits, target)


class DiceFocalLoss(nn.Module):
    """Soft Dice plus focal loss, 1:1, both of softmax probabilities and with the background.

    In MONAI's ``DiceFocalLoss`` ``softmax`` is for the Dice term alone: its focal term takes every class by itself, by sigmoids.

    Args:
        gamma: by what power voxels that are right already weigh less.

    Shapes:
        logits ``(N, C, ...)`` and a label map ``(N, 1, ...)`` with values 0..C-1, to a scalar.

    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017; the loss of TransSeg (ML4H 2022).
    """

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        self.dice = DiceLoss(to_onehot_y=True, softmax=True)
        self.focal = FocalLoss(to_onehot_y=True, use_softmax=True, gamma=gamma)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        logits, target = _plain(logits), _plain(target)
        return self.dice(logits, target) + self.focal(logits, target)


class DeepSupervision(nn.Module):
    """A loss at every resolution that a network gives logits of, each with half the weight of the next finer one.

    As nnU-Net has it and MONAI's ``DeepSupervisionLoss`` has not: the coarsest has no part, and the weights sum to one. Five are
    8/15, 4/15, 2/15, 1/15 and 0. One that has no part is not computed, so that its head is not trained.

    Args:
        loss: of logits and a label map ``(N, 1, ...)`` of their size.

    Shapes:
        a sequence of logits ``(N, C, ...)``, the finest first, and a label map ``(N, 1, ...)`` of the finest size, to a scalar.
        Labels are brought to coarser sizes by their nearest neighbours. One tensor of logits is given to the loss as it is.

    Source: Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation", Nature
    Methods 2021.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: Sequence[Tensor] | Tensor, target: Tensor) -> Tensor:
        target = _plain(target)
        if isinstance(logits, Tensor):
            return self.loss(_plain(logits), target)
        weights = [0.5**level for level in range(max(1, len(logits) - 1))]
        labels = target.float()  # not every integer type can be interpolated
        total = sum(
            weight * self.loss(level, nn.functional.interpolate(labels, size=level.shape[2:], mode="nearest-exact"))
            for weight, level in zip(weights, map(_plain, logits), strict=False)
        )
        return total / sum(weights)


def _plain(x: Tensor) -> Tensor:
    return x.as_tensor() if hasattr(x, "as_tensor") else x  # MetaTensor's bookkeeping costs time on every operation
