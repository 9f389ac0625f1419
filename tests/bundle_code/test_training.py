"""Training handlers, alone."""

import platform
import subprocess
import sys

import pytest
import torch
from ignite.engine import Engine
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
def test_a_run_that_is_made_longer_goes_on_by_the_longer_schedule(tmp_path, schedule):
    """Two steps an epoch; the rates of four epochs, and then of eight in the same folder."""

    def rates(folder, epochs):
        network = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        steps = 2 * epochs
        if schedule == "cosine":
            scheduler = WarmupCosineSchedule(optimizer, warmup_steps=3, t_total=steps)
        else:
            scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps, power=0.9)
        used = []

        def step(engine, batch):
            optimizer.zero_grad()
            network(batch).sum().backward()
            used.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()

        engine, validator = Engine(step), Engine(lambda *_: None)
        paths = str(folder / "model.pt"), str(folder / "last.pt")
        ResumableCheckpoint(network, optimizer, scheduler, validator, *paths).attach(engine)
        engine.run([torch.ones(1, 2)] * 2, max_epochs=epochs)
        return used

    unbroken = rates(tmp_path / "unbroken", 8)
    rates(tmp_path / "longer", 4)
    assert rates(tmp_path / "longer", 8) == pytest.approx(unbroken[8:])
    assert min(unbroken[8:]) > 0
