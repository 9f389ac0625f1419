"""How much task vectors agree, before they are merged: the report that ``inspect`` prints for several of them.

Measures of Ilharco et al. (Task Arithmetic, ICLR 2023: cosines), Yadav et al. (TIES, NeurIPS 2023: sign conflicts) and Gargiulo
et al. (TSV, CVPR 2025: overlap of singular subspaces); data-free, for the whole network and for each of its parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools.errors import UserError
from tools.merge_engine import THREADS, Entries, in_order
from tools.merge_methods.spectral import leading
from tools.merge_methods.threshold import magnitude_of_share
from tools.network import group_of, part_of
from tools.task_vector import TaskVector
from tools.weights_file import BLOCK, WeightsFile

TOP = 0.2  # share of the largest entries whose overlap is counted
SUBSPACE = 8  # one in so many output directions spans the subspaces that are compared
MEASURES = {
    "cosine": "cosine",
    "sign_conflict": "share of entries whose signs differ",
    "weighted_sign_conflict": "the same, weighted by |a·b|",
    "top_overlap": f"overlap of the largest {TOP:.0%} of entries (chance {TOP})",
    "subspace_overlap": f"overlap of the leading output subspaces (chance {1 / SUBSPACE})",
}


def mergeability(vectors: Sequence[TaskVector], pretrained: WeightsFile | None = None) -> dict[str, Any]:
    """Compare task vectors pair by pair.

    Args:
        vectors: two or more, of one network.
        pretrained: weights of the starting point, for the length of τ relative to it.

    Returns:
        "tasks"; "same_start", whether they can be merged; a matrix, task × task, for each of ``MEASURES``; "parts": for each
        part of the network the tasks' "norm", their "relative_norm" when the starting point is given, and the mean of each
        measure over all pairs; "groups": the same for the "encoder" and the "decoder".

    Raises:
        UserError: they are not of the same network.
    """
    tensors = {name: vectors[0].tensors[name] for name in vectors[0].weights}
    shapes = [{name: vector.tensors[name].shape for name in vector.weights} for vector in vectors]
    if any(other != shapes[0] for other in shapes):
        raise UserError("these task vectors are not of the same network")
    thresholds = [magnitude_of_share(Entries(vector, list(tensors)), TOP) for vector in vectors]

    def compare(task: tuple[str, int]) -> tuple[str, _Sums]:
        name, number = task
        sums = _Sums.of_entries([vector.block(name, number).values for vector in vectors], thresholds)
        if pretrained is not None and name in pretrained.entries:
            start = pretrained.read(name, number * BLOCK, (number + 1) * BLOCK)
            sums.start = float(np.dot(start, start))
        return name, sums

    parts: dict[tuple[str, str], _Sums] = {}
    blocks = [(name, number) for name in tensors for number in range(len(tensors[name].checksums))]
    for name, sums in in_order(compare, blocks, THREADS):
        key = group_of(name), part_of(name)
        parts[key] = parts[key] + sums if key in parts else sums
    for name, shape in shapes[0].items():
        if vectors[0].facts.structure.is_matrix(name, shape):
            parts[group_of(name), part_of(name)] += _Sums.of_subspaces(vectors, name)
    zero = _Sums(len(vectors))
    total = sum(parts.values(), zero)
    groups = {
        g: sum((sums for (of, _), sums in parts.items() if of == g), zero) for g in dict.fromkeys(g for g, _ in parts)
    }
    by_part: dict[str, _Sums] = {}
    for (_, part), sums in parts.items():
        by_part[part] = by_part.get(part, zero) + sums
    return {
        "tasks": [vector.task for vector in vectors],
        "same_start": all(vector.same_start(vectors[0]) for vector in vectors),
        **{measure: np.round(matrix, 6).tolist() for measure, matrix in total.measures().items()},
        "parts": {part: sums.summary() for part, sums in by_part.items()},
        "groups": {group: sums.summary() for group, sums in groups.items()},
    }


class _Sums:
    """What the measures are computed from; sums over entries and matrices, so that parts add up to the network."""

    def __init__(self, tasks: int) -> None:
        self.products, self.opposite, self.opposite_mass, self.mass, self.common, self.overlap = np.zeros(
            (6, tasks, tasks)
        )
        self.entries = self.directions = 0
        self.start: float | None = None

    def __add__(self, other: _Sums) -> _Sums:
        total = _Sums(len(self.products))
        for name, value in vars(self).items():
            theirs = getattr(other, name)
            setattr(total, name, value if theirs is None else theirs if value is None else value + theirs)
        return total

    @classmethod
    def of_entries(cls, values: Sequence[np.ndarray], thresholds: Sequence[float]) -> _Sums:
        sums = cls(len(values))
        sums.entries = values[0].size
        large = [np.abs(v) >= max(t, 1e-38) for v, t in zip(values, thresholds, strict=True)]
        for i, a in enumerate(values):
            for j in range(i + 1):
                product = a * values[j]
                mass, total = float(np.abs(product).sum(dtype=np.float64)), float(product.sum(dtype=np.float64))
                sums.products[i, j] = sums.products[j, i] = total
                sums.mass[i, j] = sums.mass[j, i] = mass
                sums.opposite_mass[i, j] = sums.opposite_mass[j, i] = (mass - total) / 2
                sums.opposite[i, j] = sums.opposite[j, i] = np.count_nonzero(product < 0)
                sums.common[i, j] = sums.common[j, i] = np.count_nonzero(large[i] & large[j])
        return sums

    @classmethod
    def of_subspaces(cls, vectors: Sequence[TaskVector], name: str) -> _Sums:
        sums = cls(len(vectors))
        matrices = [vector.facts.structure.as_matrices(name, vector.delta(name)) for vector in vectors]
        for group in zip(*matrices, strict=True):
            rank = max(1, group[0].shape[0] // SUBSPACE)
            if rank > group[0].shape[1]:
                continue
            left = [leading(matrix, rank)[0] for matrix in group]
            for i, a in enumerate(left):
                for j, b in enumerate(left):
                    sums.overlap[i, j] += np.sum(np.square(a.T @ b))
            sums.directions += rank
        return sums

    def measures(self) -> dict[str, np.ndarray]:
        """A matrix for each measure; one without anything to measure is zero."""
        lengths, large = np.sqrt(np.diag(self.products)), np.diag(self.common)
        return {
            "cosine": _ratio(self.products, np.outer(lengths, lengths)),
            "sign_conflict": _ratio(self.opposite, np.array(self.entries)),
            "weighted_sign_conflict": _ratio(self.opposite_mass, self.mass),
            "top_overlap": _ratio(self.common, np.sqrt(np.outer(large, large))),
            "subspace_overlap": _ratio(self.overlap, np.array(self.directions)),
        }

    def summary(self) -> dict[str, Any]:
        """Norms by task, and each measure's mean over pairs."""
        norms = np.sqrt(np.diag(self.products))
        pairs = np.tril_indices(len(norms), -1)
        relative = {} if self.start is None else {"relative_norm": (norms / max(np.sqrt(self.start), 1e-30)).tolist()}
        means = {measure: float(matrix[pairs].mean()) for measure, matrix in self.measures().items()}
        return {"norm": norms.tolist(), **relative, **means}


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def report(result: dict[str, Any]) -> str:
    """The comparison as text."""
    tasks, lines = result["tasks"], []
    width = max(map(len, tasks)) + 2
    for measure, title in MEASURES.items():
        lines += ["", title, " " * width + "".join(task.rjust(max(width, 8)) for task in tasks)]
        for task, row in zip(tasks, result[measure], strict=True):
            lines.append(task.ljust(width) + "".join(f"{value:.3f}".rjust(max(width, 8)) for value in row))
    rows = {**result["parts"], **{f"all of the {group}": facts for group, facts in result["groups"].items()}}
    first = max(map(len, rows)) + 2
    relative = "relative_norm" in next(iter(result["parts"].values()))
    lines += ["", f"by part of the network: {'|τ| / |θ0|' if relative else '|τ|'} of each task, then means over pairs"]
    heads = [*tasks, "cosine", "conflict", "weighted", "top", "subspace"]
    lines.append("part".ljust(first) + "".join(head.rjust(max(len(head) + 2, 9)) for head in heads))
    for part, facts in rows.items():
        values = [*facts["relative_norm" if relative else "norm"], *(facts[measure] for measure in MEASURES)]
        cells = (f"{value:.3g}".rjust(max(len(head) + 2, 9)) for head, value in zip(heads, values, strict=True))
        lines.append(part.ljust(first) + "".join(cells))
    if not result["same_start"]:
        lines += ["", "warning: these task vectors come from different starting points and cannot be merged"]
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the matrices, and norms and conflicts along the network, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks, parts = result["tasks"], list(result["parts"])
    figure, axes = plt.subplots(2, 3, figsize=(15, 9), layout="constrained")
    limits = {"cosine": (-1, 1, "RdBu"), "sign_conflict": (0, 1, "RdBu_r"), "weighted_sign_conflict": (0, 1, "RdBu_r")}
    for axis, (measure, title) in zip(axes.flat, list(MEASURES.items())[:4], strict=False):
        low, high, colours = limits.get(measure, (0, 1, "Greys"))
        matrix = np.where(np.eye(len(tasks)), np.nan, result[measure])  # a task with itself says nothing
        axis.imshow(matrix, vmin=low, vmax=high, cmap=colours)
        for (i, j), value in np.ndenumerate(matrix):
            colour = "white" if abs(value) > 0.7 * high else "black"
            axis.text(j, i, "" if i == j else f"{value:.2f}", ha="center", va="center", color=colour)
        axis.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
        axis.set_yticks(range(len(tasks)), tasks)
        axis.set_title(title, fontsize=10)
    relative = "relative_norm" in result["parts"][parts[0]]
    norms = np.array([result["parts"][part]["relative_norm" if relative else "norm"] for part in parts])
    for column, task in zip(norms.T, tasks, strict=True):
        axes[1, 1].plot(parts, column, marker="o", label=task)
    axes[1, 1].set_title("length of τ" + (" ÷ length of the starting point" if relative else ""), fontsize=10)
    axes[1, 1].set_ylim(bottom=0)
    axes[1, 1].legend()
    for measure in MEASURES:
        label = measure.replace("_", " ")
        axes[1, 2].plot(parts, [result["parts"][part][measure] for part in parts], marker="o", label=label)
    axes[1, 2].set_title("means over pairs of tasks", fontsize=10)
    axes[1, 2].set_ylim(-0.1, 1)
    axes[1, 2].legend(fontsize=9, ncols=2, loc="upper center")
    for axis in axes[1, 1:]:
        axis.tick_params(axis="x", rotation=45)
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)
