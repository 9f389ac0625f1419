"""Ignite handlers that MONAI lacks: seeded epochs, reused memory, clipped gradients, a frozen start, averages, resumable runs."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from monai.data.utils import set_rnd
from monai.engines import Evaluator, IterationEvents
from monai.utils import set_determinism
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn, update_bn

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h


class SeedEpochs:
    """Make the random numbers of an epoch a function of seed, epoch and process alone, so that a resumed run repeats them.

    Args:
        seed: of the run.
        dataset: its random transforms are seeded too.
        step: added to the seed with every epoch; with 0 all epochs are alike, as those of a random validation should be.
    """

    def __init__(self, seed: int, dataset: Any, step: int = 1000) -> None:
        self.seed = seed
        self.dataset = dataset
        self.step = step

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        seed = (self.seed + self.step * engine.state.epoch + rank) % 2**31
        set_determinism(seed=seed, use_deterministic_algorithms=None)
        set_rnd(self.dataset, seed=seed)


class ReuseMemory:
    """Keep freed memory for the next step or window instead of giving it back to the system, where the C library can (glibc).

    Tensors of 3D patches are so large that each is mapped anew, and cleared page by page, at every step.

    Args:
        large: keep tensors of more than 32 MiB too. Where sizes vary much, as with whole images, holes between them would cost
            memory.
    """

    def __init__(self, large: bool = True) -> None:
        self.large = large

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine | None = None) -> None:
        if platform.libc_ver()[0] == "glibc":
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            mallopt(*((M_MMAP_MAX, 0) if self.large else (M_MMAP_THRESHOLD, 32 * 2**20)))
            mallopt(M_TRIM_THRESHOLD, -1)


class ClipGradients:
    """Clip the norm of the gradient over all trainable parameters before each optimiser step."""

    def __init__(self, network: nn.Module, max_norm: float = 1.0) -> None:
        self.network = network
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        nn.utils.clip_grad_norm_([p for p in self.network.parameters() if p.requires_grad], self.max_norm)


class FreezeBackbone:
    """Train the head alone during the first epochs; warns if there are no others.

    Args:
        network: the network that is trained, as a plain module.
        head: names of the parameters that are trained from the start.
        epochs: number of epochs before the rest joins.
    """

    def __init__(self, network: nn.Module, head: Iterable[str], epochs: int = 2) -> None:
        self.backbone = [p for name, p in network.named_parameters() if name not in set(head)]
        self.epochs = epochs

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._warn)
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def _warn(self, engine: Engine) -> None:
        if engine.state.max_epochs <= self.epochs:
            engine.logger.warning(
                f"the backbone is frozen in all {engine.state.max_epochs} epochs (--frozen_epochs {self.epochs}): only the head "
                "learns, and the task vector will be zero"
            )

    def __call__(self, engine: Engine) -> None:
        for parameter in self.backbone:
            parameter.requires_grad_(engine.state.epoch > self.epochs)
            parameter.grad = None


class WeightAverage:
    """Average the weights over the steps of a run; what is validated and kept as the model is the average.

    - ``"swa"``: from ``start`` on, every step counts alike (stochastic weight averaging, Izmailov et al., "Averaging Weights
      Leads to Wider Optima and Better Generalization", UAI 2018; over steps instead of epochs, as Cha et al., "SWAD",
      NeurIPS 2021). The learning rate should not fall to zero meanwhile.
    - ``"ema"``: exponential moving average, whose decay rises to ``decay`` as (1 + n) / (10 + n) with the n averaged steps, so
      that the first weights of a short run are forgotten.

    Running statistics of batch normalisation are measured anew for the average, on the training patches, before it is validated.

    Args:
        network: a plain module (not wrapped for distributed training), on the device where it is trained.
        method: ``"swa"`` or ``"ema"``.
        start: share of all steps before the average begins; until then it is the weights themselves. No model is kept before.
        decay: of ``"ema"``.

    Raises:
        ValueError: another method.
    """

    def __init__(self, network: nn.Module, method: str, start: float = 0.0, decay: float = 0.999) -> None:
        if method not in ("swa", "ema"):
            raise ValueError(f"weights are averaged by 'swa' or 'ema', not by {method!r}")
        self.network = network
        self.start = start
        self.model = AveragedModel(network, multi_avg_fn=_moving(decay) if method == "ema" else get_swa_multi_avg_fn())

    def attach(self, engine: Engine, validator: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        validator.add_event_handler(Events.STARTED, lambda _: self._measure_statistics(engine))
        validator.add_event_handler(Events.STARTED, self._exchange)
        validator.add_event_handler(Events.COMPLETED, self._exchange)

    @property
    def begun(self) -> bool:
        """Whether the average is more than the weights of one step."""
        return int(self.model.n_averaged) > 1

    def __call__(self, engine: Engine) -> None:
        if engine.state.iteration <= self.start * engine.state.max_epochs * engine.state.epoch_length:
            self.model.n_averaged.zero_()
        self.model.update_parameters(self.network)

    def _measure_statistics(self, engine: Engine) -> None:
        if self.begun:
            batches = engine.state.dataloader
            update_bn((engine.prepare_batch(batch, engine.state.device)[0] for batch in batches), self.model)

    @torch.no_grad()
    def _exchange(self, _: Engine) -> None:
        """Average and weights change places, so that whoever holds the network sees the other."""
        ours, theirs = (chain(n.parameters(), n.buffers()) for n in (self.model.module, self.network))
        for average, weight in zip(ours, theirs, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)


def _moving(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor], None]:
    def update(averages: list[Tensor], weights: list[Tensor], count: Tensor) -> None:
        share = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        for average, weight in zip(averages, weights, strict=True):
            average.lerp_(weight, share)

    return update


class ResumableCheckpoint:
    """Keep the best model and, after every epoch, all that a killed run needs to go on as if nothing had happened.

    The best model (tensors only) is written to ``model_path`` whenever the validation metric improves, and after the last
    epoch when no model was written before; the state of the run to ``checkpoint_path``, from which the next start resumes.
    Both are written to a temporary name and renamed; in distributed training by the first process only.

    Args:
        network: a plain module (not wrapped for distributed training).
        optimizer: its state is kept.
        lr_scheduler: its state is kept.
        validator: evaluator with a key metric, where larger is better; run before this handler at the end of an epoch.
        model_path: for the best model.
        checkpoint_path: for the state of the run.
        frozen_epochs: epochs whose models are not chosen, because the backbone is still that of the starting point.
        resume: go on from ``checkpoint_path`` when it exists.
        heads: modules beside the network that are trained with it; kept with the state of the run, and not in the model.
        average: of the network's weights: it is attached, validated, kept as the model, and kept with the state of the run.

    Raises:
        ValueError: at the start, when the checkpoint is broken or of another network or optimiser; at the end of an epoch, when
            weights are NaN or infinite: then what was saved before stays.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: Any,
        validator: Engine,
        model_path: str,
        checkpoint_path: str,
        frozen_epochs: int = 0,
        resume: bool = True,
        heads: nn.Module | None = None,
        average: WeightAverage | None = None,
    ) -> None:
        self.parts = {"network": network, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
        if heads is not None:
            self.parts["heads"] = heads
        if average is not None:
            self.parts["average"] = average.model
        self.average = average
        self.validator = validator
        self.model_path = Path(model_path)
        self.checkpoint_path = Path(checkpoint_path)
        self.frozen_epochs = frozen_epochs
        self.resume = resume
        self.best: float | None = None
        self.best_epoch = 0
        self.validated = False

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.load)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        self.validator.add_event_handler(Events.COMPLETED, self._note_validation)
        if self.average is not None:
            self.average.attach(engine, self.validator)

    def _note_validation(self, _: Engine) -> None:
        self.validated = True

    def load(self, engine: Engine) -> None:
        if not self.resume or not self.checkpoint_path.is_file():
            return
        try:
            checkpoint = torch.load(self.checkpoint_path, map_location="cpu", weights_only=True)
            groups = self.parts["lr_scheduler"].optimizer.param_groups
            settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
            for name, part in self.parts.items():
                if name != "lr_scheduler":
                    part.load_state_dict(checkpoint[name])
            self._go_on(settings, checkpoint, engine.state.epoch_length)
            self.best, self.best_epoch = checkpoint["best"], checkpoint["best_epoch"]
            engine.state.epoch = checkpoint["epoch"]
            engine.state.iteration = checkpoint["epoch"] * engine.state.epoch_length
        except Exception as error:
            raise ValueError(
                f"cannot resume from {self.checkpoint_path} ({str(error).splitlines()[0]}): "
                "delete it, or run with --resume False, to train from the beginning"
            ) from error
        rates = dict.fromkeys(f"{group['lr']:.3g}" for group in self.parts["lr_scheduler"].optimizer.param_groups)
        engine.logger.info(
            f"resumed after epoch {engine.state.epoch} from {self.checkpoint_path}, learning rate {', '.join(rates)}"
        )

    def _go_on(self, settings: Sequence[Mapping[str, Any]], checkpoint: Mapping[str, Any], epoch_length: int) -> None:
        """Learning rates and other settings as they would be now, had the run been begun with those that it has now.

        Args:
            settings: of the optimiser's groups, as they are at the beginning of a run.
            checkpoint: of the run that is gone on with; its own settings, and its schedule, are left behind.
            epoch_length: steps in an epoch of this run.
        """
        scheduler = self.parts["lr_scheduler"]
        for group, own in zip(scheduler.optimizer.param_groups, settings, strict=True):
            group.update(own)
        epoch, steps = checkpoint["epoch"], checkpoint["lr_scheduler"]["last_epoch"]
        if steps == epoch * checkpoint.get("epoch_length", epoch_length):  # otherwise it takes a step an epoch
            steps = epoch * epoch_length
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about steps of the scheduler without one of the optimiser
            for _ in range(steps):
                scheduler.step()

    def __call__(self, engine: Engine) -> None:
        weights = (self.parts["network"] if self.average is None else self.average.model.module).state_dict()
        for name, tensor in weights.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(
                    f"after epoch {engine.state.epoch} the tensor {name} has NaN or infinite values, and nothing is saved: look "
                    "at the images and labels, or lower the learning rate"
                )
        score = None
        if self.validated:
            metric = float(self.validator.state.metrics[self.validator.state.key_metric_name])
            score = None if math.isnan(metric) else metric
            self.validated = False
        chosen_from = self.average is None or self.average.begun
        eligible = score is not None and engine.state.epoch > self.frozen_epochs and chosen_from
        better = eligible and (self.best is None or score > self.best)
        if better or (self.best_epoch == 0 and engine.state.epoch == engine.state.max_epochs):
            self.best, self.best_epoch = score, engine.state.epoch
            self._write({name: tensor.cpu().contiguous() for name, tensor in weights.items()}, self.model_path)
        state = {name: part.state_dict() for name, part in self.parts.items()}
        self._write(
            {
                **state,
                "epoch": engine.state.epoch,
                "epoch_length": engine.state.epoch_length,
                "best": self.best,
                "best_epoch": self.best_epoch,
            },
            self.checkpoint_path,
        )

    def _write(self, content: dict, path: Path) -> None:
        if dist.is_initialized() and dist.get_rank() > 0:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            torch.save(content, temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


class Progress:
    """A progress bar on a terminal, in the first process only: per epoch with the current loss, or over the images."""

    def attach(self, engine: Engine) -> None:
        rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK") or 0)
        if not sys.stderr.isatty() or rank > 0:
            return
        bar = ProgressBar(persist=isinstance(engine, Evaluator))
        bar.attach(engine, output_transform=None if isinstance(engine, Evaluator) else _loss)


def _loss(output: dict) -> dict[str, float]:
    return {"loss": output["loss"].item()}
