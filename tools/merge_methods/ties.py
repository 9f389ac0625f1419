"""TIES: trim small changes, elect a sign, average the changes that agree with it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tools.errors import UserError
from tools.merge_methods.registry import Vectors, merge_method, scales


def _thresholds(vectors: Vectors, *, density: float = 0.2, scope: str = "global", **_: object) -> dict:
    if scope not in ("global", "tensor"):
        raise UserError(f"ties: scope must be 'global' or 'tensor', got {scope!r}")
    if not 0 < density <= 1:
        raise UserError(f"ties: density is the share of changes to keep, above 0 and at most 1; got {density}")
    if scope == "tensor":
        return {}
    return {
        "_thresholds": [_threshold(np.concatenate([np.abs(t).ravel() for t in v.values()]), density) for v in vectors]
    }


def _threshold(magnitudes: np.ndarray, density: float) -> float:
    """The magnitude that the largest ``density`` share, at least one entry, reaches."""
    kept = max(1, round(density * magnitudes.size))
    return float(np.partition(magnitudes, magnitudes.size - kept)[magnitudes.size - kept])


@merge_method(
    "ties",
    reference="Yadav et al., TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023",
    prepare=_thresholds,
)
def ties(
    pretrained: np.ndarray,
    deltas: Sequence[np.ndarray],
    *,
    density: float = 0.2,
    scale: float | Sequence[float] = 1.0,
    scope: str = "global",
    _thresholds: Sequence[float] | None = None,
) -> np.ndarray:
    """Trim to the largest changes, elect each entry's sign by summed mass, average the changes that agree.

    Args:
        pretrained: the starting point's tensor; not used.
        deltas: one array per task, all of the same shape.
        density: share of each task vector's entries to keep, by magnitude.
        scale: scaling coefficient λ of the result; with one per task, of each task vector before the sign is elected.
        scope: "global" trims over the whole task vector as in the paper, "tensor" within each tensor as the code of
            U-Net Transplant does.

    Returns:
        The merged delta, of that shape.
    """
    if not deltas[0].size:
        return np.zeros_like(deltas[0])
    thresholds = _thresholds or [_threshold(np.abs(delta).ravel(), density) for delta in deltas]
    per_task = isinstance(scale, list | tuple)
    total, positive, negative = (np.zeros_like(deltas[0]) for _ in range(3))
    agreeing_up, agreeing_down = (np.zeros(deltas[0].shape, np.int16) for _ in range(2))
    for delta, threshold, factor in zip(deltas, thresholds, scales(scale, len(deltas)), strict=True):
        kept = np.where(np.abs(delta) >= threshold, delta, 0) * (factor if per_task else 1)
        total += kept
        positive += np.maximum(kept, 0)
        negative += np.minimum(kept, 0)
        agreeing_up += kept > 0
        agreeing_down += kept < 0
    up = total > 0
    mean = np.where(up, positive, negative) / np.maximum(np.where(up, agreeing_up, agreeing_down), 1)
    merged = np.where(total == 0, 0, mean)
    return (merged if per_task else merged * scale).astype(deltas[0].dtype, copy=False)
