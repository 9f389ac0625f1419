"""The identity of what something was made of, as SHA-256: of a backbone, of files, of plain values."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def case_sha256(case: Mapping[str, Any]) -> list[str]:
    """SHA-256 of the files of a labelled case: of its image, channel by channel, and of its label map."""
    image = case["image"]
    return [file_sha256(file) for file in (*([image] if isinstance(image, str) else image), case["label"])]


def facts_sha256(facts: Any) -> str:
    """SHA-256 of plain values, independent of the order of dictionaries."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
