"""A training step as the bundles do it, against the same step in MONAI's default: float32, contiguous."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from monai.data import MetaTensor
from monai.inferers import SimpleInferer
from torch import nn

from tests.benchmarks.stopwatch import Stopwatch, compare
from tools.bundle_code.inferers import MixedPrecisionInferer
from tools.bundle_code.losses import DiceBCELoss
from tools.bundle_code.residual_unet import Decoder, PointwiseConv3d, ResidualUNet3D
from tools.bundle_code.training import ReuseMemory

BUNDLES = Path(__file__).parents[2] / "bundles"


class PublishedDecoder(Decoder):
    """The decoder as it is described: upsample, concatenate, then the 1x1x1 convolution over all channels."""

    def forward(self, skip: torch.Tensor, deep: torch.Tensor) -> torch.Tensor:
        upsampled = nn.functional.interpolate(deep, size=skip.shape[2:], mode="nearest")
        return self.basic_module(torch.cat([skip, upsampled], dim=1))


def training_step(width: int, patch: int, batch: int, fast: bool, reuse_memory: bool) -> Callable[[], None]:
    """One step of training on 7 organs: forward, loss, backward, AdamW; as the bundles do it, or as MONAI does."""
    torch.manual_seed(0)
    network = ResidualUNet3D(out_channels=8, width=width, dropout=0.0)
    if reuse_memory:
        ReuseMemory()()
    if fast:
        network.to(memory_format=torch.channels_last_3d)
    else:
        for module in network.modules():
            if isinstance(module, Decoder):
                module.__class__ = PublishedDecoder
            elif isinstance(module, PointwiseConv3d):
                module.__class__ = nn.Conv3d
    inferer = MixedPrecisionInferer() if fast else SimpleInferer()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    image = MetaTensor(torch.rand(batch, 1, *[patch] * 3))
    label = MetaTensor(torch.randint(0, 8, (batch, 1, *[patch] * 3)))
    loss = DiceBCELoss()

    def step() -> None:
        optimizer.zero_grad()
        loss(inferer(image, network), label).backward()
        optimizer.step()

    return step


def compare_training_steps() -> None:
    """Print a line for the small overlay as it is, one where both keep their memory, and lines for other sizes."""
    small = json.loads((BUNDLES / "pretrain_amos" / "configs" / "small.json").read_text())
    overlay = small["width"], small["patch_size"][0], small["batch_size"]
    rows = [("the small overlay", *overlay, False), ("the same, both keeping their memory", *overlay, True)]
    rows += [("training step", *size, False) for size in ((16, 48, 2), (8, 64, 2), (8, 48, 2))]
    for name, width, patch, batch, both in rows:
        ours = Stopwatch(training_step, width, patch, batch, True, True)
        theirs = Stopwatch(training_step, width, patch, batch, False, both)
        compare(f"{name}: width {width}, {patch}³, batch {batch}", ours, theirs)
