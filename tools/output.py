"""Output that is complete or not there: written to a temporary name beside its place, then renamed."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tools.errors import UserError


@contextmanager
def complete_output(
    path: str | Path, overwrite: bool = False, sign: str = "configs/metadata.json", inputs: Iterable[str | Path] = ()
) -> Iterator[Path]:
    """A temporary path to write a file or a folder to; it takes the name ``path`` when the block ends without an error.

    When the block fails or is interrupted, what was written is removed and an older output stays as it was.

    Args:
        path: where the output goes.
        overwrite: replace an older output.
        sign: the file by which an older output folder is known to be one, and not somebody's documents.
        inputs: files and folders that it is made of, which it must not replace.

    Raises:
        UserError: ``check_output`` refuses the path, it is a folder where a file is to be or the other way round, or another
            process has written it meanwhile and ``overwrite`` is not set.
    """
    path = check_output(path, overwrite, sign, inputs)
    path.parent.mkdir(parents=True, exist_ok=True)
    own = f".{path.name}.{os.getpid()}_{secrets.token_hex(4)}"  # processes of two containers may have one number
    temporary, old = path.with_name(f"{own}.partial"), path.with_name(f"{own}.old")
    try:
        yield temporary
        if path.exists() and path.is_dir() != temporary.is_dir():
            kinds = ("file", "folder") if path.is_dir() else ("folder", "file")
            raise UserError(f"{path} is to be a {kinds[0]}, and is a {kinds[1]}; choose another --output")
        if path.exists() and not overwrite:
            raise UserError(
                f"{path} was written by another process meanwhile; choose another --output, or add --overwrite"
            )
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
        UserError: the path is one of the inputs, or a folder that has one in it, exists and ``overwrite`` is not set, is a folder
            without the sign, or neither file nor folder.
    """
    path = Path(str(path))  # a folder called 2024 is a number where a script gives one
    path = path if path.name and not path.is_symlink() else path.resolve()  # "." has no name; a link stays where it is
    if found := next((source for source in inputs if Path(source).resolve().is_relative_to(path.resolve())), None):
        raise UserError(f"--output {path} would replace {found}, of which it is made; choose another --output")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another --output, or add --overwrite")
    if path.is_dir() and any(path.iterdir()) and not (path / sign).is_file():
        raise UserError(f"{path} is a folder without {sign}, so not an older output; it is not overwritten")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path} is neither a file nor a folder; choose another --output")
    return path
