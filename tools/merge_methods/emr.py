"""EMR's unified task vector: elect a sign, take the largest change that agrees with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np

from tools.merge_methods.registry import Within, merge_method


@merge_method("emr", reference="Huang et al., EMR-Merging: Tuning-Free High-Performance Model Merging, NeurIPS 2024")
def emr(pretrained: np.ndarray, deltas: Sequence[np.ndarray], *, scale: Annotated[float, Within()] = 1.0) -> np.ndarray:
    """For each entry the sign of the sum and the largest magnitude among the tasks that have it.

    Args:
        pretrained: the starting point's tensor; not used.
        deltas: one array per task, all of the same shape.
        scale: scaling coefficient λ of the result.

    Returns:
        The merged delta, of that shape.
    """
    sign = np.sign(np.add.reduce(deltas))
    largest = np.zeros_like(deltas[0])
    for delta in deltas:
        np.maximum(largest, delta * sign, out=largest)
    return largest * sign * scale
