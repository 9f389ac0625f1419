"""Whether a bundle's configs can work, found by reading them: references, expressions and the code that they name."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tools.bundle import read_json
from tools.errors import UserError, nearest

NEEDED = {  # ids that MONAI, MONAI Label and these tools look for
    "inference.json": ("bundle_root", "device", "network_def", "inferer"),
    "train.json": ("bundle_root", "device", "dataset_dir"),
}
REFERENCE = re.compile(r"@(\w*(?:::\w*)*)")  # as monai.bundle finds them, after "#" has become "::"
FILE_MACRO = re.compile(r"%.*\.(json|ya?ml)\b")
OWN_IMPORT = re.compile(r"\$\s*(import|from)\s+scripts\b")


def check_configs(folder: Path) -> str:
    """Read every config of a bundle and run none.

    Args:
        folder: the bundle.

    Returns:
        What was found, for people.

    Raises:
        UserError: the first config that is not JSON or YAML, lacks an id that it needs, refers to an id that neither it nor, for
            an overlay, another config has, or names code that is not in scripts/.
    """
    configs = {
        path.name: _read(path)
        for path in sorted((folder / "configs").iterdir())
        if path.suffix in (".json", ".yaml", ".yml") and path.stem != "metadata"
    }
    metadata = _ids(read_json(folder / "configs" / "metadata.json"), "_meta_")
    ids = {name: {"_meta_", *metadata, *_ids(config)} for name, config in configs.items()}
    everywhere = set().union(*ids.values())
    references = 0
    for name, config in configs.items():
        where = folder / "configs" / name
        if missing := [key for key in NEEDED.get(name, ()) if key not in config]:
            raise UserError(f"{where} lacks {', '.join(missing)}, which whoever runs the bundle looks for")
        known = ids[name] if name in NEEDED else everywhere
        for place, text in _texts(config):
            if fault := _fault(text, place, known, folder / "scripts", alone=name == "inference.json"):
                raise UserError(f"{where}, {place.replace('::', '#')}: {fault}")
            references += len(_references(text, place))
    return f"{len(configs)} configs, {references} references"


def check_scripts(folder: Path) -> str:
    """Parse the Python of a bundle and run none.

    Args:
        folder: the bundle.

    Returns:
        What was found, for people.

    Raises:
        UserError: a file is not Python, or imports a module beside it that is not there.
    """
    scripts = folder / "scripts"
    paths = sorted(scripts.rglob("*.py"))
    for path in paths:
        for node in ast.walk(_parsed(path)):
            beside = node.module if isinstance(node, ast.ImportFrom) and node.level == 1 else None
            if beside and _module_file(path.parent, beside) is None:
                raise UserError(f"{path}, line {node.lineno}: imports .{beside}, which is not beside it")
    return f"{len(paths)} Python files"


def _read(path: Path) -> dict[str, Any]:
    """A config; nothing of a file that is data for one, such as a list of cases."""
    try:
        content = yaml.safe_load(path.read_text()) if path.suffix != ".json" else json.loads(path.read_text())
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not {'JSON' if path.suffix == '.json' else 'YAML'} ({error})") from None
    return content if isinstance(content, dict) else {}


def _ids(node: Any, place: str = "") -> set[str]:
    """The ids of everything in a config; an overlay writes them as "train#handlers" and "+imports"."""
    found = {place} if place else set()
    for key, value in _children(node):
        found |= _ids(value, _joined(place, key))
    if not place:  # what "validate#handlers#0" sets is there under its parents' names too
        found |= {id.rsplit("::", count)[0] for id in found for count in range(1, id.count("::") + 1)}
    return found


def _texts(node: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a config that is more than a description, with its id."""
    if isinstance(node, str):
        yield place, node.replace("#", "::") if node[:1] in ("@", "$", "%") else node
    for key, value in _children(node):
        if key != "_desc_":
            yield from _texts(value, _joined(place, key))


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        yield from ((str(key), value) for key, value in node.items())
    elif isinstance(node, list):
        yield from ((str(position), value) for position, value in enumerate(node))


def _joined(place: str, key: str) -> str:
    key = key.lstrip("+").replace("#", "::")
    return f"{place}::{key}" if place else key


def _fault(text: str, place: str, known: set[str], scripts: Path, alone: bool) -> str:
    """What is wrong with a text of a config, or nothing."""
    if OWN_IMPORT.match(text):
        return f"{text!r} fails when the bundle is run from elsewhere: name the code by _target_ instead"
    if text.startswith("%") and FILE_MACRO.match(text):
        return f"{text!r} takes from another file, but inference.json must stand alone" if alone else ""
    for reference in _references(text, place):
        if reference not in known:
            return f"@{reference.replace('::', '#')} is not there{nearest(reference, known)}"
    if text.startswith("$"):
        return _expression_fault(text)
    if place.endswith("_target_") and text.startswith("scripts."):
        return _target_fault(text, scripts)
    return ""


def _references(text: str, place: str) -> list[str]:
    """The ids that a text refers to; "@##x" is relative to where the text is."""
    if text[:1] == "%":
        text = f"@{text[1:]}" if not FILE_MACRO.match(text) else ""
    found = [match[1] for match in REFERENCE.finditer(text) if text.startswith("$") or match[0] == text]
    return [_absolute(reference, place) for reference in found if reference]


def _absolute(reference: str, place: str) -> str:
    up = len(reference) - len(reference.lstrip(":"))
    parents = place.split("::")[: -(up // 2)] if up else []
    return "::".join([*parents, reference.lstrip(":")])


def _expression_fault(text: str) -> str:
    if "import" in text and "@" in text:
        return f"{text!r} has 'import' beside a reference, which MONAI cannot parse"
    try:
        ast.parse(REFERENCE.sub("reference", text[1:]).strip())
    except (SyntaxError, ValueError, RecursionError) as error:
        return f"{text!r} is not Python ({error})"
    return ""


def _target_fault(target: str, scripts: Path) -> str:
    """Why a ``scripts.module.Name`` cannot be found, or nothing."""
    module, _, name = target.removeprefix("scripts.").rpartition(".")
    path = _module_file(scripts, module) if module else scripts / "__init__.py"
    if path is None or not path.is_file():
        return f"{target} is not there: scripts/ has no {module or '__init__'}.py"
    if name not in _names(_parsed(path)):
        return f"{target} is not there: scripts/{path.relative_to(scripts)} has no {name}"
    return ""


def _module_file(folder: Path, module: str) -> Path | None:
    stem = folder.joinpath(*module.split("."))
    candidates = (stem.with_name(f"{stem.name}.py"), stem / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{path} is not Python ({error})") from None


def _names(module: ast.Module) -> set[str]:
    """What a module defines or imports at its top level."""
    names: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names
