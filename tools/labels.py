"""Labels as a user types them on the command line, checked against a dataset."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from tools.bundle import Bundle
from tools.errors import UserError, nearest

Label = int | str


def parse_sources(labels: object) -> list[Label]:
    """Labels of one channel: ``6``, ``"2,3"``, ``("left", "right")``, ``"11-18,21-28"``."""
    items = labels if isinstance(labels, Sequence) and not isinstance(labels, str) else [labels]
    sources: list[Label] = []
    for item in items:
        for part in str(item).split(","):
            part = part.strip()
            span = re.fullmatch(r"(\d+)\s*-\s*(\d+)", part)
            if span:
                sources.extend(range(int(span[1]), int(span[2]) + 1))
            elif part:
                sources.append(int(part) if part.isdigit() else part)
    return sources


def parse_channels(labels: object) -> dict[str, object] | None:
    """A dictionary of channels, also as YAML text such as ``{left lung: 1, right lung: 2}``; None if it is not one."""
    if isinstance(labels, str) and labels.lstrip().startswith("{"):
        try:
            labels = yaml.safe_load(labels)
        except yaml.YAMLError:
            raise UserError(
                f"--labels {labels!r} is not a dictionary such as {{kidneys: [2, 3], liver: liver}}"
            ) from None
    return dict(labels) if isinstance(labels, Mapping) else None


def renamed_labels(labels: object, bundles: Sequence[Bundle]) -> dict[str, object]:
    """What a dataset calls the channels of bundles that are called otherwise: ``{liver: 6}``; {} for None.

    Raises:
        UserError: it is no dictionary, or no bundle has such a channel.
    """
    if labels is None:
        return {}
    renamed = parse_channels(labels)
    if renamed is None:
        raise UserError(
            f"--labels {labels!r} is not a dictionary such as {{liver: 6}}: a channel, and its label(s) here"
        )
    known = [label for bundle in bundles for label in bundle.labels]
    for name in renamed:
        if name not in known:
            raise UserError(f"--labels: no bundle has a channel {name!r}{nearest(str(name), known)}")
    return renamed


def resolve(dataset_dir: str | Path, channels: Mapping[str, object]) -> dict[str, list[Label]]:
    """Output channels with the names that the dataset gives to their labels; a region is its labels, if these have names.

    Args:
        dataset_dir: nnU-Net raw dataset.
        channels: channel name to label(s) by name or voxel value.

    Raises:
        UserError: a label that the dataset does not have.
    """
    from tools.bundle_code.nnunet_data import ignored_value, label_values, read_labels

    wanted = {str(name): parse_sources(sources) for name, sources in channels.items()}
    try:
        label_values(dataset_dir, wanted)  # refuses what is not there, or twice
        names = {value: name for name, vs in read_labels(dataset_dir).items() for value in vs if len(vs) == 1}
        named = {source: label_values(dataset_dir, {str(source): [source]})[0] for s in wanted.values() for source in s}
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from None
    if ignored_value(dataset_dir) is not None:
        print(
            f"warning: {dataset_dir} has a label 'ignore'; evaluation leaves its voxels out, "
            "but training takes them for background"
        )

    def called(source: Label) -> list[Label]:
        values = named[source]
        return [names[v] for v in values] if all(v in names for v in values) else [source]

    return {name: [label for source in sources for label in called(source)] for name, sources in wanted.items()}


def check_channels(dataset_dir: str | Path, bundle: Bundle) -> None:
    """Refuse a dataset whose images do not have the channels that a bundle's network takes.

    Raises:
        UserError: says both numbers.
    """
    from tools.bundle_code.nnunet_data import count_channels

    count = count_channels(dataset_dir)
    if count != bundle.in_channels:
        raise UserError(
            f"images of {dataset_dir} have {count} channel(s), the network of {bundle.path} takes {bundle.in_channels}"
        )
