"""Model Stock: how far to go from the starting point to the mean follows from the angle between the specialists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from tools.merge_methods.registry import merge_method


@merge_method(
    "model_stock",
    reference="Jang et al., Model Stock: All we need is just a few fine-tuned models, ECCV 2024",
    granularity="rows",
)
def model_stock(
    pretrained: np.ndarray, deltas: Sequence[np.ndarray], *, by: Literal["tensor", "filter"] = "tensor"
) -> np.ndarray:
    """The mean of the task vectors times n cos / (1 + (n - 1) cos), cos being the mean cosine between them.

    Args:
        pretrained: the starting point's tensor, outputs × the rest; not used.
        deltas: one array per task, all of the same shape.
        by: one ratio for each "tensor" as in the paper, or for each "filter", the row of one output channel.

    Returns:
        The merged delta, of that shape.
    """
    count = len(deltas)
    if count == 1:
        return deltas[0]
    rows = [delta if by == "filter" else delta.reshape(1, -1) for delta in deltas]
    units = [row / np.maximum(np.linalg.norm(row, axis=1, keepdims=True), 1e-300) for row in rows]
    # Σ over pairs of cosines from the squared length of the sum of the directions
    directions = np.sum(np.square(sum(units)), axis=1, keepdims=True)
    present = sum(np.sum(np.square(unit), axis=1, keepdims=True) for unit in units)
    cosine = np.clip((directions - present) / (count * (count - 1)), 0, 1)
    ratio = count * cosine / (1 + (count - 1) * cosine)
    return (ratio * np.add.reduce(rows) / count).reshape(deltas[0].shape)
