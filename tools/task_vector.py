"""A task vector: what fine-tuning added to a starting point, with the head that it trained and its lineage.

On disk it is one safetensors file. ``backbone/<name>`` holds finetuned - pretrained, ``head/<name>`` the whole head tensor
in canonical form (background row zero); everything else is in the header. A float32 difference cannot always give the
specialist back: where it does not, ``remainder/<name>`` holds the rounding error of the subtraction, itself a float32, and
``remainder_index/<name>`` the entries, so that pretrained + τ is the specialist bit for bit
(unless a weight changed its magnitude by more than 2**29).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tools.errors import UserError

FORMAT = "task-vector-1"  # the header's only entry: safetensors writes several in random order
TENSORS = ("backbone", "head", "remainder", "remainder_index")


@dataclass
class TaskVector:
    """Task arithmetic's τ = θt - θ0 (Ilharco et al., ICLR 2023) and what is needed to use it.

    Attributes:
        task: name of the task.
        labels: names of the head's output channels 1..C.
        label_map: for each of them, the labels of the fine-tuning dataset that it stands for.
        pretrained_sha256: identity of the backbone that it was fine-tuned from.
        finetuned_sha256: identity of the fine-tuned backbone.
        network_def: the specialist's network.
        head_axes: for each head tensor, the axis that counts output channels.
        backbone: τ by tensor name, float32.
        head: the trained head by tensor name, float32.
        remainder: rounding errors of τ by tensor name, float32, at the flat positions ``remainder_index``.
        remainder_index: see there.
        pretrained_name: what the starting point was called; for people.
        tool_version: of the tools that wrote it.
    """

    task: str
    labels: list[str]
    label_map: dict[str, list[int | str]]
    pretrained_sha256: str
    finetuned_sha256: str
    network_def: dict[str, Any]
    head_axes: dict[str, int]
    pretrained_name: str = ""
    tool_version: str = ""
    backbone: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    head: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    remainder: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    remainder_index: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def set_delta(self, name: str, pretrained: np.ndarray, finetuned: np.ndarray) -> None:
        """Set τ of one tensor from both float32 weights, with the remainder that makes it exact."""
        delta = finetuned - pretrained
        self.backbone[name] = delta
        index = np.flatnonzero((pretrained + delta).ravel() != finetuned.ravel())
        if index.size:
            exact = finetuned.astype(np.float64).ravel()[index] - pretrained.ravel()[index]
            self.remainder[name] = (exact - delta.ravel()[index]).astype(np.float32)
            self.remainder_index[name] = index.astype(np.int32 if delta.size < 2**31 else np.int64)

    def delta(self, name: str) -> np.ndarray:
        """τ of one tensor, exactly: float64, the stored difference and its remainder together."""
        delta = self.backbone[name].astype(np.float64)
        if name in self.remainder:
            delta.ravel()[self.remainder_index[name]] += self.remainder[name]
        return delta

    def save(self, path: str | Path) -> None:
        """Write the file. The same vector gives the same bytes."""
        tensors = {f"{part}/{name}": t for part in TENSORS for name, t in getattr(self, part).items()}
        facts = {name: value for name, value in vars(self).items() if name not in TENSORS}
        save_file(tensors, path, metadata={FORMAT: json.dumps(facts, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path) -> TaskVector:
        """Read a task vector; tensors are copied into memory.

        Raises:
            UserError: no such file, not a task vector, damaged, or with NaN or infinite values.
        """
        if not Path(path).is_file():
            raise UserError(f"task vector {path} not found")
        try:
            with safe_open(path, framework="numpy") as file:
                header = file.metadata() or {}
                if FORMAT not in header:
                    raise UserError(f"{path} is a safetensors file, but not a task vector ({FORMAT})")
                vector = cls(**json.loads(header[FORMAT]))
                for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    part, _, name = key.partition("/")
                    if part not in TENSORS:
                        raise ValueError(f"unexpected tensor {key}")
                    getattr(vector, part)[name] = file.get_tensor(key)
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise UserError(f"{path} is damaged, or is not a task vector ({str(error).splitlines()[0]})") from None
        vector.check(path)
        return vector

    def check(self, source: str | Path) -> None:
        """Refuse NaN, infinite values and a head that does not match the labels.

        Raises:
            UserError: names the tensor.
        """
        for name, tensor in [*self.backbone.items(), *self.head.items(), *self.remainder.items()]:
            if not np.isfinite(tensor).all():
                raise UserError(f"{source}: tensor {name} has NaN or infinite values")
        for name, index in self.remainder_index.items():
            size = self.backbone[name].size if name in self.backbone else 0
            if index.size != self.remainder.get(name, index[:0]).size or (index < 0).any() or (index >= size).any():
                raise UserError(f"{source}: the remainder of tensor {name} does not fit it")
        for name, axis in self.head_axes.items():
            if name not in self.head or self.head[name].shape[axis] != 1 + len(self.labels):
                raise UserError(f"{source}: head tensor {name} does not have 1 + {len(self.labels)} output channels")
