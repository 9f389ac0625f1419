"""Scores one recipe after another on the same cases: in one network, whose weights each merge replaces, and nothing is written.

The merge engine makes the weights, as for ``merge``, so a recipe scores here what its bundle scores in ``evaluate``. Task vectors
stay open, and preprocessed cases stay in memory as far as they fit.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tools.bundle import Bundle
from tools.errors import UserError
from tools.evaluate import matched_channels
from tools.labels import check_channels, renamed_labels
from tools.merge import merge_recipe
from tools.merge_engine import MergeEngine
from tools.recipe import Recipe
from tools.scores import Score, check_grid, load_reference, rounded_score
from tools.segmenter import Segmenter
from tools.task_vector import TaskVector

KEPT_BYTES = 2**32  # of preprocessed cases

CaseDice = dict[str, float]  # by label; NaN where the reference does not have the organ


class MergeScorer:
    """Scores recipes that merge the same task vectors onto the same starting point.

    Args:
        recipe: one of them; method and parameters of the others may differ.
        dataset_dir: nnU-Net raw dataset.
        labels: the dataset's labels for organs that are called otherwise.

    Raises:
        UserError: the recipe cannot be merged, or the dataset has none of its labels, or images of other channels.
    """

    def __init__(self, recipe: Recipe, dataset_dir: str | Path, labels: object = None) -> None:
        import torch

        from tools.bundle_code.nnunet_data import ignored_value

        self._folder = tempfile.TemporaryDirectory()
        merge_recipe(recipe, Path(self._folder.name) / "merged", quiet=True)
        self.bundle = Bundle(Path(self._folder.name) / "merged")
        check_channels(dataset_dir, self.bundle)
        self.channels = matched_channels(self.bundle, dataset_dir, renamed_labels(labels, [self.bundle]))
        self._ignored = ignored_value(dataset_dir)
        self.vectors = [TaskVector(path) for path in recipe.vectors]
        self._start = Bundle(recipe.pretrained).weights()
        self._network = self.bundle.network().to(memory_format=torch.channels_last_3d)
        with self.bundle.code():
            self._segmenter = Segmenter(self.bundle)
        self._kept: dict[str, _Case] = {}
        self._kept_bytes = 0

    def scores(self, recipe: Recipe, cases: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, list[Score]]]:
        """Merge, then segment and score case by case.

        Args:
            recipe: of the same task vectors and starting point.
            cases: image and label paths by case.

        Yields:
            Case, and Dice and volumes of each label that the dataset has; the bundle's name is the method's.

        Raises:
            UserError: the method refuses its parameters, or the merged weights would be infinite.
        """
        self._merge(recipe)
        yield from self._scores(self.bundle, self._network, cases, recipe.method)

    def bundle_scores(self, bundle: Bundle, cases: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Score]]:
        """The same of a merged bundle's own weights."""
        return dict(self._scores(bundle, bundle.network(), cases, bundle.name))

    def _merge(self, recipe: Recipe) -> None:
        import torch

        engine = MergeEngine(recipe, self._start, self.vectors)
        tensors = self._network.state_dict()  # anew each time: a change of the memory format replaces them
        with torch.no_grad():
            for name, pieces in engine.pieces():
                data = [*pieces]
                if data:
                    values = torch.from_numpy(np.concatenate(data)).view(getattr(torch, engine.dtype(name)))
                    tensors[name].copy_(values.view(tensors[name].shape))

    def _scores(
        self, bundle: Bundle, network: Any, cases: Mapping[str, Mapping[str, Any]], title: str
    ) -> Iterator[tuple[str, list[Score]]]:
        for name, files in cases.items():
            with bundle.code():
                case = self._case(name, files)
                label_map, affine = self._segmenter(case.image, network)
            reference = f"case {name}: {files['label']}"
            check_grid(reference, (case.reference.shape, case.affine), (label_map.shape, affine))
            yield name, case.scores(title, name, label_map, self.channels, self._ignored)

    def _case(self, name: str, files: Mapping[str, Any]) -> _Case:
        if name in self._kept:
            return self._kept[name]
        case = _Case.load(self._segmenter, files)
        if self._kept_bytes + case.size <= KEPT_BYTES:
            self._kept[name] = case
            self._kept_bytes += case.size
        return case


@dataclass(frozen=True)
class _Case:
    """A labelled case in memory.

    Attributes:
        image: preprocessed.
        values: of the reference, ascending.
        reference: their positions, voxel by voxel (X, Y, Z).
        affine: voxel to world, 4x4, RAS millimetres.
    """

    image: Mapping[str, Any]
    values: np.ndarray
    reference: np.ndarray
    affine: np.ndarray

    @classmethod
    def load(cls, segmenter: Segmenter, files: Mapping[str, Any]) -> _Case:
        voxels, affine = load_reference(files["label"])
        values, positions = np.unique(voxels, return_inverse=True)
        return cls(segmenter.load(files["image"]), values, positions.reshape(voxels.shape).astype(np.int16), affine)

    @property
    def size(self) -> int:
        return self.image["image"].nbytes + self.reference.nbytes

    def scores(
        self,
        bundle: str,
        name: str,
        label_map: np.ndarray,
        channels: Mapping[str, list[int] | None],
        ignored: int | None,
    ) -> list[Score]:
        """Dice and volumes of every organ that the dataset has, from one count of which voxels have which label in both."""
        columns = 1 + max(len(channels), int(label_map.max()))
        pairs = self.reference.astype(np.int64) * columns + label_map
        counts = np.bincount(pairs.ravel(), minlength=len(self.values) * columns).reshape(-1, columns)
        counts[self.values == ignored] = 0  # nobody knows what these voxels are
        millilitres = abs(np.linalg.det(self.affine[:3, :3])) / 1000
        scores = []
        for channel, (label, values) in enumerate(channels.items(), start=1):
            if values is not None:
                organ = counts[np.isin(self.values, values)]
                truth, predicted = int(organ.sum()), int(counts[:, channel].sum())
                dice = 2 * int(organ[:, channel].sum()) / (truth + predicted) if truth else math.nan
                volumes = [float(voxels * millilitres) for voxels in (truth, predicted)]
                scores.append(rounded_score(bundle, name, label, dice, math.nan, math.nan, *volumes))
        return scores


def case_dice(scores: Iterable[Score]) -> CaseDice:
    """The Dice of one case's scores."""
    return {score.label: score.dice for score in scores}


def mean_dice(scores: Mapping[str, CaseDice]) -> dict[str, float]:
    """Mean over cases by label, as ``evaluate`` has it; absent organs do not count.

    Raises:
        UserError: no case has any of the organs.
    """
    labels = next(iter(scores.values()), {})
    means = {}
    for label in labels:
        values = [case[label] for case in scores.values() if not np.isnan(case[label])]
        means[label] = float(np.mean(values)) if values else float("nan")
    if not any(np.isfinite(value) for value in means.values()):
        raise UserError(f"none of the cases {', '.join(scores)} has any of the organs {', '.join(labels)}")
    return means
