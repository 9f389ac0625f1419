"""What a search may choose: coefficients per task, or per task and group of layers, and other parameters of a merge method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import numpy as np
import yaml

from tools.errors import UserError, nearest
from tools.merge_methods import METHODS
from tools.merge_methods.registry import Parameter
from tools.network import matches
from tools.recipe import Recipe

Value = float | int | str | bool
COEFFICIENTS = ("scale", "weights")  # of which there is one for each task and group, where the method allows it
LARGEST_GRID = 100_000
DIGITS = 6  # significant ones, so that a recipe stays readable


@dataclass(frozen=True)
class Range:
    """All numbers from ``low`` to ``high``."""

    low: float
    high: float


@dataclass(frozen=True)
class Coefficient:
    """One value that is chosen.

    Attributes:
        name: the column of trials.csv: "scale/liver", or "decoder/scale/liver" of a group.
        parameter: of the merge method.
        group: pattern of the tensors that it is for; empty for all that no group has.
        task: position of its task vector; None for all tasks together.
        starts: the values that are tried first: the recipe's own, and 1/T.
        choice: a range, or a list of values.
        whole: only whole numbers.
    """

    name: str
    parameter: str
    group: str
    task: int | None
    starts: tuple[Value, ...]
    choice: Range | tuple[Value, ...]
    whole: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For search.json, and to see whether a study was begun with another space."""
        choice = self.choice
        span = {"low": choice.low, "high": choice.high} if isinstance(choice, Range) else {"values": [*choice]}
        return {"parameter": self.parameter, "group": self.group, "task": self.task, "starts": [*self.starts], **span}


class SearchSpace:
    """The coefficients of a search, and the recipes that they make.

    Args:
        recipe: what is not searched stays as it says, and its own values are the first that are tried.
        tasks: names of the task vectors, in its order.
        tensors: names of the tensors that it merges.
        wanted: ranges "0..1" or lists of values by parameter, as YAML text too; or one of them, for the method's coefficient;
            None for that from 0 to 1.
        per_task: parameters with a value for each task; None for those of ``COEFFICIENTS`` that can have one.
        groups: patterns of tensors, or "encoder" and "decoder"; each gets coefficients of its own.
        points: values to make of each range, evenly spaced; 0 leaves ranges as they are.

    Attributes:
        coefficients: all that are chosen.
        notes: what a user should know, a line each.

    Raises:
        UserError: names a parameter or a value that the method does not have or take.
    """

    def __init__(
        self,
        recipe: Recipe,
        tasks: Sequence[str],
        tensors: Sequence[str],
        wanted: object = None,
        per_task: Sequence[str] | None = None,
        groups: Sequence[str] = (),
        points: int = 0,
    ) -> None:
        self.base = recipe
        self.method = METHODS[recipe.method]
        self.notes: list[str] = []
        if recipe.modulate:
            raise UserError(
                "a recipe with modulate cannot be searched; leave it out, and merge the best recipe with it"
            )
        choices = {name: self._choice(name, value) for name, value in self._parsed(wanted).items()}
        able = [name for name, parameter in self.method.parameters.items() if parameter.within.per_task]
        for name in per_task or ():
            if name not in able:
                which = f"; those are {', '.join(able)}" if able else ""
                raise UserError(
                    f"--per_task: {self.method.name} has no {name!r} that takes a value for each task{which}"
                )
        alone = [name for name in COEFFICIENTS if name in able] if per_task is None else per_task
        titles = [task if tasks.count(task) == 1 else f"{task} {i}" for i, task in enumerate(tasks, start=1)]
        rest = [name for name in tensors if not any(matches(name, group) for group in groups)]
        self.coefficients: list[Coefficient] = []
        for name, choice in choices.items():
            grouped = groups if name in COEFFICIENTS or name in alone else ()
            for group in [*grouped, *([""] if rest or not grouped else [])]:
                for task in range(len(tasks)) if name in alone else [None]:
                    title = "/".join(filter(None, [group, name, titles[task] if task is not None else ""]))
                    self.coefficients.append(self._coefficient(title, name, group, task, len(tasks), choice, points))

    @property
    def starts(self) -> list[dict[str, Value]]:
        """The values that are tried first: the recipe's own, and 1/T, unless that is the same."""
        points = [{c.name: c.starts[i] for c in self.coefficients} for i in (0, 1)]
        return points[:1] if points[0] == points[1] else points

    @property
    def size(self) -> int:
        """Points of the grid; 0 when there are ranges."""
        return prod(0 if isinstance(c.choice, Range) else len(c.choice) for c in self.coefficients)

    def grid(self) -> Iterator[dict[str, Value]]:
        """Every combination of the lists of values."""
        names = [c.name for c in self.coefficients]
        for values in product(*(c.choice for c in self.coefficients)):
            yield dict(zip(names, values, strict=True))

    def recipe(self, values: Mapping[str, Value]) -> Recipe:
        """The recipe with these values.

        Args:
            values: by coefficient.
        """
        found: dict[str, dict[str, Any]] = {}
        for c in self.coefficients:
            parameters = found.setdefault(c.group, {})
            if c.task is None:
                parameters[c.parameter] = values[c.name]
            else:
                parameters.setdefault(c.parameter, []).append(values[c.name])
        overrides = [{"tensors": group, "parameters": parameters} for group, parameters in found.items() if group]
        parameters = self.base.parameters | found.get("", {})
        return replace(self.base, parameters=parameters, overrides=[*self.base.overrides, *overrides])

    def as_dict(self) -> dict[str, Any]:
        return {c.name: c.as_dict() for c in self.coefficients}

    def _parsed(self, wanted: object) -> dict[str, object]:
        if isinstance(wanted, str) and wanted.lstrip().startswith("{"):
            try:
                wanted = yaml.safe_load(wanted)
            except yaml.YAMLError:
                raise UserError(f"--space {wanted!r} is not like {{scale: 0..1, density: [0.1, 0.2]}}") from None
        if isinstance(wanted, Mapping):
            if not wanted:
                raise UserError("--space is empty; it should be like {scale: 0..1, density: [0.1, 0.2]}")
            return {str(name): value for name, value in wanted.items()}
        main = next((name for name in (*COEFFICIENTS, "t") if name in self.method.parameters), None)
        if main is None:
            has = f"it has {', '.join(self.method.parameters)}" if self.method.parameters else "it has no parameters"
            raise UserError(f"{self.method.name} has no coefficient to search ({has}); name a parameter by --space")
        return {main: "0..1" if wanted is None else wanted}

    def _choice(self, name: str, value: object) -> Range | tuple[Value, ...]:
        known = self.method.parameters
        if name not in known:
            choice = f"it has {', '.join(known)}" if known else "it has none"
            raise UserError(f"--space: {self.method.name} has no parameter {name!r}{nearest(name, known)}; {choice}")
        if any(name in override["parameters"] for override in self.base.overrides):
            raise UserError(f"the recipe's overrides set {name}, which is to be searched; take it out of them")
        parameter = known[name]
        if isinstance(value, str) and ".." in value and parameter.kind in (int, float):
            return self._range(parameter, value)
        if not isinstance(value, list | tuple) or not value:
            raise UserError(
                f"--space: {name} must be a range such as 0..1 or a list of values such as [0.1, 0.2]; got {value!r}"
            )
        for item in value:
            parameter.check(item, self.method.name)
            if isinstance(item, list | tuple):
                raise UserError(f"--space: {name} must be a list of single values; got {item}")
        return tuple(dict.fromkeys(readable(float(item)) if parameter.kind is float else item for item in value))

    def _range(self, parameter: Parameter, text: str) -> Range:
        try:
            low, high = (parameter.kind(bound) for bound in text.split(".."))
        except ValueError:
            raise UserError(f"--space: {parameter.name} must be a range such as 0..1; got {text!r}") from None
        for bound in (low, high):
            parameter.check(bound, self.method.name)
        if low >= high:
            raise UserError(f"--space: {parameter.name}: the range {text} is empty")
        return Range(low, high)

    def _coefficient(
        self,
        title: str,
        name: str,
        group: str,
        task: int | None,
        tasks: int,
        choice: Range | tuple[Value, ...],
        points: int,
    ) -> Coefficient:
        parameter = self.method.parameters[name]
        own = self.base.parameters.get(name, parameter.default)
        if isinstance(own, list | tuple):
            if task is None:
                raise UserError(f"the recipe has one {name} for each task, but {name} is not in --per_task")
            own = own[task]
        own = readable(float(own)) if parameter.kind is float else own
        starts = (own, readable(1 / tasks) if name == "scale" else own)
        whole = parameter.kind is int
        if isinstance(choice, Range) and points:
            values = np.linspace(choice.low, choice.high, points)
            choice = tuple(dict.fromkeys(round(v) if whole else readable(v) for v in values.tolist()))
        elif isinstance(choice, Range):
            wide = Range(min(choice.low, *starts), max(choice.high, *starts))
            if wide != choice:
                self.notes.append(
                    f"{title}: searched from {wide.low:g} to {wide.high:g}, so that what is tried first is in it"
                )
            choice = wide
        return Coefficient(title, name, group, task, starts, choice, whole)


def readable(value: Value) -> Value:
    """A number with so few digits that people can read it."""
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
