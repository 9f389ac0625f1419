"""Output that is complete or not there: written to a temporary name beside its place, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tools.errors import UserError


@contextmanager
def complete_output(path: str | Path, overwrite: bool = False, sign: str = "configs/metadata.json") -> Iterator[Path]:
    """A temporary path to write a file or a folder to; it takes the name ``path`` when the block ends without an error.

    When the block fails or is interrupted, what was written is removed and an older output stays as it was.

    Args:
        path: where the output goes.
        overwrite: replace an older output.
        sign: the file by which an older output folder is known to be one, and not somebody's documents.

    Raises:
        UserError: ``path`` exists and ``overwrite`` is not set, or is a folder without the sign, or neither file nor folder, or
            a folder where a file is to be, or the other way round.
    """
    path = Path(str(path))  # a folder called 2024 is a number where a script gives one
    path = path if path.name else path.resolve()  # "." has no name
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another --output, or add --overwrite")
    if path.is_dir() and any(path.iterdir()) and not (path / sign).is_file():
        raise UserError(f"{path} is a folder without {sign}, so not an older output; it is not overwritten")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path} is neither a file nor a folder; choose another --output")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        yield temporary
        if path.exists() and path.is_dir() != temporary.is_dir():
            kinds = ("file", "folder") if path.is_dir() else ("folder", "file")
            raise UserError(f"{path} is to be a {kinds[0]}, and is a {kinds[1]}; choose another --output")
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    finally:
        for leftover in (temporary, old):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)
