"""What a long command has done so far, kept in ``<output>.partial`` so that it goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


def unfinished(output: str | Path, name: str, facts: Sequence[Any]) -> Path:
    """A folder for what is done, which is another one when anything that decides it has changed.

    Args:
        output: of the command.
        name: the folder's begins with it.
        facts: whatever decides what is done, as plain values.
    """
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return _partial(output) / f"{name}_{key[:16]}"


def made(path: Path, sources: Any) -> bool:
    """Whether a file is there and was made after the image, images, or image and label that it is made from."""
    if isinstance(sources, Mapping):
        return all(made(path, source) for source in sources.values())
    files = [sources] if isinstance(sources, str) else sources
    return path.is_file() and path.stat().st_mtime >= max(Path(file).stat().st_mtime for file in files)


def clear(output: str | Path) -> None:
    """Remove what was kept, also with other settings, and nothing else."""
    partial = _partial(output)
    for folder in partial.glob(f"*_{'[0-9a-f]' * 16}"):
        shutil.rmtree(folder)
    with suppress(OSError):  # it holds something else
        partial.rmdir()


def _partial(output: str | Path) -> Path:
    path = Path(output)
    return Path(f"{path if path.name else path.resolve()}.partial")  # "." has no name
