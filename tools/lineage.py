"""The identity of a backbone: the SHA-256 of its tensors."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tools.network import Structure
from tools.weights_file import BLOCK, WeightsFile


def backbone_sha256(weights: WeightsFile, structure: Structure) -> str:
    """SHA-256 over the tensors of a file without head and aliases, independent of their order.

    Hashed are, sorted by name, each tensor's name, dtype, shape and little-endian bytes.
    """
    digest = hashlib.sha256()
    for name in sorted(set(weights.entries) - set(structure.head) - set(structure.aliases)):
        entry = weights.entries[name]
        digest.update(f"{name}\0{entry.dtype}\0{','.join(map(str, entry.shape))}\0".encode())
        for start in range(0, entry.size, BLOCK):
            digest.update(weights.bytes(name, start, min(start + BLOCK, entry.size)))
    return digest.hexdigest()


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
