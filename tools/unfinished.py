"""What a long command has done so far, kept in ``<output>.partial`` so that it goes on where it was stopped."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tools.lineage import facts_sha256


def unfinished(output: str | Path, name: str, facts: Sequence[Any]) -> Path:
    """A folder for what is done, which is another one when anything that decides it has changed.

    Args:
        output: of the command.
        name: the folder's begins with it.
        facts: whatever decides what is done, as plain values.
    """
    return _partial(output) / f"{name}_{facts_sha256(facts)[:16]}"


def kept_file(folder: Path, case: str, ending: str, *sources: str | Sequence[str]) -> Path:
    """Where something of a case is kept: another file for other sources, or for ones that were written anew.

    Args:
        folder: of ``unfinished``.
        case: the file's name begins with it.
        ending: with its dot.
        sources: the path, or paths, of the image, and of whatever else it is made of.
    """
    files = [Path(file) for source in sources for file in ([source] if isinstance(source, str) else source)]
    facts = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return folder / f"{case}_{facts_sha256(facts)[:16]}{ending}"


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
