"""Averaged weights: by their formulas, what validation sees and what is kept, and over a run that is broken off."""

import pytest
import torch
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import MeanAbsoluteError, ValidationHandler

from tools.bundle_code.training import ResumableCheckpoint, WeightAverage


def _stacked(outputs):
    return tuple(torch.stack([output[key] for output in outputs]) for key in ("pred", "label"))


def run(folder, method, epochs=4, stop=None, start=0.0, seen=None, track=None):
    """Four epochs of three steps of a linear layer with batch normalisation; returns the network and what is on disk."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.BatchNorm1d(1))
    images = [torch.randn(4, 2) for _ in range(3)]
    batches = [{"image": image, "label": image.sum(1, keepdim=True)} for image in images]
    device, optimizer = torch.device("cpu"), torch.optim.SGD(network.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    metric = {"error": MeanAbsoluteError(output_transform=_stacked)}
    validator = SupervisedEvaluator(device, batches, network, key_val_metric=metric)
    average = WeightAverage(network, method, start) if method else None
    files = str(folder / "model.pt"), str(folder / "last.pt")
    handlers = [
        ValidationHandler(1, validator),
        ResumableCheckpoint(network, optimizer, scheduler, validator, *files, average=average),
    ]
    trainer = SupervisedTrainer(
        device, epochs, batches, network, optimizer, torch.nn.MSELoss(), train_handlers=handlers
    )
    if track is not None:
        trainer.add_event_handler("ITERATION_COMPLETED", lambda _: track.append(network[0].weight.detach().clone()))
    if seen is not None:
        validator.add_event_handler("EPOCH_STARTED", lambda _: seen.append(network[0].weight.detach().clone()))
    if stop:
        trainer.add_event_handler(
            "EPOCH_COMPLETED", lambda engine: engine.terminate() if engine.state.epoch == stop else None
        )
    trainer.run()
    return network, torch.load(files[0], weights_only=True), torch.load(files[1], weights_only=True), images


def test_swa_is_the_mean_of_the_steps_after_its_start_and_is_what_is_validated_and_kept(tmp_path):
    steps, seen = [], []
    network, model, _, images = run(tmp_path, "swa", start=0.5, seen=seen, track=steps)
    means = [torch.stack(steps[5:end]).mean(0) for end in (9, 12)]
    torch.testing.assert_close(seen[:2], steps[2:6:3])  # until then the weights themselves
    torch.testing.assert_close(seen[2:], means)
    assert any(torch.allclose(model["0.weight"], mean) for mean in means)  # never a model of the first epochs
    assert torch.equal(network[0].weight, steps[-1])  # training went on from its own weights
    outputs = torch.cat([image @ model["0.weight"].T + model["0.bias"] for image in images])
    torch.testing.assert_close(model["1.running_mean"], outputs.mean(0), rtol=1e-4, atol=1e-5)


def test_ema_by_its_recursion(tmp_path):
    steps, seen = [], []
    run(tmp_path, "ema", seen=seen, track=steps)
    average = steps[0]
    for count, weight in enumerate(steps[1:], start=1):
        decay = min(0.999, (1 + count) / (10 + count))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(seen[-1], average)


@pytest.mark.parametrize("method", ["swa", "ema"])
def test_a_run_that_is_broken_off_keeps_its_average(tmp_path, method):
    (tmp_path / "whole").mkdir(), (tmp_path / "broken").mkdir()
    *_, whole, _ = run(tmp_path / "whole", method, start=0.25)
    run(tmp_path / "broken", method, start=0.25, stop=2)
    *_, broken, _ = run(tmp_path / "broken", method, start=0.25)
    assert whole["epoch"] == broken["epoch"] == 4
    assert whole["average"]["n_averaged"] == broken["average"]["n_averaged"] > 1
    for name, tensor in whole["average"].items():
        torch.testing.assert_close(broken["average"][name], tensor)


def test_another_method_is_refused():
    with pytest.raises(ValueError, match="'swa' or 'ema', not by 'polyak'"):
        WeightAverage(torch.nn.Linear(1, 1), "polyak")
