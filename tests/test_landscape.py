"""Flatness of losses whose curvature is known: quadratic ones, and a small network against its dense Hessian."""

import numpy as np
import pytest
import torch

from tools.bundle_code.group_norm import GroupNorm3d
from tools.errors import UserError
from tools.landscape import Plane, Surface, barrier, empirical_fisher_trace, noisy_losses, on_line, top_eigenvalue


class Quadratic(torch.nn.Module):
    """½ Σ λ w², of a kernel of two filters and a bias; every image adds its own value, so that patches count."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.kernel, self.bias = torch.nn.Parameter(torch.randn(2, 5)), torch.nn.Parameter(torch.randn(3))
        self.curvature = {"kernel": torch.rand(2, 5) + 0.1, "bias": torch.tensor([0.2, 9.0, -1.0])}

    def forward(self, images):
        total = sum((self.curvature[name] * p**2).sum() / 2 for name, p in self.named_parameters())
        return total * images.flatten(1).mean(1)


@pytest.fixture
def surface():
    images = torch.tensor([0.5, 1.0, 1.5]).view(3, 1)  # their mean is 1; the last batch is smaller
    return Surface(Quadratic(), lambda output, _: output.mean(), [(b, b) for b in images.split(2)], ["kernel", "bias"])


def filters(network):
    """Curvature and mean square of each weight's filter."""
    for filter_, curvature in [
        *zip(network.kernel, network.curvature["kernel"]),
        (network.bias, network.curvature["bias"]),
    ]:
        yield curvature, filter_.detach().square().mean()


def test_the_top_eigenvalue_of_a_quadratic(surface):
    assert top_eigenvalue(surface) == pytest.approx(9.0, rel=1e-3)
    relative = max(float(curvature.max() * square) for curvature, square in filters(surface.network))
    assert top_eigenvalue(surface, relative=True) == pytest.approx(relative, rel=1e-3)


def test_the_expected_loss_under_relative_noise(surface):
    expected = sum(float(curvature.sum() * square) for curvature, square in filters(surface.network)) / 2
    rise = np.array(noisy_losses(surface, [0.1, 0.4], 400)) - surface.value()
    for level, rises in zip((0.1, 0.4), rise, strict=True):
        assert rises.mean() == pytest.approx(level**2 * expected, abs=4 * rises.std() / 400**0.5)
        assert rises.std() > 0
    before = surface.network.kernel.detach().clone()
    again = noisy_losses(surface, [0.1], 3)
    np.testing.assert_array_equal(again[0], rise[0, :3] + surface.value())
    assert torch.equal(surface.network.kernel, before)


def test_the_empirical_fisher_of_a_quadratic(surface):
    length = sum(
        float((surface.network.curvature[n] * p).square().sum()) for n, p in surface.network.named_parameters()
    )
    assert empirical_fisher_trace(surface) == pytest.approx(length * (0.25 + 1 + 2.25) / 3, rel=1e-5)


def test_the_hessian_of_a_network_whose_fast_normalisation_has_no_second_derivative():
    """Against PyTorch's dense Hessian of the same network with PyTorch's own normalisation."""
    torch.manual_seed(0)

    def network(normalisation):
        return torch.nn.Sequential(
            torch.nn.Conv3d(1, 4, 1), normalisation(2, 4), torch.nn.Tanh(), torch.nn.Conv3d(4, 2, 1)
        )

    ours, theirs = network(GroupNorm3d), network(torch.nn.GroupNorm)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 1, 3, 3, 3).contiguous(memory_format=torch.channels_last_3d)
    ours.to(memory_format=torch.channels_last_3d)
    surface = Surface(ours, lambda output, labels: (output**3).mean(), [(images, images)], list(ours.state_dict()))
    parameters = dict(theirs.named_parameters())

    def loss(flat):
        pieces = flat.split([p.numel() for p in parameters.values()])
        weights = {name: piece.view_as(p) for (name, p), piece in zip(parameters.items(), pieces, strict=True)}
        return (torch.func.functional_call(theirs, weights, images.contiguous()) ** 3).mean()

    hessian = torch.autograd.functional.hessian(loss, torch.cat([p.detach().reshape(-1) for p in parameters.values()]))
    assert top_eigenvalue(surface) == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=0.01)
    assert "forward" not in vars(ours[1])


def test_variances_stay_positive_and_the_first_of_several_outputs_counts():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm3d(1)

        def forward(self, x):
            return [self.norm(x), torch.full_like(x, torch.nan)]  # as with deep supervision

    network, images = Network().eval(), torch.randn(2, 1, 3, 3, 3)
    state = {name: tensor for name, tensor in network.state_dict().items() if tensor.is_floating_point()}
    surface = Surface(network, lambda output, _: output.square().mean(), [(images, images)], list(state))
    beyond = state | {"norm.running_var": torch.tensor([-0.3])}  # where a plane extrapolates
    assert np.isfinite(surface.values([state, beyond])).all()
    assert network.norm.running_var.item() == 1


def test_a_hessian_that_is_not_finite_is_said(surface):
    with torch.no_grad():
        surface.network.kernel[0, 0] = float("inf")
    with pytest.raises(UserError, match="not finite"):
        top_eigenvalue(surface, relative=True)


def test_the_barrier_of_a_known_line():
    t = np.linspace(0, 1, 11)
    assert barrier(t, 1 + 2 * t) == pytest.approx(0)
    assert barrier(t, (1 - t**2) * 4) == pytest.approx(1)  # chord 4 - 4t, highest above it at ½
    assert barrier(t, t**2) == 0
    halfway = on_line({"w": torch.zeros(2)}, {"w": torch.tensor([2.0, 4.0])}, 0.5)
    assert halfway["w"].tolist() == [1, 2]


def test_a_plane_goes_through_its_three_points_with_axes_of_unit_length():
    torch.manual_seed(0)
    points = [{"a": torch.randn(4, 3), "b": torch.randn(5)} for _ in range(3)]
    plane = Plane(*points)
    for (x, y), point in zip([(0, 0), plane.first, plane.second], points, strict=True):
        torch.testing.assert_close(plane.at(x, y), point)
    origin, right, up = (torch.cat([t.reshape(-1) for t in plane.at(*p).values()]) for p in [(0, 0), (1, 0), (0, 1)])
    torch.testing.assert_close((right - origin).norm(), torch.tensor(1.0))
    assert abs((right - origin) @ (up - origin)) < 1e-5
    with pytest.raises(UserError, match="on one line"):
        Plane(points[0], points[1], on_line(points[0], points[1], 0.3))
