"""Weighted sum of the task vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tools.merge_methods.registry import merge_method, scales


@merge_method("task_arithmetic", reference="Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023")
def task_arithmetic(
    pretrained: np.ndarray, deltas: Sequence[np.ndarray], *, scale: float | Sequence[float] = 0.4
) -> np.ndarray:
    """The sum of the task vectors, each times its scaling coefficient λ.

    Args:
        pretrained: the starting point's tensor; not used.
        deltas: one array per task, all of the same shape.
        scale: λ for all tasks, or one per task; 0 leaves a task out, a negative one removes what it learned.

    Returns:
        The merged delta, of that shape.
    """
    merged = np.zeros_like(deltas[0])
    for delta, factor in zip(deltas, scales(scale, len(deltas)), strict=True):
        merged += factor * delta
    return merged
