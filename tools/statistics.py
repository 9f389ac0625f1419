"""``statistics``: what the merge methods ``fisher`` and ``regmean`` need of a specialist, measured on unlabelled scans.

Whoever trained the specialist runs it where the scans are and shares the file with the task vector; it holds sums over many
places of many scans, and no image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import product
from math import prod
from typing import TYPE_CHECKING

from tqdm import tqdm

from tools import __version__
from tools.bundle import Bundle
from tools.errors import UserError, at_least, nearest
from tools.instantiate import window_size
from tools.lineage import backbone_sha256
from tools.merge import split_paths
from tools.merge_methods import METHODS
from tools.output import complete_output
from tools.scans import choose_scans, patches_on_organs
from tools.task_statistics import save_statistics, statistics_file
from tools.task_vector import TaskVector

if TYPE_CHECKING:
    from torch import Tensor, nn

AT_ONCE = 2**30  # bytes of Gram matrices that are collected in one pass over the patches


def statistics(
    bundle: str,
    vector: str,
    images: str,
    method: str,
    part: str = "",
    split_file: str = "",
    scans: int = 8,
    patches: int = 8,
    patch_size: int = 0,
    places: int = 2048,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Measure a specialist and write the result beside its task vector, as <vector>.<method>.safetensors.

    Args:
        bundle: the specialist, with weights.
        vector: its task vector.
        images: folder of images, or an nnU-Net dataset, whose labels are not looked at; those it was trained on serve best.
        method: fisher (as large as the model), regmean (for a convolution of c channels (27·c)² numbers, for the reference
            network 2.5 GB), or both, separated by a comma: on the same patches, which are looked for once.
        part: of an nnU-Net dataset: "train", "val" or "test" of its split; default: all labelled cases.
        split_file: JSON file with the split; default: the dataset's splits_final.json.
        scans: how many to use, chosen at random.
        patches: from each of them, around what the specialist sees.
        patch_size: edge of the patches, voxels; default: the bundle's.
        places: of each patch, at most, where a layer's inputs are looked at (regmean).
        seed: of scans, patches, places and sampled labels.
        overwrite: replace the output if it exists.

    Raises:
        UserError: no such method, the vector is not the bundle's, or there are no scans.
    """
    import torch

    known = [name for name, entry in METHODS.items() if entry.needs_statistics]
    methods = list(dict.fromkeys(split_paths(method)))
    for name in methods or [""]:
        if name not in known:
            raise UserError(f"no statistics for a method {name!r}{nearest(name, known)}; for {', '.join(known)}")
    at_least(1, scans=scans, patches=patches, places=places)
    specialist, task = Bundle(bundle), TaskVector(vector)
    if backbone_sha256(specialist.weights(), task.facts.structure) != task.facts.finetuned_sha256:
        raise UserError(f"{vector} (task {task.task}) is not the task vector of {bundle}")
    network = specialist.network().requires_grad_(False)
    cases = choose_scans(images, specialist, part, split_file, scans, seed)
    size = window_size(specialist, patch_size)
    facts = {
        "task": task.task,
        "finetuned_sha256": task.facts.finetuned_sha256,
        "scans": len(cases),
        "patches": len(cases) * patches,
        "tool_version": __version__,
    }
    written = []
    with ExitStack() as stack:
        paths = [stack.enter_context(complete_output(statistics_file(vector, name), overwrite)) for name in methods]
        crops = [patch for patch, _ in patches_on_organs(specialist, network, cases, size, patches, seed)]
        for name, path in zip(methods, paths, strict=True):
            torch.manual_seed(seed)
            own: dict[str, object] = {"method": name}
            if name == "fisher":
                values, own["trace"] = fisher_information(network, list(task.tensors), crops)
                shapes = {tensor: tuple(array.shape) for tensor, array in values.items()}
                arrays = ((tensor, array.cpu().numpy()) for tensor, array in values.items())
            else:
                layers = linear_layers(network, task)
                shapes = {tensor: gram_shape(layer) for tensor, layer in layers.items()}
                grams = gram_matrices(network, layers, crops, places)
                arrays = ((tensor, gram.cpu().numpy()) for tensor, gram in grams)
            save_statistics(path, facts | own, shapes, arrays)
            mebibytes = 4 * sum(map(prod, shapes.values())) / 2**20
            written.append(
                f"{statistics_file(vector, name)}: {len(shapes)} tensors, {mebibytes:.1f} MiB, {len(crops)} patches"
            )
    print("\n".join(written))


def fisher_information(
    network: nn.Module, names: Sequence[str], patches: Sequence[Tensor], precision: str = "bfloat16"
) -> tuple[dict[str, Tensor], float]:
    """The diagonal of the Fisher information of a network's own predictions, one patch being one observation.

    Its expectation over labels is taken by sampling them from the prediction (Matena & Raffel 2022, section 2.1; so it is no
    "empirical" Fisher, and needs no labels): in every voxel, for every organ, with the probability that the network gives.

    Args:
        network: in evaluation mode, with 1 + C outputs.
        names: of parameters; others are left out.
        patches: (in, …) each.
        precision: "float32", or "bfloat16" where the processor computes in it.

    Returns:
        By name, in units of the mean over all entries; and the trace (their sum) of one patch before that division.

    Raises:
        UserError: the network predicts everything with certainty, so that nothing matters.
    """
    import torch

    from tools.bundle_code.inferers import autocast, full_size

    device = next(network.parameters()).device
    known = dict(network.named_parameters(remove_duplicate=False))
    parameters = {name: known[name] for name in names if name in known}
    squares = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for patch in tqdm(patches, desc="Fisher information", disable=None, leave=False):
        with autocast(device, precision):
            output = full_size(network(patch[None].to(device))).float()
        margins = output[:, 1:] - output[:, :1]
        labels = torch.bernoulli(margins.detach().sigmoid())
        loss = torch.nn.functional.binary_cross_entropy_with_logits(margins, labels, reduction="sum")
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for square, gradient in zip(squares.values(), gradients, strict=True):
            if gradient is not None:
                square += gradient.square()
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    total = sum(square.double().sum().item() for square in squares.values())
    if not 0 < total < float("inf"):
        raise UserError("the Fisher information of this network is zero or infinite on these scans")
    mean = total / sum(square.numel() for square in squares.values())
    return {name: square / mean for name, square in squares.items()}, total / len(patches)


def linear_layers(network: nn.Module, task: TaskVector) -> dict[str, nn.Module]:
    """The convolutions and linear layers of the backbone, by the name of their weight."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    names = {f"{name}.weight": module for name, module in network.named_modules(remove_duplicate=False)}
    return {
        name: module
        for name, module in names.items()
        if name in task.tensors and isinstance(module, _ConvNd | nn.Linear)
    }


def gram_shape(layer: nn.Module) -> tuple[int, int, int]:
    """Of a layer's Gram matrices: groups, and twice the number of inputs that one output sees."""
    from torch.nn.modules.conv import _ConvTransposeNd

    groups, shape = getattr(layer, "groups", 1), layer.weight.shape
    inputs = shape[0] // groups if isinstance(layer, _ConvTransposeNd) else prod(shape[1:])
    return groups, inputs, inputs


def gram_matrices(
    network: nn.Module, layers: Mapping[str, nn.Module], patches: Sequence[Tensor], places: int
) -> Iterator[tuple[str, Tensor]]:
    """The mean of x·xᵀ over inputs x of each layer; a convolution's x is what its kernel covers at one place (Jin et al. 2023).

    The matrices of a whole network are large: as many as fit in a budget are collected in one pass over the patches.

    Args:
        network: in evaluation mode.
        layers: some of its convolutions and linear layers by name.
        patches: (in, …) each.
        places: of each patch, at most, chosen at random.

    Yields:
        Name and Gram matrices (groups, inputs, inputs), float32, in the order of the layers.
    """
    import torch

    from tools.bundle_code.inferers import autocast

    device = next(network.parameters()).device
    portions: list[list[str]] = [[]]
    for name in layers:
        if portions[-1] and 4 * sum(prod(gram_shape(layers[n])) for n in [*portions[-1], name]) > AT_ONCE:
            portions.append([])
        portions[-1].append(name)
    with tqdm(total=len(portions) * len(patches), desc="Gram matrices", disable=None, leave=False) as bar:
        for names in portions:
            sums = {name: torch.zeros(gram_shape(layers[name]), device=device) for name in names}
            counts = dict.fromkeys(names, 0)

            def collect(name: str, layer: nn.Module, inputs: tuple[Tensor], sums=sums, counts=counts) -> None:
                seen = layer_inputs(layer, inputs[0].detach().float(), places)
                sums[name].baddbmm_(seen.transpose(1, 2), seen)
                counts[name] += seen.shape[1]

            hooks = [
                layers[name].register_forward_pre_hook(lambda layer, inputs, name=name: collect(name, layer, inputs))
                for name in names
            ]
            try:
                for patch in patches:
                    with torch.inference_mode(), autocast(device):
                        network(patch[None].to(device))
                    bar.update()
            finally:
                for hook in hooks:
                    hook.remove()
            for name in names:
                yield name, sums.pop(name) / max(counts[name], 1)


def layer_inputs(layer: nn.Module, inputs: Tensor, places: int) -> Tensor:
    """What a layer multiplies by its weight at some places.

    Args:
        layer: a convolution, transposed or not, or a linear layer.
        inputs: of it: (N, channels, …), or (…, features) of a linear layer.
        places: how many, chosen at random; all, when there are fewer.

    Returns:
        (groups, places, inputs of one group), the inputs in the order of the weight's columns.
    """
    import torch
    from torch import nn
    from torch.nn.modules.conv import _ConvTransposeNd

    if isinstance(layer, nn.Linear):
        flat = inputs.reshape(-1, inputs.shape[-1])
        return flat[_some(len(flat), places, inputs.device)][None]
    groups, channels = layer.groups, inputs.shape[1]
    if isinstance(layer, _ConvTransposeNd):
        flat = inputs.movedim(1, -1).reshape(-1, channels)
        flat = flat[_some(len(flat), places, inputs.device)]
        return flat.reshape(-1, groups, channels // groups).transpose(0, 1)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = nn.functional.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    sizes = [
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, dilation, kernel, stride in zip(padded.shape[2:], layer.dilation, layer.kernel_size, layer.stride)
    ]
    chosen = _some(inputs.shape[0] * prod(sizes), places, inputs.device)
    image, *corner = torch.unravel_index(chosen, (inputs.shape[0], *sizes))
    corner = [start * stride for start, stride in zip(corner, layer.stride)]
    columns = [
        padded[
            (
                image,
                slice(None),
                *(start + step * dilation for start, step, dilation in zip(corner, steps, layer.dilation)),
            )
        ]
        for steps in product(*map(range, layer.kernel_size))
    ]
    return torch.stack(columns, -1).reshape(len(chosen), groups, -1).transpose(0, 1)


def _some(count: int, places: int, device: object) -> Tensor:
    """Numbers below a count, each at most once: all of them, or as many as there may be."""
    import torch

    return torch.arange(count, device=device) if count <= places else torch.randperm(count)[:places].to(device)
