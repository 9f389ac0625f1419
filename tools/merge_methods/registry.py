"""The table of merge methods that the decorator fills."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tools.errors import UserError

Vectors = Sequence[Mapping[str, np.ndarray]]
METHODS: dict[str, MergeMethod] = {}


@dataclass(frozen=True)
class MergeMethod:
    """A merge method and where it was published.

    Attributes:
        name: what a recipe calls it.
        reference: paper.
        function: ``(pretrained, deltas, **parameters) -> merged delta``, arrays of one tensor.
        prepare: looks at the whole task vectors first and adds parameters, ``(vectors, **parameters) -> parameters``;
            for methods with a threshold over all tensors.
    """

    name: str
    reference: str
    function: Callable[..., np.ndarray]
    prepare: Callable[..., dict] | None = None

    @property
    def summary(self) -> str:
        return inspect.getdoc(self.function).splitlines()[0]

    @property
    def defaults(self) -> dict[str, object]:
        """The parameters that a recipe may set, with their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and not p.name.startswith("_")}


def merge_method(name: str, reference: str, prepare: Callable[..., dict] | None = None):
    """Register a function as a merge method."""

    def register(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        METHODS[name] = MergeMethod(name, reference, function, prepare)
        return function

    return register


def scales(scale: float | Sequence[float], count: int) -> list[float]:
    """One scaling coefficient per task, from one for all or one for each.

    Raises:
        UserError: as many coefficients as tasks are needed.
    """
    values = [float(s) for s in scale] if isinstance(scale, list | tuple) else [float(scale)] * count
    if len(values) != count or not np.isfinite(values).all():
        raise UserError(f"scale must be one number, or one for each of the {count} task vectors; got {scale}")
    return values
