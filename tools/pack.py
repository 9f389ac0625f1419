"""``pack``: a bundle as one zip, byte for byte the same whoever packs it, as MONAI downloads it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import yaml

from tools.archive import LARGEST, is_too_large, name_fault, twins, write_zip
from tools.bundle import Bundle, read_json
from tools.errors import UserError
from tools.lineage import SHA256, file_sha256
from tools.output import complete_output

PARTS = ("LICENSE", "README.md", "configs", "docs", "models", "scripts")  # of a bundle; all else is somebody's own
NEEDED = ("LICENSE", "configs/metadata.json", "configs/inference.json")
LARGE_FILES = "large_files.yml"
SKIPPED = re.compile(r"\..*|__pycache__|.*\.pyc|.*\.partial")
LONGEST_NAME = 100


def pack(
    bundle: str, output: str = "dist", without_weights: bool = False, url: str = "", overwrite: bool = False
) -> None:
    """Write a bundle as <name>_v<version>.zip, after the name and the version in its metadata, and its SHA-256 beside it.

    In the zip are LICENSE, README.md, configs/, docs/, models/ and scripts/; everything else in the folder, such as images,
    results and checkpoints, is left out.

    Args:
        bundle: the folder.
        output: folder for the zip.
        without_weights: leave models/ out, and say in large_files.yml where they are, for `monai.bundle download_large_files`.
        url: where the weights will be, with --without_weights: <url>/models/model.pt, and so on.
        overwrite: replace an older zip.
    """
    if without_weights != bool(url):
        raise UserError("--without_weights and --url belong together: the url says where the weights are instead")
    folder = Path(str(bundle))
    if not folder.is_dir():
        raise UserError(f"{bundle} is not a bundle folder")
    output = Path(str(output))
    if output.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--output {output} is inside the bundle; choose another folder")
    sizes, left_out = bundle_files(folder)
    check_layout(folder, sizes)
    files: dict[str, Path | bytes] = {name: folder / name for name in sizes}
    if without_weights:
        files[LARGE_FILES] = _large_files(folder, [n for n in files if n.startswith("models/")], url)
        files = {name: file for name, file in files.items() if not name.startswith("models/")}
    elif (folder / LARGE_FILES).is_file():
        _check_downloaded(folder, sizes)
    name, version = zip_name(Bundle(folder))
    notes = [f"note: {place} says {value!r}, which everybody will read" for place, value in _absolute_paths(folder)]
    path = output / f"{name}_v{version}.zip"
    beside = path.with_name(f"{path.name}.sha256")
    with complete_output(beside, overwrite) as checksum_file, complete_output(path, overwrite) as archive:
        write_zip(archive, name, files)
        sha256 = file_sha256(archive)
        checksum_file.write_text(f"{sha256}  {path.name}\n")
    print(f"{path}: {len(files)} files, {path.stat().st_size / 2**20:.1f} MiB, SHA-256 {sha256}")
    if left_out:
        print(f"left out: {', '.join(left_out)}")
    for note in notes:
        print(note)
    print(f"to get it: python -m monai.bundle download --name {name} --url <where {path.name} is> --bundle_dir .")


def bundle_files(folder: Path) -> tuple[dict[str, int], list[str]]:
    """What of a folder belongs to the bundle.

    Returns:
        The sizes of the bundle's files by their path inside, sorted; and what else lies there, hidden files and Python's caches
        aside.

    Raises:
        UserError: a symbolic link or another special file, or a name that is not portable.
    """
    sizes: dict[str, int] = {}
    for part in PARTS:
        for path in _files(folder / part):
            name = path.relative_to(folder).as_posix()
            if path.is_symlink():
                raise UserError(f"{path} is a symbolic link, which does not survive a zip: put the file itself there")
            if not path.is_file():
                raise UserError(f"{path} is neither a file nor a folder: remove it")
            if fault := name_fault(name):
                raise UserError(f"{name!r} in {folder} is {fault}: rename it")
            sizes[name] = path.stat().st_size
    if pair := twins(list(sizes)):
        raise UserError(f"{folder}: {pair[0]} and {pair[1]} are one file on some computers: rename one")
    known = (*PARTS, LARGE_FILES)
    others = sorted(p.name for p in folder.iterdir() if p.name not in known and not SKIPPED.fullmatch(p.name))
    return dict(sorted(sizes.items())), others


def _files(path: Path) -> list[Path]:
    """A path, or everything in it if it is a folder; a link is not followed."""
    if path.is_symlink() or path.is_file():
        return [path]
    if not path.is_dir():
        return [path] if path.exists() else []
    return [file for inner in sorted(path.iterdir()) if not SKIPPED.fullmatch(inner.name) for file in _files(inner)]


def check_layout(folder: Path, sizes: Mapping[str, int]) -> None:
    """Refuse a bundle that lacks what everybody needs, or has files that are too large.

    Args:
        folder: for messages.
        sizes: of its files by their path inside.

    Raises:
        UserError: names the file.
    """
    for name in NEEDED:
        if name not in sizes:
            raise UserError(f"{folder / name} is missing: a bundle that is shared needs {', '.join(NEEDED)}")
    for name, size in sizes.items():
        if is_too_large(name, size):
            raise UserError(
                f"{folder / name} has {size >> 20} MiB; outside models/ the model zoo takes {LARGEST >> 20}: move or remove it"
            )


def zip_name(bundle: Bundle) -> tuple[str, str]:
    """The name of a bundle's zip and of the folder in it, and the version.

    Raises:
        UserError: the metadata do not have them.
    """
    where = bundle.path / "configs" / "metadata.json"
    name = re.sub(r"[^a-z0-9]+", "_", str(bundle.metadata.get("name", "")).lower()).strip("_")[:LONGEST_NAME]
    if not name:
        raise UserError(f"{where}: name must have letters or digits, of which the zip's name is made")
    version = str(bundle.metadata.get("version", ""))
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise UserError(f"{where}: version must be three numbers, as 0.1.0, got {version!r}")
    return name, version


def _large_files(folder: Path, names: list[str], url: str) -> bytes:
    if not names:
        raise UserError(f"{folder} has no weights in models/: pack it without --without_weights")
    if not re.match(r"(https?|file)://", url):
        raise UserError(f"--url {url} must begin with https://, http:// or file://")
    entries = [
        {
            "path": name,
            "url": f"{url.rstrip('/')}/{quote(name)}",
            "hash_val": file_sha256(folder / name),
            "hash_type": "sha256",
        }
        for name in names
    ]
    return yaml.safe_dump({"large_files": entries}, sort_keys=False).encode()


def _check_downloaded(folder: Path, sizes: Mapping[str, int]) -> None:
    """Refuse to pack a bundle whose weights are still elsewhere."""
    for entry in read_large_files(folder / LARGE_FILES):
        if entry["path"] not in sizes:
            raise UserError(
                f"{folder / entry['path']} is not here yet: python -m monai.bundle download_large_files --bundle_path {folder}"
            )


def read_large_files(path: Path) -> list[dict[str, str]]:
    """The entries of a large_files.yml.

    Raises:
        UserError: it is not one, a file would be written outside the bundle, or has no SHA-256.
    """
    try:
        entries = yaml.safe_load(path.read_text())["large_files"]
        for entry in entries:
            name, sha256 = entry["path"], entry.get("hash_val")
            if not isinstance(name, str) or not isinstance(entry["url"], str):
                raise UserError(f"{path}: path and url must be text, got {entry!r}")
            if fault := name_fault(name):
                raise UserError(f"{path}: {name!r} is {fault}")
            if entry.get("hash_type") != "sha256" or not SHA256.fullmatch(str(sha256)):
                raise UserError(f"{path}: {name} needs the SHA-256 as hash_val, and hash_type: sha256")
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a list of large files ({' '.join(str(error).split())})") from None
    return entries


def _absolute_paths(folder: Path) -> list[tuple[str, str]]:
    """The places in the configs that name folders of this computer."""
    found = []
    for path in sorted((folder / "configs").glob("*.json")):
        entries = read_json(path).items()
        found += [(f"{key} in configs/{path.name}", v) for key, v in entries if isinstance(v, str) and os.path.isabs(v)]
    return found
