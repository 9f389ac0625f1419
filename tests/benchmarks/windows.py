"""What neighbouring slices gain: windows of five against single slices, the same network, schedule and cases, several seeds.

``python -m tests.benchmarks.windows --dataset_dir <Dataset903_Hippocampus> --output runs/windows``

The cases are those of ``label_efficiency``: eight of labelsTr train, two choose the epoch, the test cases are never seen. Each
command is printed; a run that was stopped goes on. With ``--pretraining_dir <Dataset904_JawCT>`` a 2D network is first trained on
the slices of that dataset, and both kinds of window start from its weights too (``inflate``).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import fire

from tests.benchmarks.label_efficiency import ROOT, evaluate, modality_overlay, report, run_tool, split_cases, train
from tools.instantiate import set_values

TRAINING = {
    "learning_rate": 0.001,
    "max_epochs": 15,
    "val_interval": 5,
    "patches_per_volume": 10,
    "zoom": "[0.9, 1.1]",
}
PRETRAINING = {"learning_rate": 0.001, "max_epochs": 5, "val_interval": 5, "patches_per_volume": 6}
PATCH = [32, 32, 8]  # voxels: 16 × 2 slices of 16 tokens in a step


def windows(
    dataset_dir: str,
    output: str,
    labels: str = "{anterior: Anterior, posterior: Posterior}",
    seeds: int = 3,
    pretraining_dir: str = "",
    mode: str = "centre",
) -> None:
    """Train with windows and with single slices, test both, and write results.md.

    Args:
        dataset_dir: nnU-Net raw dataset, of CT or MR images.
        output: folder of the runs.
        labels: channels to segment.
        seeds: trainings of each kind.
        pretraining_dir: nnU-Net raw dataset of CT images to train a 2D network on.
        mode: of inflation, centre or average.
    """
    folder, dataset = Path(output).resolve(), Path(dataset_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    split_cases(dataset, folder, same_images=True)
    modality = modality_overlay(dataset)
    kinds = {"window": f"small{modality}", "force_2d": f"small{modality},force_2d"}
    seconds: dict[str, float] = {}
    for kind, overlay in kinds.items():
        _bundle(folder / f"{kind}_untrained", dataset, overlay, labels)
    arms = {kind: folder / f"{kind}_untrained" for kind in kinds}
    if pretraining_dir:
        flat = folder / "slices"
        _bundle(flat, Path(pretraining_dir).resolve(), "small,force_2d", "all")
        seconds["slices"] = train(flat, PRETRAINING)
        for kind, start in list(arms.items()):
            arms[f"{kind}_pretrained"] = folder / f"{kind}_inflated"
            words = ["inflate", "--weights", flat / "models/model.pt", "--network_def", start, "--mode", mode]
            run_tool(arms[f"{kind}_pretrained"], *words)
    for seed in range(seeds):
        runs = {f"{arm}_{seed}": start for arm, start in arms.items()}
        for name, start in runs.items():
            if not (folder / name).exists():
                shutil.copytree(start, folder / name)
            own = {"split_file": folder / "split.json", "seed": seed}
            seconds[name] = train(folder / name, TRAINING | own)
        evaluate([folder / name for name in runs], dataset, folder, seed)
        report(folder, seed + 1, seconds)


def _bundle(output: Path, dataset: Path, overlay: str, labels: str) -> None:
    """A small copy of pretrain_inflated for a dataset."""
    if not output.exists():
        words = ["new_pretraining", "--bundle", ROOT / "bundles/pretrain_inflated", "--dataset_dir", dataset]
        run_tool(output, *words, "--overlay", overlay, "--labels", labels)
        set_values(output, {"patch_size": PATCH})


if __name__ == "__main__":
    fire.Fire(windows)
