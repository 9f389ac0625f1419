"""``diff``: the task vector between a starting point and a specialist."""

from __future__ import annotations

from typing import Any

import numpy as np

from tools import __version__
from tools.bundle import Bundle
from tools.errors import UserError
from tools.lineage import backbone_sha256
from tools.output import complete_output
from tools.task_vector import TaskVector


def diff(pretrained: str, finetuned: str, output: str, task: str = "", overwrite: bool = False) -> None:
    """Write the task vector: finetuned - pretrained, with the trained head and the lineage.

    Args:
        pretrained: the starting point, a bundle with weights.
        finetuned: the specialist, a bundle with weights.
        output: the file to write, usually <task>.safetensors.
        task: name of the task; default: as recorded in the specialist.
        overwrite: replace the output if it exists.
    """
    vector = task_vector(Bundle(pretrained), Bundle(finetuned), task)
    with complete_output(output, overwrite) as path:
        vector.save(path)
    size = sum(tensor.nbytes for tensor in vector.backbone.values()) / 2**20
    print(
        f"{output}: task {vector.task}, {len(vector.backbone)} tensors, {size:.1f} MiB, channels {', '.join(vector.labels)}"
    )


def task_vector(pretrained: Bundle, finetuned: Bundle, task: str = "") -> TaskVector:
    """The task vector of a specialist.

    Args:
        pretrained: the starting point.
        finetuned: the specialist.
        task: its name; default: as recorded in the specialist, else its labels.

    Raises:
        UserError: the backbones differ in a tensor's name or shape, the specialist says that it started elsewhere, or
            the head is not one linear layer per output.
    """
    from tools.bundle_code.heads import find_head

    network_def = finetuned.network_def()
    try:
        with finetuned.code():
            head_axes = find_head(network_def)
    except Exception as error:
        raise UserError(f"{finetuned.path}: {error}") from None
    before, after = pretrained.state(), finetuned.state()
    _check_backbones(pretrained, before, finetuned, after, head_axes)
    lineage = finetuned.metadata.get("lineage", {})
    pretrained_sha256 = backbone_sha256(before, head_axes)
    if lineage.get("pretrained_sha256", pretrained_sha256) != pretrained_sha256:
        raise UserError(
            f"{finetuned.path} was fine-tuned from {lineage.get('pretrained')} "
            f"({lineage['pretrained_sha256'][:12]}), not from {pretrained.path} ({pretrained_sha256[:12]})"
        )
    vector = TaskVector(
        task=task or lineage.get("task") or "+".join(finetuned.labels),
        labels=finetuned.labels,
        label_map=finetuned.label_map,
        pretrained_sha256=pretrained_sha256,
        finetuned_sha256=backbone_sha256(after, head_axes),
        network_def=network_def,
        head_axes=head_axes,
        pretrained_name=pretrained.name,
        tool_version=__version__,
        head={name: canonical_head(after[name].float().numpy(), axis) for name, axis in head_axes.items()},
    )
    for name, tensor in before.items():
        if name not in head_axes and tensor.is_floating_point():
            vector.set_delta(name, tensor.float().numpy(), after[name].float().numpy())
    return vector


def canonical_head(tensor: np.ndarray, axis: int) -> np.ndarray:
    """Subtract the background row from every row: organ channels become margins over background, whose logit is 0.

    A softmax head decides as before; a sigmoid head with a zero background row is unchanged.
    """
    return np.ascontiguousarray(tensor - np.take(tensor, [0], axis=axis))


def _check_backbones(
    pretrained: Bundle, before: dict[str, Any], finetuned: Bundle, after: dict[str, Any], head: dict[str, int]
) -> None:
    shapes = [{name: tuple(t.shape) for name, t in state.items() if name not in head} for state in (before, after)]
    if shapes[0] == shapes[1]:
        return
    name = next(n for n in [*shapes[0], *shapes[1]] if shapes[0].get(n) != shapes[1].get(n))
    raise UserError(
        f"{pretrained.path} and {finetuned.path} are not the same network: tensor {name} is "
        f"{shapes[0].get(name, 'missing')} in the first and {shapes[1].get(name, 'missing')} in the second"
    )
