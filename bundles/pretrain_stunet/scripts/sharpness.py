"""Sharpness-aware minimisation: steps by the gradient where the loss is highest nearby, so that training ends in wide minima."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from monai.utils import CommonKeys
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class SharpnessAware:
    """SAM and ASAM for MONAI's ``SupervisedTrainer``: put it before the handler that clips gradients.

    After the usual backward pass the weights w go up to w + ε, the loss of the same batch is computed there with the same random
    numbers (dropout), its gradient takes the place of the first one, and the weights come back exactly. A step costs twice.

    - SAM: ε = ρ g / |g| (Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021,
      equations 2 and 3, for p = 2).
    - ASAM: ε = ρ T² g / |T g|, with T = |w| + η for every entry of a weight and 1 for one of a bias, so that rescaled weights
      are as sharp as before (Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization", ICML 2021, algorithm 1).

    Running statistics of normalisations see the first pass alone. In distributed training gradients are averaged before ε is
    taken, which so is that of the whole batch.

    Args:
        network: the network that is trained, as a plain module.
        rho: ρ, how far up.
        adaptive: ASAM.
        eta: η of ASAM.

    Raises:
        ValueError: at the start, when the trainer scales its loss or accumulates gradients, which this handler does not undo.
    """

    def __init__(self, network: nn.Module, rho: float = 0.05, adaptive: bool = False, eta: float = 0.01) -> None:
        self.network = network
        self.rho = rho
        self.adaptive = adaptive
        self.eta = eta

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._check)
        engine.add_event_handler(Events.ITERATION_STARTED, self._note_random_numbers)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        before = {p: p.detach().clone() for p in self.network.parameters() if p.grad is not None}
        if not self._climb():
            return
        images, labels = engine.state.output[CommonKeys.IMAGE], engine.state.output[CommonKeys.LABEL]
        for parameter in before:
            parameter.grad = None
        with self._same_random_numbers(), _statistics_kept(self.network):
            engine.loss_function(engine.inferer(images, engine.network), labels).mean().backward()
        with torch.no_grad():
            for parameter, value in before.items():
                parameter.copy_(value)

    @torch.no_grad()
    def _climb(self) -> bool:
        """Add ε to the weights; not where the gradient is zero or not finite."""
        trained = [(name, p) for name, p in self.network.named_parameters() if p.grad is not None]
        scales = [p.abs() + self.eta if self.adaptive and not name.endswith("bias") else None for name, p in trained]
        scaled = [p.grad if scale is None else scale * p.grad for (_, p), scale in zip(trained, scales, strict=True)]
        length = nn.utils.get_total_norm(scaled)
        if not torch.isfinite(length) or length == 0:
            return False
        for (_, parameter), scale, gradient in zip(trained, scales, scaled, strict=True):
            parameter.add_((gradient if scale is None else scale * gradient) * (self.rho / length))
        return True

    def _check(self, engine: Engine) -> None:
        if engine.scaler is not None or engine.accumulation_steps > 1:
            raise ValueError("SharpnessAware works with a trainer that has neither amp nor accumulation_steps")

    def _note_random_numbers(self, engine: Engine) -> None:
        device = next(self.network.parameters()).device
        self._cuda = [device] if device.type == "cuda" else []
        self._random: list[Tensor] = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._cuda)]

    @contextmanager
    def _same_random_numbers(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=self._cuda):
            torch.set_rng_state(self._random[0])
            for device, state in zip(self._cuda, self._random[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


@contextmanager
def _statistics_kept(network: nn.Module) -> Iterator[None]:
    """Running means and variances stay as they are."""
    layers = [m for m in network.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
