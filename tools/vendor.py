"""Keep every bundle's scripts/ folder equal to its source, tools/bundle_code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tools.errors import UserError

SOURCE = Path(__file__).parent / "bundle_code"
BUNDLES = Path(__file__).parents[1] / "bundles"
PACKAGE_HEADER = '"""Copied from tools/bundle_code by `python -m tools vendor`: change it there."""\n'


def vendor(check: bool = False) -> None:
    """Copy into each bundle's scripts/ just the modules that its configs name, and what those import.

    Args:
        check: write nothing; fail when a copy differs from its source.
    """
    stale = []
    for bundle in sorted(path.parent.parent for path in BUNDLES.glob("*/configs/metadata.json")):
        scripts = bundle / "scripts"
        wanted = scripts_for(bundle, SOURCE)
        present = {path.name: path.read_text() for path in scripts.glob("*.py")}
        if wanted == present:
            continue
        stale.append(bundle.name)
        if not check:
            scripts.mkdir(exist_ok=True)
            for name in present.keys() - wanted.keys():
                (scripts / name).unlink()
            for name, text in wanted.items():
                (scripts / name).write_text(text)
    if check and stale:
        raise UserError(f"scripts/ differ from tools/bundle_code in {', '.join(stale)}: run python -m tools vendor")
    print(f"{'checked' if check else 'written'}: {', '.join(stale) or 'all bundles are up to date'}")


def scripts_for(bundle: Path, source: Path) -> dict[str, str]:
    """The files, by name, that a bundle's configs need from a folder of modules."""
    texts = [path.read_text() for path in sorted((bundle / "configs").glob("*.json"))]
    return with_imports(named_modules(texts), source)


def named_modules(texts: list[str]) -> set[str]:
    """The modules of ``scripts`` that configs refer to."""
    return {name for text in texts for name in re.findall(r"\bscripts\.(\w+)", text)}


def with_imports(modules: set[str], source: Path) -> dict[str, str]:
    """Modules and what they import relatively, as file texts; with the package's ``__init__.py``.

    Raises:
        UserError: a module that the folder does not have.
    """
    files = {"__init__.py": PACKAGE_HEADER}
    todo = set(modules)
    while todo:
        name = todo.pop()
        path = source / f"{name}.py"
        if not path.is_file():
            raise UserError(f"a config names scripts.{name}, but there is no {path}")
        files[path.name] = path.read_text()
        for node in ast.walk(ast.parse(files[path.name])):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                imported = {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
                todo |= {module for module in imported if f"{module}.py" not in files}
    return files
