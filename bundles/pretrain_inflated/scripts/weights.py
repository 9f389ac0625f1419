"""Where a bundle's weights are, and what to do when they are not there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn


def model_file(bundle_root: str | Path, folder: str = "models") -> str:
    """The path of a bundle's ``model.pt``.

    Raises:
        FileNotFoundError: the bundle has no weights; the message says how it gets them.
    """
    path = Path(bundle_root) / folder / "model.pt"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} not found. This copy of the bundle has no weights: train it (configs/train.json) or, for a merged "
            "model, make one with `python -m tools merge`."
        )
    return str(path)


def load_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a ``model.pt``, read without executing anything that the file may contain.

    Raises:
        ValueError: the file is truncated, holds something else than tensors, or holds NaN or infinite values.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a readable file of weights ({reason})") from None
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} holds something else than named tensors")
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: tensor {name} has NaN or infinite values")
    return state


def load_backbone(
    network: nn.Module,
    bundle_root: str | Path,
    head: Sequence[str],
    last_layer: Sequence[str] = (),
    skips: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Load a starting point's backbone into a network and start its fresh head from zero.

    From zero, every voxel at probability 1/2, the head learns in one epoch what takes it several from random weights. Of several
    layers only the last starts from zero: nothing could be learned through two layers of zeros.

    Args:
        network: changed in place.
        bundle_root: the bundle; the starting point is its ``models/pretrained/model.pt``.
        head: names of the head's tensors.
        last_layer: those of its last layer, where it has several.
        skips: kernels among them to whose outputs the network adds their inputs, (C, C, …): they start by taking the
            background's away, so that its logit is zero.

    Returns:
        The starting point's parameters by name, head left out.

    Raises:
        FileNotFoundError: there is no starting point.
        ValueError: its tensors are not the network's, by name and shape.
    """
    path = model_file(bundle_root, "models/pretrained")
    state, own = load_state(path), network.state_dict()
    backbone = {name: tensor for name, tensor in state.items() if name not in head}
    for name in [*backbone, *own]:
        if name not in head and (name not in own or name not in backbone or backbone[name].shape != own[name].shape):
            raise ValueError(f"{path} is not of this network: tensor {name} is missing, or has another shape")
    fresh = {name: torch.zeros_like(own[name]) if name in (last_layer or head) else own[name] for name in head}
    for name in skips:
        fresh[name][0, 0, *(size // 2 for size in fresh[name].shape[2:])] = -1
    network.load_state_dict(backbone | fresh)
    return backbone
