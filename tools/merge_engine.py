"""Runs a merge method over a whole network, piece by piece: the files are read once and little is held in memory."""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fnmatch import fnmatchcase
from itertools import groupby
from math import prod
from typing import Any

import numpy as np

from tools.errors import UserError, nearest
from tools.merge_methods import METHODS, POSTPROCESSORS, SPARSIFIERS
from tools.merge_methods.registry import per_task
from tools.network import matches, part_of
from tools.recipe import Recipe
from tools.sparsified import SparsifiedVector
from tools.task_statistics import TaskStatistics
from tools.task_vector import TaskVector, exact_where_needed
from tools.weights_file import BLOCK, WeightsFile, is_finite, to_bytes

THREADS = min(4, os.cpu_count() or 1)
SMALLEST_VARIANCE = 1e-12
HALF = ("float16", "bfloat16")
SAMPLED = 2**27  # entries of a task vector from which on its sample is thinned out


class MergeEngine:
    """Merges the backbones of task vectors onto their starting point.

    Args:
        recipe: method, parameters and which tensors take part.
        start: weights of the starting point.
        vectors: of the same network.
    """

    def __init__(self, recipe: Recipe, start: WeightsFile, vectors: Sequence[TaskVector]) -> None:
        keep_freed_memory()
        self.recipe = recipe
        self.method = METHODS[recipe.method]
        self.start = start
        self.structure = vectors[0].facts.structure
        self.names = [name for name in start.entries if name in vectors[0].tensors]
        self._check_patterns()
        self.vectors = vectors
        self._in_float32 = any(vector.facts.dtype not in HALF for vector in vectors)
        if recipe.sparsify:
            sparsifier, values = SPARSIFIERS[recipe.sparsify["method"]], recipe.sparsify.get("parameters") or {}
            whole = set(self.structure.statistics)
            self.vectors = [SparsifiedVector(vector, sparsifier, values, recipe.seed, whole) for vector in vectors]
        self._corrections = [
            (POSTPROCESSORS[step["method"]], POSTPROCESSORS[step["method"]].defaults | (step.get("parameters") or {}))
            for step in recipe.postprocess
        ]
        self._by_entries = all(m.granularity == "entries" for m in (self.method, *(m for m, _ in self._corrections)))
        with_statistics = vectors if self.method.needs_statistics else []
        self._statistics = [TaskStatistics(vector, recipe.method) for vector in with_statistics]
        self._check_statistics()
        self._prepared: dict[str, dict[str, Any]] = {}
        self._parameters = {name: self.parameters_for(name) for name in self.names}
        self._check_method()
        self._depth = {name: i / max(1, len(self.names) - 1) for i, name in enumerate(self.names)}

    def dtype(self, name: str) -> str:
        """Of a merged tensor: as the recipe says, or else the starting point's; float32 where half of it would round τ away."""
        own = self.start.entries[name].dtype
        return self.recipe.dtype or ("float32" if own in HALF and self._in_float32 else own)

    def treatment(self, name: str) -> str:
        """What is done with a tensor: "kept", "mean" (running statistics), "scaled mean" (no matrix, or nothing was measured of
        it), or "merged"."""
        recipe = self.recipe
        if not any(matches(name, p) for p in recipe.include) or any(matches(name, p) for p in recipe.exclude):
            return "kept"
        if name in self.structure.statistics:
            return "mean"
        matrix = self.structure.is_matrix(name, self.start.entries[name].shape)
        unmeasured = any(measured.shape(name) is None for measured in self._statistics)
        return "scaled mean" if unmeasured or (self.method.granularity == "matrices" and not matrix) else "merged"

    def measured(self) -> list[dict[str, str]]:
        """For each task what identifies the statistics that the merge uses, if it uses any."""
        return [{"statistics_sha256": s.sha256} for s in self._statistics] or [{}] * len(self.vectors)

    def parameters_for(self, name: str) -> dict[str, Any]:
        """The method's parameters for one tensor."""
        values = {**self.method.defaults, **self.recipe.parameters}
        for override in self.recipe.overrides:
            if matches(name, override["tensors"]):
                values |= override["parameters"]
        return values

    def prepare(self) -> None:
        """Let a method with thresholds look at the task vectors first: at all of them, or with scope "tensor" at each."""
        if self.method.prepare is None:
            return
        found: dict[str, dict[str, Any]] = {}
        names = [name for name in self.names if self.treatment(name) == "merged"]
        for name in names:
            values = self._parameters[name]
            alone = values.get("scope") == "tensor"
            key = f"{name if alone else ''} {values}"
            if key not in found:
                deltas = [Entries(vector, [name] if alone else names) for vector in self.vectors]
                found[key] = self.method.prepare(deltas, **values)
            self._prepared[name] = found[key]

    def pieces(self) -> Iterator[tuple[str, Iterator[np.ndarray]]]:
        """Name and bytes of every tensor of the merged backbone, in the starting point's order.

        Raises:
            UserError: an input is damaged, holds NaN or infinite values, or the result would.
        """
        self.prepare()
        tasks = []
        for name in self.names:
            if self._by_entries and self.treatment(name) == "merged":
                tasks += [(name, number) for number in range(len(self.vectors[0].tensors[name].checksums))]
            else:
                tasks.append((name, None))
        # one core writes; and factorisations of whole matrices use all cores themselves
        results = in_order(self._piece, tasks, max(1, THREADS - 1) if self._by_entries else 1)
        merged = dict.fromkeys(self.names)
        for name, group in groupby(results, key=lambda result: result[0]):
            merged.pop(name)
            yield name, (data for _, data in group)
        for name in merged:  # tensors without entries
            yield name, iter(())

    def _piece(self, task: tuple[str, int | None]) -> tuple[str, np.ndarray]:
        name, number = task
        with np.errstate(over="ignore", invalid="ignore"):
            merged = self._whole(name) if number is None else self._block(name, number)
            data = to_bytes(merged, self.dtype(name))
            if not is_finite(merged.astype(np.float16) if self.dtype(name) == "float16" else merged):
                for vector in self.vectors:
                    vector.check_finite(name)
                if is_finite(merged):
                    raise does_not_fit(name)
                raise UserError(f"the merged tensor {name} has infinite values: the coefficients are too large")
        return name, data

    def _pretrained(self, name: str, number: int) -> np.ndarray:
        """A block of the starting point, after checking that it is the one that the vectors came from."""
        start = number * BLOCK
        values = self.start.read(name, start, start + BLOCK)
        vector = self.vectors[0]
        if not self.recipe.other_start and not vector.came_from(name, number, values.astype(np.float32, copy=False)):
            facts = vector.facts
            raise UserError(
                f"{vector.path} (task {vector.task}) comes from another starting point: {facts.pretrained_name} "
                f"{facts.pretrained_sha256[:12]}, from which {self.start.path} differs in tensor {name}"
            )
        return values

    def _block(self, name: str, number: int) -> np.ndarray:
        """Entries of one tensor: in float32, and once more in float64 where float32 differences are not exact."""
        pretrained = self._pretrained(name, number)
        blocks = [vector.block(name, number) for vector in self.vectors]
        measured = [statistics.block(name, number) for statistics in self._statistics]
        merged = pretrained + self._apply(name, pretrained, [block.values for block in blocks], measured)
        if any(block.positions.size for block in blocks):
            where, exact = exact_where_needed(blocks)
            wide = pretrained[where].astype(np.float64)
            merged[where] = wide + self._apply(name, wide, exact, [values[where] for values in measured])
        return merged

    def _whole(self, name: str) -> np.ndarray:
        """One whole tensor in float64."""
        shape, treatment = self.start.entries[name].shape, self.treatment(name)
        blocks = [self._pretrained(name, number) for number in range(len(self.vectors[0].tensors[name].checksums))]
        pretrained = np.concatenate(blocks or [np.empty(0)]).reshape(shape).astype(np.float64)
        if treatment == "kept" or not pretrained.size:
            return pretrained
        deltas = [vector.delta(name) for vector in self.vectors]
        if treatment == "mean":
            shares = _shares(self._parameters[name], len(deltas))
            merged = pretrained + sum(share * delta for share, delta in zip(shares, deltas, strict=True))
            return np.maximum(merged, SMALLEST_VARIANCE) if name.endswith("running_var") else merged
        if treatment == "scaled mean":
            merged = _scaled_mean(deltas, self._parameters[name].get("scale", 1.0))
            return pretrained + self._corrected(name, merged, deltas, is_matrix=False)
        is_matrix = self.structure.is_matrix(name, shape)
        arrays = [self.structure.as_matrices(name, array) for array in (pretrained, *deltas)]
        groups = [
            self._apply(name, before, after, measured, is_matrix)
            for (before, *after), measured in zip(zip(*arrays, strict=True), self._measured(name), strict=True)
        ]
        return pretrained + self.structure.from_matrices(name, np.stack(groups), shape)

    def _measured(self, name: str) -> Iterator[Iterable[np.ndarray]]:
        """For each group of a tensor the statistics of all tasks; of an ungrouped one they are read when they are needed."""
        groups = self.structure.groups.get(name, 1)
        if self.method.granularity == "entries":
            arrays = [self.structure.as_matrices(name, measured.array(name)) for measured in self._statistics]
        elif groups > 1:
            arrays = [measured.array(name) for measured in self._statistics]
        else:
            return iter([(measured.array(name)[0] for measured in self._statistics)])
        return ([array[group] for array in arrays] for group in range(groups))

    def _check_patterns(self) -> None:
        """A pattern that means no tensor is a mistake.

        Raises:
            UserError: names the entry of the recipe, and the most similar tensor.
        """
        places = [(("include", i), pattern) for i, pattern in enumerate(self.recipe.include)]
        places += [(("exclude", i), pattern) for i, pattern in enumerate(self.recipe.exclude)]
        places += [(("overrides", i, "tensors"), entry["tensors"]) for i, entry in enumerate(self.recipe.overrides)]
        for place, pattern in places:
            if any(matches(name, pattern) for name in self.names):
                continue
            entry = f"{self.recipe.where(place)}{place[0]}: "
            if pattern == "head" or any(fnmatchcase(name, pattern) for name in self.structure.head):
                raise UserError(f"{entry}{pattern!r} is the head, which is not merged: each task keeps its own")
            known = ["encoder", "decoder", *dict.fromkeys(f"{part_of(name)}.*" for name in self.names), *self.names]
            raise UserError(f"{entry}no tensor is called {pattern!r}{nearest(pattern, known)}")

    def _check_method(self) -> None:
        """Let a method refuse its parameters, or this number of tasks, before anything is done.

        Raises:
            UserError: what it says.
        """
        if self.method.prepare is None and not self.method.needs_statistics:
            one = np.ones((1, 1))
            for values in {repr(values): values for values in self._parameters.values()}.values():
                self.method.function(one, [one] * len(self.vectors), **values)

    def _check_statistics(self) -> None:
        for measured in self._statistics:
            for name in self.names:
                shape, tensor = measured.shape(name), self.start.entries[name].shape
                if self.method.granularity == "matrices" and shape:
                    groups, _, columns = self.structure.matrices_shape(name, tensor)
                    fits = len(shape) == 3 and shape == (groups, shape[1], shape[1]) and columns % max(shape[1], 1) == 0
                else:
                    fits = shape in (None, tensor)
                if not fits:
                    raise UserError(
                        f"{measured.path}: the statistics of tensor {name} are {shape}, which does not fit {tensor}"
                    )

    def _apply(
        self,
        name: str,
        pretrained: np.ndarray,
        deltas: list[np.ndarray],
        measured: Iterable[np.ndarray] = (),
        is_matrix: bool = False,
    ) -> np.ndarray:
        """The merged delta of a part of a tensor: method, then post-processors."""
        inputs = (pretrained, deltas, measured) if self.method.needs_statistics else (pretrained, deltas)
        merged = self.method.function(*inputs, **self._parameters[name], **self._prepared.get(name, {}))
        return self._corrected(name, merged, deltas, is_matrix)

    def _corrected(self, name: str, merged: np.ndarray, deltas: Sequence[np.ndarray], is_matrix: bool) -> np.ndarray:
        for method, parameters in self._corrections:
            if is_matrix or method.granularity == "entries":
                merged = method.function(merged, deltas, self._depth[name], **parameters)
        return merged


def does_not_fit(name: str) -> UserError:
    """Of a tensor that would be infinite in float16, and in no other dtype."""
    return UserError(f"the merged tensor {name} does not fit float16: let the recipe name another dtype")


def merged_buffers(paths: Sequence[object], vectors: Sequence[TaskVector]) -> dict[str, np.ndarray]:
    """Integer buffers: counters of training steps become the largest one, all others must agree.

    Raises:
        UserError: names the buffer and two files that differ in it.
    """
    merged = {}
    for name, first in vectors[0].buffers.items():
        for path, vector in zip(paths, vectors, strict=True):
            other = vector.buffers.get(name)
            if name.endswith("num_batches_tracked"):
                merged[name] = np.maximum(merged.get(name, first), other)
            elif other is None or not np.array_equal(first, other):
                raise UserError(f"{paths[0]} and {path} differ in the buffer {name}, which cannot be merged")
            else:
                merged[name] = first
    return merged


class Entries:
    """The entries of some of a task vector's tensors, for a method's first look."""

    def __init__(self, vector: TaskVector, names: Sequence[str]) -> None:
        self.vector = vector
        self.names = names
        self.size = sum(prod(vector.tensors[name].shape) for name in names)

    def scan(self, function: Callable[[np.ndarray], Any]) -> Iterator[Any]:
        tasks = [(name, n) for name in self.names for n in range(len(self.vector.tensors[name].checksums))]
        return in_order(lambda task: function(self.vector.block(*task).values), tasks, THREADS)

    def sample(self) -> np.ndarray:
        step = 1 + self.size // SAMPLED
        return np.concatenate([self.vector.sample(name, step) for name in self.names])


def keep_freed_memory() -> None:
    """Let glibc keep the memory of one block for the next: clearing new pages takes longer than most arithmetic on them."""
    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX
        for parameter, value in ((-1, 2**30), (-2, 2**24), (-3, 2**30), (-8, 1)):
            library.mallopt(parameter, value)


def in_order(function: Callable[[Any], Any], tasks: Iterable[Any], threads: int) -> Iterator[Any]:
    """Like ``map``, a few tasks ahead in threads: NumPy, hashing and reading files let them run side by side."""
    with ThreadPoolExecutor(threads) as executor:
        waiting = deque()
        try:
            for task in tasks:
                waiting.append(executor.submit(function, task))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _shares(parameters: Mapping[str, Any], tasks: int) -> np.ndarray:
    """How much each task counts in the mean of running statistics: as its coefficient does; nothing where all are zero."""
    if "t" in parameters and tasks == 2:
        factors = np.array([1 - parameters["t"], parameters["t"]])
    else:
        factors = np.array(per_task(parameters.get("weights", 1.0), tasks))
    factors *= np.abs(per_task(parameters.get("scale", 1.0), tasks))
    return factors / (factors.sum() or 1.0)


def _scaled_mean(deltas: Sequence[np.ndarray], scale: Any) -> np.ndarray:
    factors = per_task(scale, len(deltas))
    return np.add.reduce([delta * factor for delta, factor in zip(deltas, factors)]) / len(deltas)
