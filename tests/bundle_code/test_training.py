"""Training handlers, alone."""

import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import Dataset
from monai.optimizers import WarmupCosineSchedule
from monai.transforms import RandGaussianNoise

from tests.conftest import ROOT
from tools.bundle_code.training import ResumableCheckpoint, SeedEpochs, WeightAverage

FAULTS = """
import resource, torch
from tools.bundle_code.training import ReuseMemory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.zeros(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = page_faults()
ReuseMemory()()
page_faults()
print(before, page_faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep freed memory")
def test_large_tensors_reuse_memory():
    words = [sys.executable, "-c", FAULTS]
    before, after = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert int(after) < int(before) / 10


@pytest.mark.parametrize("averaged", [False, True])
def test_weights_that_are_no_numbers_are_not_saved(tmp_path, averaged):
    network = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(network.parameters(), 1.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    files = tmp_path / "model.pt", tmp_path / "last.pt"
    average = WeightAverage(network, "swa", start=0.9) if averaged else None  # which has not begun
    validator = Engine(lambda *_: None)
    checkpoint = ResumableCheckpoint(network, optimizer, schedule, validator, *map(str, files), average=average)
    engine = Engine(lambda *_: network.bias.data.fill_(torch.nan) if engine.state.epoch == 2 else None)
    checkpoint.attach(engine)
    with pytest.raises(
        ValueError, match="after epoch 2 the tensor bias has NaN or infinite values, and nothing is saved"
    ):
        engine.run([0], max_epochs=3)
    assert not files[0].exists()
    assert torch.load(files[1])["epoch"] == 1


@pytest.mark.parametrize(("step", "alike"), [(0, True), (1000, False)])
def test_seeded_epochs(step, alike):
    drawn, dataset = [], Dataset([torch.zeros(1, 2)], RandGaussianNoise(prob=1))
    engine = Engine(lambda *_: drawn.append((dataset[0].sum().item(), torch.rand(()).item())))
    SeedEpochs(7, dataset, step).attach(engine)
    for _ in range(2):
        engine.run([0], max_epochs=2)
    first, second, *again = drawn
    assert (first == second) == alike
    assert again == [first, second]


@pytest.mark.parametrize("schedule", ["cosine", "polynomial"])
def test_a_run_goes_on_as_what_it_is_now_told_to_be(tmp_path, schedule):
    """Cosine by steps, or polynomial by epochs; begun with four epochs of two steps, gone on with as other runs."""

    def rates(folder, epochs, length=2, rate=0.1, decay=0.0):
        network = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(network.parameters(), lr=rate, weight_decay=decay)
        if schedule == "cosine":
            scheduler = WarmupCosineSchedule(optimizer, warmup_steps=3, t_total=length * epochs)
        else:
            scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=epochs, power=0.9)
        used = []

        def step(engine, batch):
            optimizer.zero_grad()
            network(batch).sum().backward()
            used.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]))
            optimizer.step()
            if schedule == "cosine":
                scheduler.step()

        engine, validator = Engine(step), Engine(lambda *_: None)
        if schedule == "polynomial":
            engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: scheduler.step())
        paths = str(folder / "model.pt"), str(folder / "last.pt")
        ResumableCheckpoint(network, optimizer, scheduler, validator, *paths).attach(engine)
        engine.run([torch.ones(1, 2)] * length, max_epochs=epochs)
        return np.array(used)

    for number, other in enumerate(({}, {"length": 1}, {"length": 6, "rate": 0.01, "decay": 0.1})):
        unbroken = rates(tmp_path / f"unbroken{number}", 8, **other)
        rates(tmp_path / f"longer{number}", 4)
        gone_on = rates(tmp_path / f"longer{number}", 8, **other)
        np.testing.assert_allclose(gone_on, unbroken[len(unbroken) // 2 :], rtol=1e-6)
        assert gone_on[:, 0].min() > 0
