"""``demo``: the whole chain, pretrain → fine-tune → diff → merge → evaluate, each step one printed command.

One population of patients pre-trains a starting point on all organs; single organs are fine-tuned with fresh heads on
another; their task vectors are merged; all is scored on patients that nothing has seen (the protocol of U-Net Transplant,
MICCAI 2025).
"""

from __future__ import annotations

import inspect
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tools.bundle import read_json
from tools.errors import UserError
from tools.labels import parse_channels, parse_sources
from tools.markdown import table
from tools.scores import dice
from tools.summary import LEARNED

BUNDLES = Path(os.path.relpath(Path(__file__).parents[1] / "bundles"))
PHANTOM_TASKS = {
    "liver": "liver",
    "spleen": "spleen",
    "kidneys": ["right kidney", "left kidney"],
    "stomach": "stomach",
}
PRETRAIN_STEPS = 1600  # from which on a small starting point merges well on real CT: docs/recipes.md
# merged bundles by folder name: the method's flags, and what the table calls it
MERGES = {
    "merged_heads": ("--method task_arithmetic --scale 0", "start + new heads (λ = 0)"),
    "merged_average": ("--method average", "average"),
    "merged_task_arithmetic": ("--method task_arithmetic --scale 0.4", "task arithmetic (λ = 0.4)"),
    "merged_ties": ("--method ties --density 0.2", "TIES (top 20 %)"),
}


@dataclass
class Cohorts:
    """Who pre-trains, who fine-tunes and who tests.

    Attributes:
        pretrain: nnU-Net dataset for pre-training.
        finetune: nnU-Net dataset for fine-tuning and testing.
        splits: folder with pretrain.json and finetune.json, whose parts are train, val and test.
    """

    pretrain: Path
    finetune: Path
    splits: Path


def demo(
    dataset_dir: str = "",
    output: str = "runs/demo",
    tasks: object = None,
    pretrain_bundle: str = "pretrain_amos",
    overlay: str = "small",
    pretrain_epochs: int = 0,
    finetune_epochs: int = 0,
    patch_size: int = 0,
    batch_size: int = 0,
    seed: int = 0,
) -> None:
    """Run the whole chain and write a table (Dice per task) and one picture per test case. A stopped run goes on.

    Args:
        dataset_dir: nnU-Net raw dataset; its labelled patients are split three ways. Default: the simulated phantom.
        output: folder for everything.
        tasks: names separated by commas, "liver,spleen"; or a dictionary with several labels for a task,
            "{kidneys: [right kidney, left kidney], liver: liver}". Default: every label of the dataset (four organs of
            the phantom).
        pretrain_bundle: the bundle that pre-trains, pretrain_amos, pretrain_cui or pretrain_stunet.
        overlay: overlay of the training bundles, "small" for two CPU cores; "" for full size.
        pretrain_epochs: default: the overlay's; with "small" as many as make 1600 steps, and 6 for the phantom.
        finetune_epochs: default: the overlay's, and 4 for the phantom.
        patch_size: edge of the training patches and inference windows, voxels, other than the overlay's.
        batch_size: patches per training step; default: the overlay's, and 1 with "small": many steps make a starting point
            that merges.
        seed: of the phantom, the split and the training.
    """
    root = Path(output)
    if "labels" not in read_json(BUNDLES / pretrain_bundle / "configs" / "train.json"):
        raise UserError(f"{pretrain_bundle} learns without labels, so it cannot be compared with what is made from it")
    settings = {"dataset_dir": str(dataset_dir), "pretrain_bundle": pretrain_bundle, "overlay": overlay, "seed": seed}
    sizes = {"pretrain_epochs": pretrain_epochs, "finetune_epochs": finetune_epochs}
    sizes |= {"patch_size": patch_size, "batch_size": batch_size}
    _same_settings(root / "settings.json", settings | sizes)
    steps = Steps(root / "logs")
    started = time.time()
    if overlay == "small":
        batch_size = batch_size or 1
    if dataset_dir:
        cohorts = real_cohorts(Path(dataset_dir), root, seed)
        if overlay == "small":
            pretrain_epochs = pretrain_epochs or _epochs_for(PRETRAIN_STEPS, cohorts, pretrain_bundle, batch_size)
    else:
        cohorts = _phantom_cohorts(steps, root, seed)
        pretrain_epochs, finetune_epochs = pretrain_epochs or 6, finetune_epochs or 4
    usual = None if dataset_dir else PHANTOM_TASKS
    wanted = choose_tasks(tasks, cohorts.finetune, usual, taken=("pretrain", *MERGES))

    print("\n1. a starting point: pre-train on all organs of the first patients")
    start = root / "pretrain"
    setup = {"bundle": BUNDLES / pretrain_bundle, "dataset_dir": cohorts.pretrain, "overlay": overlay}
    steps.run("pretrain_setup", tools("new_pretraining", **setup, **given(patch_size=patch_size), output=start), start)
    overrides = {"split_file": cohorts.splits / "pretrain.json", "seed": seed}
    overrides |= given(max_epochs=pretrain_epochs, batch_size=batch_size)
    steps.run("pretrain", train(start, **overrides), start / "models" / "model.pt", ["pretrain_setup"])

    overrides = {"split_file": cohorts.splits / "finetune.json", "seed": seed}
    overrides |= given(max_epochs=finetune_epochs, batch_size=batch_size)
    for task, labels in wanted.items():
        print(f"\n2. a specialist for {task}: fine-tune on other patients, share the task vector")
        _specialist(steps, root, cohorts, task, labels, overlay, overrides)

    print("\n3. merge the task vectors")
    vectors = [_vector(root, task) for task in wanted]
    diffs = [f"specialist_{slug(task)}_diff" for task in wanted]
    steps.run("inspect", [*tools("inspect"), *vectors])
    for name, (flags, _) in MERGES.items():
        merge = tools("merge", pretrained=start, vectors=",".join(map(str, vectors)), output=root / name)
        steps.run(name, [*merge, *flags.split()], root / name, diffs)

    print("\n4. segment the test patients and compare")
    bundles = [start, *(root / "specialists" / slug(task) for task in wanted), *(root / name for name in MERGES)]
    cases = {"dataset_dir": cohorts.finetune, "part": "test", "split_file": cohorts.splits / "finetune.json"}
    evaluation = tools(
        "evaluate", bundle=",".join(map(str, bundles)), **cases, overlays=False, output=root / "evaluation"
    )
    steps.run("evaluate", evaluation, root / "evaluation", list(MERGES))
    table = _compare(root, wanted, cohorts)
    (root / "results.md").write_text(table)
    print(f"\n{table}\nwritten: {root}/results.md, results.json, one picture per test patient in {root}/overlays")
    print(f"{(time.time() - started) / 60:.1f} minutes")


def _specialist(
    steps: Steps,
    root: Path,
    cohorts: Cohorts,
    task: str,
    labels: Sequence,
    overlay: str,
    overrides: Mapping[str, object],
) -> None:
    """Fine-tune one task and take its task vector."""
    start, folder, step = root / "pretrain", root / "specialists" / slug(task), f"specialist_{slug(task)}"
    setup = tools(
        "new_task", pretrained=start, dataset_dir=cohorts.finetune, task=task, labels=",".join(map(str, labels)),
        overlay=overlay, output=folder,
    )  # fmt: skip
    steps.run(f"{step}_setup", setup, folder, ["pretrain"])
    steps.run(step, train(folder, **overrides), folder / "models" / "model.pt", [f"{step}_setup"])
    diff = tools("diff", pretrained=start, finetuned=folder, output=_vector(root, task))
    steps.run(f"{step}_diff", diff, _vector(root, task), [step])


def _epochs_for(steps: int, cohorts: Cohorts, bundle: str, batch_size: int) -> int:
    """How many epochs of pre-training with the small overlay make so many steps."""
    cases = json.loads((cohorts.splits / "pretrain.json").read_text())[0]["train"]
    small = read_json(BUNDLES / bundle / "configs" / "small.json")
    per_epoch = small.get("iterations_per_epoch") or len(cases) * small["patches_per_volume"] / batch_size
    return math.ceil(steps / per_epoch)


def _same_settings(path: Path, settings: dict[str, object]) -> None:
    """Refuse to go on with what was begun with other settings; other tasks may be added.

    Raises:
        UserError: names what differs.
    """
    before = json.loads(path.read_text()) if path.is_file() else settings
    changed = [f"{name} was {before.get(name)!r}" for name in settings if before.get(name) != settings[name]]
    if changed:
        raise UserError(f"{path.parent} was begun with other settings ({', '.join(changed)}); choose another --output")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=4))


class Steps:
    """Runs commands one after another, each once: what an earlier run finished is not done again."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        logs.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, command: Sequence[object], makes: Path | None = None, after: Sequence[str] = ()) -> None:
        """Print a command, run it unless it is done, and keep what it prints in logs/<name>.log.

        Args:
            name: of the step.
            command: its words, the first being ``python``.
            makes: what the command makes; without it the command always runs, and what it prints is shown.
            after: steps that it builds on; when one of them was run since, it runs again.

        Raises:
            UserError: the command failed; its last words are in the message.
        """
        line = shlex.join(str(word) for word in command)
        print(f"$ {line}", flush=True)
        done, log = self.logs / f"{name}.done", self.logs / f"{name}.log"
        if makes and makes.exists() and done.is_file() and done.read_text() == line:
            before = [self.logs / f"{step}.done" for step in after]
            if all(marker.is_file() and marker.stat().st_mtime <= done.stat().st_mtime for marker in before):
                print("  (done before)")
                return
        words = [sys.executable, *shlex.split(line)[1:]]
        if makes and makes.exists() and "tools" in words and "overwrite" in _flags(words[3]):
            words.append("--overwrite")
        began = time.time()
        done.unlink(missing_ok=True)
        with log.open("w") as file:
            code = subprocess.run(words, stdout=file, stderr=None if sys.stderr.isatty() else file).returncode
        text = log.read_text().strip()
        if code:
            raise UserError(f"that command failed: {text.splitlines()[-1] if text else code} (see {log})")
        if not makes:
            print(text)
        print(f"  {time.time() - began:.0f} s")
        done.write_text(line)


def _flags(command: str) -> Collection[str]:
    """Of a command of tools."""
    return inspect.signature(getattr(import_module(f"tools.{command}"), command)).parameters.keys()


def given(**values: int) -> dict[str, int]:
    """The values that a user gave; zero means the bundle's own."""
    return {name: value for name, value in values.items() if value}


def tools(command: str, **flags: object) -> list[object]:
    """The words of ``python -m tools <command> --flag value …``."""
    return ["python", "-m", "tools", command, *(word for name, value in flags.items() for word in (f"--{name}", value))]


def train(bundle: Path, **overrides: object) -> list[object]:
    """The words that train a bundle as a MONAI user does."""
    words = [
        "python",
        "-m",
        "monai.bundle",
        "run",
        "--config_file",
        bundle / "configs" / "train.json",
        "--bundle_root",
        bundle,
    ]
    return [*words, *(word for name, value in overrides.items() for word in (f"--{name}", value))]


def slug(task: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in task.lower())


def _vector(root: Path, task: str) -> Path:
    return root / "vectors" / f"{slug(task)}.safetensors"


def choose_tasks(
    tasks: object, dataset_dir: Path, usual: Mapping[str, Any] | None, taken: Collection[str]
) -> dict[str, list[Any]]:
    """The tasks that a user names, and their labels in a dataset.

    Args:
        tasks: from the command line: labels with commas between them, a dictionary of task names and labels, or None.
        dataset_dir: nnU-Net raw dataset.
        usual: instead of None; without these, every label of the dataset.
        taken: names of folders beside those of the tasks.

    Raises:
        UserError: there are fewer than two, the dataset does not have a label, or two tasks would have the same folder.
    """
    from tools.bundle_code.nnunet_data import read_labels
    from tools.labels import resolve

    if tasks is None:
        chosen = usual or {name: name for name in read_labels(dataset_dir)}
    else:
        chosen = parse_channels(tasks) or {str(name): name for name in parse_sources(tasks)}
    if len(chosen) < 2:
        raise UserError("a merge needs two tasks at least")
    folders = [*taken, *map(slug, chosen)]
    for task in chosen:
        if folders.count(slug(task)) > 1:
            raise UserError(f"the folder name of task {task!r} is taken; call it something else")
    return resolve(dataset_dir, chosen)


def _phantom_cohorts(steps: Steps, root: Path, seed: int) -> Cohorts:
    from tools.bundle_code.nnunet_data import all_cases, make_folds

    first, second = root / "data" / "Dataset001_PhantomNative", root / "data" / "Dataset002_PhantomPortal"
    print("\n0. simulated patients of two hospitals")
    steps.run("data1", tools("phantom", output=first, population="native", cases=16, seed=seed), first)
    steps.run("data2", tools("phantom", output=second, population="portal", cases=14, seed=seed + 1), second)
    names = list(all_cases(second))
    parts = {"train": names[:6], "val": names[6:8], "test": names[8:]}
    _write_splits(root / "splits", make_folds(list(all_cases(first)), seed)[0], parts)
    return Cohorts(first, second, root / "splits")


def real_cohorts(dataset_dir: Path, root: Path, seed: int) -> Cohorts:
    """Split the labelled patients: 43 % pre-train, 36 % fine-tune, 21 % test; a fifth of the first two validates."""
    from tools.bundle_code.nnunet_data import all_cases

    try:
        names = sorted(all_cases(dataset_dir))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from None
    if len(names) < 7:
        raise UserError(f"{dataset_dir} has {len(names)} labelled cases; three separate groups need 7 at least")
    names = [names[i] for i in np.random.RandomState(seed).permutation(len(names))]
    a, b = round(0.43 * len(names)), round(0.79 * len(names))
    first, second, test = names[:a], names[a:b], names[b:]
    va, vb = max(1, len(first) // 5), max(1, len(second) // 5)
    _write_splits(
        root / "splits",
        {"train": first[va:], "val": first[:va]},
        {"train": second[vb:], "val": second[:vb], "test": test},
    )
    return Cohorts(dataset_dir.resolve(), dataset_dir.resolve(), root / "splits")


def _write_splits(folder: Path, pretrain: Mapping, finetune: Mapping) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, parts in (("pretrain", pretrain), ("finetune", finetune)):
        (folder / f"{name}.json").write_text(json.dumps([parts], indent=4))


def _masks(
    root: Path, wanted: Mapping[str, Sequence], cohorts: Cohorts, case: str, label_file: str
) -> dict[str, dict[str, np.ndarray]]:
    """The organs of each task in a test case: reference, starting point, specialists and merges, by column title."""
    import nibabel
    from monai.transforms import LoadImage

    from tools.bundle import Bundle
    from tools.bundle_code.nnunet_data import label_values

    def label_map(bundle: str) -> np.ndarray:
        return np.asarray(nibabel.load(root / "evaluation" / "label_maps" / bundle / f"{case}.nii.gz").dataobj)

    truth = np.asarray(LoadImage(ensure_channel_first=True)(label_file)[0])
    values = dict(zip(wanted, label_values(cohorts.finetune, wanted)))
    columns = {"reference": {task: np.isin(truth, values[task]) for task in wanted}}
    start = label_map("pretrain")
    channels = {tuple(sources): i for i, sources in enumerate(Bundle(root / "pretrain").label_map.values(), start=1)}
    columns["starting point"] = {
        task: np.isin(start, [i for sources, i in channels.items() if set(sources) <= set(wanted[task])])
        for task in wanted
    }
    columns["specialists"] = {task: label_map(slug(task)) == 1 for task in wanted}
    for name, (_, title) in MERGES.items():
        merged = label_map(name)
        columns[title] = {task: merged == i for i, task in enumerate(wanted, start=1)}
    return columns


def _compare(root: Path, wanted: Mapping[str, Sequence], cohorts: Cohorts) -> str:
    """Draw every test patient, and return the table of mean Dice; both from the label maps of ``evaluate``."""
    from monai.transforms import LoadImage

    from tools.bundle_code.nnunet_data import all_cases
    from tools.pictures import draw_case

    files = all_cases(cohorts.finetune)
    cases = json.loads((cohorts.splits / "finetune.json").read_text())[0]["test"]
    (root / "overlays").mkdir(exist_ok=True)
    scores: dict[str, dict[str, list[float]]] = {}
    for case in tqdm(cases, desc="pictures", disable=None, leave=False):
        columns = _masks(root, wanted, cohorts, case, files[case]["label"])
        for title in list(columns)[1:]:
            for task in wanted:
                score = dice(columns[title][task], columns["reference"][task])
                if not np.isnan(score):
                    scores.setdefault(title, {}).setdefault(task, []).append(score)
        image = LoadImage(ensure_channel_first=True)(files[case]["image"])
        picture = root / "overlays" / f"{case}.png"
        draw_case(np.asarray(image[0]), np.asarray(image.affine), columns, picture, title=case)
    if not scores:
        raise UserError(f"none of the test patients has any of the tasks' labels: {', '.join(wanted)}")
    means = {title: {task: float(np.mean(values)) for task, values in tasks.items()} for title, tasks in scores.items()}
    (root / "results.json").write_text(json.dumps({"test_cases": cases, "mean_dice": means, "dice": scores}, indent=2))
    return results_table(means, len(cases))


def results_table(means: Mapping[str, Mapping[str, float]], patients: int) -> str:
    """A Markdown table of mean Dice: a row per task and their mean; each merge also as a share of specialists that learned.

    Args:
        means: mean Dice by column title and task; the first two columns are the starting point and the specialists.
        patients: how many the means are over.
    """
    titles = list(means)
    specialists = means["specialists"]
    learned = [task for task, score in specialists.items() if score >= LEARNED]
    rows = []
    for name, tasks in {**{task: [task] for task in specialists}, "mean": list(specialists)}.items():
        cells = []
        for position, title in enumerate(titles):
            score = f"{np.mean([means[title][task] for task in tasks]):.3f}"
            shares = [means[title][task] / specialists[task] for task in tasks if task in learned]
            cells.append(score + f" ({np.mean(shares):.2f})" if position > 1 and shares else score)
        rows.append([name, *cells])
    what = f"Mean Dice on {patients} test patients; in brackets normalized accuracy (merged ÷ specialist)."
    return f"{what}\n\n{table(['task', *titles], rows)}\n"
