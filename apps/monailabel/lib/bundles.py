"""Which bundles are served, and under which names."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

CONFIGS = ("configs/metadata.json", "configs/inference.json")
WEIGHTS = "models/model.pt"


def find_bundles(paths: str) -> dict[str, Path]:
    """The bundles to serve, by name.

    A name is that of the bundle's folder, with ``_`` for what does not go into a web address; where several folders have one
    name, the names of the folders around them come before it.

    Args:
        paths: of a bundle, or of a folder of bundles; several with commas between them. In a folder of bundles those without
            weights, and those that are not complete yet (``.partial``), are passed over.

    Raises:
        ValueError: there is no bundle, it has no weights, or its labels are not numbered without gaps.
    """
    found: list[Path] = []
    for path in (Path(part.strip()).expanduser().absolute() for part in paths.split(",") if part.strip()):
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder: BUNDLE must name a bundle, or a folder of bundles")
        inside = sorted(p for p in path.iterdir() if p.is_dir() and p.suffix != ".partial" and _is_bundle(p))
        if _is_bundle(path):
            if not (path / WEIGHTS).is_file():
                raise ValueError(
                    f"{path} has no weights ({WEIGHTS}): train it, or make a merged one with python -m tools merge"
                )
            found.append(path)
        elif not inside:
            raise ValueError(f"{path} is no bundle ({' and '.join(CONFIGS)}) and has none in it")
        elif not (with_weights := [p for p in inside if (p / WEIGHTS).is_file()]):
            raise ValueError(f"none of the {len(inside)} bundles in {path} has weights ({WEIGHTS})")
        else:
            found += with_weights
    if not found:
        raise ValueError("no bundle given: BUNDLE must name a bundle, or a folder of bundles")
    found = list(dict.fromkeys(found))
    for path in found:
        channel_labels(path)
    return _named(found)


def _is_bundle(path: Path) -> bool:
    return all((path / config).is_file() for config in CONFIGS)


def _named(found: list[Path]) -> dict[str, Path]:
    names = {path: _name(path.parts[-1:]) for path in found}
    for parts in range(2, max(len(path.parts) for path in found)):
        often = Counter(names.values())
        names |= {path: _name(path.parts[-parts:]) for path in found if often[names[path]] > 1}
    if len(set(names.values())) < len(found):
        raise ValueError(f"two bundles have the same name: {', '.join(sorted(names.values()))}; rename one's folder")
    return {name: path for path, name in names.items()}


def _name(parts: tuple[str, ...]) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", "_".join(parts))


def channel_labels(bundle: Path) -> dict[str, int]:
    """The labels of a bundle's output channels, in small letters as MONAI Label gives them, and their values.

    Raises:
        ValueError: they are not numbered 1 to N, or two have one name. Viewers number segments by position, and would call
            every organ after a gap by another one's name.
    """
    where = bundle / CONFIGS[0]
    try:
        channels = json.loads(where.read_text())["network_data_format"]["outputs"]["pred"]["channel_def"]
        labels = {name.lower(): int(channel) for channel, name in channels.items() if name.lower() != "background"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: channel_def of outputs#pred cannot be read ({error!r})") from None
    if channels.get("0", "").lower() != "background" or sorted(labels.values()) != list(range(1, len(channels))):
        raise ValueError(
            f"{where}: channel_def must be 0: background, then 1 to N without gaps, each with a name of its own"
        )
    return dict(sorted(labels.items(), key=lambda item: item[1]))
