"""``pseudo_labels``: what all specialists see in unlabelled scans, as a dataset on which one model for all tasks is trained.

Where task vectors do not merge, because each specialist made its own features of organs that the starting point never saw,
this does without merging: a student learns all organs from the label maps of their specialists (pseudo-labels: Lee, ICML
workshop 2013; one network from several specialists of partly labelled organs: for example Huang et al., Multi-organ
segmentation via co-training weight-averaged models, MICCAI 2020). No label is needed, only scans and the task vectors.
"""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tools.bundle import Bundle, read_json, write_json
from tools.demo import tools
from tools.errors import UserError
from tools.markdown import table
from tools.merge import merge_recipe, split_paths
from tools.output import complete_output
from tools.recipe import Recipe
from tools.scans import all_scans
from tools.segmenter import Segmenter, write_label_map
from tools.task_vector import TaskVector
from tools.unfinished import clear, kept_file, unfinished

ENDING = ".nii.gz"


def pseudo_labels(
    pretrained: str,
    vectors: str | Sequence[str],
    images: str,
    output: str,
    part: str = "",
    split_file: str = "",
    overlays: bool = True,
    overwrite: bool = False,
) -> None:
    """Segment scans with every specialist, and write an nnU-Net raw dataset on which one model for all tasks is trained.

    Where two specialists claim a voxel, the one whose margin over background is larger has it. A stopped run goes on: what is
    done waits in <output>.partial. Images that cannot be read are named and left out.

    Args:
        pretrained: the starting point, a bundle with weights.
        vectors: task vector files, separated by commas, in the order of the labels.
        images: folder of images, or an nnU-Net dataset, whose labels are not looked at.
        output: folder of the dataset. Images in .nii.gz are links to where they are; others are converted.
        part: of an nnU-Net dataset: "train", "val" or "test" of its split; default: all labelled cases.
        split_file: JSON file with the split; default: the dataset's splits_final.json.
        overlays: draw the label maps, one PNG per scan.
        overwrite: replace the output if it exists.
    """
    from tools.specialists import rebuild

    files = split_paths(vectors)
    if not files:
        raise UserError("no task vectors, so no specialists")
    if Path(output).resolve() in (Path(images).resolve(), *Path(images).resolve().parents):
        raise UserError(f"{output} holds the images; choose another --output")
    start = Bundle(pretrained)
    cases = _by_name(all_scans(images, start, part, split_file))
    with (
        complete_output(output, overwrite, sign="dataset.json") as folder,
        tempfile.TemporaryDirectory() as temporary,
    ):
        # a merge has the channels of all; its weights are not used
        merge_recipe(Recipe(pretrained, files), Path(temporary) / "all", quiet=True)
        stacked = Bundle(Path(temporary) / "all")
        specialists = rebuild(pretrained, files)
        tasks = [TaskVector(path) for path in files]
        facts = [stacked.inference, [task.sha256 for task in tasks], str(Path(images).resolve())]
        done = unfinished(output, "label_maps", facts)
        done.mkdir(parents=True, exist_ok=True)
        with stacked.code():
            readable = _segment(Segmenter(stacked), specialists, cases, done)
        volumes = _volumes(readable.values(), len(stacked.labels))
        if not any(volume.any() for volume in volumes):
            raise UserError(f"the specialists see none of {', '.join(stacked.labels)} in the {len(readable)} scans")
        for name in readable:
            _put_images(cases[name], name, folder / "imagesTr")
        (folder / "labelsTr").mkdir()
        for name, label_map in readable.items():
            shutil.copyfile(label_map, folder / "labelsTr" / f"{name}{ENDING}")
        write_json(folder / "dataset.json", _description(images, stacked, tasks, len(readable)))
        if overlays:
            _draw(folder, stacked.labels, list(readable))
    clear(output)
    print(_table(stacked.labels, volumes))
    labels = json.dumps({label: label for label in stacked.labels})
    train = tools("new_task", pretrained=pretrained, dataset_dir=output, task="all", labels=labels)
    print(
        f"written: {output}/imagesTr, labelsTr, dataset.json{', overlays/' if overlays else ''}. A model of all of them:\n"
        f"{shlex.join(map(str, train))} --output <bundle>"
    )


def _by_name(scans: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Scans by what nnU-Net calls a case.

    Raises:
        UserError: two would be one.
    """
    from tools.bundle_code.label_maps import first_file, image_name

    cases: dict[str, Mapping[str, Any]] = {}
    for scan in scans:
        name = image_name(first_file(scan)).removesuffix("_0000")
        if name in cases:
            raise UserError(f"{first_file(cases[name])} and {first_file(scan)} would both be case {name}: rename one")
        cases[name] = scan
    return cases


def _segment(
    segmenter: Segmenter, network: Any, cases: Mapping[str, Mapping[str, Any]], folder: Path
) -> dict[str, Path]:
    """Write the label map of each case that can be read, unless it is there; returns their files.

    Raises:
        UserError: none can be read.
    """
    readable = {}
    for name, case in tqdm(cases.items(), desc="scans", disable=None, leave=False):
        path = kept_file(folder, name, ENDING, case["image"])
        if not path.is_file():
            try:
                loaded = segmenter.load(case["image"])
            except UserError as error:
                tqdm.write(f"{error}; it is left out")
                continue
            write_label_map(path, *segmenter(loaded, network))
        readable[name] = path
    if not readable:
        raise UserError("none of the images can be read")
    return readable


def _volumes(label_maps: Iterable[Path], labels: int) -> np.ndarray:
    """Millilitres by label and case, (labels, cases)."""
    import nibabel

    found = []
    for path in label_maps:
        label_map = nibabel.load(path)
        counts = np.bincount(np.asarray(label_map.dataobj).ravel(), minlength=1 + labels)[1:]
        found.append(counts * abs(np.linalg.det(label_map.affine[:3, :3])) / 1000)
    return np.array(found).T


def _put_images(case: Mapping[str, Any], name: str, folder: Path) -> None:
    """Link the files of an image, channel by channel, or convert it."""
    import nibabel
    from monai.transforms import EnsureChannelFirst
    from monai.utils import ensure_tuple

    from tools.bundle_code.images import LoadImageOrSeriesd

    folder.mkdir(parents=True, exist_ok=True)
    files = ensure_tuple(case["image"])
    if all(file.endswith(ENDING) for file in files):
        for channel, file in enumerate(files):
            place = folder / f"{name}_{channel:04d}{ENDING}"
            try:
                place.symlink_to(Path(file).resolve())
            except OSError:  # a file system without links
                shutil.copyfile(file, place)
        return
    image = EnsureChannelFirst()(LoadImageOrSeriesd("image")(dict(case))["image"])
    for channel, voxels in enumerate(image):
        place = folder / f"{name}_{channel:04d}{ENDING}"
        nibabel.save(nibabel.Nifti1Image(voxels.numpy(), image.affine.numpy()), place)


def _description(images: str, stacked: Bundle, tasks: Sequence[TaskVector], count: int) -> dict[str, Any]:
    """dataset.json: what nnU-Net wants in it, and where labels and images come from."""
    source = Path(images) / "dataset.json"
    said = read_json(source) if source.is_file() else {}
    names = said.get("channel_names") or said.get("modality")
    facts = {name: said[name] for name in ("licence", "license", "reference") if name in said}
    return {
        "name": f"{said.get('name') or Path(images).resolve().name} with pseudo-labels",
        "description": f"Label maps of the specialists {', '.join(task.task for task in tasks)}, not of people",
        **facts,
        "channel_names": names or stacked.metadata["network_data_format"]["inputs"]["image"]["channel_def"],
        "labels": {"background": 0, **{label: number for number, label in enumerate(stacked.labels, start=1)}},
        "label_map": stacked.label_map,
        "numTraining": count,
        "file_ending": ENDING,
        "specialists": [{"task": task.task, "sha256": task.sha256} for task in tasks],
        "pretrained_sha256": tasks[0].facts.pretrained_sha256,
    }


def _draw(folder: Path, labels: Sequence[str], cases: Sequence[str]) -> None:
    import nibabel

    from tools.pictures import draw_case

    (folder / "overlays").mkdir()
    for name in tqdm(cases, desc="pictures", disable=None, leave=False):
        image = nibabel.load(folder / "imagesTr" / f"{name}_0000{ENDING}")
        label_map = np.asarray(nibabel.load(folder / "labelsTr" / f"{name}{ENDING}").dataobj)
        masks = {label: label_map == number for number, label in enumerate(labels, start=1)}
        voxels = np.asarray(image.dataobj)
        draw_case(voxels, image.affine, {"pseudo-labels": masks}, folder / "overlays" / f"{name}.png", title=name)


def _table(labels: Sequence[str], volumes: np.ndarray) -> str:
    """In how many scans each label was found, and how large it is there."""
    rows = []
    for label, found in zip(labels, volumes, strict=True):
        there = found[found > 0]
        median = f"{np.median(there):.1f}" if len(there) else ""
        rows.append([label, f"{len(there)} of {len(found)}", median])
    return table(["label", "found in", "median volume there, ml"], rows)
