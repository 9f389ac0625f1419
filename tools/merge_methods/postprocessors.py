"""Post-processors: correct the merged task vector of any method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np

from tools.merge_methods.registry import Within, postprocessor
from tools.merge_methods.spectral import leading


@postprocessor("lines", reference="Wang et al., LiNeS: Post-training Layer Scaling, ICLR 2025", granularity="entries")
def lines(
    merged: np.ndarray,
    deltas: Sequence[np.ndarray],
    depth: float,
    *,
    first: Annotated[float, Within()] = 0.5,
    last: Annotated[float, Within()] = 1.0,
) -> np.ndarray:
    """Scale layers linearly by their depth: the first ones, which all tasks share, change less.

    Args:
        merged: the merged delta.
        deltas: of the tasks; not used.
        depth: 0 for the network's first tensor, 1 for its last, in the order of its definition (a U-Net's encoder from the
            image on, then its decoder).
        first: factor of the first tensor, the paper's α.
        last: factor of the last tensor, the paper's α + β.

    Returns:
        The corrected delta.
    """
    return merged * (first + (last - first) * depth)


@postprocessor("svc", reference="Li et al., singular value calibration, arXiv 2602.05536, 2026", granularity="matrices")
def svc(
    merged: np.ndarray,
    deltas: Sequence[np.ndarray],
    depth: float,
    *,
    floor: Annotated[float, Within(0, open=True)] = 0.5,
) -> np.ndarray:
    """Shrink the singular directions in which the merged vector is longer than the tasks' own.

    Args:
        merged: the merged delta, outputs × (input · k³).
        deltas: of the tasks, of that shape.
        depth: not used.
        floor: the smallest ratio of merged to own length that counts, the paper's α, 0.1 to 1.

    Returns:
        The corrected delta.
    """
    left, _, _ = leading(merged, min(merged.shape))
    along = left.T @ merged
    ratios = []
    for delta in deltas:
        own = left.T @ delta
        square = np.sum(own * own, axis=1)
        ratios.append(np.sum(along * own, axis=1) / np.where(square > 0, square, np.inf))
    factors = len(deltas) / np.sum(np.maximum(ratios, floor), axis=0)
    return left @ (factors[:, None] * along)
