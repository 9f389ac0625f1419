"""SAM and ASAM in MONAI's trainer: one step by its formula, and nothing else of a run changes."""

import pytest
import torch
from monai.engines import SupervisedTrainer

from tools.bundle_code.sharpness import SharpnessAware

CURVATURE = torch.tensor([4.0, 1.0, 0.25])


class Quadratic(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        self.bias = torch.nn.Parameter(torch.tensor([0.5, 0.0, -1.0]))

    def forward(self, x):
        return 0.5 * (CURVATURE * (self.weight**2 + self.bias**2)).sum()


def step(network, handler, rate=0.1, images=None, **options):
    """Weights after one step of gradient descent."""
    images = torch.zeros(2, 1) if images is None else images
    trainer = SupervisedTrainer(
        torch.device("cpu"), 1, [{"image": images, "label": torch.zeros(2, 1)}], network,
        torch.optim.SGD(network.parameters(), rate), lambda output, _: output.mean(),
        train_handlers=[handler] if handler else None, **options,
    )  # fmt: skip
    trainer.run()
    return [parameter.detach() for parameter in network.parameters()]


@pytest.mark.parametrize("adaptive", [False, True])
def test_one_step_by_the_formula(adaptive):
    network, rho, eta = Quadratic(), 0.3, 0.01
    w, b = (parameter.detach().clone() for parameter in network.parameters())
    t = w.abs() + eta if adaptive else torch.ones(3)  # of a bias 1
    length = torch.cat([t * CURVATURE * w, CURVATURE * b]).norm()
    expected = [
        w - 0.1 * CURVATURE * (w + rho * t * t * CURVATURE * w / length),
        b - 0.1 * CURVATURE * (b + rho * CURVATURE * b / length),
    ]
    for found, wanted in zip(step(network, SharpnessAware(network, rho, adaptive, eta)), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_both_passes_drop_the_same_and_the_run_goes_on_as_without():
    seen, after = [], []
    for sharp in (True, False):
        torch.manual_seed(3)
        network = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(8))
        network[1].register_forward_hook(lambda layer, inputs, output: seen.append(output == 0))
        step(network, SharpnessAware(network, 0.1) if sharp else None, images=torch.randn(2, 8))
        after.append((torch.rand(3), network[2].running_mean.clone()))
    first, second, without = seen
    assert first.any() and not first.all()
    assert torch.equal(first, second)
    assert torch.equal(first, without)
    for a, b in zip(*after, strict=True):
        assert torch.equal(a, b)  # random numbers, and running statistics of the first pass alone


def test_weights_come_back_exactly_and_a_flat_place_stays():
    network = Quadratic()
    before = [parameter.detach().clone() for parameter in network.parameters()]
    assert all(map(torch.equal, before, step(network, SharpnessAware(network, 0.7), rate=0.0)))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert not any(parameter.any() for parameter in step(network, SharpnessAware(network, 0.7)))


def test_a_trainer_that_scales_or_accumulates_is_refused():
    network = Quadratic()
    with pytest.raises(ValueError, match="neither amp nor accumulation_steps"):
        step(network, SharpnessAware(network), accumulation_steps=2)
