"""The identity of a backbone: the SHA-256 of its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def backbone_sha256(state: Mapping[str, Any], head: Iterable[str]) -> str:
    """SHA-256 over a state dict without its head, independent of the order of its tensors.

    Hashed are, sorted by name, each tensor's name, dtype, shape and little-endian bytes.

    Args:
        state: torch tensors by name.
        head: names that are left out.
    """
    import torch

    digest = hashlib.sha256()
    skip = set(head)
    for name in sorted(set(state) - skip):
        tensor = state[name].detach().cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name}\0{dtype}\0{','.join(map(str, tensor.shape))}\0".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
