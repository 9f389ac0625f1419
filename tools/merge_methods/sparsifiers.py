"""Sparsifiers: thin out each task vector before any merge method; the same seed drops the same entries."""

from __future__ import annotations

from typing import Annotated

import numpy as np

from tools.merge_methods.registry import Within, sparsifier


@sparsifier("dare", reference="Yu et al., Language Models are Super Mario, ICML 2024", granularity="entries")
def dare(
    delta: np.ndarray,
    uniform: np.ndarray,
    *,
    density: Annotated[float, Within(0, 1, open=True)] = 0.5,
    rescale: bool = True,
) -> np.ndarray:
    """Drop entries at random.

    Args:
        delta: of one task.
        uniform: random numbers.
        density: share of the entries that stay.
        rescale: divide what stays by the density, so that the expected sum is unchanged.

    Returns:
        What the entries are multiplied by.
    """
    return (uniform < density) * np.float32(1 / density if rescale else 1)


@sparsifier("della", reference="Deep et al., DELLA-Merging, arXiv 2406.11617, 2024", granularity="rows")
def della(
    delta: np.ndarray,
    uniform: np.ndarray,
    *,
    density: Annotated[float, Within(0, 1, open=True)] = 0.5,
    epsilon: Annotated[float, Within(0, 0.5)] = 0.15,
    rescale: bool = True,
) -> np.ndarray:
    """Drop entries at random, small ones of an output channel more often than large ones.

    Args:
        delta: of one task, outputs × the rest.
        uniform: random numbers.
        density: mean share of the entries that stay.
        epsilon: the smallest entry of a row stays with probability density - epsilon, the largest with density + epsilon.
        rescale: divide what stays by its probability, so that the expected sum is unchanged.

    Returns:
        What the entries are multiplied by.
    """
    rank = np.abs(delta).argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    last = delta.shape[1] - 1
    relative = rank / last if last > 0 else np.full(delta.shape, 0.5)
    epsilon = min(epsilon, density, 1 - density)
    probability = np.maximum(density - epsilon + 2 * epsilon * relative, 1e-6)
    return (uniform < probability) * (1 / probability if rescale else 1.0)


@sparsifier("breadcrumbs", reference="Davari and Belilovsky, Model Breadcrumbs, ECCV 2024", granularity="rows")
def breadcrumbs(
    delta: np.ndarray,
    uniform: np.ndarray,
    *,
    density: Annotated[float, Within(0, 1, open=True)] = 0.5,
    outliers: Annotated[float, Within(0, 1)] = 0.01,
) -> np.ndarray:
    """Drop a tensor's largest entries, which are outliers, and its smallest, which are noise.

    Args:
        delta: of one task, outputs × the rest.
        uniform: not used.
        density: share of the entries that stay, one at least.
        outliers: share of the entries that are dropped as too large.

    Returns:
        What the entries are multiplied by.
    """
    order = np.abs(delta).reshape(-1).argsort(kind="stable")
    stay = min(max(1, round(density * delta.size)), delta.size)
    end = max(delta.size - round(outliers * delta.size), stay)
    factors = np.zeros(delta.size, np.float32)
    factors[order[end - stay : end]] = 1
    return factors.reshape(delta.shape)
