"""What the merge methods ``fisher`` and ``regmean`` need to know of a specialist, in a file beside its task vector.

``liver.fisher.safetensors`` belongs to ``liver.safetensors``. It holds float32 arrays under the names of the backbone's tensors,
``checksum/<name>`` with one XXH3 for each block of them, and in its header whose they are and how they were measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from tools.errors import UserError
from tools.task_vector import TaskVector
from tools.weights_file import BLOCK, WeightsFile, check_finite, write_safetensors

FORMAT = "task-statistics-1"


def statistics_file(vector: str | Path, method: str) -> Path:
    """Where the statistics of a task vector are for a method: ``liver.fisher.safetensors``."""
    path = Path(vector)
    return path.with_name(f"{path.stem}.{method}{path.suffix}")


class TaskStatistics:
    """The statistics of one specialist, read block by block or tensor by tensor.

    Args:
        vector: its task vector.
        method: that they are for.

    Attributes:
        path: the file, beside the vector's.
        facts: its header.
        sha256: of header and checksums, so of all that it says.

    Raises:
        UserError: no such file, damaged, or of another specialist.
    """

    def __init__(self, vector: TaskVector, method: str) -> None:
        self.path = statistics_file(vector.path, method)
        if not self.path.is_file():
            raise UserError(
                f"{self.path} not found: {method} needs it, and the specialist's owner makes it by "
                f"python -m tools statistics --method {method} --vector {vector.path.name} --bundle … --images …"
            )
        self._file = WeightsFile(self.path)
        try:
            self.facts: dict[str, Any] = json.loads(self._file.metadata[FORMAT])
            whose, kind = self.facts["finetuned_sha256"], self.facts["method"]
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{self.path} is damaged, or has no statistics ({FORMAT})") from None
        if (whose, kind) != (vector.facts.finetuned_sha256, method):
            raise UserError(
                f"{self.path} has the statistics for {kind} of {self.facts.get('task')} {str(whose)[:12]}, "
                f"not those for {method} of {vector.task} {vector.facts.finetuned_sha256[:12]}"
            )
        digest = hashlib.sha256(self._file.metadata[FORMAT].encode())
        self._checksums: dict[str, np.ndarray] = {}
        for name, entry in self._file.entries.items():
            if name.startswith("checksum/"):
                continue
            sums = self._file.entries.get(f"checksum/{name}")
            if entry.dtype != "float32" or sums is None or sums.shape != (-(-entry.size // BLOCK), 2):
                raise UserError(f"{self.path} is damaged: tensor {name} has no table of blocks")
            self._checksums[name] = self._file.array(f"checksum/{name}")
            digest.update(name.encode() + self._checksums[name].tobytes())
        self.sha256 = digest.hexdigest()

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of the statistics of a tensor; None where nothing was measured."""
        return self._file.entries[name].shape if name in self._checksums else None

    def block(self, name: str, number: int) -> np.ndarray:
        """Entries ``number * BLOCK`` and on, flat, float32.

        Raises:
            UserError: the file is damaged there.
        """
        start, size = number * BLOCK, self._file.entries[name].size
        data = self._file.bytes(name, start, min(start + BLOCK, size))
        if not np.array_equal(_checksum(data), self._checksums[name][number]):
            raise UserError(f"{self.path} is damaged: tensor {name} is not what was written")
        values = data.view("<f4")
        check_finite(values, self.path, name)
        return values

    def array(self, name: str) -> np.ndarray:
        """The statistics of one whole tensor."""
        blocks = [self.block(name, number) for number in range(len(self._checksums[name]))]
        return np.concatenate(blocks or [np.empty(0, np.float32)]).reshape(self._file.entries[name].shape)


def save_statistics(
    path: str | Path,
    facts: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    arrays: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Write statistics, one array at a time.

    Args:
        path: the file.
        facts: for its header: method, finetuned_sha256 and how they were measured.
        shapes: of the arrays, in their order.
        arrays: name and float32 values of each.
    """
    layout = {name: ("float32", shape) for name, shape in shapes.items()}
    layout |= {f"checksum/{name}": ("int32", (-(-prod(shape) // BLOCK), 2)) for name, shape in shapes.items()}

    def data() -> Iterator[tuple[str, list[np.ndarray]]]:
        checksums = {}
        for name, array in arrays:
            flat = np.ascontiguousarray(array, "<f4").reshape(-1)
            pieces = [flat[start : start + BLOCK].view(np.uint8) for start in range(0, flat.size, BLOCK)]
            checksums[name] = [_checksum(piece).view(np.uint8) for piece in pieces]
            yield name, pieces
        for name, sums in checksums.items():
            yield f"checksum/{name}", sums

    write_safetensors(path, layout, data(), {FORMAT: json.dumps(dict(facts))})


def _checksum(piece: np.ndarray) -> np.ndarray:
    """XXH3 as two int32: like all numbers in the file they take four bytes, so that each lies at a multiple of four."""
    return np.array([xxh3_64_intdigest(piece)], "<u8").view("<i4")
