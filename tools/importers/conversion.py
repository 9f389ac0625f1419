"""What an importer finds in a checkpoint, and how checkpoints are read without executing anything that they hold."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.errors import UserError
from tools.vendor import SOURCE

if TYPE_CHECKING:
    from torch import Tensor

PREFIXES = ("module.", "_orig_mod.")  # of networks that were wrapped for several GPUs, or compiled


@dataclass
class Conversion:
    """A checkpoint as a bundle will have it.

    Attributes:
        template: the folder in bundles/ that the new bundle is a copy of.
        labels: names of the output channels 1..C, each with the labels of the training dataset that it stands for.
        tensors: the network's weights by name; names of one tensor have the same object, and stay one in the bundle.
        origins: of each of them, the name in the checkpoint that it was made from, and how; or why it is new.
        left_out: names in the checkpoint that nothing was made from, each with the reason.
        values: top-level entries of train.json and inference.json, as network_def.
        image: entries of the input image in metadata.json, as num_channels.
        scripts: a folder that has the code of its network and preprocessing.
        packages: what the bundle needs beyond its template's requirements, as PyPI calls it.
        metadata: entries of metadata.json.
        facts: about the checkpoint, for the model card.
    """

    template: str
    labels: dict[str, list[int | str]]
    tensors: dict[str, Tensor]
    origins: dict[str, str]
    left_out: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    image: dict[str, Any] = field(default_factory=dict)
    scripts: Path = SOURCE
    packages: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)


def read_checkpoint(path: str | Path, classes: Iterable[tuple[type, str]] = ()) -> Any:
    """The content of a file that ``torch.save`` wrote: tensors, plain Python and NumPy's numbers, and nothing else.

    Args:
        path: the file. It is mapped into memory, not read, where its format allows that.
        classes: what else may be in it: a harmless stand-in, and the name that the file has for it.

    Raises:
        UserError: no such file, damaged, or it holds something that would have to be executed.
    """
    import numpy as np
    import torch

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} not found")
    _check_archive(path)
    scalar = np._core.multiarray.scalar
    allowed = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    allowed += [np.dtype, *(type(np.dtype(name)) for name in ("float64", "float32", "int64")), *classes]
    with torch.serialization.safe_globals(allowed):
        for mmap in (True, False):  # files of the format before PyTorch 1.6 cannot be mapped
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            except Exception as error:
                reason = " ".join(str(error).split("\n")[0].split()) or type(error).__name__
                if mmap and "mmap can only be used" in reason:
                    continue
                if "Weights only load failed" in reason or "Unsupported" in str(error):
                    reason = f"it holds something else than weights and numbers: {_unsupported(str(error))}"
                if "weights_only" in reason:  # PyTorch's advice to execute what is in it
                    reason = "it is no file that torch.save wrote, or damaged"
                raise UserError(f"{path} cannot be read ({reason})") from None
    raise AssertionError("unreachable")


def _check_archive(path: Path) -> None:
    """Compare the checksums of an archive's files, as PyTorch does not.

    Raises:
        UserError: one of them is not what was written.
    """
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError) as error:
            raise UserError(f"{path} is damaged ({error})") from None
        if broken:
            raise UserError(f"{path} is damaged: {broken} in it is not what was written")


def check_geometry(
    where: object, patch_size: Sequence[float], spacing: Sequence[float], strides: Sequence[Sequence[int]]
) -> None:
    """Refuse sizes that no network and no image has.

    Args:
        where: they are from, for the message.
        patch_size: voxels.
        spacing: mm.
        strides: of each level below the first, or of all.

    Raises:
        UserError: names the one that is wrong.
    """
    if any(not isinstance(step, int) or step < 1 for stride in strides for step in stride):
        raise UserError(f"{where}: strides must be whole numbers from 1 on, got {strides}")
    if not all(math.isfinite(side) and side > 0 for side in spacing):
        raise UserError(f"{where}: spacing must be above 0, got {spacing}")
    for axis, side in enumerate(patch_size):
        multiple = math.prod(stride[axis] for stride in strides)
        if side < 1 or side % multiple:
            raise UserError(
                f"{where}: the patch size {patch_size} must be a multiple of the strides' product, {multiple}"
            )


def _unsupported(message: str) -> str:
    """The line of PyTorch's long message that names what it refused."""
    lines = [line.strip() for line in message.splitlines() if "nsupported" in line or "GLOBAL" in line]
    return lines[0] if lines else message.splitlines()[0]


def check_stem(in_channels: object, stem: object) -> None:
    """Refuse options of a first layer that is repeated for more channels.

    Raises:
        UserError: names the option.
    """
    if stem not in ("repeat", "mean"):
        raise UserError(f"--stem must be repeat or mean, got {stem!r}")
    if type(in_channels) is not int or in_channels < 0:
        raise UserError(f"--in_channels must be a whole number, got {in_channels!r}")


def repeated(kernel: Tensor, copies: int, stem: str) -> tuple[Tensor, str]:
    """A kernel (out, 1, …) that takes one channel, for several: (out, copies, …), and what was done.

    Args:
        kernel: of a first layer.
        copies: number of channels.
        stem: "repeat", as STU-Net's published code does it, or "mean": divided by their number, so that equal channels give
            what one gave.
    """
    several = kernel.repeat(1, copies, *[1] * (kernel.dim() - 2))
    said = f"repeated for {copies} channels"
    return (several / copies, f"{said}, divided by {copies}") if stem == "mean" else (several, said)


def inner_state(content: Any) -> tuple[Any, str]:
    """The network's weights where a checkpoint has them among other things, and their name there; else all of it, and ""."""
    for key in ("model", "state_dict", "network", "net"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            return content[key], key
    return content, ""


def named_tensors(state: Any, path: str | Path, where: str) -> dict[str, Tensor]:
    """The tensors of a part of a checkpoint, by name without the prefixes of wrapped networks.

    Raises:
        UserError: the part is missing, holds something else than tensors, or one of them has NaN or infinite values.
    """
    import torch

    if not isinstance(state, Mapping) or not state:
        raise UserError(f"{path} has no weights in {where}")
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{path}: {where} holds {name}, which is no tensor")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{path}: tensor {name} has NaN or infinite values")
        plain = str(name)
        while plain.startswith(PREFIXES):
            plain = plain.split(".", 1)[1]
        if plain in tensors:
            raise UserError(f"{path}: {where} holds {plain} twice, once as {name}")
        tensors[plain] = tensor
    return tensors
