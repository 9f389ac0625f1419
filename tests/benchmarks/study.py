"""The study: what a merge costs, by starting point and merge method, over seeds. ``make study DATASETS=<nnU-Net datasets>``

U-Net Transplant (Lumetti et al., MICCAI 2025) claims that pre-training into wide minima makes task vectors merge better. Here it
is asked on any labelled datasets: patients are split three ways as in ``demo`` (pre-training, fine-tuning, test, by the seed);
from each starting point every task is fine-tuned, the task vectors are merged by every method (λ chosen on the fine-tuning
group's validation patients), and all is scored on the test patients. Everything goes through the project's own commands, which
are printed. A study that was stopped goes on; results.json has what was found, and runs that are in it are not run again.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import fire

from tests.benchmarks.label_efficiency import modality_overlay, random_weights
from tests.benchmarks.study_results import FLATNESS, TASK, Results, Size, draw, draw_tasks
from tools.bundle import read_json
from tools.compare import NEW_HEADS
from tools.demo import Cohorts, Steps, choose_tasks, real_cohorts, slug, tools, train
from tools.errors import UserError, nearest
from tools.instantiate import set_values
from tools.merge import split_paths
from tools.summary_table import SPECIALISTS

ROOT = Path(__file__).parents[2]
TASKS = {
    "Dataset902_HeadNeckCT": {
        "mandible": "mandible",
        "larynx": "larynx",
        "spinal cord": "spinal_cord",
        "parotids": ["parotid_right", "parotid_left"],
        "brainstem": "brainstem",
    },
    "Dataset911_AbdomenCTSim": {
        "liver": "liver",
        "spleen": "spleen",
        "kidneys": ["kidney_right", "kidney_left"],
        "stomach": "stomach",
        "aorta": "aorta",
    },
}
TAKEN = (  # folders beside those of the tasks
    *("joint_training", "student", "pseudo_labels", "distilled", "emr_modulated", "tall_modulated", "compare"),
    *("flatness", "linear", "images", "logs"),
)
PATCHES_PER_VOLUME = 8
UNLABELLED_SCANS = 4  # that statistics and coefficients are taken from


@dataclass(frozen=True)
class Start:
    """How a starting point is made.

    Attributes:
        bundle: that pre-trains it.
        overlay: of that bundle.
        settings: of its training, other than the overlay's; batch_size in units of the study's.
        fine_tuning: settings of what is fine-tuned from it.
        learns: "labels", "images" (of the pre-training group), "own images" (of the fine-tuning group) or "" (random weights).
        longer: times the study's steps of pre-training.
        linear: the starting point is linearised, and what is fine-tuned from it.
        orthogonal: each task is fine-tuned orthogonally to those before it.
    """

    bundle: str
    overlay: str
    settings: Mapping[str, float] = field(default_factory=dict)
    fine_tuning: Mapping[str, float] = field(default_factory=dict)
    learns: str = "labels"
    longer: int = 1
    linear: bool = False
    orthogonal: bool = False


# for a start that knows no organ: features must change, which the published decay towards the start holds back
FREELY = {"learning_rate": 3e-3, "head_learning_rate": 3e-3, "weight_decay": 0, "frozen_epochs": 0, "warmup_steps": 20}
# stable and sharp differ as the published ones do: learning rate by 10, batch size by 2, dropout
STABLE = {"learning_rate": 4e-3, "dropout": 0.1}
SHARP = {"learning_rate": 4e-4, "dropout": 0.0, "batch_size": 2}
STARTS = {
    "stable": Start("pretrain_amos", "small", STABLE),
    "sharp": Start("pretrain_amos", "small", SHARP),
    "stable_long": Start("pretrain_amos", "small", STABLE, longer=8),  # as much as each of them can learn
    "sharp_long": Start("pretrain_amos", "small", SHARP, longer=8),
    "sam_long": Start("pretrain_amos", "small,sam", STABLE, longer=8),
    **{name: Start("pretrain_amos", f"small,{name}", STABLE) for name in ("sam", "asam", "swa", "ema")},
    "budget": Start("pretrain_amos", "small", STABLE, {"norm_budget": 0.02}),
    "orthogonal": Start("pretrain_amos", "small", STABLE, orthogonal=True),
    "tangent": Start("pretrain_amos", "small", STABLE, linear=True),
    "scratch": Start("pretrain_amos", "small", fine_tuning=FREELY, learns=""),
    "genesis": Start("pretrain_genesis", "small,residual", {"learning_rate": 3e-3}, FREELY, learns="images"),
    "mae": Start("pretrain_genesis", "small,residual,mae", {"learning_rate": 3e-3}, FREELY, learns="images"),
    "lwi": Start(
        "pretrain_lwi", "small", {}, FREELY | {"learning_rate": 1e-3, "head_learning_rate": 0.1}, learns="own images"
    ),
}


def study(
    dataset_dir: str,
    output: str = "runs/study",
    starts: str = "stable,sharp,scratch,genesis,mae,lwi",
    seeds: int = 3,
    tasks: object = None,
    unseen: bool = False,
    width: int = 8,
    patch_size: int = 32,
    batch_size: int = 2,
    pretrain_steps: int = 400,
    finetune_steps: int = 240,
    scales: str = "0.1,0.2,0.4,0.8",
    spacing: float = 0,
) -> None:
    """Pre-train, fine-tune, merge by every method and compare, for each dataset, starting point and seed.

    Writes results.json and, as a table and pictures, results.md, results.png and tasks.png. Several studies at once may share
    a folder if their starting points differ.

    Args:
        dataset_dir: labelled nnU-Net raw datasets, separated by commas.
        output: folder of the runs.
        starts: starting points: stable, sharp, scratch, genesis, mae, lwi; what may make stable merge better: sam, asam, swa,
            ema (in pre-training), budget (short task vectors), orthogonal (to those of the tasks before), tangent (linearised);
            with eight times the steps stable_long, sharp_long, sam_long.
        seeds: how many; each has its own split, pre-training and fine-tuning.
        tasks: labels, or a dictionary of task names and labels; default: those of the study, or every label of another dataset.
        unseen: pre-train on the labels that belong to no task, so that all tasks are new to the starting point.
        width: of the residual U-Net.
        patch_size: edge, voxels.
        batch_size: patches in a training step; "sharp" takes twice as many, and half the steps.
        pretrain_steps: of training a starting point.
        finetune_steps: of each task, frozen epochs included.
        scales: λ to choose from.
        spacing: of the voxels to resample images to, mm; 0 for as they are. Large organs need as much of the image in a patch.
    """
    scales = ",".join(split_paths(scales))
    size = Size(width, patch_size, batch_size, pretrain_steps, finetune_steps, scales, unseen, spacing)
    folder = Path(output)
    chosen = split_paths(starts)
    for name in chosen:
        if name not in STARTS:
            raise UserError(f"no starting point {name!r}{nearest(name, STARTS)}; there are {', '.join(STARTS)}")
    datasets = [Path(path) for path in split_paths(dataset_dir)]
    if len({path.resolve().name for path in datasets}) < len(datasets):
        raise UserError("two datasets of one name would be taken for one: rename a folder")
    wanted = {path: choose_tasks(tasks, path, TASKS.get(path.name), TAKEN) for path in datasets}
    results = Results(folder / "results.json", size)
    results.begin({path.name: labels for path, labels in wanted.items()})
    for seed in range(seeds):
        for dataset, labels in wanted.items():
            for name in chosen:
                if seed not in results.of(dataset.name, name):
                    run = folder / dataset.name / f"seed_{seed}" / name
                    _one(run, dataset, labels, name, seed, size)
                    results.add(dataset.name, name, seed, _merges(run) | _flatness(run))
                (folder / "results.md").write_text(results.table(STARTS))
                draw([results], folder / "results.png", STARTS)
                draw_tasks([results], folder / "tasks.png", STARTS)


def _one(folder: Path, dataset: Path, wanted: Mapping[str, list], name: str, seed: int, size: Size) -> None:
    """One starting point of one dataset and seed: everything up to the table of ``compare``."""
    print(f"\n{dataset.name}, seed {seed}, starting point {name}", flush=True)
    steps = Steps(folder / "logs")
    cohorts = real_cohorts(dataset, folder.parent, seed)
    start = _starting_point(steps, folder, cohorts, wanted, STARTS[name], seed, size)
    if STARTS[name].linear:
        linear = folder / "linear"
        steps.run("linearize", tools("linearize", bundle=start, output=linear), linear, ["pretrain"])
        start = linear
    split = cohorts.splits / "finetune.json"
    cases = json.loads(split.read_text())[0]["train"]
    overrides = {"split_file": split, "seed": seed, "batch_size": size.batch_size}
    overrides |= _epochs(size.finetune_steps, len(cases), size.batch_size)
    overrides |= {"frozen_epochs": overrides["max_epochs"] // 4, **STARTS[name].fine_tuning}
    vectors: list[Path] = []
    specialists: list[Path] = []
    scans = {"images": dataset.resolve(), "part": "train", "split_file": split, "scans": UNLABELLED_SCANS}
    for task, labels in [*wanted.items(), ("joint training", wanted)]:
        bundle, vector = folder / slug(task), folder / f"{slug(task)}.safetensors"
        channels = labels if task == "joint training" else {task: labels}
        new = {"pretrained": start, "dataset_dir": dataset.resolve(), "task": task, "labels": json.dumps(channels)}
        steps.run(f"{slug(task)}_setup", tools("new_task", **new, overlay="small", output=bundle), bundle, ["pretrain"])
        earlier = vectors if STARTS[name].orthogonal and task != "joint training" else []
        own = {"orthogonal_to": str([str(path.resolve()) for path in earlier])} if earlier else {}
        before = [f"{slug(task)}_setup", *(f"{path.stem}_diff" for path in earlier)]
        steps.run(slug(task), train(bundle, **overrides, **own), bundle / "models/model.pt", before)
        if task == "joint training":
            break
        diff = tools("diff", pretrained=start, finetuned=bundle, output=vector)
        steps.run(f"{slug(task)}_diff", diff, vector, [slug(task)])
        measure = tools("statistics", bundle=bundle, vector=vector, method="fisher,regmean", patches=4, **scans)
        made = vector.with_suffix(".regmean.safetensors")
        steps.run(f"{slug(task)}_statistics", measure, made, [f"{slug(task)}_diff"])
        specialists.append(bundle)
        vectors.append(vector)
    merge = {"pretrained": start, "vectors": ",".join(map(str, vectors))}
    diffs = [f"{slug(task)}_diff" for task in wanted]
    student = _student(steps, folder, dataset, cohorts, merge, wanted, overrides, size)
    others = [folder / "joint_training", student]
    for extra, flags in {
        "distilled": ("distil", scans | {"seed": seed}),
        "emr_modulated": ("merge", {"method": "emr", "modulate": True}),
        "tall_modulated": ("merge", {"method": "task_arithmetic", "scale": 1 / len(wanted), "modulate": True}),
    }.items():
        command, options = flags
        steps.run(extra, tools(command, **merge, **options, output=folder / extra), folder / extra, diffs)
        others.append(folder / extra)
    compare = tools(
        "compare", **merge, specialists=",".join(map(str, specialists)), others=",".join(map(str, others)),
        dataset_dir=dataset.resolve(), split_file=split, scales=size.scales, output=folder / "compare",
    )  # fmt: skip
    after = [*diffs, "joint_training", "student", "distilled"]
    steps.run("compare", compare, folder / "compare" / "results.json", after)


def _student(
    steps: Steps,
    folder: Path,
    dataset: Path,
    cohorts: Cohorts,
    merge: Mapping[str, object],
    wanted: Mapping[str, list],
    overrides: Mapping[str, object],
    size: Size,
) -> Path:
    """A bundle trained on what the specialists see in the pre-training group's images, as long as each of them was."""
    from tools.bundle_code.nnunet_data import make_folds

    pseudo, bundle, split = folder / "pseudo_labels", folder / "student", cohorts.splits / "pretrain.json"
    scans = {"images": dataset.resolve(), "part": "train", "split_file": split}
    see = tools("pseudo_labels", **merge, **scans, overlays=False, output=pseudo)
    steps.run("pseudo_labels", see, pseudo, [f"{slug(task)}_diff" for task in wanted])
    labels = json.dumps({task: task for task in wanted})
    new = {"pretrained": merge["pretrained"], "dataset_dir": pseudo, "task": "student", "labels": labels}
    steps.run("student_setup", tools("new_task", **new, overlay="small", output=bundle), bundle, ["pseudo_labels"])
    folds = make_folds(json.loads(split.read_text())[0]["train"], 0)  # as many as the training makes of them
    kept = {name: value for name, value in overrides.items() if name != "split_file"}
    epochs = _epochs(size.finetune_steps, len(folds[0]["train"]), size.batch_size)
    steps.run("student", train(bundle, **kept | epochs), bundle / "models" / "model.pt", ["student_setup"])
    return bundle


def _starting_point(
    steps: Steps, folder: Path, cohorts: Cohorts, wanted: Mapping[str, list], start: Start, seed: int, size: Size
) -> Path:
    """Make a starting point's bundle and train it, or give it random weights."""
    bundle = folder / folder.name
    template = ROOT / "bundles" / start.bundle
    modality = modality_overlay(cohorts.pretrain) if (template / "configs" / "mr.json").is_file() else ""
    setup: dict[str, object] = {"bundle": template, "overlay": start.overlay + modality}
    split = cohorts.splits / ("finetune.json" if start.learns == "own images" else "pretrain.json")
    cases = json.loads(split.read_text())[0]["train"]
    if start.learns in ("labels", ""):
        setup["dataset_dir"] = cohorts.pretrain
        if size.unseen:
            setup["labels"] = json.dumps(_other_labels(cohorts.pretrain, wanted))
    else:
        setup["dataset_dir"] = _images(cohorts.pretrain, cases, folder / "images")
    new = tools("new_pretraining", **setup, patch_size=size.patch_size, output=bundle)
    steps.run("pretrain_setup", new, bundle)
    set_values(bundle, {"spacing": [size.spacing] * 3 if size.spacing else None})
    if start.bundle == "pretrain_lwi":  # UNETR, a token of which is 16 voxels long
        set_values(bundle, {"slabs": size.patch_size // 16})
    else:
        set_values(bundle, {"width": size.width})
    if not start.learns:
        done = steps.logs / "pretrain.done"
        if not done.is_file() or not (bundle / "models" / "model.pt").is_file():
            random_weights(bundle, seed)
            done.touch()
        return bundle
    steps_wanted = size.pretrain_steps * start.longer
    overrides = {**start.settings, "seed": seed, **_epochs(steps_wanted, len(cases), size.batch_size)}
    overrides["batch_size"] = size.batch_size * start.settings.get("batch_size", 1)
    if start.learns == "labels":
        overrides["split_file"] = split
    steps.run("pretrain", train(bundle, **overrides), bundle / "models" / "model.pt", ["pretrain_setup"])
    if start.learns == "labels":
        scans = {"dataset_dir": cohorts.pretrain, "part": "val", "split_file": split, "patch_size": 32, "seed": seed}
        flatness = tools("flatness", bundle=bundle, **scans, output=folder / "flatness")
        steps.run("flatness", flatness, folder / "flatness", ["pretrain"])
    return bundle


def _epochs(steps: int, cases: int, batch: int) -> dict[str, int]:
    """As many epochs as make so many steps, validated once, at the end: no validation patient chooses the weights."""
    epochs = max(1, math.ceil(steps * batch / (cases * PATCHES_PER_VOLUME)))
    return {"max_epochs": epochs, "val_interval": epochs, "patches_per_volume": PATCHES_PER_VOLUME}


def _other_labels(dataset: Path, wanted: Mapping[str, list]) -> dict[str, list]:
    """The dataset's labels that belong to no task."""
    from tools.bundle_code.nnunet_data import label_values, read_labels

    taken = {value for values in label_values(dataset, wanted) for value in values}
    others = {name: values for name, values in read_labels(dataset).items() if not taken & set(values)}
    if not others:
        raise UserError(f"every label of {dataset} belongs to a task, so none is left to pre-train on")
    return others


def _images(dataset: Path, cases: Sequence[str], folder: Path) -> Path:
    """A folder of links to some cases' images."""
    from monai.utils import ensure_tuple

    from tools.bundle_code.nnunet_data import all_cases

    folder.mkdir(parents=True, exist_ok=True)
    known = all_cases(dataset)
    for image in (Path(file) for name in cases for file in ensure_tuple(known[name]["image"])):
        if not (folder / image.name).is_symlink():
            (folder / image.name).symlink_to(image.resolve())
    return folder


def _merges(run: Path) -> dict[str, tuple[float, ...]]:
    """For each row of ``compare`` its mean Dice, and the normalized accuracy but for the specialists.

    And for each task that its specialist learned, the specialist's Dice, and the normalized accuracy of new heads on the
    starting point and of the average.
    """
    results = read_json(run / "compare" / "results.json")
    bundles, shares = results["bundles"], results["normalized_accuracy"]
    means = {title: (share["mean"],) for title, share in shares.items()}
    rows = {title: (found["mean"]["dice"]["mean"], *means.get(title, ())) for title, found in bundles.items()}
    own, average = bundles[SPECIALISTS]["labels"], shares.get("average", {"labels": {}})["labels"]
    return rows | {
        f"{TASK}{task}": (own[task]["dice"]["mean"], shares[NEW_HEADS]["labels"][task], share)
        for task, share in average.items()
    }


def _flatness(run: Path) -> dict[str, tuple[float, ...]]:
    """What ``flatness`` measured of the starting point, if that learned from labels."""
    path = run / "flatness" / "flatness.json"
    if not path.is_file():
        return {}
    (measured,) = read_json(path)["bundles"].values()
    figures = {
        f"loss rises, weights moved by {noise['relative']:g}": noise["mean"] - measured["loss"]
        for noise in measured["noise"][-2:]
    }
    figures["top Hessian eigenvalue, relative"] = measured["hessian_top_relative"]
    return {f"{FLATNESS}{title}": (value,) for title, value in figures.items()}


if __name__ == "__main__":
    try:
        fire.Fire(study)
    except (UserError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
