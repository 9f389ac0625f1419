"""Files of 2D weights for a 2D network: timm's names become MONAI's, colour becomes grey, patches another size.

The file may hold a part of the network, such as an encoder; where it belongs is found by its names. timm is not needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING

from tools.errors import UserError
from tools.importers.conversion import inner_state, named_tensors, read_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

SAME = "biases (qkv_bias), norms (patch_norm) and the number of layers must be the file's"

VIT = {
    r"patch_embed\.proj\.": "patch_embedding.patch_embeddings.",
    r"pos_embed$": "patch_embedding.position_embeddings",
    r"(blocks\.\d+\.attn\.)proj\.": r"\1out_proj.",
    r"(blocks\.\d+\.mlp\.)fc([12])\.": r"\1linear\2.",
}
SWIN = {
    r"layers\.(\d+)\.blocks\.": lambda match: f"layers{int(match[1]) + 1}.0.blocks.",
    r"layers\.(\d+)\.downsample\.": lambda match: f"layers{match[1]}.0.downsample.",
    r"(layers\d+\.0\.blocks\.\d+\.mlp\.)fc([12])\.": r"\1linear\2.",
}
SWIN_OF_ITS_AUTHORS = SWIN | {  # who count a merging to the stage before it, timm to the one after
    r"layers\.(\d+)\.downsample\.": lambda match: f"layers{int(match[1]) + 1}.0.downsample.",
}
CLASS_TOKEN = "cls_token"
WITHOUT_PLACE = {  # of timm's models
    CLASS_TOKEN: "the network has no such token",
    r"dist_token|reg_token": "a network that segments has no such token",
    r"(head|head_dist|fc_norm|head_drop)\.": "classifies images",
    r".*(relative_position_index|attn_mask)$": "follows from the size of the windows",
}
WITHOUT_PLACE_IN_SWIN = WITHOUT_PLACE | {
    r"norm\.": "the norm before the classification; MONAI norms each stage's output"
}


@dataclass
class Weights2D:
    """What a file has for a 2D network.

    Attributes:
        tensors: by the names in the network.
        origins: of each of them, its name in the file, and how it was changed.
        left_out: names in the file that nothing was made from, each with the reason.
        layout: whose names they are.
    """

    tensors: dict[str, Tensor]
    origins: dict[str, str]
    left_out: dict[str, str] = field(default_factory=dict)
    layout: str = "those of the network"


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of one that ``torch.save`` wrote; nothing in it is executed.

    Raises:
        UserError: no such file, damaged, it holds something else, or NaN or infinite values.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not path.is_file():
            raise UserError(f"{path} not found")
        try:
            return named_tensors(load_file(path), path, "it")
        except SafetensorError as error:
            raise UserError(f"{path} cannot be read ({error})") from None
    state, key = inner_state(read_checkpoint(path))
    return named_tensors(state, path, key or "it")


def fit(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], channels: int, head: Mapping[str, int], path: Path
) -> Weights2D:
    """Bring the tensors of a file to the names and shapes of a 2D network.

    Args:
        weights: of the file.
        expected: the state of the network.
        channels: of its image.
        head: the tensors whose shape depends on the number of labels: where that differs the file's are left out.
        path: of the file, for messages.

    Raises:
        UserError: the file is of another network.
    """
    layout, renames, without_place = _layout(weights, expected, path)
    if any(name.endswith(CLASS_TOKEN) for name in expected):
        without_place = {pattern: why for pattern, why in without_place.items() if pattern != CLASS_TOKEN}
        weights = _with_placed_token(weights, path) if renames is VIT else weights
    fitted = Weights2D({}, {}, layout=layout)
    named: dict[str, str] = {}
    for name in weights:
        reason = next((why for pattern, why in without_place.items() if re.match(pattern, name)), None)
        if reason:
            fitted.left_out[name] = reason
        else:
            named[name] = _renamed(name, renames)
    prefix = _prefix(named.values(), expected)
    layers = {_layer(name) for name in expected}
    for name, ours in named.items():
        ours = prefix + ours
        if ours not in expected:
            if without_place or _layer(ours) in layers:
                raise UserError(
                    f"{path}: network_def has no place for {name} ({ours}), so it would not compute the same; {SAME}"
                )
            fitted.left_out[name] = "the network has no such tensor"
            continue
        tensor, changes = _reshaped(ours, weights[name], expected[ours], channels)
        if tensor.shape == expected[ours].shape:
            fitted.tensors[ours] = tensor
            fitted.origins[ours] = ", ".join([f"`{name}`", *changes])
        elif ours in head:
            fitted.left_out[name] = "of another number of labels"
        else:
            raise UserError(
                f"{path}: {name} is {tuple(weights[name].shape)}, but the 2D network's {ours} {tuple(expected[ours].shape)}"
            )
    known = {_layer(name) for name in fitted.tensors}
    for name in expected:
        missing = name not in fitted.tensors and expected[name].is_floating_point() and name not in head
        if missing and (_layer(name) in known or (renames is VIT and re.match(rf"{prefix}blocks\.\d+\.attn\.", name))):
            raise UserError(f"{path} lacks what network_def has in {name}, so it would not compute the same; {SAME}")
    if not any(tensor.dim() > 1 for tensor in fitted.tensors.values()):
        raise UserError(
            f"{path} has no weights of this network: none of its names, such as {next(iter(weights))}, is in it"
        )
    return fitted


def _layout(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path
) -> tuple[str, dict, dict[str, str]]:
    """Whose names the tensors have, how they become the network's, and which have no place there."""
    if "patch_embed.proj.weight" in weights and any(
        name.endswith("model.patch_embed.proj.weight") for name in expected
    ):
        return "timm's, like the network's", {}, WITHOUT_PLACE
    if "patch_embed.proj.weight" in weights and "blocks.0.attn.qkv.weight" in weights:
        for name in ("blocks.0.gamma_1", "blocks.0.ls1.gamma", "blocks.0.attn.relative_position_bias_table"):
            if name in weights:
                raise UserError(
                    f"{path} is a BEiT, or another ViT with {name.partition('0.')[2]}: MONAI's ViT has no such weights, so it "
                    "would not compute the same"
                )
        return "timm's ViT", VIT, WITHOUT_PLACE
    if "layers.0.blocks.0.attn.relative_position_bias_table" in weights:
        if "layers.0.downsample.reduction.weight" in weights:
            return "Swin's authors'", SWIN_OF_ITS_AUTHORS, WITHOUT_PLACE_IN_SWIN
        return "timm's Swin", SWIN, WITHOUT_PLACE_IN_SWIN
    return "those of the network", {}, {}


def _with_placed_token(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """timm's weights with the position of the class token added to it, for a network whose token has none."""
    if CLASS_TOKEN not in weights:
        raise UserError(
            f"{path} has no {CLASS_TOKEN}, so that the network must have none: class_token false in network_def"
        )
    positions = weights["pos_embed"]
    own = isqrt(positions.shape[1]) ** 2 != positions.shape[1]
    return {**weights, CLASS_TOKEN: weights[CLASS_TOKEN] + positions[:, :1]} if own else dict(weights)


def _renamed(name: str, renames: Mapping) -> str:
    for pattern, replacement in renames.items():
        name = re.sub(f"^{pattern}", replacement, name)
    return name


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _prefix(names, expected: Mapping[str, Tensor]) -> str:
    """The part of the network that has most of the names: "vit." for those of a ViT in a UNETR."""
    names = list(names)
    parts = {""} | {
        ".".join(name.split(".")[:depth]) + "." for name in expected for depth in range(1, name.count(".") + 1)
    }
    return max(sorted(parts, key=len), key=lambda part: sum(part + name in expected for name in names))


def _reshaped(ours: str, tensor: Tensor, expected: Tensor, channels: int) -> tuple[Tensor, list[str]]:
    """A tensor of another number of colours, size of patches or number of tokens, and what was done to it."""
    changes = []
    if tensor.is_floating_point():
        tensor = tensor.double()
    if tensor.dim() == expected.dim() == 4 and len(tensor) == len(expected):
        if tensor.shape[1] != channels == expected.shape[1] and tensor.shape[1] in (1, 3):
            changes += ["colours summed"] if tensor.shape[1] == 3 else []
            changes += [f"shared by {channels} channels"] if channels > 1 else []
            tensor = tensor.sum(1, keepdim=True).expand(-1, channels, -1, -1) / channels
        factor = tensor.shape[2] // expected.shape[2]
        if (
            "patch_embed" in ours
            and factor > 1
            and tensor.shape[2:] == tuple(factor * size for size in expected.shape[2:])
        ):
            tensor = tensor.unflatten(3, (-1, factor)).unflatten(2, (-1, factor)).sum((3, 5))
            changes.append(
                f"every {factor} × {factor} of the patch summed: for images of {factor} times the pixel size"
            )
    if ours.endswith("position_embeddings") and tensor.dim() == 3 and tensor.shape != expected.shape:
        tensor, changes = _resized(tensor, expected.shape[1])
    if ours.endswith("relative_position_bias_table") and tensor.shape != expected.shape:
        tensor, changes = _resized_table(tensor, expected.shape)
    return tensor, changes


def _resized_table(table: Tensor, shape: Sequence[int]) -> tuple[Tensor, list[str]]:
    """BEiT's relative positions, (2n - 1)² + 3 rows of which 3 are the class token's, for n × n tokens of another number."""
    sides = [(isqrt(max(rows - 3, 0)) + 1) // 2 for rows in (len(table), shape[0])]
    if any((2 * side - 1) ** 2 + 3 != rows for side, rows in zip(sides, (len(table), shape[0]))):
        return table, []
    from timm.layers import resize_rel_pos_bias_table  # a network with such a table is timm's

    resized = resize_rel_pos_bias_table(table, (sides[1], sides[1]), tuple(shape))
    return resized, [f"{sides[0]} × {sides[0]} resized to {sides[1]} × {sides[1]}"]


def _resized(positions: Tensor, tokens: int) -> tuple[Tensor, list[str]]:
    """Position embeddings, 1 × tokens × C, without that of a class token, for another number of tokens in a square."""
    from torch.nn.functional import interpolate

    changes = []
    if isqrt(positions.shape[1]) ** 2 != positions.shape[1]:
        positions = positions[:, 1:]
        changes.append("without the class token's")
    old, new = isqrt(positions.shape[1]), isqrt(tokens)
    if old != new and old**2 == positions.shape[1] and new**2 == tokens:
        grid = positions.mT.unflatten(2, (old, old))
        positions = interpolate(grid, size=(new, new), mode="bicubic", antialias=True).flatten(2).mT
        changes.append(f"{old} × {old} resized to {new} × {new}")
    return positions, changes
