"""What a network is made of: its head, and what each tensor of the rest is. Found by building it, not declared."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.errors import UserError
from tools.heads import find_last_layer

if TYPE_CHECKING:
    from torch import nn

ENCODER = re.compile("enc|down|vit|swin|in_|input|stem|patch|.*_enc", re.IGNORECASE)
DECODER = re.compile("dec|up|out|final|conv_final|conv_blocks_localization|seg|attention|merge|.*_dec", re.IGNORECASE)
WITHOUT_SPARE_CHANNELS = "scripts.stacked_head.without_spare_channels"
LINEARIZED = "scripts.tangent.tangent_network"
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
        constants: other buffers, which no training changes: a merge takes them from the starting point.
        aliases: names of tensors that are another one, and that one's name.
        inner: tensors of the head whose inputs are classes too, each with the axis that counts those.
        last_layer: of a head of several layers, the tensors of its last one; empty for a head of one layer.
        skips: those kernels of the last layer to whose outputs the network adds their inputs.
    """

    head: dict[str, int]
    transposed: list[str] = field(default_factory=list)
    groups: dict[str, int] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)
    statistics: list[str] = field(default_factory=list)
    constants: list[str] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    inner: dict[str, int] = field(default_factory=dict)
    last_layer: list[str] = field(default_factory=list)
    skips: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Structure:
        """The inverse of ``as_dict``, for what a stranger may have written.

        Raises:
            ValueError: names the entry that is not what it should be.
        """
        known = {entry.name: entry.type for entry in fields(cls)}
        for name, value in content.items():
            if name not in known:
                raise ValueError(f"structure has no {name!r}")
            is_list = known[name] == "list[str]"
            if not isinstance(value, list if is_list else dict) or not all(isinstance(key, str) for key in value):
                raise ValueError(f"structure: {name} must be a {'list' if is_list else 'dictionary'} of names")
            kind, least = (str, "") if known[name] == "dict[str, str]" else (int, 1 if name == "groups" else 0)
            if not is_list and not all(type(entry) is kind and entry >= least for entry in value.values()):
                raise ValueError(
                    f"structure: {name} has a value that is no {'name' if kind is str else 'number'} that it takes"
                )
        return cls(**content)

    def as_dict(self) -> dict[str, Any]:
        """Without what is empty, for JSON."""
        return {name: value for name, value in asdict(self).items() if value}

    def class_axes(self, name: str) -> tuple[int, ...]:
        """The axes of a tensor of the head that count classes: of its outputs, and maybe of its inputs."""
        return (self.head[name], self.inner[name]) if name in self.inner else (self.head[name],)

    @property
    def not_merged(self) -> set[str]:
        """The tensors that no task vector has: head, aliases and constants."""
        return {*self.head, *self.aliases, *self.constants}

    def counts(self, name: str, shape: tuple[int, ...], channels: int) -> bool:
        """Whether a tensor of the head has this shape for a number of channels, as far as it depends on it."""
        return all(axis < len(shape) and shape[axis] == channels for axis in self.class_axes(name))

    def spare_channels(self, tasks: int) -> int:
        """How many channels the stacked head of some tasks needs beyond those that it shows; see ``tools.heads``."""
        return tasks - 1 if self.last_layer else 0

    def is_matrix(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor multiplies its input: a kernel or a linear layer's matrix."""
        return len(shape) > 1 and name not in self.plain

    def matrices_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Of what ``as_matrices`` makes of a tensor: groups, outputs, inputs · k³."""
        if not self.is_matrix(name, shape):
            return 1, 1, prod(shape)
        groups = self.groups.get(name, 1)
        outputs = shape[1] if name in self.transposed else shape[0] // groups
        return groups, outputs, prod(shape) // max(groups * outputs, 1)

    def as_matrices(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """A kernel as matrices, groups × output × (input · k³); a tensor that is no matrix as one row."""
        groups, outputs, columns = self.matrices_shape(name, tensor.shape)
        if name in self.transposed:
            tensor = np.moveaxis(tensor.reshape(groups, tensor.shape[0] // groups, *tensor.shape[1:]), 2, 1)
        return tensor.reshape(groups, outputs, columns)

    def from_matrices(self, name: str, matrices: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The inverse of ``as_matrices``."""
        if name not in self.transposed:
            return matrices.reshape(shape)
        groups = self.groups.get(name, 1)
        grouped = matrices.reshape(groups, shape[1], shape[0] // groups, *shape[2:])
        return np.moveaxis(grouped, 1, 2).reshape(shape)


def part_of(name: str) -> str:
    """The part of the network that a tensor belongs to: "encoders.0" of "encoders.0.basic_module.conv1.weight".

    MONAI's UNet nests: of "model.1.submodule.0.conv.weight" it is "model.1.submodule.0".
    """
    words, end = name.split("."), 2
    while words[end : end + 1] == ["submodule"]:
        end += 2
    return ".".join(words[:end])


def group_of(name: str) -> str:
    """Whether a tensor belongs to the "encoder" or to the "decoder" of a U-shaped network, by the usual names of its layers.

    The first word of the name that says something decides. What says nothing, such as the bottleneck, is the encoder's.
    """
    for word in re.sub(r"\b(model|submodule)\.2\b", "up", name).split("."):  # MONAI's UNet: down, next level, up
        if ENCODER.match(word):
            return "encoder"
        if DECODER.match(word):
            return "decoder"
    return "encoder"


def matches(name: str, pattern: str) -> bool:
    """Whether a recipe's pattern means a tensor: "encoder", "decoder", or a pattern of names such as "decoders.0.*"."""
    return fnmatchcase(name, pattern) or pattern == group_of(name)


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


def inner_network(network_def: Mapping[str, Any]) -> Mapping[str, Any]:
    """The network alone: in a merged bundle something may hide spare channels of its stacked head."""
    return network_def["network"] if network_def.get("_target_") == WITHOUT_SPARE_CHANNELS else network_def


def spare_channels(network_def: Mapping[str, Any]) -> int:
    """How many channels of its head a network does not show."""
    inner = inner_network(network_def)
    return 0 if inner is network_def else inner[output_argument(inner)] - network_def["out_channels"]


def describe(network_def: Mapping[str, Any]) -> Structure:
    """Build a network with two and with three output channels and look at its tensors; if its head has several layers, run it.

    Raises:
        UserError: it cannot be built, no tensor depends on the number of output channels, one has a size that is not that
            number, or the head has several layers that cannot be stacked.
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
    counted = _class_axes(few, more, distinct)
    # a kernel from classes to classes is outputs × inputs, that of a transposed convolution inputs × outputs
    ordered = {name: axes[::-1] if name in layers.transposed else axes for name, axes in counted.items()}
    head = {name: axes[0] for name, axes in ordered.items()}
    backbone = [name for name in distinct if name not in head]
    tensors = few.state_dict()
    statistics = [name for name in backbone if name in layers.statistics]
    buffers = [name for name, buffer in few.named_buffers() if buffer.is_floating_point()]
    constants = [name for name in buffers if name in backbone and name not in statistics]
    structure = Structure(
        head,
        transposed=[name for name in backbone if name in layers.transposed],
        groups={name: layers.groups[name] for name in backbone if name in layers.groups},
        plain=[
            name
            for name in backbone
            if tensors[name].dim() > 1
            and tensors[name].is_floating_point()
            and name not in layers.matrices
            and name not in constants
        ],
        statistics=statistics,
        constants=constants,
        aliases=aliases,
        inner={name: axes[1] for name, axes in ordered.items() if len(axes) == 2},
    )
    kernels = [name for name in head if name in layers.matrices]
    biases = {name.removesuffix("weight") + "bias" for name in kernels}
    if head.keys() <= {*kernels, *biases} and not structure.inner and not layers.groups.keys() & head:
        return structure  # one linear layer, or several side by side
    linear = [name.rpartition(".")[0] for name in kernels]
    return find_last_layer(structure, linear, lambda count: build(network_def, count, devices=("cpu",)))


def build(network_def: Mapping[str, Any], out_channels: int, devices: Sequence[str] = ("meta", "cpu")) -> nn.Module:
    """The network with another number of output channels; see ``instantiate``."""
    return instantiate({**network_def, output_argument(network_def): out_channels}, devices)


def instantiate(network_def: Mapping[str, Any], devices: Sequence[str] = ("meta", "cpu")) -> nn.Module:
    """The network that a config defines.

    Args:
        network_def: of the network, in plain values.
        devices: to build it on, the first one where it can be: on the meta device it has shapes and takes no memory.

    Raises:
        UserError: it cannot be built.
    """
    import torch
    from monai.bundle import ConfigParser

    for device in devices:  # some networks compute with their weights while they are built
        try:
            with torch.device(device):
                return ConfigParser({"network": dict(network_def)}).get_parsed_content("network")
        except Exception as error:
            reason = f"{type(error).__name__}: {error.__cause__ or error}"
    raise UserError(f"network_def ({network_def.get('_target_')}) cannot be built ({' '.join(reason.split())[:300]})")


def _class_axes(few: nn.Module, more: nn.Module, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """For each tensor that is larger in one of two networks of 2 and 3 output channels, the one or two axes that count them."""
    shapes = {name: tuple(tensor.shape) for name, tensor in more.state_dict().items()}
    counted: dict[str, tuple[int, ...]] = {}
    for name, tensor in few.state_dict().items():
        shape, other = tuple(tensor.shape), shapes.get(name)
        if shape == other or name not in names:
            continue
        axes = tuple(axis for axis, (a, b) in enumerate(zip(shape, other or ())) if a != b)
        if len(axes) not in (1, 2) or any((shape[axis], other[axis]) != (2, 3) for axis in axes):
            raise UserError(
                f"tensor {name} does not simply count output channels (it is {shape} for 2 of them): such heads cannot be "
                "stacked"
            )
        counted[name] = axes
    if not counted:
        raise UserError("no tensor of the network depends on the number of output channels")
    return counted


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
