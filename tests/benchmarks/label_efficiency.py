"""Fine-tuning from ten labelled cases: after self-supervised pre-training on other images, and from scratch.

``python -m tests.benchmarks.label_efficiency --dataset_dir <Dataset903_Hippocampus> --output runs/label_efficiency``

Everything goes through the project's own commands, each of which is printed; a run that was stopped goes on. Of the cases of
labelsTr ten, chosen by a seed, keep their labels: eight train, two choose the epoch. The images of all others are pre-trained on.
The cases of labelsTs test, and are never seen before; where there are none, eight others of labelsTr test. "Scratch" is a
starting point with random weights.

Learnable weight initialisation has no other images than those ten, and scratch trains for as many steps longer as it pre-trains:

``python -m tests.benchmarks.label_efficiency --dataset_dir <…> --output runs/lwi --objectives lwi --same_images``

A CT dataset is named with the labels to learn: ``--dataset_dir <Dataset902_HeadNeckCT> --labels "{mandible: mandible, …}"``.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import fire
import torch

from tools.bundle import Bundle, read_json
from tools.instantiate import set_values
from tools.markdown import table
from tools.network import instantiate
from tools.scores import read_scores

ROOT = Path(__file__).parents[2]
PRETRAINING = {"learning_rate": 0.003, "max_epochs": 5, "val_interval": 1, "patches_per_volume": 8}
FINE_TUNING = {
    "learning_rate": 0.003,
    "head_learning_rate": 0.003,
    "weight_decay": 0,
    "frozen_epochs": 0,
    "max_epochs": 6,
    "val_interval": 2,
    "patches_per_volume": 10,
    "warmup_steps": 20,
}
# a rate of the fresh head at which UNETR's eight features are told apart in this time: with 0.01 no voxel exceeds 1/2
UNETR = {"learning_rate": 0.001, "head_learning_rate": 0.1, "max_epochs": 10, "val_interval": 5}
AS_LONG = 5  # epochs of 8 cases by 10 patches, at least the steps of pre-training: 5 epochs of 9 images by 8 patches
OBJECTIVES = {  # bundle, overlays but for that of MR images, and settings for 32³ voxels: as many as the crops of Dataset903 have
    "genesis": ("pretrain_genesis", "residual,small", {}),
    "mae": ("pretrain_genesis", "residual,small,mae", {}),
    "lwi": ("pretrain_lwi", "small", {"slabs": 2, "spacing": None}),
}


def label_efficiency(
    dataset_dir: str,
    output: str,
    labels: str = "{anterior: Anterior, posterior: Posterior}",
    seeds: int = 3,
    objectives: str = "genesis,mae",
    same_images: bool = False,
) -> None:
    """Pre-train by each objective, fine-tune from each and from scratch, and write results.md.

    Args:
        dataset_dir: nnU-Net raw dataset, of CT or MR images.
        output: folder of the runs.
        labels: channels to segment.
        seeds: fine-tunings from each starting point; from scratch each seed has random weights of its own.
        objectives: which ones, of one network.
        same_images: pre-train on the ten images that have labels, and not on all others.
    """
    chosen = objectives.split(",") if isinstance(objectives, str) else list(objectives)
    folder, dataset = Path(output).resolve(), Path(dataset_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    images = split_cases(dataset, folder, same_images)
    overlay = modality_overlay(dataset)
    seconds: dict[str, float] = {}
    for objective in chosen:
        _start(folder / objective, objective, images, overlay)
        rate = UNETR if objective == "lwi" else PRETRAINING
        seconds[objective] = train(folder / objective, {**PRETRAINING, "learning_rate": rate["learning_rate"]})
    for seed in range(seeds):
        starts = {
            "scratch": _untrained(folder, seed, chosen[0], images, overlay),
            **{name: folder / name for name in chosen},
        }
        for name, start in starts.items():
            specialist = folder / f"{name}_{seed}"
            words = ["new_task", "--pretrained", start, "--dataset_dir", dataset, "--task", dataset.name]
            run_tool(specialist, *words, "--labels", labels, "--overlay", "small")
            own = {"split_file": folder / "split.json", "seed": seed, **(UNETR if chosen == ["lwi"] else {})}
            if same_images and name == "scratch":
                own["max_epochs"] = (FINE_TUNING | own)["max_epochs"] + AS_LONG
            seconds[specialist.name] = train(specialist, FINE_TUNING | own)
        evaluate([folder / f"{name}_{seed}" for name in starts], dataset, folder, seed)
        report(folder, seed + 1, seconds)


def modality_overlay(dataset: Path) -> str:
    """The overlay to add for a dataset's images: none for CT, or where they are not named."""
    description = read_json(dataset / "dataset.json")
    channels = description.get("channel_names") or description.get("modality") or {}
    return "" if channels.get("0", "CT") == "CT" else ",mr"


def split_cases(dataset: Path, folder: Path, same_images: bool) -> Path:
    """Write split.json, and links to the images to pre-train on."""
    names = sorted(path.name.removesuffix(".nii.gz") for path in (dataset / "labelsTr").glob("*.nii.gz"))
    tested = {path.name.removesuffix(".nii.gz") for path in (dataset / "labelsTs").glob("*.nii.gz")}
    labelled = random.Random(0).sample(names, 10)
    others = sorted({*names} - {*labelled})
    tested = tested or {*random.Random(0).sample(others, min(8, len(others)))}
    images = [*(dataset / "imagesTr").glob("*.nii.gz"), *(dataset / "imagesTs").glob("*.nii.gz")]
    free = [path for path in sorted(images) if path.name.removesuffix("_0000.nii.gz") not in {*labelled, *tested}]
    own = [path for path in sorted(images) if path.name.removesuffix("_0000.nii.gz") in labelled]
    unlabelled = folder / "unlabelled"
    unlabelled.mkdir(exist_ok=True)
    for path in own if same_images else free:
        link = unlabelled / path.name
        if not link.is_symlink():
            link.symlink_to(path)
    split = {"train": sorted(labelled[:8]), "val": sorted(labelled[8:]), "test": sorted(tested)}
    split["unlabelled"] = sorted(path.name for path in unlabelled.iterdir())
    (folder / "split.json").write_text(json.dumps([split], indent=2))
    return unlabelled


def _start(output: Path, objective: str, images: Path, modality: str) -> None:
    """A pre-training bundle for an objective, with one more overlay."""
    bundle, overlay, values = OBJECTIVES[objective]
    if not output.exists():
        words = ["new_pretraining", "--bundle", ROOT / "bundles" / bundle, "--dataset_dir", images]
        run_tool(output, *words, "--overlay", overlay + modality, "--patch_size", 32)
        set_values(output, values)


def _untrained(folder: Path, seed: int, objective: str, images: Path, modality: str) -> Path:
    """A copy of an objective's bundle with random weights."""
    start = folder / f"random_{seed}"
    _start(start, objective, images, modality)
    random_weights(start, seed)
    return start


def random_weights(folder: Path, seed: int) -> None:
    """Give a bundle's network random weights."""
    bundle = Bundle(folder)
    torch.manual_seed(seed)
    with bundle.code():
        torch.save(instantiate(bundle.network_def(), ("cpu",)).state_dict(), bundle.model_file)


def evaluate(bundles: Sequence[Path], dataset: Path, folder: Path, seed: int) -> None:
    """Score a seed's bundles on the test cases."""
    words: list[object] = ["evaluate", "--bundle", ",".join(map(str, bundles)), "--dataset_dir", dataset]
    tested = ["Ts"] if (dataset / "labelsTs").is_dir() else ["test", "--split_file", folder / "split.json"]
    run_tool(folder / f"evaluation_{seed}", *words, "--overlays", "False", "--part", *tested)


def run_tool(output: Path, *words: object) -> None:
    """One of the project's commands, unless its output is there."""
    if not output.exists():
        _run("tools", *words, "--output", output)


def train(bundle: Path, settings: dict) -> float:
    """Train a bundle, and give the seconds that it took; 0 if that is done already."""
    last = bundle / "checkpoints" / "last.pt"
    if last.is_file() and torch.load(last, weights_only=True)["epoch"] == settings["max_epochs"]:
        return 0
    words = ["--config_file", bundle / "configs/train.json", "--bundle_root", bundle]
    start = time.perf_counter()
    _run("monai.bundle", "run", *words, *[word for key, value in settings.items() for word in (f"--{key}", value)])
    return time.perf_counter() - start


def _run(*words: object) -> None:
    print(f"$ python -m {' '.join(map(str, words))}", flush=True)
    subprocess.run([sys.executable, "-m", *map(str, words)], cwd=ROOT, check=True)


def report(folder: Path, seeds: int, seconds: dict[str, float]) -> None:
    """results.md: Dice on the test cases for each starting point, label and seed."""
    dice: dict[str, dict[str, list[float]]] = {}
    for seed in range(seeds):
        for score in read_scores(folder / f"evaluation_{seed}" / "scores.csv"):
            labels = dice.setdefault(score.bundle.rpartition("_")[0], {})
            labels.setdefault(score.label, [[] for _ in range(seeds)])[seed].append(score.dice)
    names = list(next(iter(dice.values())))
    rows = []
    for start, labels in dice.items():
        means = {name: [statistics.mean(cases) for cases in labels[name]] for name in names}
        whole = [statistics.mean(means[name][seed] for name in names) for seed in range(seeds)]
        spread = f" ± {statistics.stdev(whole):.3f}" if seeds > 1 else ""
        columns = [f"{statistics.mean(means[name]):.3f}" for name in names]
        columns += [f"{statistics.mean(whole):.3f}{spread}", ", ".join(f"{value:.3f}" for value in whole)]
        rows.append([start, *columns])
    text = table(["starting point", *names, "mean", "each seed"], rows)
    text += "\n\nseconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()) + "\n"
    (folder / "results.md").write_text(text)
    print(text, flush=True)


if __name__ == "__main__":
    fire.Fire(label_efficiency)
