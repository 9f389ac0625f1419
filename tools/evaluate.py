"""``evaluate``: Dice, surface Dice and HD95 per case and class on a labelled dataset, what they say together, and pictures."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tools.bundle import Bundle, read_json
from tools.calibration import CalibrationSummary, calibrate, calibration_markdown, check_inferer, summarise_calibration
from tools.errors import UserError, at_least, nearest
from tools.instantiate import data_facts
from tools.labels import check_channels, parse_sources, renamed_labels
from tools.merge import split_paths
from tools.output import complete_output
from tools.scores import Score, read_scores, score_label_map, write_scores
from tools.segmenter import Segmenter, write_label_map
from tools.summary import Summary, summarise
from tools.summary_table import SPECIALISTS, markdown
from tools.unfinished import clear, kept_file, unfinished

REFERENCE = "reference"  # the first column of a picture


def evaluate(
    bundle: str | Sequence[str],
    dataset_dir: str,
    output: str,
    part: str = "all",
    split_file: str = "",
    fold: int = 0,
    labels: object = None,
    tolerance: float = 2.0,
    against: str | Sequence[str] = (),
    workers: int = 0,
    calibration: bool = False,
    overlays: bool = True,
    overwrite: bool = False,
) -> None:
    """Run bundles on labelled cases; write scores.csv, summary.json and .md, label maps and one picture per case.

    Classes are matched by the label names that a bundle was trained on, so a specialist is scored on its own organ and a
    merged model on all of its own. A class that the dataset does not have is left out, and said so. A stopped run goes on:
    what is done waits in <output>.partial.

    Args:
        bundle: a bundle with weights, or several separated by commas.
        dataset_dir: nnU-Net raw dataset.
        output: folder to write.
        part: "all" (labelsTr), "Ts" (labelsTs), or a part of the split: "train", "val", "test".
        split_file: JSON file with the split; default: the dataset's splits_final.json.
        fold: index into the split.
        labels: the dataset's labels for channels that are called otherwise: "{liver: 6}".
        tolerance: of the normalised surface Dice, mm: surfaces this near to each other count as the same.
        against: those of the bundles that the others are compared with, separated by commas: one, or the specialists. Default:
            the specialists whose task vectors were merged.
        workers: processes that measure while the next case is segmented; 0 measures in between.
        calibration: also write calibration.json: how far probabilities are from frequencies, and where two organs' heads claim
            the same voxels. Runs each bundle a second time.
        overlays: draw reference and predictions, one PNG per case.
        overwrite: replace the output if it exists.
    """
    bundles = [Bundle(path) for path in split_paths(bundle)]
    if len({b.name for b in bundles}) != len(bundles):
        raise UserError("the bundles' folders must have different names")
    for name in {REFERENCE, SPECIALISTS} & {b.name for b in bundles}:
        raise UserError(
            f"a bundle's folder must not be called {name!r}, which is what tables and pictures call another thing"
        )
    at_least(0, tolerance=tolerance, workers=workers)
    for b in bundles:
        check_channels(dataset_dir, b)
        if calibration:
            check_inferer(b)
    references = reference_bundles(bundles, split_paths(against))
    renamed = renamed_labels(labels, bundles)
    cases = find_cases(dataset_dir, part, split_file, fold)
    sha256 = {b.name: b.sha256() for b in bundles}
    facts = {
        "dataset": data_facts(dataset_dir)["dataset"],
        "part": f"{len(cases)} cases ({part})",
        "bundles": sha256,
        "labels": {b.name: b.labels for b in bundles},  # of the label maps, from 1 on
        "tolerance_mm": tolerance,
    }
    with complete_output(output, overwrite, sign="summary.json") as folder:
        folder.mkdir()
        done = {
            b.name: unfinished(output, b.name, [sha256[b.name], *_facts(b, dataset_dir, renamed, tolerance)])
            for b in bundles
        }
        scores: list[Score] = []
        with _scoring_processes(workers) as executor:
            for b in bundles:
                scores += score_bundle(b, dataset_dir, cases, done[b.name], renamed, tolerance, executor)
        calibrated = {
            b.name: _calibration(b, dataset_dir, cases, done[b.name], renamed) for b in bundles if calibration
        }
        for b in bundles:
            (folder / "label_maps" / b.name).mkdir(parents=True)
            for name, case in cases.items():
                kept = kept_file(done[b.name], name, ".nii.gz", case["image"])
                shutil.copyfile(kept, folder / "label_maps" / b.name / f"{name}.nii.gz")
        table = _write_results(folder, scores, summarise(scores, references), calibrated, facts)
        if overlays:
            for name, case in tqdm(cases.items(), desc="pictures", disable=None, leave=False):
                _draw(folder, bundles, name, case, dataset_dir, renamed)
    clear(output)
    pictures = ", one PNG per case" if overlays else ""
    print(f"{table}\nwritten: {output}/scores.csv, summary.json, summary.md, label_maps/{pictures}")


def _write_results(
    folder: Path,
    scores: Sequence[Score],
    summary: Summary,
    calibrated: Mapping[str, CalibrationSummary],
    facts: Mapping[str, Any],
) -> str:
    """Write everything but label maps and pictures; returns the tables."""
    write_scores(folder / "scores.csv", scores)
    table = markdown(summary, facts["tolerance_mm"])
    contents = {"summary": summary.as_dict(), "evaluation": facts}
    if calibrated:
        contents["calibration"] = {"bundles": {name: found.as_dict() for name, found in calibrated.items()}}
        table += f"\n{calibration_markdown(calibrated)}"
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2, allow_nan=False))
    (folder / "summary.md").write_text(f"{facts['dataset']}, {facts['part']}\n\n{table}")
    return table


def score_bundle(
    bundle: Bundle,
    dataset_dir: str | Path,
    cases: Mapping[str, Mapping[str, Any]],
    folder: Path,
    labels: Mapping,
    tolerance: float | None = None,
    executor: Executor | None = None,
) -> list[Score]:
    """Segment cases with a bundle and score the classes that the dataset has; what the folder already has is not done again.

    Args:
        bundle: with weights.
        dataset_dir: nnU-Net raw dataset.
        cases: image and label paths by case.
        folder: for one NIfTI file and one CSV file per case.
        labels: the dataset's labels for channels that are called otherwise.
        tolerance: of the normalised surface Dice, mm; None measures Dice and volumes only.
        executor: measures while the next case is segmented.
    """
    from tools.bundle_code.nnunet_data import ignored_value

    channels, ignored = matched_channels(bundle, dataset_dir, labels), ignored_value(dataset_dir)
    left_out = [label for label, values in channels.items() if values is None]
    if left_out:
        print(f"{bundle.name}: not scored, because the dataset does not have them: {', '.join(left_out)}")
    folder.mkdir(parents=True, exist_ok=True)

    label_maps = {name: kept_file(folder, name, ".nii.gz", case["image"]) for name, case in cases.items()}
    files = {name: kept_file(folder, name, ".csv", case["image"], case["label"]) for name, case in cases.items()}

    def score(name: str) -> Future | None:
        facts = (files[name], bundle.name, name, label_maps[name], cases[name]["label"], channels, tolerance, ignored)
        return executor.submit(_score_case, *facts) if executor else _score_case(*facts)

    to_segment = {name: case for name, case in cases.items() if not label_maps[name].is_file()}
    to_score = [name for name in cases if name not in to_segment and not files[name].is_file()]
    if len(cases) > len(to_segment):
        print(f"{bundle.name}: goes on, {len(cases) - len(to_segment)} of {len(cases)} cases were segmented before")
    scored = [score(name) for name in to_score]
    for name, prediction, affine in segment(bundle, to_segment) if to_segment else ():
        write_label_map(label_maps[name], prediction, affine)
        scored.append(score(name))
    for future in tqdm(filter(None, scored), desc=f"{bundle.name}: scores", disable=None, leave=False):
        future.result()
    return [score for file in files.values() for score in read_scores(file)]


def _score_case(file: Path, *facts: Any) -> None:
    write_scores(file, score_label_map(*facts))


def _calibration(
    bundle: Bundle, dataset_dir: str | Path, cases: Mapping[str, Mapping[str, Any]], folder: Path, labels: Mapping
) -> CalibrationSummary:
    from tools.bundle_code.nnunet_data import ignored_value

    files = {name: kept_file(folder, name, ".json", case["image"], case["label"]) for name, case in cases.items()}
    missing = {file: cases[name] for name, file in files.items() if not file.is_file()}
    if missing:
        channels = matched_channels(bundle, dataset_dir, labels)
        calibrate(bundle, missing, channels, ignored_value(dataset_dir))
    return summarise_calibration([read_json(file) for file in files.values()])


def _facts(bundle: Bundle, dataset_dir: str | Path, labels: Mapping, tolerance: float) -> list[Any]:
    """What decides, beside the bundle itself, what is measured of it on a dataset."""
    channels = matched_channels(bundle, dataset_dir, labels)
    said = read_json(Path(dataset_dir) / "dataset.json").get("labels")
    return [channels, said, str(Path(dataset_dir).resolve()), tolerance]


@contextmanager
def _scoring_processes(workers: int) -> Iterator[Executor | None]:
    """So many processes; with an error what they have not begun is dropped."""
    if not workers:
        yield None
        return
    executor = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def _one_thread() -> None:
    """A process that measures: of one thread, because there are several; the one that started it takes the interrupts."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def reference_bundles(bundles: Sequence[Bundle], against: Sequence[str]) -> dict[str, str]:
    """For each label the name of the bundle that the others are compared with.

    Args:
        bundles: all of them.
        against: names or paths of the reference bundles. If there are none, they are the specialists whose task vectors were
            merged: a merged bundle records the starting point and the labels of each vector, a specialist its starting point.

    Raises:
        UserError: one of ``against`` is not among the bundles, or two have the same label.
    """
    if against:
        for path in against:
            if not any(_is(b, path) for b in bundles):
                known = [*(b.name for b in bundles), *(str(b.path) for b in bundles)]
                raise UserError(f"--against {path}: not among the bundles{nearest(path, known)}")
        chosen = [b for b in bundles if any(_is(b, path) for path in against)]
    else:
        merged = [b.metadata.get("lineage", {}) for b in bundles if "vectors" in b.metadata.get("lineage", {})]
        tasks = [(m.get("pretrained_sha256"), v.get("labels")) for m in merged for v in m["vectors"]]
        chosen = [b for b in bundles if (b.metadata.get("lineage", {}).get("pretrained_sha256"), b.labels) in tasks]
        chosen = [b for b in chosen if "vectors" not in b.metadata["lineage"]]
    owned = owners(chosen)
    for label, names in owned.items():
        if len(names) > 1:
            which = f"{' and '.join(names)} have {label!r}: --against must say which one the others are compared with"
            if against:
                raise UserError(which)
            print(which)
    return {label: names[0] for label, names in owned.items() if len(names) == 1}


def _is(bundle: Bundle, name_or_path: str) -> bool:
    return name_or_path == bundle.name or Path(name_or_path).resolve() == bundle.path.resolve()


def owners(bundles: Sequence[Bundle]) -> dict[str, list[str]]:
    """For each label the names of the bundles that have it."""
    return {label: [b.name for b in bundles if label in b.labels] for b in bundles for label in b.labels}


def segment(bundle: Bundle, cases: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Run a bundle's own preprocessing, inferer and postprocessing; yields case, prediction and affine.

    The prediction is an integer array ``(X, Y, Z)`` on the grid of the image file.

    Raises:
        UserError: the weights do not fit the bundle's network.
    """
    import torch

    network = bundle.network().to(memory_format=torch.channels_last_3d)
    with bundle.code():
        segmenter = Segmenter(bundle)
        for name, case in tqdm(cases.items(), desc=bundle.name, disable=None, leave=False):
            yield name, *segmenter(segmenter.load(case["image"]), network)


def find_cases(dataset_dir: str | Path, part: str, split_file: str, fold: int) -> dict[str, dict]:
    """Image and label paths by case, of a part of a split.

    Raises:
        UserError: the dataset or the split is not there, or the part has no cases.
    """
    from tools.bundle_code.nnunet_data import all_cases, split_cases

    try:
        if part in ("all", "Ts"):
            return all_cases(dataset_dir, "Tr" if part == "all" else "Ts")
        if split_file and not Path(split_file).is_file():
            raise UserError(f"{split_file} not found")
        if not split_file and not (Path(dataset_dir) / "splits_final.json").is_file():
            raise UserError(
                f"{dataset_dir} has no splits_final.json that says which cases are {part!r}: name one by --split_file"
            )
        wanted = split_cases(dataset_dir, part, split_file or None, fold)
        named = all_cases(dataset_dir)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from None
    if not wanted:
        raise UserError(f"part {part!r} of the split has no cases to evaluate")
    return {name: case for name, case in named.items() if case in wanted}


def separate_cases(
    dataset_dir: str, part: str, test_part: str, split_file: str, fold: int
) -> tuple[dict[str, dict], dict[str, dict]]:
    """Cases to choose coefficients on, and cases to say what they are worth; none of these without a ``test_part``.

    Raises:
        UserError: they have cases in common.
    """
    validation = find_cases(dataset_dir, part, split_file, fold)
    test = find_cases(dataset_dir, test_part, split_file, fold) if test_part else {}
    shared = [name for name in test if name in validation and validation[name] == test[name]]
    if shared:
        raise UserError(
            f"the parts {part} and {test_part} share {len(shared)} cases ({', '.join(shared[:5])}): "
            "coefficients chosen on cases say nothing about them; split them apart"
        )
    return validation, test


def matched_channels(bundle: Bundle, dataset_dir: str | Path, labels: Mapping) -> dict[str, list[int] | None]:
    """The dataset's voxel values for each channel; None where it does not have them.

    Raises:
        UserError: it has none of them.
    """
    matched = found_channels(bundle, dataset_dir, labels)
    if all(values is None for values in matched.values()):
        raise UserError(
            f"{dataset_dir} has none of the labels of {bundle.path} ({', '.join(matched)}); map them by --labels"
        )
    return matched


def found_channels(bundle: Bundle, dataset_dir: str | Path, labels: Mapping) -> dict[str, list[int] | None]:
    """The same, also of a dataset that has none of the labels.

    What a channel was trained on counts, then its own name. A voxel value says something in the training dataset only.
    """
    from tools.bundle_code.nnunet_data import label_values

    dataset = data_facts(dataset_dir)["dataset"]
    found: dict[str, list[int] | None] = {}
    for label, sources in bundle.label_map.items():
        if label in labels:
            candidates = [parse_sources(labels[label])]
        elif bundle.dataset_of(label) == dataset or all(isinstance(source, str) for source in sources):
            candidates = [sources, [label]]
        else:
            candidates = [[label]]
        found[label] = None
        for candidate in candidates:
            try:
                found[label] = label_values(dataset_dir, {label: candidate})[0]
                break
            except ValueError:
                continue
    return found


def _draw(
    folder: Path,
    bundles: Sequence[Bundle],
    name: str,
    case: Mapping[str, Any],
    dataset_dir: str | Path,
    labels: Mapping,
) -> None:
    import nibabel
    from monai.transforms import LoadImage

    from tools.pictures import draw_case

    image = LoadImage(ensure_channel_first=True)(case["image"])
    truth = np.asarray(LoadImage(ensure_channel_first=True)(case["label"])[0])
    reference: dict[str, np.ndarray] = {}
    columns = {REFERENCE: reference}
    for bundle in bundles:
        channels = matched_channels(bundle, dataset_dir, labels)
        label_map = np.asarray(nibabel.load(folder / "label_maps" / bundle.name / f"{name}.nii.gz").dataobj)
        columns[bundle.name] = {label: label_map == i for i, label in enumerate(channels, start=1)}
        reference |= {label: np.isin(truth, values) for label, values in channels.items() if values is not None}
    draw_case(np.asarray(image[0]), np.asarray(image.affine), columns, folder / f"{name}.png", title=name)
