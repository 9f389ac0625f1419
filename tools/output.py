"""Output that is complete or not there: written to a temporary name beside its place, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
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
    path = check_output(path, overwrite, sign)
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


def check_output(
    path: str | Path, overwrite: bool, sign: str = "configs/metadata.json", inputs: Iterable[str | Path] = ()
) -> Path:
    """Refuse what ``complete_output`` would refuse, before anything is done for it; returns the path.

    Args:
        path: where the output goes.
        overwrite: replace an older output.
        sign: as for ``complete_output``.
        inputs: files and folders that it is made of, which it must not replace.

    Raises:
        UserError: the path is one of the inputs, exists and ``overwrite`` is not set, is a folder without the sign, or neither
            file nor folder.
    """
    path = Path(str(path))  # a folder called 2024 is a number where a script gives one
    path = path if path.name else path.resolve()  # "." has no name
    if any(Path(source).resolve() == path.resolve() for source in inputs):
        raise UserError(f"{path} is what is merged; choose another --output")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another --output, or add --overwrite")
    if path.is_dir() and any(path.iterdir()) and not (path / sign).is_file():
        raise UserError(f"{path} is a folder without {sign}, so not an older output; it is not overwritten")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path} is neither a file nor a folder; choose another --output")
    return path
