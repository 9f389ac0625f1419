"""``inflate``: the weights of a 2D network become a 3D starting point that computes the same on every slice."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.bundle import Bundle, read_json
from tools.convert import write_conversion
from tools.errors import UserError
from tools.importers.conversion import Conversion
from tools.inflation import Mode, depth_taps, inflate_weights, inflate_window, verify, verify_window
from tools.instantiate import window_size
from tools.labels import parse_sources
from tools.network import describe, instantiate, output_argument
from tools.output import complete_output
from tools.vendor import BUNDLES, SOURCE
from tools.weights_2d import Weights2D, fit, read_weights

if TYPE_CHECKING:
    from torch import Tensor

TEMPLATE = "merged_inference"
AXCODES = "SRA"  # depth first, so that slices are axial; their rows and columns as in RAS
CHECKED = 128  # voxels in plane at most, on which networks with windows are checked: they are the same on more of them
SPATIAL = ("img_size", "patch_size", "window_size")  # arguments of MONAI's networks with a number for each axis
# arguments with a number, or one for each axis, for each level
PER_LEVEL = ("kernel_size", "strides", "upsample_kernel_size", "up_kernel_size")
NEW = "the file has none; the network's own start"


def inflate(
    weights: str,
    network_def: str,
    output: str,
    network_2d: str = "",
    mode: object = "centre",
    labels: object = None,
    patch_size: object = None,
    overwrite: bool = False,
) -> None:
    """Turn the weights of a 2D network into a 3D starting point, and check that it computes the same.

    On a volume of equal slices the 3D network gives on every slice what the 2D network gives on one. This is checked on noise in
    float64, and refused where it does not hold. Depth is the first axis: the bundle turns images so that slices are axial.
    A bundle whose network sees windows of slices, bundles/pretrain_inflated or a copy of it, is copied with all that it has and
    gets the weights to start from.

    Args:
        weights: of the 2D network: .safetensors, or .pth. Names of MONAI, of timm's ViT or Swin, or of a part of the network.
        network_def: the 3D network of MONAI: as JSON, a JSON file, or a bundle whose inference.json has it.
        output: folder of the new bundle.
        network_2d: the 2D network in the same way. Default: the 3D one with spatial_dims 2, sizes without the depth's.
        mode: how kernels are shared out along the depth: centre, average, or taps that sum to 1: 0.25,0.5,0.25.
        labels: names of the output channels 1, 2, …: liver,spleen. Default: the bundle's, or label_1, …
        patch_size: of the windows, depth first: 96 or 32,224,224. Default: network_def's img_size, or the bundle's, or 96.
        overwrite: replace the output if it exists.
    """
    mode = mode if isinstance(mode, str) else _numbers("mode", mode)
    depth_taps(1, mode)  # so that a wrong one is noticed here
    deep_def, source = _definition(network_def)
    inputs = [weights, *([source.path] if source else [])]
    if "window" in deep_def:
        if source is None or network_2d or labels is not None or patch_size is not None:
            raise UserError(
                "a network of windows is a bundle's, and takes its labels and patch_size from there: --network_def "
                "bundles/pretrain_inflated, or what new_pretraining made of it, without --network_2d, --labels and --patch_size"
            )
        with complete_output(output, overwrite, inputs=inputs) as folder, source.code():
            conversion = _fill(folder, source, Path(weights), deep_def, mode)
        _report(output, conversion)
        return
    flat_def = _definition(network_2d)[0] if network_2d else _twin(deep_def)
    names = _label_names(labels, deep_def, source)
    for definition in (deep_def, flat_def):
        definition[output_argument(definition)] = 1 + len(names)
    size = _patch_size(patch_size, deep_def, source)
    with complete_output(output, overwrite, inputs=inputs) as folder, _code(source):
        result = _inflated(Path(weights), deep_def, flat_def, mode, size)
        conversion = _conversion(result, Path(weights), deep_def, mode, size)
        conversion.labels = {name: [name] for name in names}
        conversion.scripts = source.path / "scripts" if source else SOURCE
        write_conversion(folder, "inflate", "2D weights, inflated", Path(weights), conversion)
    _report(output, conversion)


def _report(output: str, conversion: Conversion) -> None:
    print(
        f"{output}: {conversion.facts['tensors']} (docs/conversion.md); {len(conversion.left_out)} of the file left out"
    )
    print(f"on {conversion.facts['verified']}")


def _fill(folder: Path, source: Bundle, path: Path, deep_def: Mapping, mode: Mode) -> Conversion:
    """A copy of a bundle whose network sees windows, with weights: its start (models/pretrained), and for now its model."""
    size = [*(min(side, CHECKED) for side in window_size(source)[:2]), 3]
    result = _inflated(path, deep_def, {**deep_def, "window": 1}, mode, size)
    facts = _facts(result, mode)
    slices = "any slices" if mode == "centre" else "equal slices"
    conversion = Conversion(
        template=str(source.path),
        labels=read_json(source.path / "configs" / "train.json")["labels"],
        tensors=result.tensors,
        origins=result.origins,
        left_out=result.found.left_out,
        values={"use_pretrained": True},
        scripts=source.path / "scripts",
        metadata={
            "name": f"{source.name}, from {path.stem}",
            "copyright": f"{source.metadata['copyright']}; of the 2D weights, that of their authors",
            "lineage": source.metadata.get("lineage", {}),
        },
        facts=facts
        | {
            "depth": "the network's last axis, which is axial; its windows are channels of the 2D network",
            "verified": (
                f"{'×'.join(map(str, size))} voxels of {slices} the output is the 2D network's within {result.error:.1e} of its "
                "maximum"
            ),
        },
    )
    write_conversion(folder, "inflate", "2D weights, for windows of slices", path, conversion)
    (folder / "models" / "pretrained").mkdir()
    shutil.copyfile(folder / "models" / "model.pt", folder / "models" / "pretrained" / "model.pt")
    return conversion


@dataclass
class Inflated:
    """A 3D network's weights as they will be written.

    Attributes:
        tensors: by name, in the network's own precision; those that the file lacks are a 3D network's own start.
        origins: of each, the rule and the name in the file.
        found: what the file had.
        error: by which 3D and 2D outputs differ.
    """

    tensors: dict[str, Tensor]
    origins: dict[str, str]
    found: Weights2D
    error: float


def _inflated(path: Path, deep_def: Mapping, flat_def: Mapping, mode: Mode, size: Sequence[int]) -> Inflated:
    """The weights of a file, inflated and verified.

    Raises:
        UserError: they do not fit, or no rule is exact.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flat, deep = (instantiate(definition, devices=("cpu",)) for definition in (flat_def, deep_def))
    channels = deep_def.get("in_channels", 1)
    found = fit(read_weights(path), flat.state_dict(), channels, describe(flat_def).head, path)
    flat, start = flat.double().eval(), deep.state_dict(keep_vars=True)
    flat.load_state_dict({**flat.state_dict(), **found.tensors})
    fill, check = (inflate_window, verify_window) if "window" in deep_def else (inflate_weights, verify)
    tensors, rules = fill(flat, deep, mode)
    deep.load_state_dict(tensors, assign=True)
    deep.double().eval()
    error = check(flat, deep, channels, size, mode)
    origins = {name: _origin(name, rule, found) for name, rule in rules.items()}
    single = {id(tensor): tensor.to(start[name].dtype) for name, tensor in tensors.items()}
    written = {
        name: start[name] if origins[name].startswith("new") else single[id(tensor)] for name, tensor in tensors.items()
    }
    return Inflated(written, origins, found, error)


def _conversion(result: Inflated, path: Path, deep_def: Mapping, mode: Mode, size: Sequence[int]) -> Conversion:
    """What the bundle will say, but for its labels and code."""
    shape = "×".join(map(str, size))
    new = any(origin.startswith("new") for origin in result.origins.values())
    new = " (new tensors: inflated too, for this check)" if new else ""
    channels = deep_def.get("in_channels", 1)
    return Conversion(
        template=TEMPLATE,
        labels={},
        tensors=result.tensors,
        origins=result.origins,
        left_out=result.found.left_out,
        values={"network_def": dict(deep_def), "preprocessing": _preprocessing(), "patch_size": list(size)},
        image={
            "num_channels": channels,
            "spatial_shape": list(size),
            "channel_def": {str(channel): f"image {channel}" if channel else "image" for channel in range(channels)},
        },
        metadata={
            "name": f"Inflated {path.stem}",
            "task": "Starting point",
            "description": f"A 3D network with the weights of a 2D one, {path.name}: the same on every slice. Not trained in 3D.",
            "data_source": "that of the 2D weights",
            "references": [
                "Zhang et al., Adapting Pre-trained Vision Transformers from 2D to 3D through Weight Inflation Improves Medical "
                "Image Segmentation, ML4H 2022",
                "Carreira and Zisserman, Quo Vadis, Action Recognition? A New Model and the Kinetics Dataset, CVPR 2017",
            ],
        },
        facts=_facts(result, mode)
        | {
            "depth": "the network's first axis; images are turned so that slices are axial",
            "verified": (
                f"{shape} voxels of equal slices the 3D output is the 2D one within {result.error:.1e} of its maximum{new}"
            ),
        },
    )


def _facts(result: Inflated, mode: Mode) -> dict[str, str]:
    """What was done to the file's tensors, in words."""
    counts = Counter(origin.partition(":")[0] for origin in result.origins.values())
    return {
        "names": result.found.layout,
        "mode": mode if isinstance(mode, str) else f"taps {', '.join(map(str, mode))}",
        "tensors": ", ".join(f"{number} {rule}" for rule, number in sorted(counts.items())),
    }


def _origin(name: str, rule: str, found: Weights2D) -> str:
    """What a tensor was made from, for the account."""
    if rule == "new":
        return "new: follows from the 3D network's size"
    return f"{rule}: {found.origins[name]}" if name in found.origins else f"new: {NEW}"


def _definition(text: str) -> tuple[dict[str, Any], Bundle | None]:
    """A network_def, and the bundle that it is from.

    Raises:
        UserError: it is no JSON object with ``_target_``, a missing file, or a bundle without a plain network_def.
    """
    path = Path(text)
    if not text.lstrip().startswith("{"):
        if path.is_dir():
            bundle = Bundle(path)
            return bundle.network_def(), bundle
        definition = read_json(path)
        definition = definition.get("network_def", definition)
    else:
        try:
            definition = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"network_def {text[:60]!r} is not JSON ({error})") from None
    if not isinstance(definition, dict) or "_target_" not in definition:
        raise UserError(f'network_def {text[:60]!r} names no network: it needs {{"_target_": "BasicUNet", …}}')
    return definition, None


def _twin(deep: Mapping[str, Any]) -> dict[str, Any]:
    """The definition of the same network for images."""
    flat = {**deep, "spatial_dims": 2}
    for key in SPATIAL:
        if isinstance(flat.get(key), list) and len(flat[key]) == 3:
            flat[key] = flat[key][1:]
    for key in PER_LEVEL:
        if isinstance(flat.get(key), list):
            flat[key] = [size[1:] if isinstance(size, list) and len(size) == 3 else size for size in flat[key]]
    return flat


def _label_names(labels: object, definition: Mapping[str, Any], source: Bundle | None) -> list[str]:
    if labels is not None:
        return [str(name) for name in parse_sources(labels)]
    if source:
        return source.labels
    count = definition[argument := output_argument(definition)]
    if not isinstance(count, int) or count < 2:
        raise UserError(f"network_def: {argument} is {count}, not background and some labels")
    return [f"label_{number}" for number in range(1, count)]


def _patch_size(wanted: object, definition: Mapping[str, Any], source: Bundle | None) -> list[int]:
    if wanted is None:
        wanted = definition.get("img_size") or (window_size(source) if source else 96)
    sizes = [int(size) for size in _numbers("patch_size", wanted)]
    sizes = sizes * 3 if len(sizes) == 1 else sizes
    if len(sizes) != 3 or min(sizes) < 1:
        raise UserError(f"--patch_size {wanted} is neither a number nor three, depth first, such as 32,224,224")
    return sizes


def _numbers(name: str, value: object) -> list[float]:
    try:
        return [float(number) for number in (value if isinstance(value, list | tuple) else [value])]
    except (TypeError, ValueError):
        raise UserError(f"--{name} {value} is not made of numbers") from None


def _preprocessing() -> dict[str, Any]:
    """The template's, with the depth first."""
    preprocessing = read_json(BUNDLES / TEMPLATE / "configs" / "inference.json")["preprocessing"]
    for transform in preprocessing["transforms"]:
        if transform["_target_"] == "Orientationd":
            transform["axcodes"] = AXCODES
    return preprocessing


@contextmanager
def _code(source: Bundle | None) -> Iterator[None]:
    """Make the code of the bundle that a network is from importable."""
    if source is None:
        yield
    else:
        with source.code():
            yield
