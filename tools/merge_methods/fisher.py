"""Fisher merging: every parameter goes where the tasks that it matters to want it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np

from tools.merge_methods.registry import Within, merge_method, per_task


@merge_method(
    "fisher",
    reference="Matena & Raffel, Merging Models with Fisher-Weighted Averaging, NeurIPS 2022",
    needs_statistics=True,
)
def fisher(
    pretrained: np.ndarray,
    deltas: Sequence[np.ndarray],
    statistics: Sequence[np.ndarray],
    *,
    scale: Annotated[float, Within()] = 1.0,
    weights: Annotated[float, Within(0, open=True, per_task=True)] = 1.0,
    floor: Annotated[float, Within(0, open=True)] = 1e-6,
) -> np.ndarray:
    """The mean of the specialists, each entry weighted by its Fisher information.

    Args:
        pretrained: the starting point's tensor; not used.
        deltas: one array per task, all of the same shape.
        statistics: the diagonal of the Fisher information per task, of that shape; its mean over a whole network is 1.
        scale: scaling coefficient λ of the result; the paper's is 1.
        weights: of each task.
        floor: Fisher information below this counts as this much, so that what no task needs is averaged.

    Returns:
        The merged delta, of that shape.
    """
    factors = [np.maximum(f, floor) * weight for f, weight in zip(statistics, per_task(weights, len(deltas)))]
    total = np.add.reduce(factors)
    merged = np.zeros_like(deltas[0])
    for delta, factor in zip(deltas, factors, strict=True):
        merged += delta * (factor / total * scale)
    return merged
