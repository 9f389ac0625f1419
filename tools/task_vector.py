"""A task vector: what fine-tuning added to a starting point, with the head that it trained and its lineage.

On disk it is one safetensors file, read block by block so that merging needs no more memory for a large network than for a
small one. ``backbone/<name>`` holds τ = finetuned - pretrained, ``head/<name>`` the whole head tensor in canonical form
(the background's logit is zero), ``buffer/<name>`` the specialist's integer buffers; everything else is in the header. A float32
difference cannot always give the specialist back: where it does not, ``remainder/<name>`` holds the rounding error of the
subtraction, itself a float32, and ``position/<name>`` where in its block, so that pretrained + τ is the specialist bit for bit
(unless a weight changed its magnitude by more than 2**29). Each block has a checksum.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64

from tools.errors import UserError
from tools.network import Structure
from tools.weights_file import BLOCK, WeightsFile, check_finite, to_bytes, write_safetensors

FORMAT = "task-vector-2"  # the header's only entry: safetensors writes several in random order


@dataclass(frozen=True)
class Facts:
    """What the header of a task vector says.

    Attributes:
        task: name of the task.
        labels: names of the head's output channels 1..C.
        label_map: for each of them, the labels of the fine-tuning dataset that it stands for.
        pretrained_sha256: identity of the backbone that it was fine-tuned from.
        finetuned_sha256: identity of the fine-tuned backbone.
        network_def: the specialist's network.
        structure: what its tensors are.
        pretrained_name: what the starting point was called; for people.
        tool_version: of the tools that wrote it.
        data: what it was fine-tuned on: "dataset", "licence" and "reference", as far as known; for people.
        dtype: of the specialist's weights, "float32" where it was not recorded.
    """

    task: str
    labels: list[str]
    label_map: dict[str, list[int | str]]
    pretrained_sha256: str
    finetuned_sha256: str
    network_def: dict[str, Any]
    structure: Structure
    pretrained_name: str = ""
    tool_version: str = ""
    data: dict[str, str] = field(default_factory=dict)
    dtype: str = "float32"

    def check(self) -> None:
        """Refuse what no ``diff`` writes.

        Raises:
            ValueError: names the entry.
        """
        texts = ("task", "pretrained_sha256", "finetuned_sha256", "pretrained_name", "tool_version", "dtype")
        for name in texts:
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be text")
        names = [self.task, *self.labels]
        if not isinstance(self.labels, list) or not all(
            isinstance(n, str) and n.strip() and n.isprintable() for n in names
        ):
            raise ValueError("task and labels must be names")
        if len({"background", *(label.lower() for label in self.labels)}) != 1 + len(self.labels):
            raise ValueError("labels must differ, and none may be the background")
        if not isinstance(self.network_def, dict) or not isinstance(self.label_map, dict):
            raise ValueError("network_def and label_map must be dictionaries")
        if not all(isinstance(values, list) for values in self.label_map.values()):
            raise ValueError("label_map must have a list for each label")
        values = [value for values in self.label_map.values() for value in values]
        if not all(isinstance(value, str | int) for value in values):
            raise ValueError("label_map must have labels or their numbers")
        if not all(isinstance(word, str) for entry in self.data.items() for word in entry):
            raise ValueError("data must be text")


@dataclass(frozen=True)
class Block:
    """A piece of one tensor of a task vector, flat.

    Attributes:
        values: τ, float32.
        positions: where τ alone is not exact, ascending.
        remainders: what is missing there, float32.
    """

    values: np.ndarray
    positions: np.ndarray
    remainders: np.ndarray

    def exact(self) -> np.ndarray:
        """τ with its remainder, float64."""
        values = self.values.astype(np.float64)
        values[self.positions] += self.remainders
        return values


def exact_where_needed(blocks: Sequence[Block]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Where at least one of several tasks' τ needs its remainder, and all of them exactly there, float64."""
    size = blocks[0].values.size
    needed = np.zeros(size, bool)
    for block in blocks:
        needed[block.positions] = True
    where = np.flatnonzero(needed)
    rank = np.empty(size, np.int32)
    rank[where] = np.arange(where.size, dtype=np.int32)
    exact = []
    for block in blocks:
        exact.append(block.values[where].astype(np.float64))
        exact[-1][rank[block.positions]] += block.remainders
    return where, exact


@dataclass(frozen=True)
class Tensor:
    """What the header says of one tensor of the backbone.

    Attributes:
        shape: its sizes.
        remainders: for each block, how many.
        checksums: for each block, of τ and its remainders.
        pretrained: for each block, of the starting point's values.
    """

    shape: tuple[int, ...]
    remainders: list[int]
    checksums: list[str]
    pretrained: list[str]


class TaskVector:
    """Task arithmetic's τ = θt - θ0 (Ilharco et al., ICLR 2023), read from its file.

    Args:
        path: the file.

    Attributes:
        facts: its header.
        tensors: the backbone's tensors by name, in the network's order.
        head: the trained head by tensor name, float32.
        buffers: the specialist's integer buffers by name.
        sha256: of all that it says; the tensors are in it by the identities of the two backbones.

    Raises:
        UserError: no such file, not a task vector, damaged, or a head that is not finite or does not match the labels.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = WeightsFile(path)
        header = self._file.metadata.get(FORMAT)
        if header is None:
            older = next((name for name in self._file.metadata if name.startswith("task-vector-")), "")
            hint = f"; it is a {older} of another version of the tools: make it again by diff" if older else ""
            raise UserError(f"{path} is a safetensors file, but not a task vector ({FORMAT}){hint}")
        try:
            content = json.loads(header)
            tensors = content.pop("tensors")
            whole = content.pop("checksums")
            content["structure"] = Structure.read(content["structure"])
            self.facts = Facts(**content)
            self.facts.check()
            self.tensors = {name: self._tensor(name, **entry) for name, entry in tensors.items()}
            self.head = self._whole("head", self.facts.structure.head, whole)
            self.buffers = self._whole(
                "buffer", [n.removeprefix("buffer/") for n in whole if n[:7] == "buffer/"], whole
            )
            self._first = {name: np.cumsum([0, *tensor.remainders]).tolist() for name, tensor in self.tensors.items()}
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(f"{path} is damaged, or is not a task vector ({_reason(error)})") from None
        channels = 1 + len(self.facts.labels)
        for name, tensor in self.head.items():
            if not self.facts.structure.counts(name, tensor.shape, channels):
                raise UserError(f"{path}: head tensor {name} does not have {channels} output channels")
        digest = hashlib.sha256(header.encode())
        for name in sorted(self.head):
            digest.update(self.head[name].tobytes())
        self.sha256 = digest.hexdigest()

    @property
    def weights(self) -> list[str]:
        """Names of the tensors but running means and variances, which no method merges as weights."""
        return [name for name in self.tensors if name not in self.facts.structure.statistics]

    @property
    def task(self) -> str:
        return self.facts.task

    def same_start(self, other: TaskVector) -> bool:
        """Whether both say that they come from the same starting point: by its identity, and by the checksums of its tensors."""
        mine, theirs = ({name: t.pretrained for name, t in v.tensors.items()} for v in (self, other))
        return self.facts.pretrained_sha256 == other.facts.pretrained_sha256 and mine == theirs

    def block(self, name: str, number: int) -> Block:
        """Entries ``number * BLOCK`` and on of a tensor of the backbone.

        Values may be NaN or infinite: whoever uses them checks the result.

        Raises:
            UserError: the file is damaged there.
        """
        tensor = self.tensors[name]
        start, (first, last) = number * BLOCK, self._first[name][number : number + 2]
        values = self._file.bytes(f"backbone/{name}", start, min(start + BLOCK, prod(tensor.shape)))
        digest = xxh3_64(values)
        positions = remainders = np.empty(0, np.uint8)
        if last > first:
            positions = self._file.bytes(f"position/{name}", first, last)
            remainders = self._file.bytes(f"remainder/{name}", first, last)
            digest.update(positions)
            digest.update(remainders)
        if digest.hexdigest() != tensor.checksums[number]:
            raise UserError(f"{self.path} is damaged: tensor {name} is not what was written")
        block = Block(values.view("<f4"), positions.view("<i4"), remainders.view("<f4"))
        where = block.positions
        if where.size and (where[0] < 0 or where[-1] >= block.values.size or (np.diff(where) <= 0).any()):
            raise UserError(f"{self.path} is damaged: the remainder of tensor {name} does not fit it")
        return block

    def check_finite(self, name: str) -> None:
        """Refuse NaN and infinite values in a tensor of the backbone.

        Raises:
            UserError: names the tensor.
        """
        for block in self.blocks(name):
            check_finite(block.values, self.path, name)
            check_finite(block.remainders, self.path, name)

    def came_from(self, name: str, number: int, pretrained: np.ndarray) -> bool:
        """Whether these are the starting point's values, float32, of a block."""
        return checksum(pretrained) == self.tensors[name].pretrained[number]

    def sample(self, name: str, step: int = 1) -> np.ndarray:
        """A few entries from each block of a tensor, one of 64 · step, in little time: what they are read from is not checked."""
        size = prod(self.tensors[name].shape)
        starts = range(0, size, BLOCK)
        pieces = [
            self._file.bytes(f"backbone/{name}", s, min(s + BLOCK // 16, size)).view("<f4")[:: 4 * step].copy()
            for s in starts
        ]
        return np.concatenate(pieces or [np.empty(0, np.float32)])

    def blocks(self, name: str) -> Iterator[Block]:
        return (self.block(name, number) for number in range(len(self.tensors[name].checksums)))

    def delta(self, name: str) -> np.ndarray:
        """τ of one whole tensor, exactly: float64, the stored difference and its remainder together.

        Raises:
            UserError: the file is damaged, or a value is NaN or infinite.
        """
        self.check_finite(name)
        blocks = [block.exact() for block in self.blocks(name)]
        return np.concatenate(blocks or [np.empty(0)]).reshape(self.tensors[name].shape)

    def _tensor(self, name: str, remainders: list[int], checksums: list[str], pretrained: list[str]) -> Tensor:
        entry = self._file.entries[f"backbone/{name}"]
        tables = ((remainders, int), (checksums, str), (pretrained, str))
        if not all(isinstance(table, list) and all(type(n) is kind for n in table) for table, kind in tables):
            raise ValueError(f"tensor {name} has a wrong table of blocks")
        lengths = {len(remainders), len(checksums), len(pretrained)}
        if entry.dtype != "float32" or lengths != {-(-entry.size // BLOCK)} or min(remainders, default=0) < 0:
            raise ValueError(f"tensor {name} has a wrong table of blocks")
        if sum(remainders):
            for part, dtype in (("position", "int32"), ("remainder", "float32")):
                other = self._file.entries[f"{part}/{name}"]
                if other.shape != (sum(remainders),) or other.dtype != dtype:
                    raise ValueError(f"the remainder of tensor {name} does not fit it")
        return Tensor(entry.shape, remainders, checksums, pretrained)

    def _whole(self, part: str, names: Iterable[str], checksums: Mapping[str, str]) -> dict[str, np.ndarray]:
        tensors = {}
        for name in names:
            key = f"{part}/{name}"
            if checksum(self._file.bytes(key)) != checksums[key]:
                raise UserError(f"{self.path} is damaged: tensor {name} is not what was written")
            tensors[name] = self._file.array(key)
        return tensors


def save_task_vector(
    path: str | Path,
    facts: Facts,
    backbone: Iterable[tuple[str, np.ndarray, np.ndarray]],
    head: Mapping[str, np.ndarray],
    buffers: Mapping[str, np.ndarray],
) -> None:
    """Write a task vector, one tensor in memory at a time. The same content gives the same bytes.

    Args:
        path: the file.
        facts: its header.
        backbone: name, pretrained and finetuned of every floating-point tensor that is neither head nor alias, float32; it is
            gone through twice, because the header, with the checksums, comes first.
        head: in canonical form, float32.
        buffers: integer buffers of the specialist.
    """
    whole = {f"buffer/{n}": t for n, t in buffers.items()} | {f"head/{n}": t for n, t in head.items()}
    layout = {key: (np.asarray(tensor).dtype.name, np.shape(tensor)) for key, tensor in whole.items()}
    tensors: dict[str, dict[str, list]] = {}
    for name, pretrained, finetuned in backbone:
        blocks = [*_blocks(pretrained, finetuned)]
        starts = [checksum(part) for part in _parts(pretrained)]
        counts = [block.positions.size for block in blocks]
        sums = [checksum(block.values, block.positions, block.remainders) for block in blocks]
        tensors[name] = {"remainders": counts, "checksums": sums, "pretrained": starts}
        layout[f"backbone/{name}"] = "float32", pretrained.shape
        if sum(counts):
            layout[f"position/{name}"] = "int32", (sum(counts),)
            layout[f"remainder/{name}"] = "float32", (sum(counts),)
    header = {
        **asdict(facts),
        "structure": facts.structure.as_dict(),
        "tensors": tensors,
        "checksums": {key: checksum(np.asarray(tensor)) for key, tensor in whole.items()},
    }

    def data() -> Iterator[tuple[str, list[np.ndarray]]]:
        for key, tensor in whole.items():
            yield key, [to_bytes(np.asarray(tensor), layout[key][0])]
        for name, pretrained, finetuned in backbone:
            blocks = [*_blocks(pretrained, finetuned)]
            yield f"backbone/{name}", [block.values.view(np.uint8) for block in blocks]
            if f"position/{name}" in layout:
                yield f"position/{name}", [block.positions.view(np.uint8) for block in blocks]
                yield f"remainder/{name}", [block.remainders.view(np.uint8) for block in blocks]

    write_safetensors(path, layout, data(), {FORMAT: json.dumps(header)})


def _blocks(pretrained: np.ndarray, finetuned: np.ndarray) -> Iterator[Block]:
    """The blocks of finetuned - pretrained."""
    for before, after in zip(_parts(pretrained), _parts(finetuned), strict=True):
        delta = after - before
        where = np.flatnonzero(before + delta != after)
        exact = after[where].astype(np.float64) - before[where]
        yield Block(delta, where.astype("<i4"), (exact - delta[where]).astype("<f4"))


def _parts(tensor: np.ndarray) -> Iterator[np.ndarray]:
    flat = tensor.reshape(-1)
    return (flat[start : start + BLOCK] for start in range(0, flat.size, BLOCK))


def checksum(*arrays: np.ndarray) -> str:
    """XXH3 over the bytes of arrays: finds damage and mix-ups at the speed of memory, but no intent."""
    digest = xxh3_64()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error).splitlines()[0] if str(error) else ""
