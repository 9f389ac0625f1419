"""Interpolation on the sphere: directions and lengths of weights are averaged apart, so that merging does not shrink them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np

from tools.errors import UserError
from tools.merge_methods.registry import Within, merge_method, per_task

PARALLEL = 1e-6  # angles below it, radians, are interpolated along the line


@merge_method(
    "slerp",
    reference="Shoemake, Animating Rotation with Quaternion Curves, SIGGRAPH 1985; for weights as in mergekit",
    granularity="rows",
)
def slerp(
    pretrained: np.ndarray,
    deltas: Sequence[np.ndarray],
    *,
    t: Annotated[float, Within(0, 1)] = 0.5,
    by: Literal["tensor", "filter"] = "tensor",
) -> np.ndarray:
    """Spherical interpolation between the weights of two specialists.

    Args:
        pretrained: the starting point's tensor, outputs × the rest.
        deltas: one array per task, all of the same shape; two of them.
        t: 0 gives the first specialist, 1 the second.
        by: interpolate each "tensor" as one vector, or each "filter", the row of one output channel, by itself.

    Returns:
        The merged delta, of that shape.

    Raises:
        UserError: there are more than two tasks.
    """
    return _between(deltas, [1 - t, t], "slerp", by, pretrained)


@merge_method(
    "nuslerp",
    reference="Goddard et al., Arcee's MergeKit, EMNLP 2024 (industry track); its method nuslerp with a base model",
    granularity="rows",
)
def nuslerp(
    pretrained: np.ndarray,
    deltas: Sequence[np.ndarray],
    *,
    weights: Annotated[float, Within(0, per_task=True)] = 1.0,
    by: Literal["tensor", "filter"] = "tensor",
) -> np.ndarray:
    """Spherical interpolation between two task vectors, not between the weights themselves.

    Args:
        pretrained: the starting point's tensor, outputs × the rest; not used.
        deltas: one array per task, all of the same shape; two of them.
        weights: of each task; they are divided by their sum.
        by: interpolate each "tensor" as one vector, or each "filter", the row of one output channel, by itself.

    Returns:
        The merged delta, of that shape.

    Raises:
        UserError: there are more than two tasks, or all weights are zero.
    """
    return _between(deltas, _shares(weights, len(deltas), "nuslerp"), "nuslerp", by, 0.0)


@merge_method(
    "karcher",
    reference="Karcher, Riemannian center of mass and mollifier smoothing, CPAM 1977; for weights as in mergekit",
    granularity="rows",
)
def karcher(
    pretrained: np.ndarray,
    deltas: Sequence[np.ndarray],
    *,
    weights: Annotated[float, Within(0, per_task=True)] = 1.0,
    iterations: Annotated[int, Within(1, 10_000)] = 10,
    tolerance: Annotated[float, Within(0)] = 1e-5,
    by: Literal["tensor", "filter"] = "tensor",
) -> np.ndarray:
    """The centre of the specialists' weights on the sphere, with the mean of their lengths; for any number of tasks.

    Args:
        pretrained: the starting point's tensor, outputs × the rest.
        deltas: one array per task, all of the same shape.
        weights: of each task; they are divided by their sum.
        iterations: at most.
        tolerance: stop when the centre moves by a smaller angle, radians.
        by: take each "tensor" as one vector, or each "filter", the row of one output channel, by itself.

    Returns:
        The merged delta, of that shape.

    Raises:
        UserError: all weights are zero.
    """
    shares = _shares(weights, len(deltas), "karcher")
    if len(deltas) == 1:
        return deltas[0]
    points = [_vectors(pretrained + delta, by) for delta in deltas]
    lengths = [np.linalg.norm(point, axis=1, keepdims=True) for point in points]
    units = [np.divide(p, n, out=np.zeros_like(p), where=n > 0) for p, n in zip(points, lengths, strict=True)]
    centre = _unit(sum(share * unit for share, unit in zip(shares, units, strict=True)))
    for _ in range(iterations):
        step = sum(share * _towards(centre, unit) for share, unit in zip(shares, units, strict=True))
        angle = np.linalg.norm(step, axis=1, keepdims=True)
        centre = _unit(np.cos(angle) * centre + np.sinc(angle / np.pi) * step)
        if angle.max(initial=0) < tolerance:
            break
    length = sum(share * n for share, n in zip(shares, lengths, strict=True))
    return (centre * length).reshape(pretrained.shape) - pretrained


def _between(
    deltas: Sequence[np.ndarray], shares: Sequence[float], method: str, by: str, origin: np.ndarray | float
) -> np.ndarray:
    if len(deltas) == 1:
        return deltas[0]
    if len(deltas) > 2:
        raise UserError(f"{method} interpolates between two task vectors, not {len(deltas)}; karcher takes any number")
    a, b = (_vectors(origin + delta, by) for delta in deltas)
    cosine = np.sum(_unit(a) * _unit(b), axis=1, keepdims=True)
    angle = np.arccos(np.clip(cosine, -1, 1))
    curved = (angle > PARALLEL) & (angle < np.pi - PARALLEL)
    sine = np.where(curved, np.sin(angle), 1)
    factors = [np.where(curved, np.sin(share * angle) / sine, share) for share in shares]
    return (factors[0] * a + factors[1] * b).reshape(deltas[0].shape) - origin


def _vectors(array: np.ndarray, by: str) -> np.ndarray:
    return array if by == "filter" else array.reshape(1, -1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)


def _towards(centre: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """The logarithm map: the tangent at ``centre`` that leads to ``unit``, as long as the angle between them."""
    cosine = np.clip(np.sum(centre * unit, axis=1, keepdims=True), -1, 1)
    return np.arccos(cosine) * _unit(unit - cosine * centre)


def _shares(weights: float | Sequence[float], count: int, method: str) -> list[float]:
    values = per_task(weights, count)
    if not sum(values):
        raise UserError(f"{method}: at least one of the weights must be above 0")
    return [value / sum(values) for value in values]
