"""The magnitude that the largest share of a task vector's entries reaches: exact, in little memory."""

from __future__ import annotations

import numpy as np

from tools.merge_methods.registry import Deltas

FEW = 2**20  # so many magnitudes are simply held in memory


def largest(values: np.ndarray, share: float) -> float:
    """The magnitude that the largest ``share`` of an array, at least one entry, reaches; 0 for an empty one."""
    return _nth_largest(np.abs(values).reshape(-1), _count(share, values.size)) if values.size else 0.0


def magnitude_of_share(deltas: Deltas, share: float) -> float:
    """The same over all of a task vector, without holding it: the exact value, as if sorted.

    A sample gives a bracket around the threshold; one pass counts what lies above it and keeps what lies inside, about two
    entries in a hundred. Should the threshold lie outside, the bracket is made wider.

    Args:
        deltas: of one task.
        share: above 0, at most 1.
    """
    if deltas.size <= FEW:
        return largest(np.concatenate([np.empty(0), *deltas.scan(np.abs)]), share)
    wanted, sample = _count(share, deltas.size), np.sort(np.abs(deltas.sample()))
    margin = 0.01
    while True:
        low, high = (round((1 - share + side * margin) * (sample.size - 1)) for side in (-1, 1))
        bottom = sample[low] if low > 0 else -1.0
        top = sample[high] if high < sample.size - 1 else np.inf

        def count_and_keep(values: np.ndarray, bottom: float = bottom, top: float = top) -> tuple[int, np.ndarray]:
            magnitudes = np.abs(values)
            return np.count_nonzero(magnitudes > top), magnitudes[(magnitudes >= bottom) & (magnitudes <= top)]

        counts, pieces = zip(*deltas.scan(count_and_keep), strict=True)
        above, inside = sum(counts), np.concatenate(pieces)
        if above < wanted <= above + inside.size:
            return _nth_largest(inside, wanted - above)
        margin *= 8


def _count(share: float, size: int) -> int:
    return max(1, round(share * size))


def _nth_largest(values: np.ndarray, n: int) -> float:
    return float(np.partition(values, values.size - n)[values.size - n])
