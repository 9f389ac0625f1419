"""A folder of images: seconds of MONAI's evaluator, step after step, and of ours, loading and saving beside the network."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from tools.bundle import Bundle, read_json, write_json
from tools.bundle_code.residual_unet import ResidualUNet3D
from tools.instantiate import copy_template, set_labels

ROOT = Path(__file__).parents[2]
COUNT, SIZE, WIDTH = 8, (224, 224, 192), 8
WINDOWS = {"patch_size": [64, 64, 64], "overlap": 0.25}


def compare_cohorts() -> None:
    """Print a line for each way, with its ratio to the first, and whether their label maps are equal."""
    print(
        f"{torch.get_num_threads()} threads; {COUNT} images of {' × '.join(map(str, SIZE))} at 1.5 mm, segmented at 3 mm"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _make(folder)
        _measure("warming up", folder, False)  # files into the page cache
        first: float | None = None
        for overlapped in (False, True, False, True):
            way = "ours" if overlapped else "monai"
            seconds = _measure(way, folder, overlapped)
            first = first or seconds
            print(f"{way:<20} {seconds:8.2f} s {first / seconds:6.2f} x", flush=True)
        maps = [sorted((folder / way).glob("*_seg.nii.gz")) for way in ("monai", "ours")]
        same = all(np.array_equal(*(np.asarray(nibabel.load(path).dataobj) for path in pair)) for pair in zip(*maps))
        print(f"{[len(paths) for paths in maps]} label maps, {'equal' if same else 'not equal'}")


def _make(folder: Path) -> None:
    """Smooth noise, which compresses about as a CT does, and a bundle with random weights that resamples."""
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    volume = gaussian_filter(generator.standard_normal(SIZE, np.float32), 2) * 5000
    volume += generator.integers(-10, 10, SIZE)
    for number in range(COUNT):
        image = nibabel.Nifti1Image(np.roll(volume, 20 * number, 0).astype(np.int16), np.diag([1.5, 1.5, 1.5, 1]))
        nibabel.save(image, folder / "images" / f"ct{number}.nii.gz")
    bundle = folder / "bundle"
    copy_template(ROOT / "bundles" / "merged_inference", bundle)
    set_labels(bundle, {f"organ {number}": [number] for number in range(1, 10)})
    path = bundle / "configs" / "inference.json"
    config = read_json(path) | WINDOWS
    config["network_def"]["width"] = WIDTH
    spacing = {"_target_": "Spacingd", "keys": "image", "pixdim": [3.0, 3.0, 3.0], "mode": "bilinear"}
    config["preprocessing"]["transforms"].insert(3, spacing)
    write_json(path, config)
    torch.manual_seed(0)
    torch.save(ResidualUNet3D(1, 10, width=WIDTH).state_dict(), bundle / "models" / "model.pt")


def _measure(way: str, folder: Path, overlapped: bool) -> float:
    """Seconds from the first image's loading to the last label map, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    mine, other = context.Pipe()
    process = context.Process(target=_segment, args=(other, way, folder, overlapped), daemon=True)
    process.start()
    seconds = mine.recv()
    process.join()
    return seconds


def _segment(connection: Connection, way: str, folder: Path, overlapped: bool) -> None:
    bundle = Bundle(folder / "bundle")
    output = str(folder / way)
    with bundle.code():
        parser = bundle.parser(dataset_dir=str(folder / "images"), output_dir=output, overwrite=True)
        if not overlapped:
            _one_after_another(parser, output)
        evaluator = parser.get_parsed_content("evaluator")
        began = time.perf_counter()
        evaluator.run()
        connection.send(time.perf_counter() - began)


def _one_after_another(parser: Any, output: str) -> None:
    """MONAI's own components instead of ours."""
    parser["dataset"] = {"_target_": "Dataset", "data": parser["dataset"]["data"], "transform": "@preprocessing"}
    parser["dataloader"] = {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1}
    save = {"output_postfix": "seg", "output_dtype": "$np.uint8", "separate_folder": False, "resample": False}
    transforms = parser["postprocessing"]["transforms"]
    transforms[-1] = {"_target_": "SaveImaged", "keys": "pred", "output_dir": output, "print_log": False, **save}
    parser["postprocessing"] = {"_target_": "Compose", "transforms": transforms}
    references = ("device", "network", "inferer", "postprocessing")
    evaluator = {"_target_": "SupervisedEvaluator", "val_data_loader": "@dataloader", "val_handlers": "@handlers"}
    parser["evaluator"] = evaluator | {name: f"@{name}" for name in references}
