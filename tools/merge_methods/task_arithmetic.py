"""Weighted sum of the task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np

from tools.merge_methods.average import weighted_sum
from tools.merge_methods.registry import Within, merge_method, per_task


@merge_method("task_arithmetic", reference="Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023")
def task_arithmetic(
    pretrained: np.ndarray, deltas: Sequence[np.ndarray], *, scale: Annotated[float, Within(per_task=True)] = 0.4
) -> np.ndarray:
    """The sum of the task vectors, each times its scaling coefficient λ.

    Args:
        pretrained: the starting point's tensor; not used.
        deltas: one array per task, all of the same shape.
        scale: λ for all tasks, or one per task; 0 leaves a task out, a negative one removes what it learned.

    Returns:
        The merged delta, of that shape.
    """
    return weighted_sum(deltas, per_task(scale, len(deltas)))
