"""A recipe: which task vectors are merged onto which starting point, and how."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tools.errors import UserError, nearest
from tools.merge_methods import METHODS


@dataclass
class Recipe:
    """What ``merge --recipe`` reads.

    Attributes:
        pretrained: the starting point, a bundle.
        vectors: task vector files, in the order of their output channels.
        method: a merge method.
        parameters: of the method.
    """

    pretrained: str
    vectors: list[str]
    method: str = "average"
    parameters: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(
                f"no merge method {self.method!r}{nearest(self.method, METHODS)}; there are {', '.join(METHODS)}"
            )
        known = METHODS[self.method].defaults
        for name in self.parameters:
            if name not in known:
                choice = f"it has {', '.join(known)}" if known else "it has none"
                raise UserError(f"{self.method} has no parameter {name!r}{nearest(name, known)}; {choice}")
        if not self.vectors:
            raise UserError("no task vectors to merge")

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a recipe; relative paths in it are relative to its folder.

        Raises:
            UserError: no such file, not YAML, an unknown or a missing entry.
        """
        try:
            content = yaml.safe_load(Path(path).read_text())
        except FileNotFoundError:
            raise UserError(f"recipe {path} not found") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not YAML ({error})") from None
        known = list(cls.__dataclass_fields__)
        if not isinstance(content, dict):
            raise UserError(f"{path} must have the entries {', '.join(known)}")
        for name in content:
            if name not in known:
                raise UserError(
                    f"{path}: unknown entry {name!r}{nearest(str(name), known)}; a recipe has {', '.join(known)}"
                )
        for name, kind in (("pretrained", str), ("vectors", list)):
            if not isinstance(content.get(name), kind):
                raise UserError(f"{path}: {name} must be a {'list' if kind is list else 'path'}")
        content.update(parameters=content.get("parameters") or {})
        folder = Path(path).parent
        content["pretrained"] = str(folder / content["pretrained"])
        content["vectors"] = [str(folder / str(vector)) for vector in content["vectors"]]
        return cls(**content)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
