"""Whether a model's probabilities are those of its organs, and where its heads claim the same voxels.

Output channel 0 is background, so the margin of an organ over it is a logit: the organ's probability is its sigmoid. Merging
shrinks margins and brings heads together that never saw each other's organs; this measures both, on the grid on which the
network works, and piece by piece as sliding windows finish, without the logits of an image in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from tools.bundle import Bundle
from tools.errors import UserError, naming
from tools.markdown import table
from tools.segmenter import preprocessed
from tools.summary import Estimate, estimate
from tools.summary_table import cell

if TYPE_CHECKING:
    from torch import Tensor

BINS = 15
WIDTH = 0.05  # of the margins' own, finer bins, from which temperatures are found
LARGEST = 20.0  # larger margins count as this
TEMPERATURES = (0.05, 20.0)  # to look among
AROUND_MM = 10.0  # voxels further away are background that every model is sure of: they would hide everything else
OURS = "scripts.sliding_window.SlidingWindow"


def check_inferer(bundle: Bundle) -> None:
    """Refuse a bundle whose inferer does not give logits piece by piece.

    Raises:
        UserError: names what it has.
    """
    target = bundle.inference.get("inferer", {}).get("_target_")
    if target != OURS:
        raise UserError(f"{bundle.path}: calibration is measured with the inferer {OURS}, this bundle has {target}")


def calibrate(
    bundle: Bundle,
    cases: Mapping[Path, Mapping[str, Any]],
    channels: Mapping[str, Sequence[int] | None],
    ignored: int | None = None,
) -> None:
    """Run a bundle on cases and write a JSON file for each; see ``Counts.result`` for what is in it.

    Args:
        bundle: with weights, and the project's own sliding windows.
        cases: image and label paths by the file to write.
        channels: for each output channel from 1 on the reference's voxel values; None for what the dataset does not have.
        ignored: the reference's value for voxels that do not count.

    Raises:
        UserError: a file cannot be read, or the network gives NaN.
    """
    import torch
    from monai.transforms import LoadImage, ResampleToMatch

    network = bundle.network().to(memory_format=torch.channels_last_3d)
    device = next(network.parameters()).device
    with bundle.code(), torch.inference_mode():
        parser = bundle.parser()
        parser["inferer#_target_"] = "tools.bundle_code.sliding_window.SlidingWindow"
        inferer, preprocessing = (parser.get_parsed_content(key) for key in ("inferer", "preprocessing"))
        for path, case in tqdm(cases.items(), desc=f"{bundle.name}: calibration", disable=None, leave=False):
            image = preprocessed(preprocessing, case["image"], bundle.in_channels)["image"]
            with naming(case["label"]):
                reference = LoadImage(ensure_channel_first=True)(case["label"])
            reference = ResampleToMatch(mode="nearest", padding_mode="zeros")(reference, image)[0].as_tensor()
            counts = Counts(reference.round().long().to(device), channels, image.affine, ignored)
            for box, logits in inferer.pieces(image.as_tensor().to(device), network):
                counts.add(box, margins(logits, inferer.average == "probabilities"))
            partial = path.with_name(f".{path.name}")
            partial.write_text(json.dumps(counts.result(), indent=1, allow_nan=False))
            partial.replace(path)


def margins(logits: Tensor, probabilities: bool = False) -> Tensor:
    """The margins ``(…, C)`` of organs over background of a piece ``(…, 1 + C)`` of logits, or of probabilities.

    They are -∞ in a piece of zeros, which sliding windows passed over as air.
    """
    import torch

    if not logits.any():
        return torch.full_like(logits[..., 1:], -torch.inf)
    if probabilities:
        logits = logits.clamp_min(torch.finfo(logits.dtype).tiny).log()
    return logits[..., 1:] - logits[..., :1]


class Counts:
    """What one case says, gathered from boxes that tile it.

    Args:
        reference: label map ``(D, H, W)`` on the network's grid.
        channels: for each output channel from 1 on its voxel values in the reference; None where it has none.
        affine: of that grid, mm.
        ignored: the reference's value for voxels that do not count.
    """

    def __init__(
        self,
        reference: Tensor,
        channels: Mapping[str, Sequence[int] | None],
        affine: Any,
        ignored: int | None = None,
    ) -> None:
        import torch

        affine = np.asarray(affine, dtype=float)
        self.reference, self.channels, self.ignored = reference, channels, ignored
        self.millilitres = abs(np.linalg.det(affine[:3, :3])) / 1000
        margin = np.ceil(AROUND_MM / np.linalg.norm(affine[:3, :3], axis=0)).astype(int)
        self.regions = {
            label: _around(torch.isin(reference, torch.tensor(values, device=reference.device)), margin)
            for label, values in channels.items()
            if values is not None
        }
        self.claimed = torch.zeros(len(channels), len(channels), dtype=torch.float64)
        seen = [label for label, region in self.regions.items() if region]
        self.bins = {label: torch.zeros(3, BINS, dtype=torch.float64) for label in seen}
        self.margins = {label: torch.zeros(2, len(_centres()), dtype=torch.float64) for label in seen}

    def add(self, box: tuple[slice, ...], over: Tensor) -> None:
        """Take in the margins ``(d, h, w, C)`` of the organs over background in a box."""
        claims = (over > 0).flatten(0, 2).float()
        self.claimed += (claims.T @ claims).double().cpu()  # exact: a box has fewer than 2²⁴ voxels
        for channel, (label, values) in enumerate(self.channels.items()):
            if label in self.bins and (inside := _common(box, self.regions[label])):
                within = tuple(slice(i.start - b.start, i.stop - b.start) for i, b in zip(inside, box, strict=True))
                self._count(label, over[(*within, channel)].flatten(), self.reference[inside].flatten(), values)

    def _count(self, label: str, over: Tensor, reference: Tensor, values: Sequence[int]) -> None:
        import torch

        if self.ignored is not None:
            over, reference = over[reference != self.ignored], reference[reference != self.ignored]
        if over.isnan().any():
            raise UserError(f"the network gives NaN for {label}")
        probability = over.double().sigmoid()
        truth = torch.isin(reference, torch.tensor(values, device=reference.device)).double()
        place = (probability * BINS).long().clamp(max=BINS - 1)
        rows = [torch.bincount(place, weight, BINS) for weight in (torch.ones_like(truth), probability, truth)]
        self.bins[label] += torch.stack(rows).cpu()
        places = len(_centres())
        place = ((over.double() + LARGEST) / WIDTH).clamp(0, places - 1).long()
        self.margins[label] += torch.bincount(place + places * truth.long(), minlength=2 * places).view(2, -1).cpu()

    def result(self) -> dict[str, Any]:
        """For each label the "ece", null where the reference does not have it; for each pair "conflicts".

        And, of labels that it has, the "margins": rows of bin, voxels of background, voxels of the organ; empty ones left out.
        """
        labels, claimed = list(self.channels), (self.claimed * self.millilitres).tolist()
        errors = {label: expected_calibration_error(*bins.numpy()) for label, bins in self.bins.items()}
        return {
            "ece": {label: errors.get(label) for label in labels},
            "margins": {
                label: [[place, *bins[:, place].long().tolist()] for place in bins.any(0).nonzero().flatten().tolist()]
                for label, bins in self.margins.items()
            },
            "conflicts": [
                {"labels": [labels[i], labels[j]], "ml": claimed[i][j]} for i, j in combinations(range(len(labels)), 2)
            ],
        }


def expected_calibration_error(counts: np.ndarray, probability: np.ndarray, truth: np.ndarray) -> float:
    """The mean distance between how sure a model is and how often it is right, over bins of its probability.

    Args:
        counts: voxels in each bin.
        probability: their summed probabilities.
        truth: how many of them are organ.

    Source: Guo et al., "On calibration of modern neural networks", ICML 2017, section 2.
    """
    return float(np.abs(probability - truth).sum() / counts.sum())


def temperature(margins: np.ndarray) -> float:
    """What margins have to be divided by to be most likely: above 1 for a model that is too sure.

    Args:
        margins: voxels of background and of the organ (2, bins), in bins as ``Counts`` has them.

    Source: Guo et al., section 4.2.
    """
    from scipy.optimize import minimize_scalar

    signed = np.array([[1.0], [-1.0]]) * _centres()
    found = minimize_scalar(
        lambda log: (margins * np.logaddexp(0, signed * np.exp(-log))).sum(),
        bounds=np.log(TEMPERATURES),
        method="bounded",
    )
    return float(np.exp(found.x))


def scaled_error(margins: np.ndarray, by: float) -> float:
    """The expected calibration error when margins, in the bins of ``Counts``, are divided by a temperature."""
    probability = 1 / (1 + np.exp(-_centres() / by))
    place = (probability * BINS).astype(int)
    rows = (margins.sum(0), margins.sum(0) * probability, margins[1])
    return expected_calibration_error(*(np.bincount(place, row, BINS) for row in rows))


def _centres() -> np.ndarray:
    return np.arange(-LARGEST + WIDTH / 2, LARGEST, WIDTH)


@dataclass(frozen=True)
class CalibrationSummary:
    """Means over cases.

    Attributes:
        ece: expected calibration error by label.
        mean: over labels.
        temperatures: by label, found on all cases.
        scaled: by label, the error with temperatures that were found on the other cases.
        scaled_mean: over labels.
        conflicts: by pair of labels, the volume that both claim, ml.
    """

    ece: dict[str, Estimate]
    mean: Estimate
    temperatures: dict[str, float]
    scaled: dict[str, Estimate]
    scaled_mean: Estimate
    conflicts: dict[tuple[str, str], Estimate]

    def as_dict(self) -> dict[str, Any]:
        return {
            "ece": {label: value.as_dict() for label, value in self.ece.items()},
            "mean": self.mean.as_dict(),
            "temperatures": self.temperatures,
            "scaled_ece": {label: value.as_dict() for label, value in self.scaled.items()},
            "scaled_mean": self.scaled_mean.as_dict(),
            "conflicts": [{"labels": list(pair), "ml": value.as_dict()} for pair, value in self.conflicts.items()],
        }


def summarise_calibration(cases: Sequence[Mapping[str, Any]]) -> CalibrationSummary:
    """Means over cases of what ``calibrate`` wrote for one bundle."""
    labels = list(cases[0]["ece"])
    errors = np.array([[case["ece"][label] for label in labels] for case in cases], dtype=float)
    temperatures: dict[str, float] = {}
    scaled = np.full_like(errors, np.nan)
    for column, label in enumerate(labels):
        margins = {
            row: _histogram(case["margins"][label]) for row, case in enumerate(cases) if label in case["margins"]
        }
        total = sum(margins.values())
        if len(margins) > 1:
            temperatures[label] = temperature(total)
            for row, own in margins.items():
                scaled[row, column] = scaled_error(own, temperature(total - own))
    pairs = [tuple(pair["labels"]) for pair in cases[0]["conflicts"]]
    volumes = np.array([[pair["ml"] for pair in case["conflicts"]] for case in cases], dtype=float)
    return CalibrationSummary(
        {label: estimate(errors[:, [i]]) for i, label in enumerate(labels)},
        estimate(errors),
        temperatures,
        {label: estimate(scaled[:, [i]]) for i, label in enumerate(labels)},
        estimate(scaled),
        {pair: estimate(volumes[:, [i]]) for i, pair in enumerate(pairs)},
    )


def _histogram(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """The margins' bins (2, bins) of their rows of place, background and organ."""
    bins = np.zeros((2, len(_centres())))
    for place, background, organ in rows:
        bins[:, place] = background, organ
    return bins


def calibration_markdown(bundles: Mapping[str, CalibrationSummary]) -> str:
    """Tables of calibration errors, as they are and with temperatures, and of the conflicts that are not zero when rounded."""
    labels = list(dict.fromkeys(label for bundle in bundles.values() for label in bundle.ece))

    def by_label(cells: Mapping[str, Mapping[str, str]]) -> str:
        columns = [*labels, "mean"]
        return table(["", *columns], ([name, *(row.get(c, "") for c in columns)] for name, row in cells.items()))

    as_they_are, scaled = {}, {}
    for name, bundle in bundles.items():
        all_labels = len(bundle.ece) == len(labels)
        as_they_are[name] = {label: cell(value, 3) for label, value in bundle.ece.items()}
        as_they_are[name]["mean"] = cell(bundle.mean, 3) if all_labels else ""
        scaled[name] = {label: cell(bundle.scaled[label], 3, t) for label, t in bundle.temperatures.items()}
        scaled[name]["mean"] = cell(bundle.scaled_mean, 3) if all_labels else ""
    title = f"Calibration error of the organs' probabilities within {AROUND_MM:g} mm of them (less is better)"
    lines = [f"**{title}**", "", by_label(as_they_are)]
    if any(bundle.temperatures for bundle in bundles.values()):
        title = "The same with each organ's margins divided by a temperature, found on the other cases (in brackets: on all)"
        lines += ["", f"**{title}**", "", by_label(scaled)]
    conflicts = [
        [name, " and ".join(pair), cell(value, 2)]
        for name, bundle in bundles.items()
        for pair, value in bundle.conflicts.items()
        if value.mean >= 0.005
    ]
    if conflicts:
        lines += ["", "**Volume that two organs' heads claim at once, ml (the larger margin gets it)**", ""]
        lines.append(table(["", "organs", "volume"], conflicts))
    return "\n".join(lines) + "\n"


def _around(organ: Tensor, margin: Sequence[int]) -> tuple[slice, ...] | None:
    """The box of an organ, wider by a margin; None if it is not there."""
    places = organ.nonzero()
    if not len(places):
        return None
    first, last = places.amin(0).tolist(), places.amax(0).tolist()
    sides = zip(first, last, margin, organ.shape, strict=True)
    return tuple(slice(max(a - int(m), 0), min(b + 1 + int(m), length)) for a, b, m, length in sides)


def _common(one: Sequence[slice], other: Sequence[slice]) -> tuple[slice, ...] | None:
    """The box that two boxes have in common."""
    both = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
    return both if all(side.start < side.stop for side in both) else None
