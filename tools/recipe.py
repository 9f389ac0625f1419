"""A recipe: which task vectors are merged onto which starting point, and how."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import yaml

from tools.errors import UserError, nearest
from tools.merge_methods import METHODS, POSTPROCESSORS, SPARSIFIERS, Method

Place = tuple[str | int, ...]  # of an entry: ("parameters", "density"), ("overrides", 0, "tensors")
MASKED = ("emr", "task_arithmetic")  # methods whose result a mask for each task can take apart again
DTYPES = ("float32", "float16", "bfloat16")


@dataclass
class Recipe:
    """What ``merge --recipe`` reads.

    Attributes:
        pretrained: the starting point, a bundle.
        vectors: task vector files, in the order of their output channels.
        method: a merge method.
        parameters: of the method.
        overrides: other parameters for some tensors, ``{tensors: "decoders.*", parameters: {scale: 0.2}}``; of several that
            match a tensor, the last one holds. Tensors are named by a pattern, or by "encoder" or "decoder". The head
            is none of them: each task keeps its own.
        include: patterns of the tensors that are merged.
        exclude: patterns of tensors that stay those of the starting point.
        sparsify: a sparsifier in front of the method, ``{method: dare, parameters: {density: 0.5}}``, or its name.
        postprocess: corrections after the method, in this order; each like sparsify.
        seed: of the sparsifier.
        modulate: keep for each task a mask of one bit a weight, with which the merged model can become that task again.
        dtype: of the merged weights; default: the starting point's.
        heads: file of heads that replace the task vectors' own, as ``distil --heads`` writes it.
        other_start: the task vectors may come from another starting point.
    """

    pretrained: str
    vectors: list[str]
    method: str = "average"
    parameters: dict[str, Any] = field(default_factory=dict)
    overrides: list[dict[str, Any]] = field(default_factory=list)
    include: list[str] = field(default_factory=lambda: ["*"])
    exclude: list[str] = field(default_factory=list)
    sparsify: dict[str, Any] = field(default_factory=dict)
    postprocess: list[dict[str, Any]] = field(default_factory=list)
    seed: int = 0
    modulate: bool = False
    dtype: str = ""
    heads: str = ""
    other_start: bool = False

    where: ClassVar[Callable[[Place], str]] = staticmethod(
        lambda place: ""
    )  # of an entry, in front of a message about it

    def __post_init__(self) -> None:
        self.sparsify = _step(self.sparsify)
        self.postprocess = [_step(step) for step in self.postprocess]
        check(asdict(self), lambda place: "")

    @classmethod
    def read(cls, path: str | Path, home: Path | None = None) -> Recipe:
        """Read a recipe; relative paths in it are relative to its folder.

        Args:
            path: of the file.
            home: the folder that they are relative to instead.

        Raises:
            UserError: no such file, not YAML, an unknown, double or missing entry, a wrong type, a value out of range; with
                the number of the line.
        """
        try:
            text = Path(path).read_text()
            for event in yaml.parse(text):
                if isinstance(event, yaml.AliasEvent):  # a few lines of them stand for more than any memory holds
                    raise UserError(
                        f"{path}, line {event.start_mark.line + 1}: *{event.anchor}: a recipe has no aliases"
                    )
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            content = yaml.safe_load(text)
        except FileNotFoundError:
            raise UserError(f"recipe {path} not found") from None
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise UserError(f"{path} is not YAML ({error})") from None
        lines: dict[Place, int] = {}
        _note_lines(node, (), lines, path)

        def where(place: Place) -> str:
            while place and place not in lines:
                place = place[:-1]
            return f"{path}, line {lines[place]}: " if place else f"{path}: "

        content = check(content, where)
        folder = home or Path(path).parent
        if folder.resolve() != Path(os.path.abspath(folder)):  # behind a link ".." is another folder than it looks like
            folder = folder.resolve()
        content["pretrained"] = os.path.normpath(folder / content["pretrained"])
        content["vectors"] = [os.path.normpath(folder / vector) for vector in content["vectors"]]
        if content.get("heads"):
            content["heads"] = os.path.normpath(folder / content["heads"])
        recipe = cls(**content)
        recipe.where = where
        return recipe

    def relative_to(self, folder: Path) -> Recipe:
        """The same with paths as they are written in a recipe in this folder."""

        def relative(path: str) -> str:
            return os.path.relpath(Path(path).parent.resolve() / Path(path).name, Path(folder).resolve())

        pretrained, *vectors = map(relative, (self.pretrained, *self.vectors))
        heads = relative(self.heads) if self.heads else ""
        return replace(self, pretrained=pretrained, vectors=vectors, heads=heads)

    def as_dict(self) -> dict[str, Any]:
        """Without what is left at its default."""
        default = Recipe(self.pretrained, self.vectors)
        named = ("pretrained", "vectors", "method")
        return {k: v for k, v in asdict(self).items() if k in named or v != getattr(default, k)}


def check(content: object, where: Callable[[Place], str]) -> dict[str, Any]:
    """Refuse what is not a recipe.

    Args:
        content: what the YAML file has, or the same from the command line.
        where: says at which line of which file an entry is, for messages.

    Returns:
        The content.

    Raises:
        UserError: one line that names the entry and the nearest valid name.
    """
    known = [entry.name for entry in fields(Recipe)]
    if not isinstance(content, dict):
        raise UserError(f"{where(())}a recipe must have the entries {', '.join(known)}")
    _known_names(content, known, (), where, "a recipe has")
    _typed(content, "pretrained", str, "the path of a bundle", (), where)
    _typed(content, "vectors", list, "a list of task vector files", (), where)
    if not content["vectors"]:
        raise UserError(f"{where(('vectors',))}no task vectors to merge")
    for name in ("vectors", "include", "exclude"):
        for position, item in enumerate(_typed(content, name, list, "a list", (), where, default=[])):
            if not isinstance(item, str):
                raise UserError(f"{where((name, position))}{name} must be text, got {item!r}")
    if content.get("include") == []:
        raise UserError(f"{where(('include',))}include has no pattern, so nothing would be merged")
    method = _typed(content, "method", str, "the name of a merge method", (), where, default="average")
    if method not in METHODS:
        choice = f"{nearest(method, METHODS)}; there are {', '.join(METHODS)}"
        raise UserError(f"{where(('method',))}no merge method {method!r}{choice}")
    tasks = len(content["vectors"])
    own = METHODS[method]
    _check_parameters(own, _typed(content, "parameters", dict, "a dictionary", (), where, default={}), tasks, (), where)
    for position, override in enumerate(_typed(content, "overrides", list, "a list", (), where, default=[])):
        place = ("overrides", position)
        if not isinstance(override, dict):
            raise UserError(f"{where(place)}an override has the entries tensors and parameters, got {override!r}")
        _known_names(override, ["tensors", "parameters"], place, where, "an override has")
        _typed(override, "tensors", str, "a pattern of tensor names", place, where)
        _check_parameters(own, _typed(override, "parameters", dict, "a dictionary", place, where), tasks, place, where)
    if content.get("sparsify") not in (None, "", {}):
        _check_step(content["sparsify"], SPARSIFIERS, "sparsifier", ("sparsify",), where)
    for position, step in enumerate(_typed(content, "postprocess", list, "a list", (), where, default=[])):
        _check_step(step, POSTPROCESSORS, "post-processor", ("postprocess", position), where)
    if type(_typed(content, "seed", int, "a whole number", (), where, default=0)) is bool:
        raise UserError(f"{where(('seed',))}seed must be a whole number")
    if _typed(content, "modulate", bool, "true or false", (), where, default=False):
        _check_modulated(content, method, where)
    _typed(content, "other_start", bool, "true or false", (), where, default=False)
    _typed(content, "heads", str, "the path of a file", (), where, default="")
    dtype = _typed(content, "dtype", str, "text", (), where, default="")
    if dtype and dtype not in DTYPES:
        raise UserError(f"{where(('dtype',))}dtype must be {', '.join(DTYPES)}, got {dtype!r}{nearest(dtype, DTYPES)}")
    return {name: value for name, value in content.items() if value is not None}


def _check_modulated(content: Mapping, method: str, where: Callable[[Place], str]) -> None:
    place = where(("modulate",))
    if method not in MASKED:
        raise UserError(f"{place}there are masks for the methods {' and '.join(MASKED)}, not for {method}")
    if content.get("overrides") or content.get("postprocess") or content.get("sparsify"):
        raise UserError(f"{place}overrides, sparsify and postprocess cannot be undone by masks; leave them out")
    if isinstance((content.get("parameters") or {}).get("scale"), list):
        raise UserError(f"{place}the shared model must have one scale for all tasks")


def _step(step: Any) -> Any:
    return {"method": step} if isinstance(step, str) and step else step


def _check_step(step: Any, table: Mapping[str, Method], kind: str, place: Place, where: Callable[[Place], str]) -> None:
    step = _step(step)
    if not isinstance(step, dict):
        raise UserError(f"{where(place)}a {kind} has the entries method and parameters; got {step!r}")
    _known_names(step, ["method", "parameters"], place, where, f"a {kind} has")
    name = _typed(step, "method", str, f"the name of a {kind}", place, where)
    if name not in table:
        raise UserError(
            f"{where((*place, 'method'))}no {kind} {name!r}{nearest(name, table)}; there are {', '.join(table)}"
        )
    parameters = _typed(step, "parameters", dict, "a dictionary", place, where, default={})
    _check_parameters(table[name], parameters, 1, place, where)


def _check_parameters(
    method: Method, parameters: Mapping[str, Any], tasks: int, place: Place, where: Callable[[Place], str]
) -> None:
    for name, value in parameters.items():
        try:
            method.check({name: value}, tasks)
        except UserError as error:
            raise UserError(f"{where((*place, 'parameters', name))}{error}") from None


def _known_names(content: Mapping, known: list[str], place: Place, where: Callable[[Place], str], has: str) -> None:
    for name in content:
        if name not in known:
            hint = f"{nearest(str(name), known)}; {has} {', '.join(known)}"
            raise UserError(f"{where((*place, name))}unknown entry {name!r}{hint}")


def _typed(
    content: Mapping,
    name: str,
    kind: type,
    what: str,
    place: Place,
    where: Callable[[Place], str],
    default: Any = None,
) -> Any:
    value = content.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, kind):
        got = "it is missing" if name not in content else f"got {value!r}"
        raise UserError(f"{where((*place, name))}{name} must be {what}; {got}")
    return value


def _note_lines(node: yaml.Node | None, place: Place, lines: dict[Place, int], path: str | Path) -> None:
    """Note at which line each entry is; refuse one that is there twice, of which YAML would take the last."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*place, key.value)
            if here in lines:
                raise UserError(f"{path}, line {key.start_mark.line + 1}: {key.value!r} is there twice")
            lines[here] = key.start_mark.line + 1
            _note_lines(value, here, lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for position, value in enumerate(node.value):
            lines[(*place, position)] = value.start_mark.line + 1
            _note_lines(value, (*place, position), lines, path)
