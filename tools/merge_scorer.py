"""Dice of one recipe after another on the same cases: in one network, whose weights each merge replaces, and nothing is written.

The merge engine makes the weights, as for ``merge``, so a recipe scores here what its bundle scores in ``evaluate``. Task vectors
stay open, and preprocessed cases stay in memory as far as they fit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tools.bundle import Bundle
from tools.errors import UserError
from tools.evaluate import dice, matched_channels
from tools.labels import check_channels
from tools.merge import merge_recipe
from tools.merge_engine import MergeEngine
from tools.recipe import Recipe
from tools.segmenter import Case, Segmenter
from tools.task_vector import TaskVector

KEPT_BYTES = 2**32  # of preprocessed cases

CaseDice = dict[str, float]  # by label; NaN where the reference does not have the organ


class MergeScorer:
    """Scores recipes that merge the same task vectors onto the same starting point.

    Args:
        recipe: one of them; method and parameters of the others may differ.
        dataset_dir: nnU-Net raw dataset.

    Raises:
        UserError: the recipe cannot be merged, or the dataset has none of its labels, or images of other channels.
    """

    def __init__(self, recipe: Recipe, dataset_dir: str | Path) -> None:
        import torch

        self._folder = tempfile.TemporaryDirectory()
        merge_recipe(recipe, Path(self._folder.name) / "merged", quiet=True)
        self.bundle = Bundle(Path(self._folder.name) / "merged")
        check_channels(dataset_dir, self.bundle)
        self.channels = matched_channels(self.bundle, dataset_dir, {})
        self.vectors = [TaskVector(path) for path in recipe.vectors]
        self._start = Bundle(recipe.pretrained).weights()
        self._network = self.bundle.network().to(memory_format=torch.channels_last_3d)
        with self.bundle.code():
            self._segmenter = Segmenter(self.bundle)
        self._kept: dict[str, Case] = {}
        self._kept_bytes = 0

    def scores(self, recipe: Recipe, cases: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, CaseDice]]:
        """Merge, then segment and score case by case.

        Args:
            recipe: of the same task vectors and starting point.
            cases: image and label paths by case.

        Yields:
            Case and its Dice by label, of the labels that the dataset has.

        Raises:
            UserError: the method refuses its parameters, or the merged weights would be infinite.
        """
        self._merge(recipe)
        yield from self._scores(self.bundle, self._network, cases)

    def bundle_scores(self, bundle: Bundle, cases: Mapping[str, Mapping[str, Any]]) -> dict[str, CaseDice]:
        """The same of a merged bundle's own weights."""
        return dict(self._scores(bundle, bundle.network(), cases))

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
        self, bundle: Bundle, network: Any, cases: Mapping[str, Mapping[str, Any]]
    ) -> Iterator[tuple[str, CaseDice]]:
        for name, files in cases.items():
            with bundle.code():
                case = self._case(name, files)
                label_map = self._segmenter(case, network)
            yield (
                name,
                {
                    label: dice(label_map == channel, np.isin(case.reference, values))
                    for channel, (label, values) in enumerate(self.channels.items(), start=1)
                    if values is not None
                },
            )

    def _case(self, name: str, files: Mapping[str, Any]) -> Case:
        if name in self._kept:
            return self._kept[name]
        case = self._segmenter.load(name, files)
        size = case.data["image"].nbytes + case.reference.nbytes
        if self._kept_bytes + size <= KEPT_BYTES:
            self._kept[name] = case
            self._kept_bytes += size
        return case


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
