"""Merging by singular vectors: every kernel is a matrix, outputs × (input · k³).

The matrices are wide, so their singular values come from the small Gram matrix M Mᵀ; in float64, because that squares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np

from tools.merge_methods.registry import Within, merge_method

NEGLIGIBLE = (
    1e-6  # singular values below this share of the largest one count as zero: their squares are rounding errors
)


@merge_method(
    "tsv_m",
    reference="Gargiulo et al., Task Singular Vectors: Reducing Task Interference in Model Merging, CVPR 2025",
    granularity="matrices",
)
def tsv_m(
    pretrained: np.ndarray, deltas: Sequence[np.ndarray], *, scale: Annotated[float, Within()] = 1.0
) -> np.ndarray:
    """The leading 1/n of each task's singular vectors, made orthogonal across tasks, with their singular values.

    Args:
        pretrained: the starting point's matrix; not used.
        deltas: one matrix per task, all of the same shape; with fewer rows or columns than tasks they are averaged.
        scale: scaling coefficient λ of the result; the paper's 1 is for vision transformers, convolutions need less.

    Returns:
        The merged delta, of that shape.
    """
    rank = min(deltas[0].shape) // len(deltas)
    if rank == 0:
        return scale * np.add.reduce(deltas) / len(deltas)
    left, values, right = zip(*(leading(delta, rank) for delta in deltas), strict=True)
    return scale * (polar(np.hstack(left))[0] * np.concatenate(values)) @ polar(np.vstack(right))[0]


@merge_method(
    "iso_c",
    reference="Marczak et al., No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces, ICML 2025",
    granularity="matrices",
)
def iso_c(
    pretrained: np.ndarray, deltas: Sequence[np.ndarray], *, scale: Annotated[float, Within()] = 1.0
) -> np.ndarray:
    """The sum of the task vectors with all of its singular values replaced by their mean.

    Args:
        pretrained: the starting point's matrix; not used.
        deltas: one matrix per task, all of the same shape.
        scale: scaling coefficient λ of the result; the paper's 1 is for vision transformers, convolutions need less.

    Returns:
        The merged delta, of that shape.
    """
    factor, values = polar(np.add.reduce(deltas))
    return scale * values.mean() * factor


@merge_method(
    "iso_cts",
    reference="Marczak et al., No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces, ICML 2025",
    granularity="matrices",
)
def iso_cts(
    pretrained: np.ndarray,
    deltas: Sequence[np.ndarray],
    *,
    scale: Annotated[float, Within()] = 1.0,
    common: Annotated[float, Within(0, 1)] = 0.8,
) -> np.ndarray:
    """Iso-C with the least of the common directions replaced by directions of each task's own.

    Args:
        pretrained: the starting point's matrix; not used.
        deltas: one matrix per task, all of the same shape.
        scale: scaling coefficient λ of the result; the paper's 1 is for vision transformers, convolutions need less.
        common: share of the directions that are those of the sum; the tasks share the rest equally.

    Returns:
        The merged delta, of that shape.
    """
    full = min(deltas[0].shape)
    own = round((full - int(common * full)) / len(deltas))
    shared = full - own * len(deltas)
    if own == 0 or shared < 0:
        return iso_c(pretrained, deltas, scale=scale)
    parts = [leading(np.add.reduce(deltas), shared)]
    left = parts[0][0]
    parts += [leading(delta - left @ (left.T @ delta), own, np.linalg.norm(delta)) for delta in deltas]
    left, values, right = zip(*parts, strict=True)
    mean = np.concatenate(values).mean()
    return scale * mean * polar(np.hstack(left))[0] @ polar(np.vstack(right))[0]


def leading(matrix: np.ndarray, rank: int, size: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The leading singular triples of a matrix.

    Args:
        matrix: m × n.
        rank: how many, at most m and n.
        size: length of what the matrix was computed from: what is negligible against it counts as zero too.

    Returns:
        U (m × rank), σ descending, Vᵀ (rank × n); zero vectors where σ is zero.
    """
    if matrix.shape[0] > matrix.shape[1]:
        left, values, right = leading(matrix.T, rank, size)
        return right.T, values, left.T
    squares, vectors = np.linalg.eigh(matrix @ matrix.T)
    values = np.sqrt(np.maximum(squares[::-1][:rank], 0))
    left = vectors[:, ::-1][:, :rank]
    present = values > NEGLIGIBLE * max(values.max(initial=0), size, 1e-300)
    values, left = values * present, left * present
    return left, values, (left.T @ matrix) / np.where(present, values, 1)[:, None]


def polar(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest matrix whose rows (or columns, of which there are fewer) are orthonormal: its polar factor U Vᵀ.

    Args:
        matrix: m × n.

    Returns:
        U Vᵀ (m × n), without the directions whose singular value is zero; and all min(m, n) singular values.
    """
    if matrix.shape[0] > matrix.shape[1]:
        factor, values = polar(matrix.T)
        return factor.T, values
    squares, vectors = np.linalg.eigh(matrix @ matrix.T)
    values = np.sqrt(np.maximum(squares, 0))
    present = values > NEGLIGIBLE * max(values.max(initial=0), 1e-300)
    inverse = np.divide(1, values, where=present, out=np.zeros_like(values))
    return (vectors * inverse) @ vectors.T @ matrix, values * present
