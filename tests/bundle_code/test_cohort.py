"""Loading, network and saving at once, in bounded memory; how processes share the images."""

import threading

import pytest
import torch
from monai.data import MetaTensor, ThreadDataLoader

from tools.bundle_code.cohort import CohortDataset, CohortEvaluator, share
from tools.bundle_code.label_maps import LabelMaps, SaveImageOrNothingd

COUNT = 6


class Stages:
    """Which images have entered loading, network and saving; each stage can wait for another one."""

    def __init__(self):
        self.entered = {stage: [threading.Event() for _ in range(COUNT)] for stage in ("load", "network", "save")}
        self.late = []
        self.alive = set()
        self.most = 0

    def enter(self, stage, number, wait_for, next_number):
        if stage == "load":
            self.alive.add(number)
            self.most = max(self.most, len(self.alive))
        self.entered[stage][number].set()
        if next_number < COUNT and not self.entered[wait_for][next_number].wait(20):
            self.late.append((stage, number))
        if stage == "save":
            self.alive.discard(number)


def make_evaluator(folder, files, load, network, save):
    (folder / "model.pt").touch()
    return CohortEvaluator(
        device=torch.device("cpu"),
        network=network,
        val_data_loader=ThreadDataLoader(CohortDataset([{"image": file} for file in files], load, 1)),
        postprocessing=save,
        label_maps=LabelMaps(folder / "out"),
        models=[folder / "model.pt"],
        config=folder / "inference.json",
        settings={},
    )


def test_the_next_image_is_loaded_and_segmented_while_one_is_saved(tmp_path):
    """Each image's network waits until the next is being loaded, its saving until the next is in the network."""
    stages = Stages()

    def load(item):
        number = int(item["image"])
        stages.enter("load", number, "load", COUNT)
        return {"image": torch.full((1, 2, 2, 2), float(number))}

    class Network(torch.nn.Module):
        def forward(self, image):
            stages.enter("network", int(image.max()), "load", int(image.max()) + 1)
            return image

    def save(data):
        stages.enter("save", int(data["pred"].max()), "network", int(data["pred"].max()) + 1)
        return data

    evaluator = make_evaluator(tmp_path, map(str, range(COUNT)), load, Network(), save)
    evaluator.run()
    assert not stages.late
    assert evaluator.segmented == COUNT
    assert stages.most <= 4


def test_processes_that_start_one_after_another_share_the_images(tmp_path, monkeypatch, capsys):
    """As the jobs of an array do; a later run of one process knows of the failures that are left, and only of those."""
    broken = {"/d/b.nii", "/d/d.nii"}

    def load(item):
        if item["image"] in broken:
            raise OSError("cannot be read")
        return {"image": MetaTensor(torch.ones(1, 4, 4, 4), meta={"filename_or_obj": item["image"]})}

    def segment():
        save = SaveImageOrNothingd("pred", LabelMaps(tmp_path / "out"), output_dtype="uint8", resample=False)
        files = [f"/d/{letter}.nii" for letter in "abcde"]
        make_evaluator(tmp_path, files, load, torch.nn.Identity(), save).run()

    def there():
        return sorted(path.name for path in (tmp_path / "out").iterdir() if path.name != "label_maps.json")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    segment()
    assert there() == ["a_seg.nii.gz", "c_seg.nii.gz", "e_seg.nii.gz"]
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match=r"2 of 2 images failed \(b.nii, d.nii\)"):
        segment()
    assert there() == ["a_seg.nii.gz", "c_seg.nii.gz", "e_seg.nii.gz", "failed_1_of_2.csv"]
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    broken.remove("/d/b.nii")
    with pytest.raises(SystemExit, match=r"1 of 2 images failed \(d.nii\)"):
        segment()
    assert "3 of 5 images have their label map" in capsys.readouterr().out
    assert there() == ["a_seg.nii.gz", "b_seg.nii.gz", "c_seg.nii.gz", "e_seg.nii.gz", "failed.csv"]


def test_processes_are_counted_from_zero(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert share() == (0, 1)
    for rank, processes in (("2", "2"), ("", "2"), ("0", ""), ("one", "2")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", processes)
        with pytest.raises(SystemExit, match="processes are numbered from 0 to WORLD_SIZE - 1"):
            share()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert share() == (1, 2)
