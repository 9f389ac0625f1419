"""A MONAI bundle as the tools see it: its configs with references resolved, its labels, weights and code."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.errors import UserError
from tools.network import Structure, describe, inner_network, spare_channels
from tools.weights_file import WeightsFile

if TYPE_CHECKING:
    from torch import nn


class Bundle:
    """A bundle folder.

    Args:
        path: folder with configs/metadata.json and configs/inference.json.

    Raises:
        UserError: one of the two is missing or is not JSON.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{path} is not a bundle folder")
        self.metadata = read_json(self.path / "configs" / "metadata.json")
        self.inference = read_json(self.path / "configs" / "inference.json")

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def labels(self) -> list[str]:
        """Names of the output channels 1..C."""
        try:
            channels = self.metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
            return [str(channels[str(i)]) for i in range(1, len(channels))]
        except KeyError as error:
            raise UserError(f"{self.path}/configs/metadata.json: outputs#pred#channel_def lacks {error}") from None

    @property
    def label_map(self) -> dict[str, list[int | str]]:
        """For each output channel, the labels of the training dataset that it stands for."""
        recorded = self.metadata.get("label_map", {})
        return {label: recorded.get(label, [label]) for label in self.labels}

    @property
    def in_channels(self) -> int:
        return self.metadata["network_data_format"]["inputs"]["image"]["num_channels"]

    @property
    def data(self) -> dict[str, str]:
        """What it was trained on, as ``data_facts`` describes it; empty where that was not recorded."""
        data = self.metadata.get("lineage", {}).get("data")
        return {str(name): str(value) for name, value in data.items()} if isinstance(data, dict) else {}

    def dataset_of(self, label: str) -> str:
        """Name of the dataset that taught it a label, of a merge as of a specialist; empty where that was not recorded."""
        vectors = self.metadata.get("lineage", {}).get("vectors") or []
        taught = [vector.get("data") or {} for vector in vectors if label in vector.get("labels", ())]
        return str((taught[0] if taught else self.data).get("dataset", ""))

    @property
    def model_file(self) -> Path:
        return self.path / "models" / "model.pt"

    def sha256(self) -> str:
        """Of what decides its label maps: weights, masks of tasks, and how inference.json uses them.

        Raises:
            UserError: there are no weights.
        """
        from tools.lineage import facts_sha256, file_sha256

        masks = self.path / "models" / "modulators.pt"
        files = [self.weights().path, *([masks] if masks.is_file() else [])]
        return facts_sha256([*map(file_sha256, files), self.inference])

    def weights(self) -> WeightsFile:
        """The weights, to be read piece by piece.

        Raises:
            UserError: there are none, or the file is damaged.
        """
        if not self.model_file.is_file():
            raise UserError(f"{self.model_file} not found: train the bundle first")
        return WeightsFile(self.model_file)

    def state(self) -> dict[str, Any]:
        """The weights by name, as torch tensors.

        Raises:
            UserError: there are none, or the file is damaged or holds NaN.
        """
        from tools.bundle_code.weights import load_state

        if not self.model_file.is_file():
            raise UserError(f"{self.model_file} not found: train the bundle first")
        try:
            return load_state(self.model_file)
        except ValueError as error:
            raise UserError(str(error)) from None

    def network(self) -> nn.Module:
        """The network with its weights, on the device that inference.json names, in evaluation mode.

        Raises:
            UserError: there are no weights, the file is damaged or holds NaN, or they do not fit the network.
        """
        state = self.state()
        with self.code():
            parser = self.parser()
            network, device = (parser.get_parsed_content(key) for key in ("network_def", "device"))
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            message = " ".join(str(error).split())[:300]
            raise UserError(f"{self.model_file} does not fit the network of {self.path}: {message}") from None
        return network.to(device).eval()

    @contextmanager
    def code(self) -> Iterator[None]:
        """Make the bundle's own ``scripts`` package importable, and no other bundle's, inside the block."""
        _forget_scripts()
        sys.path.insert(0, str(self.path.resolve()))
        try:
            yield
        finally:
            sys.path.remove(str(self.path.resolve()))
            _forget_scripts()

    def parser(self, **overrides: Any):
        """A MONAI ConfigParser over inference.json, with metadata, and ``bundle_root`` set."""
        from monai.bundle import ConfigParser

        parser = ConfigParser()
        parser.read_config(str(self.path / "configs" / "inference.json"))
        parser.read_meta(str(self.path / "configs" / "metadata.json"))
        parser.update({"bundle_root": str(self.path.resolve()), **overrides})
        return parser

    def resolved(self, key: str) -> Any:
        """An entry of inference.json with its references and expressions replaced by plain values.

        Raises:
            UserError: the entry is missing, or refers to something that is not a plain value.
        """
        if key not in self.inference:
            raise UserError(f"{self.path}/configs/inference.json has no {key!r}")
        with suppress(_NeedsMonai):
            return _looked_up(self.inference[key], self.inference)
        parser = self.parser()
        parser.resolve_macro_and_relative_ids()
        with self.code():
            return plain_values(parser, key, parser[key])

    def plain(self, key: str) -> Any:
        """The same without evaluating anything that the bundle says: None where that would be needed, or nothing is there."""
        with suppress(_NeedsMonai):
            return _looked_up(self.inference.get(key), self.inference)
        return None

    def network_def(self) -> dict[str, Any]:
        """The network, which in a merged bundle has the spare channels of a stacked head too; see ``tools.heads``."""
        return dict(inner_network(self.resolved("network_def")))

    def structure(self) -> Structure:
        """What the network's tensors are: as recorded when the bundle was made, or else found by building the network.

        Raises:
            UserError: the network cannot be built, or its head cannot be found.
        """
        recorded = self.metadata.get("lineage", {}).get("structure")
        try:
            if recorded and self._fits(structure := Structure.read(recorded)):
                return structure
        except (AttributeError, ValueError) as error:
            raise UserError(f"{self.path}: the lineage in its metadata is not one ({error})") from None
        network_def = self.network_def()
        try:
            with self.code():
                return describe(network_def)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None

    def _fits(self, structure: Structure) -> bool:
        """Whether a recorded structure is that of the weights: somebody may have changed the network since."""
        if not self.model_file.is_file():
            return True
        entries = self.weights().entries
        channels = 1 + len(self.labels) + spare_channels(self.resolved("network_def"))
        return {*structure.head, *structure.transposed, *structure.statistics} <= set(entries) and all(
            structure.counts(name, entries[name].shape, channels) for name in structure.head
        )


class _NeedsMonai(Exception):
    """A config has more than plain values and references to them."""


def _looked_up(value: Any, config: dict[str, Any], depth: int = 0) -> Any:
    """A part of a config with references to plain entries replaced, without the seconds that importing MONAI takes.

    Raises:
        _NeedsMonai: it has expressions, macros, or references into entries.
    """
    if isinstance(value, dict):
        if "_requires_" in value:
            raise _NeedsMonai
        return {k: _looked_up(v, config, depth) for k, v in value.items() if k != "_disabled_"}
    if isinstance(value, list):
        kept = [v for v in value if not (isinstance(v, dict) and _disabled(v.get("_disabled_", False), config))]
        return [_looked_up(v, config, depth) for v in kept]
    if not isinstance(value, str) or not value.startswith(("@", "$", "%")):
        return value
    if not value.startswith("@") or value[1:] not in config or depth == 9 or isinstance(config[value[1:]], dict):
        raise _NeedsMonai
    return _looked_up(config[value[1:]], config, depth + 1)


def _disabled(value: Any, config: dict[str, Any]) -> bool:
    """What ``_disabled_`` says: true, false, or the usual ``$@spacing is None``."""
    if isinstance(value, bool):
        return value
    match = re.fullmatch(r"\$@(\w+) is None", value) if isinstance(value, str) else None
    if match is None or match[1] not in config:
        raise _NeedsMonai
    return config[match[1]] is None


def plain_values(parser: Any, key: str, value: Any) -> Any:
    """A part of a bundle's config with what it refers to in its place, as JSON has it.

    Args:
        parser: MONAI's ConfigParser over the config, with macros resolved.
        key: of the part.
        value: of it there.

    Raises:
        UserError: something in it is no plain value, such as a function.
    """
    if isinstance(value, dict):
        entries = {k: plain_values(parser, f"{key}::{k}", v) for k, v in value.items()}
        return None if entries.get("_disabled_") else {k: v for k, v in entries.items() if k != "_disabled_"}
    if isinstance(value, list):
        entries = [plain_values(parser, f"{key}::{i}", v) for i, v in enumerate(value)]
        return [new for new, old in zip(entries, value) if new is not None or old is None]
    if value == "@device":  # which every bundle has: it is chosen where the bundle runs
        return value
    if isinstance(value, str) and value[:1] in "@$":
        content = parser.get_parsed_content(key)
        try:
            return json.loads(json.dumps(content))
        except TypeError:
            if isinstance(content, type):  # "$torch.nn.Conv3d", an argument of many a network
                return {"_target_": f"{content.__module__}.{content.__qualname__}", "_mode_": "callable"}
            raise UserError(
                f"{key.replace('::', '#')} of the config is {value!r}, which is not a plain value"
            ) from None
    return value


def _forget_scripts() -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
        del sys.modules[module]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: the file is missing or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} not found") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented JSON with short lists on one line, as people write configs."""

    def on_one_line(match: re.Match) -> str:
        line = "[" + re.sub(r",\s+", ", ", match[1]) + "]"
        return line if len(line) < 100 else match[0]

    text = json.dumps(content, indent=4)
    path.write_text(re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", on_one_line, text) + "\n")
