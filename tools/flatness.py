"""``flatness``: how flat the loss is around the weights of bundles, between two of them, and on the plane through three."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from tools.bundle import Bundle, plain_values
from tools.errors import UserError, at_least, numbers
from tools.instantiate import window_size
from tools.labelled_patches import labelled_patches
from tools.labels import renamed_labels
from tools.landscape import (
    Plane,
    Surface,
    barrier,
    empirical_fisher_trace,
    noisy_losses,
    on_line,
    top_eigenvalue,
)
from tools.markdown import table
from tools.merge import split_paths
from tools.output import complete_output

if TYPE_CHECKING:
    from torch import Tensor

MEASURES = {
    "loss": "loss",
    "fisher_trace": "Fisher trace, per voxel",
    "empirical_fisher_trace": "empirical Fisher trace, per patch",
    "hessian_top": "top Hessian eigenvalue",
    "hessian_top_relative": "top Hessian eigenvalue, relative",
}


def flatness(
    dataset_dir: str,
    output: str,
    bundle: str = "",
    between: str = "",
    plane: str = "",
    part: str = "val",
    split_file: str = "",
    labels: object = None,
    scans: int = 4,
    patches: int = 4,
    patch_size: int = 0,
    batch_size: int = 2,
    noise: str | float | Sequence[float] = (0.01, 0.03, 0.1, 0.3),
    seeds: int = 5,
    points: int = 11,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Measure the loss landscape of bundles on fixed patches of labelled scans; see docs/flatness.md for what each number is.

    Writes flatness.json, flatness.md with a column for each bundle, and pictures: flatness.png, line.png, plane.png.

    Args:
        dataset_dir: nnU-Net raw dataset with labels.
        output: folder to write.
        bundle: bundles with weights, separated by commas, to be measured side by side.
        between: two bundles of one network: the loss along the straight line from one to the other.
        plane: a starting point and two specialists: the loss on the plane through them.
        part: of the dataset's split: "train", "val", "test"; or "all".
        split_file: JSON file with the split; default: the dataset's splits_final.json.
        labels: the dataset's labels for channels that are called otherwise: "{liver: 6}".
        scans: how many to use, chosen at random.
        patches: from each of them, centred on the bundles' organs.
        patch_size: edge of the patches, voxels; default: the first bundle's.
        batch_size: patches in a pass of the network; part of the loss where that averages over the organs of a batch.
        noise: how far weights are moved, as shares of their filter's length, separated by commas.
        seeds: how many random directions at each share.
        points: along a line, and along each side of a plane.
        seed: of scans, patches, sampled labels and the first direction.
        overwrite: replace the output if it exists.

    Raises:
        UserError: no bundle is named, labels or weights are missing, or the bundles of a line or plane have different networks.
    """
    sides, corners = _two_or_three(between, 2, "between"), _two_or_three(plane, 3, "plane")
    measured = split_paths(bundle)
    bundles = {path: Bundle(path) for path in dict.fromkeys([*measured, *sides, *corners])}
    if not bundles:
        raise UserError("name bundles to measure: --bundle, --between or --plane")
    at_least(2, points=points)
    at_least(1, scans=scans, patches=patches, batch_size=batch_size, seeds=seeds)
    at_least(0, patch_size=patch_size)
    if len({b.name for b in bundles.values()}) != len(bundles):
        raise UserError("the bundles' folders must have different names")
    _check_same_network([bundles[path] for path in sides])
    _check_same_network([bundles[path] for path in corners])
    levels = numbers("noise", noise)
    with complete_output(output, overwrite, sign="flatness.json") as folder:
        labelled = {path: b for path, b in bundles.items() if path in {*measured, *sides, *corners[1:]}}
        size = window_size(next(iter(bundles.values())), patch_size)
        images, own_labels = labelled_patches(
            list(labelled.values()), dataset_dir, part, split_file, scans, patches, size, seed,
            renamed_labels(labels, list(labelled.values())),
        )  # fmt: skip
        for one in bundles.values():
            if (one.path / "models" / "modulators.pt").is_file():
                print(f"{one.path}: what is measured are the weights that its tasks share, without their masks")
        if len({json.dumps(loss_definition(bundles[path])) for path in measured}) > 1:
            print("warning: these bundles were trained with different losses, so their numbers cannot be compared")
        surfaces = {
            path: surface_of(b, images, own, batch_size)
            for (path, b), own in zip(labelled.items(), own_labels, strict=True)
        }
        result: dict[str, Any] = {
            "bundles": {
                bundles[path].name: measure(surfaces[path], images, levels, seeds, seed) for path in measured
            },
            "line": _line(*[(bundles[path], surfaces[path]) for path in sides], points) if sides else None,
            "plane": None,
            "settings": {
                "dataset": Path(dataset_dir).resolve().name, "part": part, "patches": len(images), "patch_size": size,
                "batch_size": batch_size, "seeds": seeds, "seed": seed,
            },
        }  # fmt: skip
        if corners:
            start = bundles[corners[0]]
            specialists = [(bundles[path].name, surfaces[path]) for path in corners[1:]]
            result["plane"] = _plane(start, specialists, points)
        folder.mkdir()
        (folder / "flatness.json").write_text(json.dumps(result, indent=2, allow_nan=False))
        (folder / "flatness.md").write_text(markdown(result) + "\n")
        draw(result, folder)
    print(markdown(result))
    print(f"written: {output}/flatness.json, flatness.md and pictures")


def surface_of(bundle: Bundle, images: Tensor, labels: Tensor, batch_size: int) -> Surface:
    """The loss of a bundle over the weights of its backbone: that which it was trained with, or else Dice + cross-entropy.

    Args:
        bundle: with weights.
        images: patches (N, in, …).
        labels: (N, 1, …), the numbers of its channels.
        batch_size: patches in a pass.
    """
    import torch
    from monai.bundle import ConfigParser

    with bundle.code():
        loss = ConfigParser({"loss": loss_definition(bundle)}).get_parsed_content("loss")
    network, structure = bundle.network(), bundle.structure()
    if images[0, 0].dim() == 3:
        network = network.to(memory_format=torch.channels_last_3d)
    batches = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    state = network.state_dict()
    left_out = structure.not_merged
    moved = [name for name, tensor in state.items() if tensor.is_floating_point() and name not in left_out]
    return Surface(network, loss, batches, moved, frozenset(structure.transposed))


def loss_definition(bundle: Bundle) -> dict[str, Any]:
    """The loss that a bundle was trained with, in plain values; Dice + binary cross-entropy for merged ones."""
    from monai.bundle import ConfigParser

    config = bundle.path / "configs" / "train.json"
    if not config.is_file():
        return {"_target_": "tools.bundle_code.losses.DiceBCELoss", "present_only": True}
    parser = ConfigParser()
    parser.read_config(str(config))
    parser.resolve_macro_and_relative_ids()
    with bundle.code():
        return plain_values(parser, "loss", parser["loss"])


def measure(surface: Surface, images: Tensor, levels: Sequence[float], seeds: int, seed: int) -> dict[str, Any]:
    """All numbers of one bundle, as flatness.json has them."""
    import torch

    from tools.statistics import fisher_information

    torch.manual_seed(seed)
    names = list(surface.parameters())
    _, fisher = fisher_information(surface.network, names, list(images), precision="float32")
    noise = noisy_losses(surface, levels, seeds)
    return {
        "loss": surface.value(),
        "fisher_trace": fisher / images[0, 0].numel(),
        "empirical_fisher_trace": empirical_fisher_trace(surface),
        "hessian_top": top_eigenvalue(surface, seed=seed),
        "hessian_top_relative": top_eigenvalue(surface, relative=True, seed=seed),
        "noise": [
            {"relative": level, "mean": float(np.mean(losses)), "std": float(np.std(losses))}
            for level, losses in zip(levels, noise, strict=True)
        ],
    }


def markdown(result: Mapping[str, Any]) -> str:
    """The numbers as Markdown, one column for each bundle."""
    lines, bundles = [], result["bundles"]
    if bundles:
        rows = [[title, *(f"{b[measure]:.4g}" for b in bundles.values())] for measure, title in MEASURES.items()]
        levels = [entry["relative"] for entry in next(iter(bundles.values()))["noise"]]
        for number, level in enumerate(levels):
            entries = [facts["noise"][number] for facts in bundles.values()]
            cells = [f"{entry['mean']:.4g} ± {entry['std']:.2g}" for entry in entries]
            rows.append([f"loss, weights moved by {level:.4g}", *cells])
        lines.append(table(["", *bundles], rows))
    if line := result["line"]:
        lines += [
            "",
            f"From {line['from']} to {line['to']}: barrier {line['barrier']:.4g}, highest loss {max(line['loss']):.4g}.",
        ]
    if plane := result["plane"]:
        lowest = np.unravel_index(np.argmin(plane["loss"]), np.shape(plane["loss"]))
        place = f"({plane['x'][lowest[1]]:.3g}, {plane['y'][lowest[0]]:.3g})"
        points = ", ".join(f"{name} ({x:.3g}, {y:.3g})" for name, (x, y) in plane["points"].items())
        lines += ["", f"Plane: lowest loss {np.min(plane['loss']):.4g} at {place}; {points}."]
    return "\n".join(lines).strip()


def draw(result: Mapping[str, Any], folder: Path) -> None:
    """Draw what was measured: flatness.png, line.png and plane.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def figure(width: float, columns: int = 1):
        new = Figure(figsize=(width, 4.5), layout="constrained")
        FigureCanvasAgg(new)
        return new, new.subplots(1, columns, squeeze=False)[0]

    if bundles := result["bundles"]:
        picture, (left, right) = figure(11, 2)
        for name, facts in bundles.items():
            x = [0, *(entry["relative"] for entry in facts["noise"])]
            y = [facts["loss"], *(entry["mean"] for entry in facts["noise"])]
            spread = [0, *(entry["std"] for entry in facts["noise"])]
            left.errorbar(x, y, spread, marker="o", capsize=3, label=name)
        left.set(
            xlabel="noise ÷ length of each filter", ylabel="loss", title="loss under relative weight noise (mean ± std)"
        )
        left.legend()
        measures = [measure for measure in MEASURES if measure != "loss"]
        width = 0.8 / len(bundles)
        for number, (name, facts) in enumerate(bundles.items()):
            right.bar(np.arange(len(measures)) + number * width, [facts[m] for m in measures], width, label=name)
        right.set_xticks(
            np.arange(len(measures)) + 0.4 - width / 2, [fill(MEASURES[m], 14) for m in measures], fontsize=8
        )
        right.set(yscale="log", title="curvature (small is flat)")
        right.legend()
        picture.savefig(folder / "flatness.png", dpi=110)
    if line := result["line"]:
        picture, (axis,) = figure(6)
        axis.plot(line["t"], line["loss"], color="black", marker=".", label="loss")
        if len(line["losses"]) > 1:
            for name, losses in line["losses"].items():
                axis.plot(line["t"], losses, linestyle="--", label=f"task of {name}")
        axis.plot([0, 1], [line["loss"][0], line["loss"][-1]], color="grey", linewidth=0.8, label="straight line")
        axis.set(
            xlabel=f"from {line['from']} (0) to {line['to']} (1)", ylabel="loss", title=f"barrier {line['barrier']:.3g}"
        )
        axis.legend()
        picture.savefig(folder / "line.png", dpi=110)
    if plane := result["plane"]:
        picture, (axis,) = figure(6.5)
        filled = axis.contourf(plane["x"], plane["y"], plane["loss"], levels=20, cmap="viridis")
        picture.colorbar(filled, label="loss, mean of both tasks")
        for name, (x, y) in plane["points"].items():
            axis.plot(x, y, marker="o", color="white", markeredgecolor="black")
            axis.annotate(
                name,
                (x, y),
                xytext=(6, 6),
                textcoords="offset points",
                color="white",
                bbox={"facecolor": "black", "alpha": 0.4, "linewidth": 0},
            )
        axis.set(xlabel="distance in weight space", ylabel="distance in weight space", aspect="equal")
        picture.savefig(folder / "plane.png", dpi=110)


def _line(a: tuple[Bundle, Surface], b: tuple[Bundle, Surface], points: int) -> dict[str, Any]:
    """The loss from one bundle to another.

    Bundles with the same labels are one task, and their heads are moved with the rest. Of others each keeps its own head, and the
    loss is the mean of both tasks'.
    """
    tasks = {bundle.name: surface for bundle, surface in (a, b)}
    if a[0].labels == b[0].labels:
        whole = [_with_head(surface) for _, surface in (a, b)]
        tasks, ends = {"both": whole[0]}, [surface.weights() for surface in whole]
    else:
        ends = [surface.weights() for surface in tasks.values()]
    t = np.linspace(0, 1, points)
    losses = {
        name: surface.values(
            on_line(*ends, share) for share in tqdm(t, desc=f"line, {name}", disable=None, leave=False)
        )
        for name, surface in tasks.items()
    }
    mean = np.mean(list(losses.values()), axis=0).tolist()
    return {
        "from": a[0].name, "to": b[0].name, "t": t.tolist(), "loss": mean, "losses": losses, "barrier": barrier(t, mean),
    }  # fmt: skip


def _plane(start: Bundle, specialists: Sequence[tuple[str, Surface]], points: int) -> dict[str, Any]:
    """The mean loss of two specialists, each with its own head, for the backbones on the plane through theirs and the start's."""
    state = start.state()
    ends = [surface.weights() for _, surface in specialists]
    origin = {name: state[name].to(value) for name, value in ends[0].items()}
    plane = Plane(origin, *ends)
    corners = {start.name: (0.0, 0.0), specialists[0][0]: plane.first, specialists[1][0]: plane.second}
    corners["average"] = tuple((np.add(plane.first, plane.second) / 2).tolist())
    axes = []
    for values in zip(*corners.values(), strict=True):
        margin = 0.3 * (max(values) - min(values))
        axes.append(np.linspace(min(values) - margin, max(values) + margin, points))
    places = [(x, y) for y in axes[1] for x in axes[0]]
    losses = [
        surface.values(plane.at(*place) for place in tqdm(places, desc=f"plane, {name}", disable=None, leave=False))
        for name, surface in specialists
    ]
    mean = np.mean(losses, axis=0).reshape(points, points)
    return {
        "x": axes[0].tolist(), "y": axes[1].tolist(), "loss": mean.tolist(),
        "points": {name: list(place) for name, place in corners.items()},
    }  # fmt: skip


def _with_head(surface: Surface) -> Surface:
    state = surface.network.state_dict()
    moved = [name for name, tensor in state.items() if tensor.is_floating_point()]
    return Surface(surface.network, surface.loss, surface.batches, moved, surface.columns)


def _two_or_three(bundles: object, count: int, flag: str) -> list[str]:
    paths = split_paths(bundles)
    if paths and (len(paths) != count or len(set(paths)) != count):
        raise UserError(f"--{flag} takes {count} different bundles, separated by commas, not {len(paths)}")
    return paths


def _check_same_network(bundles: Sequence[Bundle]) -> None:
    """Refuse bundles whose backbones do not have the same tensors."""
    shapes = []
    for bundle in bundles:
        entries, own = bundle.weights().entries, bundle.structure().not_merged
        shapes.append({name: entry.shape for name, entry in entries.items() if name not in own})
        if shapes[-1] != shapes[0]:
            differ = sorted({n for n in {*shapes[0], *shapes[-1]} if shapes[0].get(n) != shapes[-1].get(n)})
            raise UserError(
                f"{bundles[0].path} and {bundle.path} are different networks (tensor {differ[0]}): no line or plane joins them"
            )
