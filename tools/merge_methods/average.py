"""Average of the task vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tools.merge_methods.registry import merge_method


@merge_method("average", reference="Lumetti et al., U-Net Transplant, MICCAI 2025 (its rule, λ = 1/T)")
def average(pretrained: np.ndarray, deltas: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of the task vectors: task arithmetic with λ = 1/T.

    Args:
        pretrained: the starting point's tensor; not used.
        deltas: one array per task, all of the same shape.

    Returns:
        The merged delta, of that shape.
    """
    return np.add.reduce(deltas) / len(deltas)
