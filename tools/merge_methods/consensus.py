"""Consensus: keep the weights that several tasks use, by the masks of TALL-masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np

from tools.merge_methods.registry import Within, merge_method, per_task

REFERENCE = "Wang et al., Localizing Task Information for Improved Model Merging and Compression, ICML 2024"


@merge_method("consensus", reference=REFERENCE)
def consensus(
    pretrained: np.ndarray,
    deltas: Sequence[np.ndarray],
    *,
    scale: Annotated[float, Within(per_task=True)] = 0.4,
    mask: Annotated[float, Within(0, per_task=True)] = 0.4,
    users: Annotated[int, Within(1)] = 2,
) -> np.ndarray:
    """Task arithmetic on the entries that at least so many tasks use; the others, selfish or harmful, stay the start's.

    Args:
        pretrained: the starting point's tensor; not used.
        deltas: one array per task, all of the same shape.
        scale: scaling coefficient λ for all tasks, or one per task.
        mask: λ of the masks: a task uses an entry where |τ| >= mask · |sum of the other tasks' τ|; 0.2 to 0.6 in the paper.
        users: how many tasks must use an entry (all of them, where there are fewer).

    Returns:
        The merged delta, of that shape.
    """
    total = np.add.reduce(deltas)
    used = sum(
        np.abs(delta) >= factor * np.abs(total - delta) for delta, factor in zip(deltas, per_task(mask, len(deltas)))
    )
    merged = np.add.reduce([delta * factor for delta, factor in zip(deltas, per_task(scale, len(deltas)))])
    return merged * (used >= min(users, len(deltas)))
