"""Several specialists as one network."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tools.bundle import Bundle
from tools.bundle_code.inferers import full_size
from tools.merge import merge_recipe
from tools.recipe import Recipe


class Specialists(nn.Module):
    """Runs networks on the same image and stacks what they see: margins over the background, whose own logit is 0.

    Args:
        networks: each with its organs' logits after the background's.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (N, 1 + ΣC, …) of an image (N, channels, …)."""
        outputs = [full_size(network(image)) for network in self.networks]
        margins = [output[:, 1:] - output[:, :1] for output in outputs]
        return torch.cat([torch.zeros_like(margins[0][:, :1]), *margins], 1)


def rebuild(pretrained: str, vectors: Sequence[str]) -> Specialists:
    """The specialists that task vectors come from: the starting point plus each vector, with its head.

    Raises:
        UserError: a vector is damaged or of another starting point.
    """
    networks = []
    for vector in vectors:
        with tempfile.TemporaryDirectory() as folder:  # one at a time on disk
            path = Path(folder) / "specialist"
            merge_recipe(Recipe(pretrained, [vector], "task_arithmetic", {"scale": 1.0}), path, quiet=True)
            networks.append(Bundle(path).network())
    return Specialists(networks).eval()
