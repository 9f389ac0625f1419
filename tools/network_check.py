"""Whether a network takes the weights of its bundle, found without running code that came with the bundle."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.bundle import Bundle
from tools.errors import NotDone, UserError
from tools.network import inner_network, instantiate
from tools.vendor import SOURCE, named_modules, with_imports
from tools.weights_file import WeightsFile

if TYPE_CHECKING:
    from torch import nn

NETS = "monai.networks.nets"


def check_fit(bundle: Bundle, weights: WeightsFile, run_code: bool) -> str:
    """Build the network and compare names and shapes of its tensors with those of the weights.

    A network of MONAI, or one whose code in scripts/ is this toolkit's, byte for byte, is built by the installed copy of that
    code: nothing that came with the bundle is run.

    Args:
        bundle: its inference.json has the network.
        weights: its model.pt.
        run_code: build every other network too, by the bundle's own code and expressions.

    Returns:
        What was found, for people.

    Raises:
        UserError: the weights do not fit, or the network cannot be built.
        NotDone: there is no torch or monai, or building it would run the bundle's code.
    """
    try:
        import monai  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise NotDone(f"names and shapes of the weights were not compared with network_def: {error}") from None
    try:
        network = _known_network(bundle)
    except NotDone:  # as MONAI's SwinUNETR, which computes with numbers while it is built
        if not run_code:
            raise
        network = None
    if network is None and not run_code:
        raise NotDone(
            "names and shapes of the weights were not compared with network_def, because that would run the bundle's own code; "
            "add --run_code if you trust its author"
        )
    if network is None:
        network = _own_network(bundle)
    _compare({name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}, weights)
    return f"the weights fit {type(network).__name__}, {len(weights.entries)} tensors"


def check_patch(bundle: Bundle) -> None:
    """Refuse patches that a bundle's network does not take, by running it without data or weights, on the meta device.

    Raises:
        UserError: says what the network does.
    """
    import torch

    size = bundle.resolved("patch_size")
    with bundle.code(), torch.device("meta"), torch.inference_mode():
        try:
            network = bundle.parser().get_parsed_content("network_def").eval()
            network(torch.empty(1, bundle.in_channels, *size))
        except Exception as error:  # each network has its own
            raise UserError(
                f"the network does not take patches of {size} voxels: {' '.join(str(error).split())[:200]}"
            ) from None


def _compare(shapes: Mapping[str, tuple[int, ...]], weights: WeightsFile) -> None:
    for name, shape in shapes.items():
        found = weights.entries[name].shape if name in weights.entries else "missing"
        if found != shape:
            raise UserError(
                f"{weights.path}: tensor {name} is {found}, but {shape} in network_def of configs/inference.json: it is the "
                "weights of another network"
            )
    if extra := [name for name in weights.entries if name not in shapes]:
        raise UserError(f"{weights.path}: tensor {extra[0]} is not in network_def of configs/inference.json")


def _known_network(bundle: Bundle) -> nn.Module | None:
    """The network on the meta device, if it is MONAI's or ours and its arguments are plain values; else None."""
    from torch import device

    definition = bundle.plain("network_def")
    if not isinstance(definition, Mapping):
        return None
    definition = inner_network(definition)
    arguments = {key: value for key, value in definition.items() if key not in ("_target_", "_desc_")}
    network = _known_class(str(definition.get("_target_")), bundle.path / "scripts")
    if network is None or _has_targets(arguments) or _downloads(network, arguments):
        return None
    try:
        with device("meta"):
            return network(**arguments)
    except Exception as error:
        raise NotDone(f"the weights were not compared with network_def, which cannot be built: {error}") from None


def _known_class(target: str, scripts: Path) -> type[nn.Module] | None:
    from torch import nn

    module, _, name = target.rpartition(".")
    if module.startswith("scripts.") and _is_ours(target, scripts):
        found = getattr(import_module(module.replace("scripts", "tools.bundle_code", 1)), name, None)
    else:
        found = getattr(import_module(NETS), name, None)
        if module not in ("", NETS, getattr(found, "__module__", None)):
            return None
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def _is_ours(target: str, scripts: Path) -> bool:
    """Whether the code of a target, with all that it imports, is the same as in this toolkit."""
    try:
        wanted = with_imports(named_modules([json.dumps(target)]), SOURCE)
    except UserError:  # a module that only the bundle has
        return False
    return all((scripts / name).is_file() and (scripts / name).read_text() == text for name, text in wanted.items())


def _has_targets(value: Any) -> bool:
    """Whether an argument is to be made by calling something, or is one of MONAI's instructions."""
    if isinstance(value, Mapping):
        return any(str(key).startswith("_") or _has_targets(entry) for key, entry in value.items())
    return isinstance(value, list) and any(map(_has_targets, value))


def _downloads(network: type, arguments: Mapping[str, Any]) -> bool:
    """Whether a network of MONAI fetches weights when it is built."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(network).parameters.items()}
    return any(
        value not in (False, None)
        for name, value in {**defaults, **arguments}.items()
        if "pretrained" in name or name == "weights"
    )


def _own_network(bundle: Bundle) -> nn.Module:
    """The network by the bundle's own code."""
    with bundle.code():
        return instantiate(bundle.resolved("network_def"))
