"""Loading, network and saving at once, in bounded memory; how processes share the images."""

import threading

import pytest
import torch
from monai.data import ThreadDataLoader

from tools.bundle_code.cohort import CohortDataset, CohortEvaluator, share
from tools.bundle_code.label_maps import LabelMaps

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

    model = tmp_path / "model.pt"
    model.touch()
    evaluator = CohortEvaluator(
        device=torch.device("cpu"),
        network=Network(),
        val_data_loader=ThreadDataLoader(CohortDataset([{"image": str(n)} for n in range(COUNT)], load, 1)),
        postprocessing=save,
        label_maps=LabelMaps(tmp_path / "out"),
        models=[model],
        config=tmp_path / "inference.json",
        settings={},
    )
    evaluator.run()
    assert not stages.late
    assert evaluator.segmented == COUNT
    assert stages.most <= 4


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
