"""The identity of a backbone: the SHA-256 of its tensors."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from tools.archive import pieces, progress
from tools.network import Structure
from tools.weights_file import BLOCK, WeightsFile

SHA256 = re.compile(r"[0-9a-f]{64}")


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
    digest = hashlib.sha256()
    with open(path, "rb") as file, progress(Path(path).stat().st_size, "SHA-256") as bar:
        for piece in pieces(file):
            digest.update(piece)
            bar.update(len(piece))
    return digest.hexdigest()
