"""The zip of a bundle: written so that the same files give the same bytes, read so that a hostile one does no harm."""

from __future__ import annotations

import stat
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from shutil import disk_usage
from typing import BinaryIO

from tqdm import tqdm

from tools.errors import UserError

PIECE = 2**20  # bytes that are read and written at a time
LARGEST = 25 * 2**20  # bytes of a file outside models/: the limit of MONAI's model zoo
MOST_ENTRIES = 10_000
HIGHEST_RATIO = 100  # of a file's size to what it takes in the zip; weights have about 1, configs up to 20
UNSUSPECTED = 2**20  # bytes of a file that may be compressed as much as it likes
EARLIEST = (1980, 1, 1, 0, 0, 0)  # the first time that a zip can have
ENCRYPTED = 0x1


def progress(total: int, what: str) -> tqdm:
    """A progress bar of bytes, on a terminal and if it takes more than two seconds."""
    return tqdm(
        total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1024, delay=2, disable=None, leave=False
    )


def name_fault(name: str) -> str:
    """Why a file in a bundle may not have a name, or nothing."""
    if name.startswith("/") or name[1:2] == ":":
        return "an absolute path"
    if ".." in name.split("/"):
        return "a path that leads out of the bundle"
    if "\\" in name or "" in name.split("/") or "." in name.split("/") or not name.isprintable():
        return "not a portable name"
    return ""


def is_too_large(name: str, size: int) -> bool:
    """Whether a file of a bundle, by its path inside, is larger than the model zoo takes; weights may be."""
    return size > LARGEST and not name.startswith("models/")


def twins(names: Sequence[str]) -> tuple[str, str] | None:
    """Two files that would be one on a computer that does not tell capitals apart, or a file and a folder of one name."""
    seen: dict[str, str] = {}
    for name in names:
        if name.lower() in seen:
            return seen[name.lower()], name
        seen[name.lower()] = name
    for name in names:
        for parent in map(str, PurePosixPath(name.lower()).parents):
            if parent in seen:
                return seen[parent], name
    return None


def write_zip(path: Path, top: str, files: Mapping[str, Path | bytes]) -> None:
    """Write a zip of one folder, nothing in it compressed: weights do not get smaller, and zlib's versions differ.

    Args:
        path: the zip.
        top: name of the folder inside.
        files: by path inside that folder, what is in them or where they are.

    Raises:
        UserError: a file changed while it was read.
    """
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    with zipfile.ZipFile(path, "w") as archive, progress(sum(sizes.values()), "packing") as bar:
        for name in sorted(files):
            info = zipfile.ZipInfo(f"{top}/{name}", EARLIEST)
            info.create_system = 3  # Unix, so that the permissions are read
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            info.file_size = sizes[name]
            with archive.open(info, "w") as target:
                for piece in _content(files[name]):
                    target.write(piece)
                    bar.update(len(piece))
            if info.file_size != sizes[name]:
                raise UserError(f"{files[name]} changed while it was packed; try again when nothing writes to it")


def _content(file: Path | bytes) -> Iterator[bytes]:
    if isinstance(file, bytes):
        yield file
        return
    with open(file, "rb") as source:
        yield from pieces(source)


def pieces(source: BinaryIO) -> Iterator[bytes]:
    """What is in a file, piece by piece."""
    while piece := source.read(PIECE):
        yield piece


def list_zip(path: Path) -> tuple[str, list[zipfile.ZipInfo]]:
    """Look at a zip's table of contents, and at nothing else.

    Returns:
        The name of the one folder in it, and its files.

    Raises:
        UserError: it is no zip or is truncated, or unpacking it would write to other places than one folder, write links or other
            special files, write a file twice, or write much more than the zip itself has.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        raise UserError(f"{path} is not a zip, or is truncated: download it again ({error})") from None
    if len(entries) > MOST_ENTRIES:
        raise UserError(f"{path} has {len(entries)} entries; a bundle has some dozens")
    for entry in entries:
        if fault := _entry_fault(entry):
            raise UserError(f"{path}: {entry.orig_filename!r} is {fault}; do not unpack it")
    files = [entry for entry in entries if not entry.is_dir()]
    if pair := twins([entry.filename for entry in files]):
        raise UserError(f"{path}: {pair[0]!r} and {pair[1]!r} would be written to one place; do not unpack it")
    if sum(entry.compress_size for entry in files) > path.stat().st_size:
        raise UserError(f"{path}: its files overlap, as in a zip bomb; do not unpack it")
    tops = sorted({entry.filename.split("/")[0] for entry in files})
    if len(tops) != 1 or any("/" not in entry.filename for entry in files):
        raise UserError(
            f"{path}: all files must lie in one folder, as `python -m tools pack` makes it; found {tops[:5]}"
        )
    for entry in files:
        if is_too_large(entry.filename.removeprefix(f"{tops[0]}/"), entry.file_size):
            raise UserError(
                f"{path}: {entry.filename} has more than {LARGEST >> 20} MiB; only models/ may have such files"
            )
    return tops[0], files


def _entry_fault(entry: zipfile.ZipInfo) -> str:
    """Why an entry must not be unpacked, or nothing."""
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind == stat.S_IFLNK:
        return "a symbolic link"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a special file"
    if fault := name_fault(entry.orig_filename.removesuffix("/")):
        return fault
    if entry.flag_bits & ENCRYPTED:
        return "encrypted"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "compressed in an unusual way"
    if entry.file_size > max(UNSUSPECTED, HIGHEST_RATIO * entry.compress_size):
        return f"{entry.compress_size} bytes that say to be {entry.file_size}, as in a zip bomb"
    return ""


def unpack(path: Path, files: Sequence[zipfile.ZipInfo], folder: Path) -> int:
    """Unpack files that ``list_zip`` found harmless, and compare their checksums.

    Args:
        path: the zip.
        files: its entries.
        folder: an empty one.

    Returns:
        How many bytes they are.

    Raises:
        UserError: a file is not what was packed, or they need more room than there is.
    """
    total = sum(entry.file_size for entry in files)
    if total > disk_usage(folder).free:
        raise UserError(
            f"{folder} has no room for the {total / 2**30:.1f} GiB in {path}: set TMPDIR to a folder that has"
        )
    with zipfile.ZipFile(path) as archive, progress(total, "unpacking") as bar:
        for entry in files:
            target = folder / entry.filename
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with archive.open(entry) as source, open(target, "xb") as file:
                    for piece in pieces(source):  # never more than the entry says to have
                        file.write(piece)
                        bar.update(len(piece))
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
                raise UserError(
                    f"{path}: {entry.filename} is not what was packed ({error}): download it again"
                ) from None
            if target.stat().st_size != entry.file_size:
                raise UserError(f"{path}: {entry.filename} is shorter than the zip says: download it again")
    return total
