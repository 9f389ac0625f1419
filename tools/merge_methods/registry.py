"""The tables of merge methods, sparsifiers and post-processors that the decorators fill, and what their parameters may be.

All are pure functions of arrays, of one tensor or of a part of it; their keyword parameters with their annotations are the
recipe's schema, their docstrings the reference.
"""

from __future__ import annotations

import inspect
import math
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from tools.errors import UserError, nearest

Result = TypeVar("Result")
Granularity = Literal["entries", "rows", "matrices"]


@dataclass(frozen=True)
class Within:
    """The range of a number, for ``Annotated[float, Within(0, 1)]``.

    Attributes:
        low: the smallest value.
        high: the largest one.
        open: the smallest value itself is not allowed.
        per_task: a list with one number for each task vector is allowed too.
    """

    low: float = -np.inf
    high: float = np.inf
    open: bool = False
    per_task: bool = False

    def __str__(self) -> str:
        bounds = [f"{'above' if self.open else 'at least'} {self.low:g}"] if np.isfinite(self.low) else []
        bounds += [f"at most {self.high:g}"] if np.isfinite(self.high) else []
        return " and ".join(bounds) or "finite"

    def __contains__(self, value: float) -> bool:
        try:
            value = float(value)
        except OverflowError:
            return False
        return np.isfinite(value) and (self.low < value if self.open else self.low <= value) and value <= self.high


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method, as its signature and docstring say.

    Attributes:
        name: in recipes and on the command line.
        default: its value when a recipe does not set it.
        kind: float, int, bool, or the values of a Literal.
        within: range of a number.
        help: one sentence.
    """

    name: str
    default: object
    kind: type | tuple[str, ...]
    within: Within
    help: str

    def check(self, value: object, method: str, tasks: int | None = None) -> None:
        """Refuse a value that the method does not take.

        Args:
            value: from a recipe.
            method: for the message.
            tasks: how many task vectors there are, where that is known.

        Raises:
            UserError: of another type, out of range, or not one for each task.
        """
        if isinstance(self.kind, tuple):
            if value not in self.kind:
                hint = nearest(str(value), self.kind)
                raise UserError(
                    f"{method}: {self.name} must be {' or '.join(map(repr, self.kind))}, got {value!r}{hint}"
                )
        elif self.kind is bool:
            if not isinstance(value, bool):
                raise UserError(f"{method}: {self.name} must be true or false, got {value!r}")
        elif isinstance(value, list | tuple) and self.within.per_task:
            if tasks is not None and len(value) != tasks:
                raise UserError(
                    f"{method}: {self.name} must be one number, or one for each of the {tasks} task vectors; got {value}"
                )
            for number in value:
                self._check_number(number, method)
        else:
            self._check_number(value, method)

    def _check_number(self, value: object, method: str) -> None:
        kinds = int if self.kind is int else int | float
        if isinstance(value, bool) or not isinstance(value, kinds):
            what = "a whole number" if self.kind is int else "a number"
            more = ", or one for each task" if self.within.per_task else ""
            raise UserError(f"{method}: {self.name} must be {what}{more}; got {value!r}{_as_number(value)}")
        if value not in self.within:
            raise UserError(f"{method}: {self.name} must be {self.within}, got {value}")


def _as_number(value: object) -> str:
    """A hint for what people take for a number, and YAML for text, such as 1e-1."""
    with suppress(ValueError):
        if isinstance(value, str) and math.isfinite(float(value)):
            return f" (text: write {float(value)})"
    return ""


class Deltas(Protocol):
    """All of one task's τ, as the first look of a method sees it.

    Attributes:
        size: number of entries.
    """

    size: int

    def scan(self, function: Callable[[np.ndarray], Result]) -> Iterator[Result]:
        """The results of a function for all pieces, flat arrays, in order; computed side by side."""

    def sample(self) -> np.ndarray:
        """Some of the entries from everywhere, in little time."""


@dataclass(frozen=True)
class Method:
    """A merge method, a sparsifier or a post-processor, and where it was published.

    Attributes:
        name: what a recipe calls it.
        reference: paper.
        function: see the decorators below.
        granularity: what the arrays are: "entries", flat pieces of any tensor; "rows", every tensor as outputs × the rest,
            biases and other parameters per channel as one row; "matrices", only kernels and linear layers, as outputs ×
            (input · k³), while a merge method's other tensors are averaged and multiplied by the parameter ``scale``.
        prepare: looks at the whole task vectors first and adds parameters, ``(deltas, **parameters) -> parameters``;
            for methods with a threshold over all tensors.
        needs_statistics: the function's third argument is what was measured of each specialist (``tools.task_statistics``);
            tensors of which nothing was are averaged and multiplied by the parameter ``scale``.
    """

    name: str
    reference: str
    function: Callable[..., np.ndarray]
    granularity: Granularity = "entries"
    prepare: Callable[..., dict[str, object]] | None = None
    needs_statistics: bool = False

    @property
    def summary(self) -> str:
        return inspect.getdoc(self.function).splitlines()[0]

    @property
    def parameters(self) -> dict[str, Parameter]:
        """What a recipe may set, by name."""
        return parameters_of(self.function)

    @property
    def defaults(self) -> dict[str, object]:
        return {name: parameter.default for name, parameter in self.parameters.items()}

    def check(self, values: Mapping[str, object], tasks: int | None = None) -> None:
        """Refuse parameters that the method does not have, and values that it does not take.

        Raises:
            UserError: names the parameter, and the nearest one that there is.
        """
        known = self.parameters
        for name, value in values.items():
            if name not in known:
                choice = f"it has {', '.join(known)}" if known else "it has none"
                raise UserError(f"{self.name} has no parameter {name!r}{nearest(str(name), known)}; {choice}")
            known[name].check(value, self.name, tasks)


METHODS: dict[str, Method] = {}
SPARSIFIERS: dict[str, Method] = {}
POSTPROCESSORS: dict[str, Method] = {}


def merge_method(
    name: str,
    reference: str,
    granularity: Granularity = "entries",
    prepare: Callable[..., dict[str, object]] | None = None,
    needs_statistics: bool = False,
):
    """Register ``(pretrained, deltas, *, parameters…) -> merged delta`` as a merge method.

    With ``needs_statistics`` it is ``(pretrained, deltas, statistics, *, parameters…)``.
    """
    return _register(METHODS, name, reference, granularity, prepare, needs_statistics)


def sparsifier(name: str, reference: str, granularity: Granularity):
    """Register ``(delta, uniform, *, parameters…) -> factors`` as a sparsifier, which thins out one task vector before merging.

    ``uniform`` holds random numbers in [0, 1), ``factors`` what the entries are multiplied by; all have the same shape.
    """
    return _register(SPARSIFIERS, name, reference, granularity)


def postprocessor(name: str, reference: str, granularity: Granularity):
    """Register ``(merged, deltas, depth, *, parameters…) -> merged delta`` as a post-processor, which corrects what was merged.

    ``depth`` is 0 for the network's first tensor and 1 for its last one.
    """
    return _register(POSTPROCESSORS, name, reference, granularity)


def _register(table: dict[str, Method], name: str, reference: str, *facts: Any):
    def register(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        table[name] = Method(name, reference, function, *facts)
        return function

    return register


@cache
def parameters_of(function: Callable) -> dict[str, Parameter]:
    """The keyword parameters of a function that do not begin with an underscore."""
    hints = typing.get_type_hints(function, include_extras=True)
    texts = dict(re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", inspect.getdoc(function), re.MULTILINE))
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY or name.startswith("_"):
            continue
        hint, within = hints[name], Within()
        if typing.get_origin(hint) is typing.Annotated:
            hint, within = typing.get_args(hint)
        kind = typing.get_args(hint) if typing.get_origin(hint) is Literal else hint
        found[name] = Parameter(name, parameter.default, kind, within, " ".join(texts[name].split()))
    return found


def per_task(value: float | Sequence[float], count: int) -> list[float]:
    """One number for each task, from one for all or a list."""
    return [float(v) for v in value] if isinstance(value, list | tuple) else [float(value)] * count
