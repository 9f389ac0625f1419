"""RegMean: every layer answers to each task's inputs as that task's own layer does, as nearly as one matrix can."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

import numpy as np

from tools.merge_methods.registry import Within, merge_method

RIDGE = 1e-6  # share of the mean of a Gram matrix' diagonal: inputs that are always zero say nothing, and are averaged


@merge_method(
    "regmean",
    reference="Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models, ICLR 2023",
    granularity="matrices",
    needs_statistics=True,
)
def regmean(
    pretrained: np.ndarray,
    deltas: Sequence[np.ndarray],
    statistics: Iterable[np.ndarray],
    *,
    scale: Annotated[float, Within()] = 1.0,
    off_diagonal: Annotated[float, Within(0, 1)] = 0.9,
) -> np.ndarray:
    """The least-squares solution for the layer's outputs on all tasks' inputs: (Σ τ·G) (Σ G)⁻¹.

    Args:
        pretrained: the starting point's matrix; not used.
        deltas: one matrix per task, outputs × (inputs · k³), all of the same shape.
        statistics: Gram matrix G of the layer's inputs per task: (inputs · k³)² of a convolution's patches, or inputs² of a
            transposed convolution, whose kernel positions all see the same inputs.
        scale: scaling coefficient λ of the result; the paper's is 1.
        off_diagonal: what the Gram matrices' entries off the diagonal are multiplied by; 0.9 in the paper for most models.

    Returns:
        The merged delta, of that shape.
    """
    from scipy.linalg import solve

    if len(deltas) == 1:  # without the equations it is exact
        return scale * deltas[0]
    normal, target = None, None
    for delta, gram in zip(deltas, statistics, strict=True):
        gram = np.array(gram, np.float64)
        diagonal = gram.diagonal() + RIDGE * (gram.diagonal().mean() or 1.0)
        gram *= off_diagonal
        np.fill_diagonal(gram, diagonal)
        product = _by_inputs(delta, len(gram)) @ gram
        normal = gram if normal is None else np.add(normal, gram, out=normal)
        target = product if target is None else target + product
    merged = solve(normal, target.T, assume_a="pos", overwrite_a=True, overwrite_b=True, check_finite=False).T
    return scale * _as_before(merged, deltas[0].shape)


def _by_inputs(matrix: np.ndarray, inputs: int) -> np.ndarray:
    """Outputs × (inputs · k³) as (outputs · k³) × inputs; the matrix itself where its columns are the inputs."""
    positions = matrix.shape[1] // inputs
    return matrix.reshape(len(matrix), inputs, positions).swapaxes(1, 2).reshape(-1, inputs)


def _as_before(matrix: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The inverse of ``_by_inputs``."""
    inputs = matrix.shape[1]
    return matrix.reshape(shape[0], shape[1] // inputs, inputs).swapaxes(1, 2).reshape(shape)
