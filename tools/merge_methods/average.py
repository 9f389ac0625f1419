"""Average of the task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np

from tools.errors import UserError
from tools.merge_methods.registry import Within, merge_method, per_task


@merge_method(
    "average",
    reference="Wortsman et al., Model soups, ICML 2022; equal weights: the rule of Lumetti et al., U-Net Transplant, MICCAI 2025",
)
def average(
    pretrained: np.ndarray,
    deltas: Sequence[np.ndarray],
    *,
    weights: Annotated[float, Within(0, per_task=True)] = 1.0,
) -> np.ndarray:
    """The weighted mean of the specialists.

    Args:
        pretrained: the starting point's tensor; not used.
        deltas: one array per task, all of the same shape.
        weights: of each task; they are divided by their sum.

    Returns:
        The merged delta, of that shape.

    Raises:
        UserError: all weights are zero.
    """
    factors = per_task(weights, len(deltas))
    if not sum(factors):
        raise UserError("average: at least one of the weights must be above 0")
    return weighted_sum(deltas, [factor / sum(factors) for factor in factors])


def weighted_sum(deltas: Sequence[np.ndarray], factors: Sequence[float]) -> np.ndarray:
    """Σ factor · delta, in the deltas' dtype."""
    if len(set(factors)) == 1:  # one multiplication is enough
        total = deltas[0] if len(deltas) == 1 else deltas[0] + deltas[1]
        for delta in deltas[2:]:
            total += delta
        return total * factors[0]
    merged = deltas[0] * factors[0]
    for delta, factor in zip(deltas[1:], factors[1:], strict=True):
        merged += delta * factor
    return merged
