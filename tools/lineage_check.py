"""Whether what a bundle says of its parents agrees with what is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tools.bundle import Bundle
from tools.errors import NotDone, UserError
from tools.lineage import SHA256, backbone_sha256, file_sha256
from tools.merge import HEADS_FILE
from tools.network import Structure
from tools.recipe import Recipe
from tools.task_vector import TaskVector
from tools.weights_file import WeightsFile


def check_lineage(bundle: Bundle, home: Path) -> str:
    """Compare what a bundle's metadata say of its parents with what is there: its labels, its recipe, and the parents themselves.

    Args:
        bundle: its folder may be a temporary one.
        home: where the folder is, or would be if its zip were unpacked where it lies; task vectors are looked for from there.

    Returns:
        What was found, for people.

    Raises:
        UserError: what does not agree.
        NotDone: the metadata have no lineage.
    """
    lineage, where = bundle.metadata.get("lineage", {}), bundle.path / "configs" / "metadata.json"
    if not isinstance(lineage, dict):
        raise UserError(f"{where}: lineage must be a dictionary")
    if not lineage:
        raise NotDone("the metadata have none: it was made from nothing else, or does not say")
    for place, value in _hashes(lineage):
        if not isinstance(value, str) or not SHA256.fullmatch(value):
            raise UserError(f"{where}: lineage#{place} is no SHA-256: {value!r}")
    parts = [_starting_point(bundle.path, lineage, where), _heads(bundle.path, lineage)]
    if "vectors" in lineage:
        parts += _vectors(bundle, home, lineage["vectors"], where)
    return ", ".join(part for part in parts if part) or "well-formed"


def _hashes(node: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a lineage that calls itself a SHA-256."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in children:
        here = f"{place}#{key}" if place else str(key)
        if str(key).endswith("sha256"):
            yield here, value
        else:
            yield from _hashes(value, here)


def _starting_point(folder: Path, lineage: Mapping[str, Any], where: Path) -> str:
    """Compare a specialist's copy of its starting point with the identity that it records."""
    try:
        structure = Structure.read(lineage.get("structure", {"head": {}}))
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{where}: lineage#structure is not one ({error})") from None
    path = folder / "models" / "pretrained" / "model.pt"
    if not path.is_file() or not structure.head:
        return ""
    if backbone_sha256(WeightsFile(path), structure) != lineage.get("pretrained_sha256"):
        raise UserError(f"{path} is not the starting point that the lineage records, {lineage.get('pretrained')}")
    return f"models/pretrained is {lineage.get('pretrained')} as recorded"


def _heads(folder: Path, lineage: Mapping[str, Any]) -> str:
    """Compare learned heads with the file that the lineage records."""
    if "heads_sha256" not in lineage:
        return ""
    path = folder / "docs" / HEADS_FILE
    if not path.is_file() or file_sha256(path) != lineage["heads_sha256"]:
        raise UserError(f"{path} is not the file of heads that the lineage records")
    return "heads as recorded"


def _vectors(bundle: Bundle, home: Path, recorded: Any, where: Path) -> list[str]:
    """Compare what a merged bundle records of its task vectors with its labels, its recipe, and the files where they are here."""
    try:
        labels = [label for vector in recorded for label in vector["labels"]]
        names = [Path(vector["file"]).name for vector in recorded]
        identities = [vector["sha256"] for vector in recorded]
    except (TypeError, KeyError) as error:
        raise UserError(f"{where}: lineage#vectors must have task, file, sha256 and labels of each ({error})") from None
    if labels != bundle.labels:
        raise UserError(f"{where}: the labels of lineage#vectors are {labels}, those of channel_def {bundle.labels}")
    path = bundle.path / "docs" / "recipe.yaml"
    if not path.is_file():
        return [f"{len(names)} task vectors, no docs/recipe.yaml"]
    recipe = Recipe.read(path, home / "docs")
    if len(recipe.vectors) != len(names):
        raise UserError(f"{path} has {len(recipe.vectors)} task vectors, the lineage in the metadata {len(names)}")
    present = 0
    for file, name, sha256 in zip(recipe.vectors, names, identities, strict=True):
        places = (Path(file), home.parent / name)
        if found := next((place for place in places if place.is_file()), None):
            present += 1
            if TaskVector(found).sha256 != sha256:
                raise UserError(f"{found} is another task vector than the {name} that the lineage records")
    return [f"{len(names)} task vectors, {present} of them here and as recorded", "recipe readable"]
