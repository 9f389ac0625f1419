"""2D networks as 3D ones: weights with which a volume of equal slices gives, on every slice, what the 2D network gives on one.

Depth is the first spatial axis. A 3D network that is given such a volume has equal features along the depth in every layer, as
long as no layer notices where the volume ends. So each tensor has a rule of its own:

- a convolution shares its 2D kernel out along the depth by taps that sum to 1. The centre tap alone reads no zero padding; the
  average of I3D (Carreira and Zisserman, CVPR 2017) does, wherever there is any;
- a transposed convolution of stride s has s sets of taps, one for each place of an output slice between two input slices, and
  each set sums to 1. Taps p … p + s − 1 for a padding of p do that and read no slice beyond the ends;
- a table of relative positions is repeated for each offset in depth, position embeddings for each layer of tokens: attention to
  n copies of a key is attention to that key;
- a patch merging, which puts the 8 voxels of a block side by side, has the 4 of the 2D block twice, each time with half the
  weight or once with all of it;
- everything that works on one place at a time is copied.

A network whose window of slices are the channels of one image (``inflate_window``) needs but the first of these rules.

The first axis, because MONAI's windowed attention looks up the relative positions of a map smaller than its window in the table
of the whole window: that is right if only the first axis is smaller, and no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import fsum
from typing import TYPE_CHECKING

from tools.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

TOLERANCE = 1e-10  # of a check in float64: rounding leaves 1e-13

Mode = str | Sequence[float]


def depth_taps(size: int, mode: Mode) -> list[float]:
    """What a kernel has of its 2D kernel at each depth.

    Args:
        size: of the kernel along the depth.
        mode: "centre"; "average"; or the taps themselves, for kernels of as many.

    Raises:
        UserError: there is no such mode, or the taps do not sum to 1.
    """
    centre = [float(place == size // 2) for place in range(size)]
    if mode == "centre":
        return centre
    if mode == "average":
        return [1 / size] * size
    if isinstance(mode, str):
        raise UserError(f"no mode {mode!r}; there are centre, average, and taps such as 0.25,0.5,0.25")
    try:
        taps = [float(tap) for tap in mode]
    except (TypeError, ValueError):
        raise UserError(f"mode {mode!r} is neither centre, average nor numbers") from None
    if not abs(fsum(taps) - 1) < 1e-6:
        raise UserError(f"taps {taps} sum to {fsum(taps):g}: only taps that sum to 1 keep what the 2D network computes")
    return taps if len(taps) == size else centre


def transposed_taps(size: int, stride: int, padding: int, output_padding: int) -> list[float]:
    """The same for a transposed convolution: output slice o reads input slice o // stride alone.

    Raises:
        UserError: the kernel is too short for that, or the output is not stride times as deep as the input.
    """
    if padding + stride > size or output_padding != stride + 2 * padding - size:
        raise UserError(
            f"no taps of a transposed convolution with kernel {size}, stride {stride}, padding {padding} and output padding "
            f"{output_padding} are exact at the ends of a volume"
        )
    return [float(padding <= place < padding + stride) for place in range(size)]


def inflate_weights(
    flat: nn.Module, deep: nn.Module, mode: Mode = "centre"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights of a 2D network for its 3D twin, whose modules have the same names.

    Args:
        flat: the 2D network.
        deep: the 3D network; names that only it has keep its own tensors.
        mode: how kernels are shared out along the depth; see ``depth_taps``.

    Returns:
        For each tensor of the 3D network's state, the new one in float64 (integers as they are) and the rule that made it, in
        a word: copied, tiled, centred, averaged, tapped or new. Names of one tensor have the same object.

    Raises:
        UserError: a tensor that no rule is known for.
    """
    flat_state = flat.state_dict()
    made: dict[int, tuple[Tensor, str]] = {}
    inflated = {}
    for name, own in deep.state_dict(keep_vars=True).items():
        if id(own) not in made:
            made[id(own)] = _inflated(name, flat_state.get(name), own.detach(), deep, mode)
        inflated[name] = made[id(own)]
    return {name: tensor for name, (tensor, _) in inflated.items()}, {
        name: rule for name, (_, rule) in inflated.items()
    }


def _inflated(name: str, flat: Tensor | None, own: Tensor, deep: nn.Module, mode: Mode) -> tuple[Tensor, str]:
    """A tensor by the rule for its layer."""
    from monai.networks.blocks import PatchEmbeddingBlock
    from monai.networks.nets.swin_unetr import PatchMergingV2, WindowAttention
    from torch import nn
    from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

    if flat is None:
        return own, "new"
    if not own.is_floating_point():  # counters; and the places of windows, which follow from their size
        return (flat, "copied") if flat.shape == own.shape and flat.dim() == 0 else (own, "new")
    flat = flat.double()
    if flat.shape == own.shape:
        return flat, "copied"
    path, _, kind = name.rpartition(".")
    layer, around = deep.get_submodule(path), deep.get_submodule(path.rpartition(".")[0])
    if isinstance(layer, _ConvNd) and kind == "weight" and flat.shape == own.shape[:2] + own.shape[3:]:
        size = own.shape[2]
        if isinstance(layer, _ConvTransposeNd):
            if layer.dilation[0] != 1:
                raise UserError(f"tensor {name}: no rule for a dilated transposed convolution")
            try:
                taps = transposed_taps(size, layer.stride[0], layer.padding[0], layer.output_padding[0])
            except UserError as error:
                raise UserError(f"tensor {name}: {error}") from None
            return _along_depth(flat, 2, taps), "tiled"
        return _along_depth(flat, 2, depth_taps(size, mode)), _word(size, mode)
    if isinstance(layer, WindowAttention) and kind == "relative_position_bias_table":
        offsets = 2 * layer.window_size[0] - 1
        if own.shape == (offsets * flat.shape[0], flat.shape[1]):
            return flat.repeat(offsets, 1), "tiled"
    if isinstance(layer, PatchEmbeddingBlock) and own.shape[1] % flat.shape[1] == 0:
        return flat.repeat(1, own.shape[1] // flat.shape[1], 1), "tiled"
    if isinstance(around, PatchMergingV2):
        return _merged(flat, around, mode)
    embedding = deep.get_submodule(
        path.rsplit(".", 2)[0]
    )  # of patches by a linear layer: depth × height × width × channels
    if (
        isinstance(layer, nn.Linear)
        and isinstance(embedding, PatchEmbeddingBlock)
        and own.shape[1] % flat.shape[1] == 0
    ):
        size = own.shape[1] // flat.shape[1]
        return _along_depth(flat, 1, depth_taps(size, mode)).flatten(1), _word(size, mode)
    raise UserError(
        f"tensor {name} is {tuple(flat.shape)} in the 2D network and {tuple(own.shape)} in the 3D one ({type(layer).__name__}): "
        "no rule makes one from the other"
    )


def _along_depth(tensor: Tensor, axis: int, taps: Sequence[float]) -> Tensor:
    """A tensor with one more axis, of the depth."""
    return tensor.new_tensor(taps).view(-1, *[1] * (tensor.dim() - axis)) * tensor.unsqueeze(axis)


def _word(size: int, mode: Mode) -> str:
    """For what ``depth_taps`` does to a kernel of this size."""
    if mode == "average":
        return "averaged"
    return "tapped" if not isinstance(mode, str) and len(mode) == size else "centred"


def _merged(flat: Tensor, merging: nn.Module, mode: Mode) -> tuple[Tensor, str]:
    """The weights of a patch merging: a norm's, 4C, or a linear layer's, outputs × 4C."""
    deep_places, flat_places = _places(type(merging), 3), _places(type(merging), 2)
    if sorted(deep_places) != list(range(8)):
        raise UserError(
            f"{type(merging).__name__} leaves out some voxels of a block (MONAI before 1.5 did): no rule is exact"
        )
    blocks = flat.unflatten(-1, (4, -1))[..., [flat_places.index(place % 4) for place in deep_places], :]
    if flat.dim() == 1:
        return blocks.flatten(), "tiled"
    taps = depth_taps(2, mode)
    return (blocks * flat.new_tensor([taps[place // 4] for place in deep_places]).unsqueeze(-1)).flatten(1), _word(
        2, mode
    )


def _places(merging: type[nn.Module], axes: int) -> list[int]:
    """Which voxel of a block of 2 × 2 (× 2), in C order, a patch merging puts where, as one of numbered voxels shows."""
    import torch

    module = merging(dim=1, norm_layer=lambda channels: torch.nn.Identity(), spatial_dims=axes)
    module.reduction = torch.nn.Identity()
    return module(torch.arange(2**axes).view(1, *[2] * axes, 1)).flatten().tolist()


def inflate_window(flat: nn.Module, deep: nn.Module, mode: Mode = "centre") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights of a 2D network for one that sees windows of slices as channels, such as ``WindowSegmenter``.

    Only its patch embedding is larger: the kernel (O, C · window, k, k) is one of (O, C, window, k, k), which shares the 2D
    kernel out along the depth like any other; see ``depth_taps``.

    Args:
        flat: the network with a window of one slice.
        deep: the same with a longer one.
        mode: as for ``inflate_weights``, which says what is returned.

    Raises:
        UserError: a tensor differs otherwise than by the window.
    """
    flat_state, tensors, rules = flat.state_dict(), {}, {}
    for name, own in deep.state_dict().items():
        tensor = flat_state[name]
        tensors[name], rules[name] = tensor.double() if tensor.is_floating_point() else tensor, "copied"
        if tensor.shape == own.shape:
            continue
        if tensor.dim() != 4 or own.shape != (len(tensor), tensor.shape[1] * deep.window, *tensor.shape[2:]):
            raise UserError(f"tensor {name} is {tuple(tensor.shape)} for one slice and {tuple(own.shape)} for a window")
        tensors[name] = _along_depth(tensor.double(), 2, depth_taps(deep.window, mode)).flatten(1, 2)
        rules[name] = _word(deep.window, mode)
    return tensors, rules


def verify_window(flat: nn.Module, deep: nn.Module, channels: int, shape: Sequence[int], mode: Mode) -> float:
    """How far the outputs for a volume of noise are from those of the 2D network, as a part of their largest value.

    With the centre tap alone that holds for any volume, else for one of equal slices.

    Args:
        flat: the 2D network in float64, in evaluation mode.
        deep: the one with a window, likewise.
        channels: of the image.
        shape: of the volume, depth last.
        mode: how the kernel was shared out.

    Raises:
        UserError: it is more than rounding.
    """
    import torch

    volume = torch.randn(1, channels, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if mode != "centre":
        volume = volume[..., :1].expand_as(volume)
    with torch.inference_mode():
        expected, found = flat(volume), deep(volume)
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE:
        raise UserError(f"the network with a window differs from the 2D one by {error:.2g} of its largest value")
    return error


def deviations(flat: nn.Module, deep: nn.Module, channels: int, shape: Sequence[int]) -> list[list[float]]:
    """How far a 3D network is from the 2D one on a volume of equal slices of noise.

    Args:
        flat: the 2D network in float64, in evaluation mode.
        deep: the 3D network, likewise.
        channels: of the image.
        shape: of the volume, depth first.

    Returns:
        For each output, and each of its slices (or layers of tokens), the largest difference, divided by the largest value of
        the 2D output.

    Raises:
        UserError: the networks do not take such an image, or their outputs are no images.
    """
    import torch

    noise = torch.randn(1, channels, *shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    try:
        with torch.inference_mode():
            expected = _tensors(flat(noise))
            found = _tensors(deep(noise.unsqueeze(2).expand(-1, -1, shape[0], -1, -1).contiguous()))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"no volumes of {_times(shape)} voxels fit these networks ({error})") from None
    if len(expected) != len(found):
        raise UserError(f"the 2D network has {len(expected)} outputs, the 3D network {len(found)}")
    return [_per_slice(one, other) for one, other in zip(expected, found)]


def _tensors(output: object) -> list[Tensor]:
    if isinstance(output, list | tuple):
        return [tensor for part in output for tensor in _tensors(part)]
    return [output]


def _per_slice(flat: Tensor, deep: Tensor) -> list[float]:
    """Of images, N × C × depth × height × width, or of tokens, N × tokens × C."""
    if flat.dim() == 3 and deep.shape[1] % flat.shape[1] == 0:
        flat, deep = flat.mT, deep.unflatten(1, (-1, flat.shape[1])).permute(0, 3, 1, 2)
    if deep.dim() != flat.dim() + 1 or deep.shape[:2] + deep.shape[3:] != flat.shape:
        raise UserError(
            f"an output is {tuple(flat.shape)} in 2D and {tuple(deep.shape)} in 3D: not slices of one size, or there is a class "
            "token, which weighs less among the tokens of many slices"
        )
    difference = (deep - flat.unsqueeze(2)).abs().amax(dim=(0, 1, *range(3, deep.dim())))
    return (difference / flat.abs().max()).tolist()


@contextmanager
def _refusing(deep: nn.Module) -> Iterator[None]:
    """Stop the 3D network, when it runs inside the block, where its windowed attention is known not to be exact."""
    from monai.networks.nets.swin_unetr import PatchMergingV2, SwinTransformerBlock

    def look(module: nn.Module, inputs: tuple) -> None:
        depth, *plane = inputs[0].shape[1:4]
        if isinstance(module, PatchMergingV2):
            if depth % 2:
                raise UserError(f"not exact: a depth of {depth} tokens is merged by two, and zeros fill it up")
            return
        window = list(module.window_size)
        if depth > window[0] and depth % window[0]:
            raise UserError(
                f"not exact: windows of {window[0]} do not divide a depth of {depth} tokens; zeros fill it up"
            )
        if min(depth, window[0]) > 1 and any(size < wide for size, wide in zip(plane, window[1:])):
            raise UserError(
                f"not exact: a window of {_times(window)} is larger in plane than its map of {_times([depth, *plane])} tokens, "
                "for which MONAI takes the relative positions of others"
            )

    kinds = (PatchMergingV2, SwinTransformerBlock)
    handles = [module.register_forward_pre_hook(look) for module in deep.modules() if isinstance(module, kinds)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def verify(flat: nn.Module, deep: nn.Module, channels: int, shape: Sequence[int], mode: Mode) -> float:
    """The largest of the deviations, which must be rounding.

    Raises:
        UserError: it is more, with the reason where one is known.
    """
    with _refusing(deep):
        found = deviations(flat, deep, channels, shape)
    error = max(max(slices) for slices in found)
    if error <= TOLERANCE:
        return error
    last = found[-1]
    reason = "a layer does something else at the ends of a volume than within it"
    if mode != "centre":
        reason = "kernels with more than the centre tap meet the zeros that pad the volume; --mode centre does not"
    raise UserError(
        f"not exact on volumes of {_times(shape)} voxels, depth first: the 3D output differs from the 2D one by {error:.2g} of "
        f"its largest value (last output: {last[0]:.2g} on the first slice, {last[len(last) // 2]:.2g} on the middle one): "
        f"{reason}"
    )


def _times(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes))
