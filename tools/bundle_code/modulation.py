"""Segment with a merged network that becomes each of its tasks in turn, by a unified task vector, and a mask and a scale each."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from monai.inferers import Inferer
from torch import Tensor

from .inferers import MixedPrecisionInferer


class ModulatedInferer(MixedPrecisionInferer):
    """One pass with the shared weights, or one pass for each task with its own.

    The shared weights are θ0 + λ·τ, τ being the unified task vector; those of a task are θ0 + scale · mask ⊙ τ. Every pass fills
    the output channels of its task; the others are never looked at.

    Args:
        inferer: runs the network on an image.
        modulators: file that ``python -m tools merge`` writes: for each tensor ``unified/<name>`` and, a bit for each entry,
            ``mask/<name>`` (tasks × bytes); ``scale`` (tasks), ``shared`` (λ) and ``channels``, the number of each task's.
        enabled: a pass for each task; without it one pass with the shared weights.
        precision: see ``MixedPrecisionInferer``.

    Source: Huang et al., EMR-Merging, NeurIPS 2024; Wang et al. (TALL-masks), ICML 2024.
    """

    def __init__(self, inferer: Inferer, modulators: str, enabled: bool = True, precision: str = "bfloat16") -> None:
        super().__init__(inferer, precision)
        self.modulators = modulators
        self.enabled = enabled

    @cached_property
    def content(self) -> dict[str, Tensor]:
        """What the file of modulators holds, read when the first image comes."""
        return torch.load(self.modulators, map_location="cpu", weights_only=True)

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.enabled:
            return super().__call__(inputs, network, *args, **kwargs)
        content, tensors = self.content, getattr(network, "module", network).state_dict()
        names = [name.removeprefix("unified/") for name in content if name.startswith("unified/")]
        shared = {name: tensors[name].clone() for name in names}
        outputs, first = [], 1
        try:
            for task, (scale, channels) in enumerate(
                zip(content["scale"].tolist(), content["channels"].tolist(), strict=True)
            ):
                for name, tensor in shared.items():
                    unified = content[f"unified/{name}"]
                    factor = scale * bits(content[f"mask/{name}"][task], unified.shape) - content["shared"].item()
                    tensors[name].copy_(tensor + (unified * factor).to(tensor))
                output = super().__call__(inputs, network, *args, **kwargs)
                outputs += [output[:, :1]] * (not outputs) + [output[:, first : first + channels]]
                first += channels
        finally:
            for name, tensor in shared.items():
                tensors[name].copy_(tensor)
        return torch.cat(outputs, 1)


def bits(packed: Tensor, shape: torch.Size) -> Tensor:
    """Packed bits, the first one highest, as zeros and ones of a shape."""
    places = torch.arange(7, -1, -1, dtype=torch.uint8)
    return (packed[:, None] >> places & 1).reshape(-1)[: shape.numel()].reshape(shape).float()
