"""``make bench``: speed as ratios of two ways to do the same thing, in turn, in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from monai.data import MetaTensor
from monai.inferers import SimpleInferer
from torch import nn

from tools.bundle_code.inferers import MixedPrecisionInferer
from tools.bundle_code.losses import DiceBCELoss
from tools.bundle_code.residual_unet import Decoder, ResidualUNet3D


class PublishedDecoder(Decoder):
    """The decoder as it is described: upsample, concatenate, then the 1x1x1 convolution over all channels."""

    def forward(self, skip: torch.Tensor, deep: torch.Tensor) -> torch.Tensor:
        upsampled = nn.functional.interpolate(deep, size=skip.shape[2:], mode="nearest")
        return self.basic_module(torch.cat([skip, upsampled], dim=1))


def training_step(width: int, patch: int, fast: bool) -> Callable[[], None]:
    """One step of the small recipe (batch 2, 7 organs): forward, loss, backward, AdamW."""
    torch.manual_seed(0)
    network = ResidualUNet3D(out_channels=8, width=width, dropout=0.0)
    if fast:
        network.to(memory_format=torch.channels_last_3d)
    else:
        for module in network.modules():
            if isinstance(module, Decoder):
                module.__class__ = PublishedDecoder
    inferer = MixedPrecisionInferer() if fast else SimpleInferer()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    image, label = MetaTensor(torch.rand(2, 1, *[patch] * 3)), MetaTensor(torch.randint(0, 8, (2, 1, *[patch] * 3)))
    loss = DiceBCELoss()

    def step() -> None:
        optimizer.zero_grad()
        loss(inferer(image, network), label).backward()
        optimizer.step()

    return step


def compare(name: str, ours: Callable[[], None], theirs: Callable[[], None], runs: int = 9) -> None:
    """Print the medians of both and the median of the ratios, run by run in turn."""

    def seconds(function: Callable[[], None]) -> float:
        began = time.perf_counter()
        function()
        return time.perf_counter() - began

    for function in (ours, theirs):
        seconds(function)
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(runs)]
    a, b = (statistics.median(column) for column in zip(*pairs))
    ratio = statistics.median(theirs / ours for ours, theirs in pairs)
    print(f"{name:<58} {a:8.3f} s {b:8.3f} s   {ratio:5.2f} x", flush=True)


def main() -> None:
    print(f"{torch.get_num_threads()} threads; ours, MONAI's default (float32, contiguous), ratio of the two\n")
    for width, patch in ((8, 48), (16, 48), (8, 64), (16, 64)):
        steps = training_step(width, patch, True), training_step(width, patch, False)
        compare(f"training step, width {width}, patch {patch}³, batch 2", *steps)


if __name__ == "__main__":
    main()
