"""Damaged and hostile inputs by the thousand: every one is refused in one line, or read exactly as torch and safetensors read it.

    python -m tests.fuzz --inputs 100000

A crash is any exception but the one that a user sees as one line; a wrong accept is content that differs from what was written
and, for weights, from what the reference reader gives too.
"""

from __future__ import annotations

import copy
import io
import json
import random
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from tools.bundle import Bundle
from tools.errors import UserError
from tools.heads import stacked_heads
from tools.merge import check_vectors
from tools.merge_engine import MergeEngine
from tools.network import Structure
from tools.recipe import Recipe
from tools.task_statistics import TaskStatistics, save_statistics
from tools.task_vector import FORMAT, Facts, TaskVector, save_task_vector
from tools.vendor import BUNDLES
from tools.weights_file import WeightsFile

RECIPE = b"""pretrained: start
vectors: [a.safetensors, b.safetensors]
method: ties
parameters: {density: 0.2, scale: [1.0, 0.5], scope: global}
overrides:
- tensors: "decoders.*"
  parameters: {scale: 0.1}
exclude: ["*.bias"]
sparsify: {method: dare, parameters: {density: 0.5}}
postprocess: [lines, {method: svc, parameters: {floor: 0.3}}]
dtype: float16
heads: heads.safetensors
seed: 3
"""


def mutated(data: bytes, chance: random.Random) -> bytes:
    """A few changes: bits, bytes, numbers, pieces left out, doubled, moved, or cut off."""
    content = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        if not content:
            break
        place = chance.randrange(len(content))
        end = min(len(content), place + chance.choice((1, 2, 4, 8, 64)))
        kind = chance.randrange(8)
        if kind == 0:
            content[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            content[place] = chance.randrange(256)
        elif kind == 2:
            content[place:end] = bytes(chance.randrange(256) for _ in range(end - place))
        elif kind == 3:
            content[place:end] = chance.choice((b"\x00", b"\xff", b"\x7f")) * (end - place)
        elif kind == 4:
            del content[place:end]
        elif kind == 5:
            content[place:place] = content[place:end]
        elif kind == 6:
            other = chance.randrange(len(content))
            content[other : other + end - place] = content[place:end]
        else:
            del content[place:]
    return bytes(content)


class Torch:
    """A ``model.pt``: the whole file, or the pickle in a sound archive."""

    name = "model.pt"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.state = {
            "kernel": torch.randn(4, 3, 2, 2, 2).to(memory_format=torch.channels_last_3d),
            "bias": torch.randn(4),
            "half": torch.randn(5).half(),
            "counter": torch.tensor(3),
        }
        buffer = io.BytesIO()
        torch.save({**self.state, "alias": self.state["bias"]}, buffer)
        self.data = buffer.getvalue()
        archive = zipfile.ZipFile(io.BytesIO(self.data))
        self.records = {info.filename: archive.read(info) for info in archive.infolist()}

    def make(self, chance: random.Random) -> bytes:
        if chance.random() < 0.5:
            return mutated(self.data, chance)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, record in self.records.items():
                archive.writestr(name, mutated(record, chance) if name.endswith("data.pkl") else record)
        return buffer.getvalue()

    def check(self, path: Path) -> None:
        file = WeightsFile(path)
        file.verify()
        ours = {name: file.array(name) for name in file.entries}
        try:
            theirs = torch.load(path, weights_only=True)
            same(ours, theirs.get("model", theirs) if isinstance(theirs.get("model"), dict) else theirs)
        except Exception:  # torch refuses damage that we do not look at, and even reads some wrongly
            same(ours, {**self.state, "alias": self.state["bias"]})


class Safetensors:
    """A safetensors file of weights."""

    name = "model.safetensors"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.data = save_safetensors(
            {"kernel": torch.randn(4, 3, 3), "half": torch.randn(5).bfloat16(), "n": torch.tensor(3)}
        )

    def make(self, chance: random.Random) -> bytes:
        return mutated(self.data, chance)

    def check(self, path: Path) -> None:
        file = WeightsFile(path)
        same({name: file.array(name) for name in file.entries}, load_safetensors(path.read_bytes()))


class Vector:
    """A task vector: a header with numbers in it that must not be believed, and data with checksums."""

    name = "vector.safetensors"

    def __init__(self) -> None:
        chance = np.random.default_rng(0)
        before, after = (10.0 ** chance.uniform(-4, 2, (2, 60)) * chance.choice((-1, 1), (2, 60))).astype(np.float32)
        facts = Facts(
            "liver", ["liver"], {"liver": [6]}, "0" * 64, "1" * 64, {"out_channels": 2}, Structure({"head": 0})
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / self.name
            backbone = [("w", before.reshape(3, 20), after.reshape(3, 20)), ("b", before[:7], after[:7])]
            save_task_vector(path, facts, backbone, {"head": np.ones((2, 3), np.float32)}, {"steps": np.int64(4)})
            self.data = path.read_bytes()
            self.content = self.read(path)
        self.before = {"w": before.reshape(3, 20), "b": before[:7], "head": np.zeros((9, 3), np.float32)}

    def make(self, chance: random.Random) -> bytes:
        return mutated(self.data, chance)

    def read(self, path: Path) -> dict[str, np.ndarray]:
        vector = TaskVector(path)
        return {**{name: vector.delta(name) for name in vector.tensors}, **vector.head, **vector.buffers}

    def check(self, path: Path) -> None:
        for name, array in self.read(path).items():
            found = [a for a in self.content.values() if a.shape == array.shape and np.array_equal(a, array)]
            assert found, f"tensor {name} is not what was written"


class Header(Vector):
    """A task vector whose header is sound JSON that says something else; it is merged, too."""

    name = "header.safetensors"
    ODD = (
        None,
        True,
        -1,
        0,
        1,
        2**70,
        0.5,
        "",
        "w",
        "head",
        "nope",
        "a\nb",
        [],
        {},
        ["w"],
        ["nope"],
        {"w": 0},
        {"w": "b"},
        [[1]],
    )

    def __init__(self) -> None:
        super().__init__()
        size = int.from_bytes(self.data[:8], "little")
        self.container = json.loads(self.data[8 : 8 + size])
        self.body = self.data[8 + size :]
        self.start = Bundle(BUNDLES / "pretrain_amos")

    def make(self, chance: random.Random) -> bytes:
        header = json.loads(self.container["__metadata__"][FORMAT])
        for _ in range(chance.choice((1, 1, 2))):
            where = header
            while True:
                key = chance.choice([*where] if isinstance(where, dict) else [*range(len(where))])
                if not (isinstance(where[key], dict | list) and where[key]) or chance.random() < 0.4:
                    break
                where = where[key]
            if isinstance(where, dict) and chance.random() < 0.2:
                where[chance.choice(("w", "head", "nope", "plain", "groups", "aliases", "constants", "transposed"))] = (
                    copy.deepcopy(chance.choice(self.ODD))
                )
            else:
                where[key] = copy.deepcopy(chance.choice(self.ODD))
        container = {**self.container, "__metadata__": {FORMAT: json.dumps(header)}}
        text = json.dumps(container).encode()
        return len(text).to_bytes(8, "little") + text + self.body

    def check(self, path: Path) -> None:
        weights = path.with_name("start.pt")
        if not weights.is_file():
            torch.save({name: torch.from_numpy(array) for name, array in self.before.items()}, weights)
        vector, start = TaskVector(path), WeightsFile(weights)
        check_vectors([str(path)], [vector], self.start, start)
        for method in ("task_arithmetic", "ties", "iso_c"):
            engine = MergeEngine(Recipe("start", [str(path)], method, {"scale": 1.0}), start, [vector])
            for name, pieces in engine.pieces():
                merged = np.concatenate([*pieces]).view("<f4")
                assert merged.size == self.before[name].size, f"tensor {name} has another size"
        stacked_heads(vector.facts.structure, [vector.head])
        assert all(label.strip() for label in vector.facts.labels)


class Statistics:
    """What was measured of a specialist, beside its sound task vector."""

    name = "liver.fisher.safetensors"

    def __init__(self) -> None:
        self.vector = Vector().data
        chance = np.random.default_rng(0)
        self.content = {"w": chance.random((3, 20), np.float32), "b": chance.random(7, np.float32)}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / self.name
            facts = {"method": "fisher", "finetuned_sha256": "1" * 64}
            shapes = {name: array.shape for name, array in self.content.items()}
            save_statistics(path, facts, shapes, self.content.items())
            self.data = path.read_bytes()

    def make(self, chance: random.Random) -> bytes:
        return mutated(self.data, chance)

    def check(self, path: Path) -> None:
        vector = path.with_name("liver.safetensors")
        vector.write_bytes(self.vector)
        statistics = TaskStatistics(TaskVector(vector), "fisher")
        for name in ("w", "b"):
            if statistics.shape(name):
                array = statistics.array(name)
                found = [a for a in self.content.values() if a.shape == array.shape and np.array_equal(a, array)]
                assert found, f"tensor {name} is not what was written"


class RecipeFile:
    """A recipe: text, and text that is no longer UTF-8."""

    name = "recipe.yaml"

    def make(self, chance: random.Random) -> bytes:
        return mutated(RECIPE, chance)

    def check(self, path: Path) -> None:
        recipe = Recipe.read(path)
        assert recipe.vectors and all(isinstance(vector, str) for vector in recipe.vectors)
        again = path.with_name("again.yaml")
        import yaml

        again.write_text(yaml.safe_dump(recipe.relative_to(path.parent).as_dict()))
        assert Recipe.read(again) == recipe, "it does not survive writing"


def same(ours: dict[str, np.ndarray], theirs: dict[str, torch.Tensor]) -> None:
    """Refuse anything but equal names and values."""
    assert set(ours) == set(theirs), "other names"
    for name, tensor in theirs.items():
        tensor = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
        assert np.array_equal(ours[name], tensor.numpy()), f"tensor {name} differs"


def fuzz(target: Torch | Safetensors | Vector | Header | Statistics | RecipeFile, inputs: int, seed: int) -> Counter:
    """Feed mutated inputs to a reader.

    Returns:
        How many were refused and how many accepted.

    Raises:
        AssertionError: one crashed, or was accepted wrongly; it is kept as ``fuzz-<seed>-<number>``.
    """
    counts: Counter = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / target.name
        for number in range(inputs):
            data = target.make(random.Random(f"{target.name} {seed} {number}"))
            path.write_bytes(data)
            try:
                target.check(path)
                counts["accepted, and right"] += 1
            except UserError:
                counts["refused"] += 1
            except Exception as error:
                kept = Path(f"fuzz-{seed}-{number}-{target.name}")
                kept.write_bytes(data)
                raise AssertionError(
                    f"{target.name}, input {number}, kept as {kept}: {type(error).__name__}: {error}"
                ) from error
    print(
        f"{target.name:<20} {inputs} inputs: " + ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
    )
    return counts


def main(inputs: int = 100_000, seed: int = 0) -> None:
    warnings.simplefilter("ignore")
    began = time.time()
    targets = (Torch(), Safetensors(), Vector(), Header(), Statistics(), RecipeFile())
    for target in targets:
        fuzz(target, inputs // len(targets), seed)
    print(f"no crash, no wrong accept; {time.time() - began:.0f} s")


if __name__ == "__main__":
    import fire

    sys.exit(fire.Fire(main))
