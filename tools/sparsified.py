"""A task vector with some of its entries dropped, in front of any merge method."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from xxhash import xxh3_128_intdigest

from tools.merge_methods.registry import Method
from tools.task_vector import Block, TaskVector
from tools.weights_file import BLOCK


class SparsifiedVector:
    """Looks like the task vector, its entries multiplied by what a sparsifier says.

    The random numbers depend on the seed, the task's name, the tensor and the block only: not on the order of tasks, tensors or
    threads.

    Args:
        vector: the task vector.
        method: the sparsifier.
        parameters: of it; the others have their defaults.
        seed: of the random numbers.
        kept: names of tensors that are left whole.
    """

    def __init__(
        self, vector: TaskVector, method: Method, parameters: Mapping[str, Any], seed: int, kept: set[str]
    ) -> None:
        self._vector = vector
        self._method = method
        self._parameters = {**method.defaults, **parameters}
        self._seed = seed
        self._kept = kept
        self._lock = threading.Lock()
        self._factors = lru_cache(maxsize=2)(self._factors_of_tensor)  # blocks of one tensor follow each other

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vector, name)

    def block(self, name: str, number: int) -> Block:
        """As of the task vector."""
        block = self._vector.block(name, number)
        if name in self._kept:
            return block
        if self._method.granularity == "entries":
            factors = self._thinned(block.values, name, number)
        else:
            with self._lock:
                factors = self._factors(name)[number * BLOCK : number * BLOCK + block.values.size]
        values = block.values * factors
        return Block(values, block.positions, block.remainders * factors[block.positions])

    blocks = TaskVector.blocks  # both go through block()
    delta = TaskVector.delta

    def sample(self, name: str, step: int = 1) -> np.ndarray:
        """As of the task vector, but it reads all of it."""
        return np.concatenate(
            [block.values[:: 64 * step].copy() for block in self.blocks(name)] or [np.empty(0, np.float32)]
        )

    def _factors_of_tensor(self, name: str) -> np.ndarray:
        delta = self._vector.delta(name)
        rows = self._vector.facts.structure.as_matrices(name, delta)
        factors = np.stack([self._thinned(rows[group], name, group) for group in range(rows.shape[0])])
        whole = self._vector.facts.structure.from_matrices(name, factors, delta.shape)
        return np.ascontiguousarray(whole, np.float32).reshape(-1)

    def _thinned(self, delta: np.ndarray, name: str, number: int) -> np.ndarray:
        key = xxh3_128_intdigest(f"{self._seed}\0{self._vector.task}\0{name}\0{number}".encode())
        uniform = np.random.Generator(np.random.Philox(key=key)).random(delta.shape, np.float32)
        return self._method.function(delta, uniform, **self._parameters)
