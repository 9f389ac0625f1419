"""``diff``: the task vector between a starting point and a specialist."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from tools import __version__
from tools.bundle import Bundle
from tools.errors import UserError
from tools.heads import canonical_head
from tools.lineage import backbone_sha256
from tools.merge_engine import HALF
from tools.network import Structure, output_argument
from tools.output import complete_output
from tools.task_vector import Facts, save_task_vector
from tools.weights_file import WeightsFile

WITHOUT_EFFECT = re.compile("drop|checkpoint")  # on what a trained network computes: of training alone


def diff(pretrained: str, finetuned: str, output: str, task: str = "", overwrite: bool = False) -> None:
    """Write the task vector: finetuned - pretrained, with the trained head and the lineage.

    Args:
        pretrained: the starting point, a bundle with weights.
        finetuned: the specialist, a bundle with weights.
        output: the file to write, usually <task>.safetensors.
        task: name of the task; default: as recorded in the specialist, else its labels.
        overwrite: replace the output if it exists.

    Raises:
        UserError: the backbones differ in a tensor's name or shape, the specialist says that it started elsewhere, or
            the head cannot be stacked.
    """
    start, specialist = Bundle(pretrained), Bundle(finetuned)
    structure = specialist.structure()
    before, after = start.weights(), specialist.weights()
    for weights in (before, after):
        weights.verify()
    _check_backbones(start, before, specialist, after, structure)
    _check_configs(start, specialist)
    lineage = specialist.metadata.get("lineage", {})
    pretrained_sha256 = backbone_sha256(before, structure)
    if lineage.get("pretrained_sha256", pretrained_sha256) != pretrained_sha256:
        raise UserError(
            f"{specialist.path} was fine-tuned from {lineage.get('pretrained')} "
            f"({lineage['pretrained_sha256'][:12]}), not from {start.path} ({pretrained_sha256[:12]})"
        )
    facts = Facts(
        task=str(task or lineage.get("task") or "+".join(specialist.labels)),
        labels=specialist.labels,
        label_map=specialist.label_map,
        pretrained_sha256=pretrained_sha256,
        finetuned_sha256=backbone_sha256(after, structure),
        network_def=specialist.network_def(),
        structure=structure,
        pretrained_name=start.name,
        tool_version=__version__,
        data=specialist.data,
        dtype=widest([entry.dtype for entry in after.entries.values() if entry.is_floating]),
    )
    try:
        facts.check()
    except ValueError as error:
        raise UserError(f"{specialist.path}, or --task: {error}") from None
    backbone = {n: e for n, e in before.entries.items() if n not in structure.not_merged}
    floating = [name for name, entry in backbone.items() if entry.is_floating]

    head = {name: canonical_head(structure, name, after.array(name).astype(np.float32)) for name in structure.head}
    buffers = {name: after.array(name) for name in backbone if name not in floating}
    with complete_output(output, overwrite, inputs=[pretrained, finetuned]) as path:
        save_task_vector(path, facts, Pairs(before, after, floating), head, buffers)
    size = 4 * sum(backbone[name].size for name in floating) / 2**20
    print(f"{output}: task {facts.task}, {len(floating)} tensors, {size:.1f} MiB, channels {', '.join(facts.labels)}")


@dataclass(frozen=True)
class Pairs:
    """Tensors of two files side by side in float32, read whenever they are gone through.

    Attributes:
        pretrained: the one file.
        finetuned: the other.
        names: of the tensors.
    """

    pretrained: WeightsFile
    finetuned: WeightsFile
    names: Sequence[str]

    def __iter__(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        for name in self.names:
            before, after = (weights.array(name) for weights in (self.pretrained, self.finetuned))
            yield name, before.astype(np.float32, copy=False), after.astype(np.float32, copy=False)


def _check_backbones(
    pretrained: Bundle, before: WeightsFile, finetuned: Bundle, after: WeightsFile, structure: Structure
) -> None:
    left_out = {*structure.head, *structure.aliases}
    shapes = [{n: e.shape for n, e in w.entries.items() if n not in left_out} for w in (before, after)]
    if shapes[0] != shapes[1]:
        name = next(n for n in [*shapes[0], *shapes[1]] if shapes[0].get(n) != shapes[1].get(n))
        raise UserError(
            f"{pretrained.path} and {finetuned.path} are not the same network: tensor {name} is "
            f"{shapes[0].get(name, 'missing')} in the first and {shapes[1].get(name, 'missing')} in the second"
        )
    for name in structure.constants:
        if not np.array_equal(before.array(name), after.array(name)):
            raise UserError(
                f"{pretrained.path} and {finetuned.path} differ in tensor {name}, which no training changes"
            )
    for name in structure.head:
        shape = after.entries[name].shape if name in after.entries else ()
        if not structure.counts(name, shape, 1 + len(finetuned.labels)):
            raise UserError(
                f"{finetuned.model_file}: head tensor {name} does not have 1 + {len(finetuned.labels)} output channels, "
                "one for each label in metadata.json and one for the background"
            )


def _check_configs(pretrained: Bundle, finetuned: Bundle) -> None:
    """Refuse networks whose weights fit and which compute otherwise; a merge has the starting point's network."""
    own, other = (bundle.network_def() for bundle in (pretrained, finetuned))
    if own["_target_"] == other["_target_"]:
        free = {output_argument(other)}
        for name in {*own, *other} - free:
            if own.get(name) != other.get(name) and not WITHOUT_EFFECT.search(name):
                raise UserError(
                    f"{pretrained.path} and {finetuned.path} are not the same network: {name} is {own.get(name, 'not set')} in "
                    f"the first and {other.get(name, 'not set')} in the second"
                )
    with suppress(UserError):  # one of them is no plain values
        if pretrained.resolved("preprocessing") != finetuned.resolved("preprocessing"):
            print(
                f"warning: {finetuned.path} preprocesses images otherwise than {pretrained.path}, and a merge does it as that "
                "one: compare preprocessing in their configs/inference.json"
            )


def widest(dtypes: Sequence[str]) -> str:
    """float32 if any weight has it or more, else the half precision that all have."""
    return dtypes[0] if len(set(dtypes)) == 1 and dtypes[0] in HALF else "float32"
