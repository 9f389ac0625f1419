"""TIES: trim small changes, elect a sign, combine the changes that agree with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np

from tools.merge_methods.registry import Deltas, Within, merge_method, per_task
from tools.merge_methods.threshold import largest, magnitude_of_share


def _thresholds(deltas: Sequence[Deltas], *, density: float | Sequence[float], **_: object) -> dict[str, object]:
    densities = per_task(density, len(deltas))
    return {"_thresholds": [magnitude_of_share(d, share) for d, share in zip(deltas, densities, strict=True)]}


@merge_method(
    "ties",
    reference="Yadav et al., TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023",
    prepare=_thresholds,
)
def ties(
    pretrained: np.ndarray,
    deltas: Sequence[np.ndarray],
    *,
    density: Annotated[float, Within(0, 1, open=True, per_task=True)] = 0.2,
    scale: Annotated[float, Within(per_task=True)] = 1.0,
    scope: Literal["global", "tensor"] = "global",
    combine: Literal["mean", "sum"] = "mean",
    _thresholds: Sequence[float] | None = None,
) -> np.ndarray:
    """Trim to the largest changes, elect each entry's sign by summed mass, average the changes that agree.

    Args:
        pretrained: the starting point's tensor; not used.
        deltas: one array per task, all of the same shape.
        density: share of each task vector's entries to keep, by magnitude.
        scale: scaling coefficient λ of the result; with one per task, of each task vector before the sign is elected.
        scope: "global" trims over the whole task vector as in the paper, "tensor" within each tensor, keeping one entry
            at least, as the code of U-Net Transplant does.
        combine: of the changes that agree, the "mean" as in the paper, or the "sum" (with a scale near 0.3).

    Returns:
        The merged delta, of that shape.
    """
    densities = per_task(density, len(deltas))
    thresholds = _thresholds or [largest(d, share) for d, share in zip(deltas, densities, strict=True)]
    alone = isinstance(scale, list | tuple)
    total, kept = np.zeros_like(deltas[0]), []
    for delta, threshold, factor in zip(deltas, thresholds, per_task(scale, len(deltas)), strict=True):
        kept.append(delta * (np.abs(delta) >= threshold))
        if alone:
            kept[-1] *= factor
        total += kept[-1]
    sign = np.sign(total)
    merged, agreeing = np.zeros_like(total), np.zeros(total.shape, np.int16)
    for change in kept:
        change *= sign  # what agrees is positive now
        merged += np.maximum(change, 0)
        agreeing += change > 0
    merged *= sign
    if combine == "mean":
        merged /= np.maximum(agreeing, 1)
    return merged if alone else merged * scale
