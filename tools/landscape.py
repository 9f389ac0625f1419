"""The loss of a network on fixed patches as a function of its weights, and how flat it is around them.

Of a network only the backbone is moved: that is what a merge moves, too. All numbers are of the same patches, in evaluation mode
and float32, so that they come out the same again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from tools.errors import UserError
from tools.merge_engine import SMALLEST_VARIANCE

if TYPE_CHECKING:
    from torch import Tensor, nn

TOLERANCE = 0.01  # of an eigenvalue, relative
SUBSPACE = 10  # directions that Lanczos keeps in memory, each as large as the backbone
RESTARTS = 30


@dataclass(frozen=True)
class Surface:
    """The loss of one network over its weights.

    Attributes:
        network: in evaluation mode.
        loss: of its output and labels, a mean over a batch.
        batches: images (N, in, …) and labels (N, 1, …).
        moved: names of the tensors that are moved, of its state dict.
        columns: those of them whose filters lie along the second axis, as in transposed convolutions.
    """

    network: nn.Module
    loss: Callable[[Any, Tensor], Tensor]
    batches: Sequence[tuple[Tensor, Tensor]]
    moved: Sequence[str]
    columns: frozenset[str] = frozenset()

    def weights(self) -> dict[str, Tensor]:
        """A copy of what is moved."""
        state = self.network.state_dict()
        return {name: state[name].clone() for name in self.moved}

    def move(self, weights: Mapping[str, Tensor]) -> None:
        """Put the network somewhere else; a variance stays positive, as in a merge."""
        import torch

        state = self.network.state_dict()
        with torch.no_grad():
            for name, value in weights.items():
                state[name].copy_(value.clamp_min(SMALLEST_VARIANCE) if name.endswith("running_var") else value)

    def value(self) -> float:
        """The mean loss over the patches."""
        import torch

        with torch.no_grad():
            return sum(self._loss(images, labels).item() * share for images, labels, share in self._shares())

    def values(self, places: Iterable[Mapping[str, Tensor]]) -> list[float]:
        """The loss at several places; the network is back where it was afterwards."""
        before, values = self.weights(), []
        try:
            for place in places:
                self.move(place)
                values.append(self.value())
        finally:
            self.move(before)
        return values

    def gradients(self, create_graph: bool = False) -> Iterator[tuple[list[Tensor], float]]:
        """For each batch the gradient of its loss by ``parameters``, and the batch's share of the patches."""
        import torch

        parameters = list(self.parameters().values())
        for images, labels, share in self._shares():
            loss = self._loss(images, labels)
            found = torch.autograd.grad(loss, parameters, create_graph=create_graph, materialize_grads=True)
            yield list(found), share

    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that are moved; running statistics are none."""
        known = dict(self.network.named_parameters(remove_duplicate=False))
        return {name: known[name].requires_grad_(True) for name in self.moved if name in known}

    def filter_norms(self) -> dict[str, Tensor]:
        """For each moved tensor the norms of its filters, shaped so that they multiply it; one norm for a bias or a scale."""
        state, norms = self.network.state_dict(), {}
        for name in self.moved:
            tensor = state[name].detach()
            if tensor.dim() < 2:
                norms[name] = tensor.norm().expand_as(tensor)
            else:
                norms[name] = _filter_norms(tensor, name in self.columns)
        return norms

    def _shares(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        count = sum(len(images) for images, _ in self.batches)
        device = next(self.network.parameters()).device
        for images, labels in self.batches:
            yield images.to(device), labels.to(device), len(images) / count

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        from tools.bundle_code.inferers import full_size

        return self.loss(full_size(self.network(images)), labels)


def empirical_fisher_trace(surface: Surface) -> float:
    """The mean squared length of the gradient of the loss, a batch of one patch being one observation.

    The measure of U-Net Transplant (Lumetti et al., MICCAI 2025), of given labels and the training loss: no Fisher information.
    """
    single = [(image[None], label[None]) for images, labels in surface.batches for image, label in zip(images, labels)]
    alone = Surface(surface.network, surface.loss, single, surface.moved)
    return sum(share * sum(g.square().sum().item() for g in gradient) for gradient, share in alone.gradients())


def noisy_losses(surface: Surface, levels: Sequence[float], seeds: int) -> list[list[float]]:
    """The loss at random places around the weights: each filter is moved by a share of its length.

    In a direction that is uniform on the sphere, so that rescaled filters are as flat as before (Li et al., "Visualizing the Loss
    Landscape of Neural Nets", NeurIPS 2018, section 4: filter normalisation). A bias, or a normalisation's scale, is moved as one
    filter. For small shares r the mean is L + ½ r² Σ λ |w|²/n, with the curvature λ of each weight and |w|²/n the mean square of
    its filter.

    Args:
        surface: around its network's weights.
        levels: shares.
        seeds: how many places at each level, the same directions at all of them.

    Returns:
        For each level the loss at each seed.
    """
    weights, norms = surface.weights(), surface.filter_norms()
    values: list[list[float]] = [[] for _ in levels]
    for seed in tqdm(range(seeds), desc="weight noise", disable=None, leave=False):
        step = {name: norms[name] * direction for name, direction in _directions(surface, weights, seed)}
        places = ({name: weights[name] + level * step[name] for name in step} for level in levels)
        for level, value in enumerate(surface.values(places)):
            values[level].append(value)
    return values


def top_eigenvalue(surface: Surface, relative: bool = False, seed: int = 0) -> float:
    """The largest eigenvalue of the Hessian of the loss, by Lanczos on Hessian-vector products.

    Args:
        surface: at its network's weights.
        relative: with every weight in units of its filter's root mean square. The plain one says little of networks with
            normalisations, which compute the same after a layer is rescaled (Dinh et al., "Sharp Minima Can Generalize For Deep
            Nets", ICML 2017).
        seed: of the first vector.

    Raises:
        UserError: it is not finite, or does not converge.
    """
    import torch
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

    parameters = surface.parameters()
    sizes = [p.numel() for p in parameters.values()]
    first = next(iter(parameters.values()))
    units = None
    if relative:
        norms = surface.filter_norms()
        units = [
            norms[name] * (norms[name].numel() / _filters(surface, name, p)) ** -0.5 for name, p in parameters.items()
        ]
    bar = tqdm(desc=f"Hessian{' (relative)' if relative else ''}", disable=None, leave=False)

    def product(vector: np.ndarray) -> np.ndarray:
        pieces = torch.from_numpy(vector.reshape(-1).astype(np.float32)).to(first).split(sizes)
        direction = [piece.view_as(p) for piece, p in zip(pieces, parameters.values(), strict=True)]
        if units is not None:
            direction = [d * u for d, u in zip(direction, units, strict=True)]
        total = [torch.zeros_like(d) for d in direction]
        for gradient, share in surface.gradients(create_graph=True):
            along = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True))
            found = torch.autograd.grad(along, list(parameters.values()), materialize_grads=True)
            for sum_, piece in zip(total, found, strict=True):
                sum_ += share * piece
        if units is not None:
            total = [t * u for t, u in zip(total, units, strict=True)]
        bar.update()
        answer = torch.cat([t.reshape(-1) for t in total]).cpu().numpy()
        if not np.isfinite(answer).all():
            raise UserError(
                "the Hessian of the loss is not finite here: the network's weights are too large, or it diverged"
            )
        return answer

    size = sum(sizes)
    start = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    options = {"k": 1, "which": "LA", "v0": start, "ncv": min(size, SUBSPACE), "tol": TOLERANCE, "maxiter": RESTARTS}
    try:
        with _twice_differentiable(surface.network), bar:
            operator = LinearOperator((size, size), matvec=product, dtype=np.float32)
            return float(eigsh(operator, return_eigenvectors=False, **options)[0])
    except ArpackError as error:
        raise UserError(f"the top eigenvalue of the Hessian was not found ({error})") from None


def on_line(a: Mapping[str, Tensor], b: Mapping[str, Tensor], t: float) -> dict[str, Tensor]:
    """The weights a share ``t`` of the way from ``a`` to ``b``."""
    return {name: value.lerp(b[name].to(value), t) for name, value in a.items()}


def barrier(t: Sequence[float], loss: Sequence[float]) -> float:
    """How far a loss along a line rises above the straight line between its ends (Frankle et al., ICML 2020): 0 if nowhere."""
    chord = np.interp(t, [t[0], t[-1]], [loss[0], loss[-1]])
    return float(np.max(np.asarray(loss) - chord))


class Plane:
    """The plane through three places in weight space, with axes of unit length (Garipov et al., NeurIPS 2018, appendix A.1).

    Args:
        origin: weights by name.
        first: at a distance along x.
        second: anywhere else on the plane, y > 0.

    Raises:
        UserError: they lie on one line.
    """

    def __init__(self, origin: Mapping[str, Tensor], first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
        self.origin = origin
        u, v = ({name: other[name] - value for name, value in origin.items()} for other in (first, second))
        length, both, whole = _dot(u, u), _dot(u, v), _dot(v, v)
        if length <= 0 or whole - both**2 / length <= 1e-8 * whole:
            raise UserError(
                "the starting point and the two specialists lie on one line: there is no plane through them"
            )
        x, y = length**0.5, (whole - both**2 / length) ** 0.5
        self.first, self.second = (x, 0.0), (both / x, y)
        self._x = {name: value / x for name, value in u.items()}
        self._y = {name: (v[name] - value * (both / length)) / y for name, value in u.items()}

    def at(self, x: float, y: float) -> dict[str, Tensor]:
        """The weights at a place of the plane."""
        return {name: value + x * self._x[name] + y * self._y[name] for name, value in self.origin.items()}


def _dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return sum((value.double() * b[name].double()).sum().item() for name, value in a.items())


def _filter_norms(tensor: Tensor, columns: bool) -> Tensor:
    axes = [axis for axis in range(tensor.dim()) if axis != int(columns)]
    return tensor.square().sum(axes, keepdim=True).sqrt().expand_as(tensor)


def _filters(surface: Surface, name: str, tensor: Tensor) -> int:
    """How many filters a tensor has."""
    return 1 if tensor.dim() < 2 else tensor.shape[int(name in surface.columns)]


def _directions(surface: Surface, weights: Mapping[str, Tensor], seed: int) -> Iterator[tuple[str, Tensor]]:
    """For each tensor a random direction, every filter of length one; running statistics stay where they are."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name in surface.parameters():
        drawn = torch.randn(weights[name].shape, generator=generator)
        norm = drawn.norm() if drawn.dim() < 2 else _filter_norms(drawn, name in surface.columns)
        yield name, (drawn / norm).to(weights[name])


@contextmanager
def _twice_differentiable(network: nn.Module) -> Iterator[None]:
    """Group normalisations compute as PyTorch's own, whose gradient has a gradient; the bundles' fast one has none."""
    from torch import nn

    def plain(layer: nn.GroupNorm, x: Tensor) -> Tensor:
        return nn.GroupNorm.forward(layer, x.contiguous())  # in the layout that forward derivatives need

    layers = [m for m in network.modules() if isinstance(m, nn.GroupNorm) and type(m) is not nn.GroupNorm]
    for layer in layers:
        layer.forward = partial(plain, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
