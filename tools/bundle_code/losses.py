"""The segmentation loss of a canonical head: Dice + binary cross-entropy on the organ channels, background left out."""

from __future__ import annotations

import torch
from monai.losses import DiceLoss
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


def _plain(x: Tensor) -> Tensor:
    return x.as_tensor() if hasattr(x, "as_tensor") else x  # MetaTensor's bookkeeping costs time on every operation
