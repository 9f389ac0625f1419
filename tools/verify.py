"""``verify``: whether a bundle, or its zip, is complete, undamaged and harmless to open; offline, and nothing of it is run."""

from __future__ import annotations

import json as json_module
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from tqdm import tqdm

from tools.archive import list_zip, unpack
from tools.bundle import Bundle
from tools.config_check import check_configs, check_scripts
from tools.errors import NotDone, UserError
from tools.lineage import SHA256, file_sha256
from tools.lineage_check import check_lineage
from tools.network import OUTPUT_ARGUMENTS
from tools.network_check import check_fit
from tools.pack import LARGE_FILES, bundle_files, check_layout, read_large_files, zip_name
from tools.weights_file import BLOCK, WeightsFile

METADATA = (  # what MONAI's metadata schema of 2024-07-25 requires, and the changelog that the model zoo asks for
    "schema version changelog monai_version pytorch_version numpy_version required_packages_version task description "
    "authors copyright network_data_format"
).split()
TENSOR = ("type", "format", "num_channels", "spatial_shape", "dtype", "value_range")
CODE = set(".pt .pth .pkl .pickle .ckpt .ts .bin .joblib .npy .npz .so .dll .dylib .pyd .pyc .exe .whl .jar".split())
PROGRAMS = (b"\x7fELF", b"MZ", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe")  # how they begin: Linux, Windows, macOS, Java
PICKLES = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
LONGEST_LINE = 600


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: its name.
        status: "ok", "FAILED", or "note" for what could not be checked.
        text: what, where, and what to do.
    """

    check: str
    status: str
    text: str


@dataclass
class Subject:
    """What is verified.

    Attributes:
        folder: where its files are.
        home: where the folder is, or would be if the zip were unpacked where it lies.
        everything: whether all that is in the folder came with the bundle, as in a zip.
    """

    folder: Path
    home: Path
    everything: bool

    @cached_property
    def bundle(self) -> Bundle:
        return Bundle(self.folder)

    @cached_property
    def files(self) -> dict[str, int]:
        """Sizes by path inside."""
        sizes, _ = bundle_files(self.folder)
        if self.everything:
            found = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
            sizes = {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in found}
        return sizes

    def weights_files(self) -> list[Path]:
        """The files that the restricted reader can read."""
        models = [name for name in self.files if name.startswith("models/") and name.endswith(".pt")]
        return [self.folder / name for name in (*models, *(n for n in self.files if n.endswith(".safetensors")))]


def verify(path: str, json: bool = False, run_code: bool = False) -> None:
    """Check a bundle or its zip, and print a line for each check; the exit code is 1 if one failed.

    Nothing in the bundle is run: configs and code are read as text, weights by a reader that knows nothing but tensors. A network
    of MONAI's, or of this toolkit's own code, is built by the installed copy to compare its tensors with the weights. Whether
    code and configs mean well, no check can tell: run only bundles of authors that you trust.

    Args:
        path: a bundle folder, or a zip. A zip is unpacked into a temporary folder that is removed at the end.
        json: print JSON.
        run_code: if all else is in order, build a network that only the bundle has the code of, which runs that code.
    """
    findings = [*check(Path(str(path)), run_code)] if json else [*_printed(check(Path(str(path)), run_code))]
    failed = [finding for finding in findings if finding.status == "FAILED"]
    if json:
        content = {"path": str(path), "ok": not failed, "checks": [asdict(finding) for finding in findings]}
        print(json_module.dumps(content, indent=2))
    if failed:
        raise UserError(f"{path}: {len(failed)} of {len(findings)} checks failed; do not use it as it is")


def _printed(findings: Iterator[Finding]) -> Iterator[Finding]:
    for finding in findings:
        print(f"{finding.status:<7} {finding.check:<12} {finding.text}", flush=True)
        yield finding


def check(path: Path, run_code: bool = False) -> Iterator[Finding]:
    """Check a bundle folder or a zip.

    Args:
        path: of it.
        run_code: as in ``verify``.

    Yields:
        What each check found, in order; after a fault of the zip itself there are no others.

    Raises:
        UserError: there is no such file or folder.
    """
    path = Path(os.path.abspath(path))
    if path.is_dir():
        yield from _check_folder(Subject(path, path, everything=False), run_code)
        return
    if not path.is_file():
        raise UserError(f"{path} not found")
    with tempfile.TemporaryDirectory(prefix="verify-") as temporary:
        for name, function in (("checksum", _checksum), ("zip", _unpacked)):
            finding = _finding(name, lambda function=function: function(path, Path(temporary)))
            yield finding
            if finding.status == "FAILED":
                return
        (folder,) = Path(temporary).iterdir()
        yield from _check_folder(Subject(folder, path.parent / folder.name, everything=True), run_code)


def _check_folder(subject: Subject, run_code: bool) -> Iterator[Finding]:
    said: set[str] = set()
    failed = False
    for name, function in CHECKS.items():
        finding = _finding(name, lambda function=function: function(subject), f"{subject.folder}/")
        if finding.status == "FAILED" and finding.text in said:
            finding = Finding(name, "note", "not done: see above")
        said.add(finding.text)
        failed |= finding.status == "FAILED"
        yield finding
    if failed:
        yield Finding("network", "note", "not built, because a check failed")
    else:
        yield _finding("network", lambda: _network(subject, run_code), f"{subject.folder}/")


def _finding(name: str, function: Callable[[], str], prefix: str = "") -> Finding:
    """Run one check. A hostile file can make the libraries raise nearly anything."""
    try:
        status, text = "ok", function()
    except NotDone as note:
        status, text = "note", str(note)
    except (UserError, OSError) as error:
        status, text = "FAILED", str(error)
    except Exception as error:
        status, text = "FAILED", f"it cannot be read: {type(error).__name__}: {str(error)[:300]}"
    if prefix:
        text = text.replace(prefix, "")
    line = " ".join(text.split())[:LONGEST_LINE]
    return Finding(name, status, "".join(c if c.isprintable() else "?" for c in line))


def _checksum(path: Path, folder: Path) -> str:
    beside = path.with_name(f"{path.name}.sha256")
    if not beside.is_file():
        raise NotDone(f"no {beside.name} beside it: whether it is what its author packed cannot be told")
    words = beside.read_text(errors="replace").split()
    if not words or not SHA256.fullmatch(words[0].lower()):
        raise UserError(f"{beside} has no SHA-256: get it again")
    if file_sha256(path) != words[0].lower():
        raise UserError(f"{path} is not the file that {beside.name} describes: download both again")
    return f"as in {beside.name}"


def _unpacked(path: Path, folder: Path) -> str:
    top, entries = list_zip(path)
    size = unpack(path, entries, folder)
    return f"{len(entries)} files in {top}/, {size / 2**20:.1f} MiB, each as it was packed"


def _layout(subject: Subject) -> str:
    check_layout(subject.folder, subject.files)
    others = bundle_files(subject.folder)[1]
    ignored = f"; not looked at, and not packed: {', '.join(others)}" if others and not subject.everything else ""
    return f"{len(subject.files)} files{ignored}"


def _metadata(subject: Subject) -> str:
    metadata, where = subject.bundle.metadata, subject.folder / "configs" / "metadata.json"
    if missing := [key for key in METADATA if key not in metadata]:
        raise UserError(f"{where} lacks {', '.join(missing)}")
    name, version = zip_name(subject.bundle)
    if version not in metadata["changelog"]:
        raise UserError(f"{where}: version {version} is not in the changelog")
    for key in ("monai_version", "pytorch_version", "numpy_version"):
        if not re.fullmatch(r"\d[\w.]*", str(metadata[key])):
            raise UserError(f"{where}: {key} {metadata[key]!r} is not a version that pip installs")
    for side, tensor in (("inputs", "image"), ("outputs", "pred")):
        entry = metadata["network_data_format"].get(side, {}).get(tensor, {})
        if missing := [key for key in TENSOR if key not in entry]:
            raise UserError(f"{where}: network_data_format#{side}#{tensor} lacks {', '.join(missing)}")
    return f"{name} {version}, {_channels(subject, where)} output channels"


def _channels(subject: Subject, where: Path) -> int:
    """The number of output channels, after comparing all that say it."""
    pred = subject.bundle.metadata["network_data_format"]["outputs"]["pred"]
    count, named = pred["num_channels"], pred.get("channel_def", {})
    if count != len(named) or set(named) != {str(i) for i in range(len(named))}:
        raise UserError(
            f"{where}: channel_def of outputs#pred names the channels {', '.join(named)}; it must name 0 to num_channels - 1, "
            f"num_channels is {count}"
        )
    if len({str(label).lower() for label in named.values()}) != count:
        raise UserError(f"{where}: two channels of channel_def have one name")
    network_def = subject.bundle.plain("network_def") or {}
    for argument in OUTPUT_ARGUMENTS:
        if network_def.get(argument, count) != count:
            raise UserError(
                f"{where}: num_channels is {count}, but {argument} of network_def in configs/inference.json is "
                f"{network_def[argument]}"
            )
    return count


def _foreign(subject: Subject) -> str:
    """Refuse what would be executed or unpickled by somebody, and is neither Python source nor weights that were read."""
    read = {path.relative_to(subject.folder).as_posix() for path in subject.weights_files()}
    for name in sorted(subject.files.keys() - read):
        path = subject.folder / name
        with open(path, "rb") as file:
            start = file.read(4)
        if path.suffix.lower() in CODE or start.startswith(PROGRAMS + PICKLES):
            raise UserError(
                f"{path} is a program, or a file that can run code when it is loaded: only models/*.pt and *.safetensors can be "
                "checked; remove it"
            )
    return "no programs, and no pickles but weights"


def _large_files(subject: Subject) -> str:
    path = subject.folder / LARGE_FILES
    if not path.is_file():
        return "none elsewhere"
    entries, missing = read_large_files(path), []
    for entry in entries:
        if entry["path"] not in subject.files:
            missing.append(entry["path"])
        elif file_sha256(subject.folder / entry["path"]) != entry["hash_val"]:
            raise UserError(
                f"{subject.folder / entry['path']} is not the file that {LARGE_FILES} describes: get it again"
            )
    if missing:
        raise NotDone(
            f"{', '.join(missing)} not here yet: python -m monai.bundle download_large_files --bundle_path <the bundle>, then "
            "verify that folder"
        )
    return f"{len(entries)} files as {LARGE_FILES} describes them"


def _weights(subject: Subject) -> str:
    paths = subject.weights_files()
    if not paths:
        raise NotDone("there are none here")
    parameters = 0
    for path in paths:
        weights = WeightsFile(path)
        weights.verify()
        for name in tqdm(weights.entries, desc=path.name, delay=2, disable=None, leave=False):
            _check_finite(weights, name)
            parameters += weights.entries[name].size
    names = ", ".join(path.relative_to(subject.folder).as_posix() for path in paths)
    return f"{names}: {parameters:,} finite numbers, checksums as they were written"


def _check_finite(weights: WeightsFile, name: str) -> None:
    entry = weights.entries[name]
    step = BLOCK if entry.strides is None else max(entry.size, 1)  # a tensor with strides is read whole anyway
    for start in range(0, entry.size, step):
        weights.read(name, start, start + step)


def _network(subject: Subject, run_code: bool) -> str:
    if not subject.bundle.model_file.is_file():
        raise NotDone("not built: there are no weights here to compare it with")
    return check_fit(subject.bundle, subject.bundle.weights(), run_code)


CHECKS: dict[str, Callable[[Subject], str]] = {
    "layout": _layout,
    "metadata": _metadata,
    "configs": lambda subject: check_configs(subject.folder),
    "scripts": lambda subject: check_scripts(subject.folder),
    "other files": _foreign,
    "large files": _large_files,
    "weights": _weights,
    "lineage": lambda subject: check_lineage(subject.bundle, subject.home),
}
