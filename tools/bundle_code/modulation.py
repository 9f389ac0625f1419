"""Segment with a merged network that becomes each of its tasks in turn, by a unified task vector, and a mask and a scale each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from monai.inferers import Inferer
from torch import Tensor

from .inferers import full_size
from .sliding_window import SlidingWindow


class ModulatedInferer(Inferer):
    """One sweep with the shared weights, or one sweep for each task with its own.

    The shared weights are θ0 + λ·τ, τ being the unified task vector; those of a task are θ0 + scale · mask ⊙ τ. Every sweep
    gives the output channels of its task; the others are never looked at.

    Args:
        inferer: runs the network on an image.
        modulators: file that ``python -m tools merge`` writes: for each tensor ``unified/<name>`` and, a bit for each entry,
            ``mask/<name>`` (tasks × bytes); ``scale`` (tasks), ``shared`` (λ) and ``channels``, the number of each task's.
        enabled: a sweep for each task; without it one sweep with the shared weights.

    Source: Huang et al., EMR-Merging, NeurIPS 2024; Wang et al. (TALL-masks), ICML 2024.
    """

    def __init__(self, inferer: SlidingWindow, modulators: str, enabled: bool = True) -> None:
        super().__init__()
        self.inferer = inferer
        self.modulators = modulators
        self.enabled = enabled

    @cached_property
    def content(self) -> dict[str, Tensor]:
        """What the file of modulators holds, read when the first image comes."""
        return torch.load(self.modulators, map_location="cpu", weights_only=True)

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        if not self.enabled:
            return self.inferer(inputs, network, *args, **kwargs)
        tasks = [self._as_task(network, task) for task in range(len(self.content["scale"]))]
        return self.inferer.stack(inputs, tasks, *args, **kwargs)

    @contextmanager
    def _as_task(self, network: Callable[..., Any], task: int) -> Iterator[Callable[..., Tensor]]:
        """The network with a task's weights, giving the task's channels; the first one's with background before them."""
        content, tensors = self.content, getattr(network, "module", network).state_dict()
        counts = content["channels"].tolist()
        end = 1 + sum(counts[: task + 1])
        own = slice(end - counts[task] if task else 0, end)
        shared = {name: tensors[name].clone() for name in self._names}
        try:
            for name, tensor in shared.items():
                unified = content[f"unified/{name}"]
                mask = bits(content[f"mask/{name}"][task], unified.shape)
                factor = content["scale"][task].item() * mask - content["shared"].item()
                tensors[name].copy_(tensor + (unified * factor).to(tensor))
            yield lambda window, *args, **kwargs: full_size(network(window, *args, **kwargs))[:, own]
        finally:
            for name, tensor in shared.items():
                tensors[name].copy_(tensor)

    @cached_property
    def _names(self) -> list[str]:
        return [name.removeprefix("unified/") for name in self.content if name.startswith("unified/")]


def bits(packed: Tensor, shape: torch.Size) -> Tensor:
    """Packed bits, the first one highest, as zeros and ones of a shape."""
    places = torch.arange(7, -1, -1, dtype=torch.uint8)
    return (packed[:, None] >> places & 1).reshape(-1)[: shape.numel()].reshape(shape).float()
