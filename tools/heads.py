"""Heads: the form in which they stack, how they are stacked, and the proof that this gives each task's own logits.

In canonical form the background's logit is the constant 0 and each organ's is its margin over background: the last layer's rows
without the background's. Heads of one linear layer then stack as rows under one row of zeros. A head of several layers also has
*hidden* channels, one for each output; the background's carry features, so that the stacked head needs them too. They are its
spare channels, behind those that it shows::

    place   0                1 … ΣC             1 + ΣC …
            background of    organs of all      background of
            the first task   tasks              the other tasks

Along every axis that counts classes each task's entries go to its places; a kernel from classes to classes is block-diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tools.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tools.network import Structure

ORGANS = (
    8  # of each task in the proof: so many margins do not all have one sign by chance, which would hide an activation
)
SIZES = (16, 32, 64, 96, 128)  # of the image in the proof, the first one that the network takes
TOLERANCE = 1e-9  # of the largest margin, in float64


def canonical_head(structure: Structure, name: str, tensor: np.ndarray) -> np.ndarray:
    """Make the last layer's outputs margins over background, by subtracting the background row from every row.

    A softmax head decides as before; a sigmoid head with a zero background row is unchanged.

    Args:
        structure: of the network.
        name: of the tensor.
        tensor: of a specialist; in a head of several layers, those in front of the last stay as they are.
    """
    if structure.last_layer and name not in structure.last_layer:
        return tensor
    axis = structure.head[name]
    margins = np.ascontiguousarray(tensor - np.take(tensor, [0], axis=axis))
    if name in structure.skips:  # the network adds channel k to row k: row k has to take channel 0 away
        centre: list[int | slice] = [size // 2 for size in tensor.shape]
        centre[axis], centre[structure.inner[name]] = slice(None), 0
        margins[tuple(centre)] -= 1
    return margins


def stacked_heads(structure: Structure, heads: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """All tensors of the stacked head.

    Args:
        structure: of the network.
        heads: those of each task in canonical form, by name.
    """
    spare = bool(structure.spare_channels(len(heads)))
    return {
        name: stacked_head([head[name] for head in heads], structure.class_axes(name), spare) for name in structure.head
    }


def stacked_head(tensors: Sequence[np.ndarray], axes: Sequence[int], spare: bool = False) -> np.ndarray:
    """The same head tensor of all tasks as one.

    Args:
        tensors: of each task, in canonical form.
        axes: that count classes.
        spare: keep the background rows of all tasks, behind the organs; otherwise all of them are the first row, zero.
    """
    organs = [tensor.shape[axes[0]] - 1 for tensor in tensors]
    size = 1 + sum(organs) + (len(tensors) - 1 if spare else 0)
    stacked = np.zeros([size if axis in axes else n for axis, n in enumerate(tensors[0].shape)], tensors[0].dtype)
    for tensor, places in zip(tensors, _places(organs, spare), strict=True):
        stacked[np.ix_(*(places if axis in axes else range(n) for axis, n in enumerate(tensor.shape)))] = tensor
    return stacked


def unstacked_heads(
    structure: Structure, stacked: Mapping[str, np.ndarray], organs: Sequence[int]
) -> list[dict[str, np.ndarray]]:
    """The inverse of ``stacked_heads``: those of each task in canonical form.

    Args:
        structure: of the network.
        stacked: the stacked head's tensors by name.
        organs: of each task.
    """
    heads: list[dict[str, np.ndarray]] = []
    for places in _places(organs, bool(structure.spare_channels(len(organs)))):
        heads.append({})
        for name, tensor in stacked.items():
            axes = structure.class_axes(name)
            chosen = (places if axis in axes else range(n) for axis, n in enumerate(tensor.shape))
            heads[-1][name] = tensor[np.ix_(*chosen)]
    return heads


def free_entries(structure: Structure, heads: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Which entries of a stacked head a training may change: those of the tasks, but not what makes the background's logit zero.

    Args:
        structure: of the network.
        heads: those of each task in canonical form, by name.
    """
    ones = [{name: np.ones(tensor.shape, bool) for name, tensor in head.items()} for head in heads]
    for head in ones:
        for name, tensor in head.items():
            if name in (structure.last_layer or structure.head):
                np.moveaxis(tensor, structure.head[name], 0)[0] = False
    return stacked_heads(structure, ones)


def _places(organs: Sequence[int], spare: bool) -> Iterator[list[int]]:
    """For each task the channels of the stacked head where its background and its organs are."""
    first, shown = 1, 1 + sum(organs)
    for task, count in enumerate(organs):
        yield [shown + task - 1 if spare and task else 0, *range(first, first + count)]
        first += count


def find_last_layer(structure: Structure, layers: Sequence[str], network_of: Callable[[int], nn.Module]) -> Structure:
    """What a head of several layers needs to be known to be stacked, found and proved by running the network.

    A layer is the last one if its canonical form leaves the margins alone. Whether its inputs are added to its outputs shows when
    two heads are stacked, and give the margins of each: all on random weights and a small random image, in float64.

    Args:
        structure: of the network, with what counts classes.
        layers: names of the head's linear layers.
        network_of: builds the network with a number of output channels, on the CPU.

    Returns:
        The structure with ``last_layer`` and ``skips``.

    Raises:
        UserError: the network cannot be run, or its heads do not stack.
    """
    import torch

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network, stacked = (network_of(count).double().eval() for count in (1 + ORGANS, 2 * (1 + ORGANS)))
        _randomise(network, network.state_dict())
        image, outputs = _first_run(network)
        heads, margins = [_head(network, structure)], [_margins(outputs)]
        _randomise(network, structure.head)
        heads.append(_head(network, structure))
        margins.append(_margins(_outputs(network, image)))
        last: list[str] = []
        for layer in layers:
            own = [name for name in structure.head if name.rpartition(".")[0] == layer]
            trial = replace(structure, last_layer=own)
            _set(network, {name: canonical_head(trial, name, heads[1][name]) for name in own})
            if _equal(_margins(_outputs(network, image)), margins[1]):
                last += own
            _set(network, heads[1])
        if not last:
            raise _refused("none is last and linear (is there a normalisation or an activation behind it?)")
        _set(stacked, {name: t.numpy() for name, t in network.state_dict().items() if name not in structure.head})
        wanted = [torch.cat([torch.zeros_like(a[:, :1]), a, b], 1) for a, b in zip(*margins, strict=True)]
        for skips in ([], [name for name in last if name in structure.inner]):
            found = replace(structure, last_layer=last, skips=skips)
            _set(
                stacked,
                stacked_heads(found, [{n: canonical_head(found, n, t) for n, t in head.items()} for head in heads]),
            )
            if _equal([output[:, : 1 + 2 * ORGANS] for output in _outputs(stacked, image)], wanted):
                return found
    raise _refused("two stacked heads do not give the logits of each (does a normalisation mix the classes?)")


def _refused(reason: str) -> UserError:
    return UserError(f"the head is more than one linear layer, and its layers cannot be stacked: {reason}")


def _first_run(network: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """A random image that the network takes, and what it returns."""
    import torch
    from torch.nn.modules.conv import _ConvNd

    first = next((module for module in network.modules() if isinstance(module, _ConvNd)), None)
    reason = "it has no convolution"
    for size in SIZES if first is not None else ():
        image = torch.rand(1, first.in_channels, *[size] * (first.weight.dim() - 2), dtype=torch.float64)
        try:
            return image, _outputs(network, image)
        except UserError:
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    raise _refused(f"the network cannot be run to prove it ({reason})")


def _outputs(network: nn.Module, image: Tensor) -> list[Tensor]:
    """What a network returns, one or several tensors."""
    from torch import Tensor

    output = network(image)
    outputs = list(output) if isinstance(output, list | tuple) else [output]
    if not all(isinstance(one, Tensor) for one in outputs):
        raise _refused(f"the network returns {type(output).__name__}, not logits")
    return outputs


def _randomise(network: nn.Module, names: Collection[str]) -> None:
    """Draw parameters and running statistics such that activations keep their size."""
    parameters = {name for name, _ in network.named_parameters()}
    for name, tensor in network.state_dict().items():
        if name not in names or not (name in parameters or name.endswith(("running_mean", "running_var"))):
            continue
        if tensor.dim() > 1:
            largest = (3 * tensor.shape[0] / tensor.numel()) ** 0.5
            tensor.uniform_(-largest, largest)
        else:
            tensor.uniform_(0.2, 1.2)


def _head(network: nn.Module, structure: Structure) -> dict[str, np.ndarray]:
    state = network.state_dict()
    return {name: state[name].numpy().copy() for name in structure.head}


def _set(network: nn.Module, tensors: Mapping[str, np.ndarray]) -> None:
    import torch

    network.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, strict=False)


def _margins(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [output[:, 1:] - output[:, :1] for output in outputs]


def _equal(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Whether they are, but for rounding."""
    return all(
        a.shape == b.shape and bool((a - b).abs().max() < TOLERANCE * b.abs().max())
        for a, b in zip(outputs, wanted, strict=True)
    )
