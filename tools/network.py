"""What a network is made of: its head, and what each tensor of the rest is. Found by building it, not declared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.errors import UserError

if TYPE_CHECKING:
    from torch import nn

OUTPUT_ARGUMENTS = ("out_channels", "num_classes", "n_classes", "out_chans")


@dataclass(frozen=True)
class Structure:
    """What merging must know about tensors and cannot see from their shapes.

    A tensor with two or more axes that is not mentioned is the kernel of a convolution or the matrix of a linear layer, its
    first axis the output; one with fewer is a bias, a normalisation's scale or another parameter per channel.

    Attributes:
        head: the tensors whose shape changes with the number of output channels, each with the axis that counts them.
        transposed: kernels of transposed convolutions, input × output/groups × k³.
        groups: tensors of several matrices along the first axis, and their number: grouped convolutions, and the query, key
            and value of torch's MultiheadAttention.
        plain: tensors with two or more axes that are no matrices, such as position embeddings.
        statistics: running means and variances.
        aliases: names of tensors that are another one, and that one's name.
    """

    head: dict[str, int]
    transposed: list[str] = field(default_factory=list)
    groups: dict[str, int] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)
    statistics: list[str] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Without what is empty, for JSON."""
        return {name: value for name, value in asdict(self).items() if value}

    def is_matrix(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor multiplies its input: a kernel or a linear layer's matrix."""
        return len(shape) > 1 and name not in self.plain

    def as_matrices(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """A kernel as matrices, groups × output × (input · k³); a tensor that is no matrix as one row."""
        if not self.is_matrix(name, tensor.shape):
            return tensor.reshape(1, 1, tensor.size)
        groups, shape = self.groups.get(name, 1), tensor.shape
        if name not in self.transposed:
            return tensor.reshape(groups, shape[0] // groups, prod(shape[1:]))
        grouped = tensor.reshape(groups, shape[0] // groups, *shape[1:])
        return np.moveaxis(grouped, 2, 1).reshape(groups, shape[1], shape[0] // groups * prod(shape[2:]))

    def from_matrices(self, name: str, matrices: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The inverse of ``as_matrices``."""
        if name not in self.transposed:
            return matrices.reshape(shape)
        groups = self.groups.get(name, 1)
        grouped = matrices.reshape(groups, shape[1], shape[0] // groups, *shape[2:])
        return np.moveaxis(grouped, 1, 2).reshape(shape)


def part_of(name: str) -> str:
    """The part of the network that a tensor belongs to: "encoders.0" of "encoders.0.basic_module.conv1.weight"."""
    return ".".join(name.split(".")[:2])


def output_argument(network_def: Mapping[str, Any]) -> str:
    """The argument of a ``network_def`` that sets the number of output channels.

    Raises:
        UserError: none of the usual names is there.
    """
    for name in OUTPUT_ARGUMENTS:
        if name in network_def:
            return name
    raise UserError(
        f"network_def ({network_def.get('_target_')}) has none of the arguments {', '.join(OUTPUT_ARGUMENTS)}, "
        "so its head cannot be found"
    )


def describe(network_def: Mapping[str, Any]) -> Structure:
    """Build a network with two and with three output channels and look at its tensors.

    Raises:
        UserError: it cannot be built, no tensor depends on the number of output channels, or one depends on it by more
            than its size along a single axis.
    """
    few, more = (build(network_def, count) for count in (2, 3))
    aliases: dict[str, str] = {}
    names: dict[int, str] = {}
    for name, tensor in few.state_dict(keep_vars=True).items():
        first = names.setdefault(id(tensor), name)
        if first != name:
            aliases[name] = first
    distinct = [name for name in few.state_dict() if name not in aliases]
    layers = _Layers(few)
    head = _head(few, more, distinct)
    for name in head:
        if name not in layers.matrices and name.removesuffix("bias") + "weight" not in layers.matrices:
            raise UserError(
                f"tensor {name} counts output channels but belongs to no convolution: the head is more than one linear "
                "layer, and such heads cannot be stacked"
            )
    backbone = [name for name in distinct if name not in head]
    tensors = few.state_dict()
    return Structure(
        head,
        transposed=[name for name in backbone if name in layers.transposed],
        groups={name: layers.groups[name] for name in backbone if name in layers.groups},
        plain=[
            name
            for name in backbone
            if tensors[name].dim() > 1 and tensors[name].is_floating_point() and name not in layers.matrices
        ],
        statistics=[name for name in backbone if name in layers.statistics],
        aliases=aliases,
    )


def build(network_def: Mapping[str, Any], out_channels: int) -> nn.Module:
    """The network with another number of output channels, on the meta device (shapes, no memory) where it can be there.

    Raises:
        UserError: it cannot be built.
    """
    import torch
    from monai.bundle import ConfigParser

    definition = {**network_def, output_argument(network_def): out_channels}
    for device in ("meta", "cpu"):  # some networks compute with their weights while they are built
        try:
            with torch.device(device):
                return ConfigParser({"network": definition}).get_parsed_content("network")
        except Exception as error:
            reason = f"{type(error).__name__}: {error.__cause__ or error}"
    raise UserError(f"network_def ({network_def.get('_target_')}) cannot be built ({' '.join(reason.split())[:300]})")


def _head(few: nn.Module, more: nn.Module, names: Sequence[str]) -> dict[str, int]:
    shapes = {name: tuple(tensor.shape) for name, tensor in more.state_dict().items()}
    head: dict[str, int] = {}
    for name, tensor in few.state_dict().items():
        shape, other = tuple(tensor.shape), shapes.get(name)
        if shape == other or name not in names:
            continue
        axes = [axis for axis, (a, b) in enumerate(zip(shape, other or ())) if a != b]
        if len(axes) != 1 or (shape[axes[0]], other[axes[0]]) != (2, 3):
            raise UserError(
                f"tensor {name} does not simply count output channels (it is {shape} for 2 of them): the head is more than "
                "one linear layer, and such heads cannot be stacked"
            )
        head[name] = axes[0]
    if not head:
        raise UserError("no tensor of the network depends on the number of output channels")
    return head


class _Layers:
    """What the layers of a network say about their tensors, under all of their names."""

    def __init__(self, network: nn.Module) -> None:
        from torch import nn
        from torch.nn.modules.batchnorm import _NormBase
        from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

        self.matrices: set[str] = set()
        self.transposed: set[str] = set()
        self.statistics: set[str] = set()
        self.groups: dict[str, int] = {}
        for prefix, module in network.named_modules(remove_duplicate=False):
            dot = f"{prefix}." if prefix else ""
            if isinstance(module, _ConvNd | nn.Linear):
                self.matrices.add(f"{dot}weight")
                if isinstance(module, _ConvTransposeNd):
                    self.transposed.add(f"{dot}weight")
                if getattr(module, "groups", 1) > 1:
                    self.groups[f"{dot}weight"] = module.groups
            elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
                self.matrices.add(f"{dot}in_proj_weight")
                self.groups[f"{dot}in_proj_weight"] = 3
            elif isinstance(module, _NormBase) and module.track_running_stats:
                self.statistics |= {f"{dot}running_mean", f"{dot}running_var"}
