"""The magnitude that the largest share of a task vector's entries reaches: exact, in little memory."""

from __future__ import annotations

import numpy as np

from tools.merge_methods.registry import Deltas

FEW = 2**20  # so many magnitudes are simply held in memory
MANY = 2**22  # and not more than so many in any case, unless they are all equal
EDGES = 256


def largest(values: np.ndarray, share: float) -> float:
    """The magnitude that the largest ``share`` of an array, at least one entry, reaches; 0 for an empty one."""
    return _nth_largest(np.abs(values).reshape(-1), _count(share, values.size)) if values.size else 0.0


def magnitude_of_share(deltas: Deltas, share: float) -> float:
    """The same over all of a task vector, without holding it: the exact value, as if sorted.

    A sample gives a bracket around the threshold; one pass counts what lies above it and keeps what lies inside, about two
    entries in a hundred. Should the threshold lie outside, the bracket is made wider. Where even that would be many, a pass in
    between counts what lies above each of some edges, and makes the bracket narrower.

    Args:
        deltas: of one task.
        share: above 0, at most 1.
    """
    if deltas.size <= FEW:
        return largest(np.concatenate([np.empty(0), *deltas.scan(np.abs)]), share)
    wanted, sample = _count(share, deltas.size), np.sort(np.abs(deltas.sample()))
    margin = 0.01
    while margin < 8:
        low, high = (round((1 - share + side * margin) * (sample.size - 1)) for side in (-1, 1))
        bottom = sample[low] if low > 0 else 0.0
        top = sample[high] if high < sample.size - 1 else np.inf
        if 2 * margin * deltas.size > MANY:
            edges = np.unique([bottom, *sample[max(low, 0) : high + 1 : 1 + (high - low) // EDGES], top])
            bottom, top = _between(deltas, edges, wanted)
            if bottom == top:
                return float(top)

        def count_and_keep(values: np.ndarray, bottom: float = bottom, top: float = top) -> tuple[int, np.ndarray]:
            magnitudes = np.abs(values)
            return np.count_nonzero(magnitudes > top), magnitudes[(magnitudes >= bottom) & (magnitudes <= top)]

        if bottom <= top:
            counts, pieces = zip(*deltas.scan(count_and_keep), strict=True)
            above, inside = sum(counts), np.concatenate(pieces)
            if above < wanted <= above + inside.size:
                return _nth_largest(inside, wanted - above)
        margin *= 8
    return 0.0  # some entries are NaN, which the merge itself refuses by tensor


def _between(deltas: Deltas, edges: np.ndarray, wanted: int) -> tuple[float, float]:
    """The two neighbouring edges between which the n-th largest magnitude is: twice the same one if it is that, (inf, -inf) if
    it is outside of all.
    """

    def count(values: np.ndarray) -> np.ndarray:
        magnitudes = np.abs(values)
        inside = np.sort(magnitudes[(magnitudes >= edges[0]) & (magnitudes <= edges[-1])])
        beyond = np.count_nonzero(magnitudes > edges[-1])
        return beyond + inside.size - np.stack([np.searchsorted(inside, edges, side) for side in ("left", "right")])

    reaching, above = np.sum(list(deltas.scan(count)), axis=0)
    last = int(np.count_nonzero(reaching >= wanted)) - 1  # the highest edge that so many reach
    if last >= 0 and above[last] < wanted:
        return edges[last], edges[last]
    return (edges[last], edges[last + 1]) if 0 <= last < edges.size - 1 else (np.inf, -np.inf)


def _count(share: float, size: int) -> int:
    return max(1, round(share * size))


def _nth_largest(values: np.ndarray, n: int) -> float:
    return float(np.partition(values, values.size - n)[values.size - n])
