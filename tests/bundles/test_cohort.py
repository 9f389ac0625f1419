"""A folder of many images, as a clinic segments it: some are broken, a run is stopped and goes on, processes share it."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import nibabel
import numpy as np
import pytest
import torch

from tests.conftest import ROOT, run
from tools.bundle import read_json
from tools.instantiate import copy_template, set_labels

SIZE = 40


def words(bundle, images, output, *extra):
    config = bundle / "configs" / "inference.json"
    named = {"config_file": config, "bundle_root": bundle, "dataset_dir": images, "output_dir": output}
    given = [str(word) for name, value in named.items() for word in (f"--{name}", value)]
    return ["monai.bundle", "run", *given, "--patch_size", "[32, 32, 32]", *map(str, extra)]


def environment(**more):
    return {**os.environ, "PYTHONPATH": "", **more}


def save(path, *shape, seed=0):
    data = np.random.default_rng(seed).random(shape).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), path)


def label_maps(folder):
    return {path.name: np.asarray(nibabel.load(path).dataobj) for path in sorted(folder.glob("*_seg.nii.gz"))}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort") / "images"
    folder.mkdir()
    for number in range(6):
        save(folder / f"ct{number}.nii.gz", SIZE, SIZE, SIZE, seed=number)
    return folder


@pytest.fixture(scope="module")
def expected(untrained, images, tmp_path_factory):
    """The label maps that an undisturbed run of two processes writes, two broken images among those of the second one."""
    folder = tmp_path_factory.mktemp("expected")
    shutil.copytree(images, folder / "images")
    for name in ("ct0_broken.mha", "ct1_broken.mha"):
        (folder / "images" / name).write_text("not an image")
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    result = run(*launcher, *words(untrained, folder / "images", folder / "out"), check=False, PYTHONPATH="")
    return folder / "out", result


def test_two_processes_segment_each_image_once(expected):
    """The second process is through first, and its failures do not make torchrun stop the other one."""
    output, result = expected
    assert result.returncode == 1
    assert sorted(re.findall(r"(ct\d)\.nii\.gz: segmented", result.stdout)) == [f"ct{number}" for number in range(6)]
    assert sorted(label_maps(output)) == [f"ct{number}_seg.nii.gz" for number in range(6)]
    assert "4 of 4 images segmented" in result.stdout and "2 of 4 images segmented" in result.stdout
    others = sorted(path.name for path in output.iterdir() if not path.name.endswith("_seg.nii.gz"))
    assert others == ["failed_1_of_2.csv", "label_maps.json"]


def test_broken_images_are_named_and_do_not_stop_the_rest(untrained, tmp_path):
    images, output = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for name in ("a", "d", "z"):
        save(images / f"{name}.nii.gz", SIZE, SIZE, SIZE)
    save(images / "two_channels.nii.gz", SIZE, SIZE, SIZE, 2)
    save(images / "large.nii.gz", 72, 72, 72)
    whole = (images / "a.nii.gz").read_bytes()
    (images / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    (images / "text.mha").write_text("not an image")
    (images / "1.2.840.1").mkdir()
    (images / "1.2.840.1" / "0.dcm").write_bytes(bytes(128) + b"DICM" + bytes(9))

    command = [sys.executable, "-m", *words(untrained, images, output, "--output_ext", ".nii")]
    limited = [
        "bash",
        "-c",
        'ulimit -f 300; exec "$@"',
        "bash",
        *command,
    ]  # 300 KiB a file: that of "large" is not written
    result = subprocess.run(limited, cwd="/", env=environment(), capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "3 of 8 images segmented" in result.stdout
    assert sorted(p.name for p in output.glob("*.nii")) == ["a_seg.nii", "d_seg.nii", "z_seg.nii"]
    reasons = {
        "cut.nii.gz": "EOFError: Compressed file ended before the end-of-stream marker",
        "text.mha": "Could not create IO object for reading file",
        "two_channels.nii.gz": "it has 2 channels, the network needs 1",
        "large.nii.gz": "File too large",
        "1.2.840.1": "no DICOM image series",
    }
    table = dict(list(csv.reader((output / "failed.csv").open()))[1:])
    assert {os.path.basename(file) for file in table} == set(reasons)
    for name, reason in reasons.items():
        assert reason in table[str(images / name)]
        assert len(re.findall(rf"{re.escape(str(images / name))}: not segmented: .*{reason}", result.stderr)) == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("5 of 8 images failed (") and str(output / "failed.csv") in last

    before = {path: path.stat().st_mtime_ns for path in output.glob("*.nii")}
    shutil.copy(images / "z.nii.gz", images / "cut.nii.gz")
    for name in ("text.mha", "two_channels.nii.gz"):
        (images / name).unlink()
    shutil.rmtree(images / "1.2.840.1")
    result = run(*words(untrained, images, output, "--output_ext", ".nii"), PYTHONPATH="")
    assert "3 of 5 images have their label map" in result.stdout
    assert "2 of 2 images segmented" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not (output / "failed.csv").exists()
    assert nibabel.load(output / "large_seg.nii").shape == (72, 72, 72)


def test_a_run_that_is_stopped_or_killed_goes_on_and_mixes_nothing(untrained, images, expected, tmp_path):
    output = tmp_path / "out"
    for name in ("ct0_seg.nii.gz", "ct5_seg.nii.gz"):  # as a killed run leaves them
        (output / f".{name}.unfinished").mkdir(parents=True)
        (output / f".{name}.unfinished" / name).write_bytes(b"half of it")
    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        before = len(label_maps(output))
        command = [sys.executable, "-m", *words(untrained, images, output)]
        with subprocess.Popen(command, cwd="/", env=environment(), stderr=subprocess.PIPE, text=True) as process:
            deadline = time.monotonic() + 100
            while len(list(output.glob("*_seg.nii.gz"))) == before and time.monotonic() < deadline:
                time.sleep(0.002)
            process.send_signal(number)
            _, said = process.communicate()
        assert process.returncode == code, said
        assert "Traceback" not in said
        if number == signal.SIGTERM:
            assert re.search(r"stopped: \d of 6 images segmented; run it again to go on", said)
        assert before < len(label_maps(output)) < 6  # each of them can be read
    kept = {path: path.stat().st_mtime_ns for path in output.glob("*_seg.nii.gz")}

    result = run(*words(untrained, images, output, "--precision", "float32"), check=False, PYTHONPATH="")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == (
        f"{output} has label maps made with another precision: take another --output_dir, or make them again by --overwrite True"
    )
    assert "Traceback" not in result.stderr

    result = run(*words(untrained, images, output), PYTHONPATH="")
    assert f"{len(kept)} of 6 images have their label map" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not list(output.glob(".*"))
    found, wanted = label_maps(output), label_maps(expected[0])
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    recorded, other = (json.loads((folder / "label_maps.json").read_text()) for folder in (output, expected[0]))
    assert (recorded["models"], recorded["settings"]) == (other["models"], other["settings"])
    assert recorded["images"] == {f"ct{n}_seg.nii.gz": str(images / f"ct{n}.nii.gz") for n in range(6)}

    run(*words(untrained, images, output, "--precision", "float32", "--overwrite", "True"), PYTHONPATH="")
    assert all(path.stat().st_mtime_ns > kept[path] for path in kept)
    assert json.loads((output / "label_maps.json").read_text())["settings"]["precision"] == "float32"


def test_two_images_of_one_name_are_refused_before_the_first(untrained, images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "ct0.nrrd").touch()
    result = run(*words(untrained, tmp_path / "images", tmp_path / "out"), check=False, PYTHONPATH="")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "ct0.nii.gz and " in result.stderr and "would both have the label map ct0_seg.nii.gz" in result.stderr
    assert not (tmp_path / "out").exists()


def test_more_than_255_classes(tmp_path, images):
    """The last of 300 classes is a voxel value of its own, and stays one in the file."""
    bundle = tmp_path / "many"
    copy_template(ROOT / "bundles" / "merged_inference", bundle)
    set_labels(bundle, {f"class {number}": [number] for number in range(1, 301)})
    path = bundle / "configs" / "inference.json"
    path.write_text(path.read_text().replace('"width": 64', '"width": 4'))
    from tools.bundle import Bundle

    with Bundle(bundle).code():
        network = Bundle(bundle).parser().get_parsed_content("network_def")
    state = {name: torch.zeros_like(tensor) for name, tensor in network.state_dict().items()}
    (bias,) = (name for name, tensor in state.items() if tensor.shape == (301,))
    state[bias][300] = 1
    torch.save(state, bundle / "models" / "model.pt")
    run(*words(bundle, images / "ct0.nii.gz", tmp_path / "out"), PYTHONPATH="")
    label_map = nibabel.load(tmp_path / "out" / "ct0_seg.nii.gz")
    assert label_map.get_data_dtype() == np.uint16
    assert np.unique(np.asarray(label_map.dataobj)).tolist() == [300]
    shipped = read_json(ROOT / "bundles" / "merged_inference" / "configs" / "inference.json")
    assert shipped["postprocessing"]["transforms"][-1]["output_dtype"] == "$np.uint8"
