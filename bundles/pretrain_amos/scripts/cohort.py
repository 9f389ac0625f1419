"""Segment hundreds of images: loading, network and saving at once, past images that fail, on from where a run was stopped."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.config import PathLike
from monai.data import DataLoader, Dataset
from monai.engines import IterationEvents, SupervisedEvaluator
from monai.engines.utils import engine_apply_transform
from tqdm import tqdm

from .images import reason
from .label_maps import LabelMaps, Record, first_file

SECTIONS = ("network_def", "preprocessing", "inferer", "postprocessing")


class CohortDataset(Dataset):
    """MONAI's ``Dataset``, in which an image that cannot be loaded is an item that says why, instead of an error.

    Items have ``file``, the image's; and what the transforms give, or ``failure``.

    Args:
        data: items with an ``image``, its file or those of its channels.
        transform: gives ``image``, (C, …).
        channels: C, as the network needs it.
    """

    def __init__(self, data: Sequence[Mapping[str, Any]], transform: Callable, channels: int) -> None:
        super().__init__(data, transform)
        self.channels = channels

    def _transform(self, index: int) -> dict[str, Any]:
        file = first_file(self.data[index])
        try:
            item = super()._transform(index)
            if len(item["image"]) != self.channels:
                raise ValueError(f"it has {len(item['image'])} channels, the network needs {self.channels}")
            return {**item, "file": file}
        except Exception as error:
            return {"file": file, "failure": reason(error)}


class CohortEvaluator(SupervisedEvaluator):
    """MONAI's ``SupervisedEvaluator`` for many images, the postprocessing of one beside the network's work on the next.

    With a ``ThreadDataLoader`` that buffers one image at most four are in memory: one that is loaded, one that waits, one in the
    network, one that is saved. What goes wrong with an image is said in a line, and the next one follows. Images whose label maps
    are there are left out. Several processes share the images, by RANK and WORLD_SIZE in their environment.

    Args:
        val_data_loader: over a ``CohortDataset``, an image at a time.
        label_maps: where postprocessing saves them. ``label_maps.json`` there records what made them, ``failed.csv`` what failed.
        models: files of weights.
        config: the bundle's inference.json, whose network and transforms are recorded.
        settings: knobs that decide what a label map becomes.
        overwrite: make label maps again that are there.
        kwargs: see ``SupervisedEvaluator``.
    """

    def __init__(
        self,
        *,
        val_data_loader: DataLoader,
        label_maps: LabelMaps,
        models: Sequence[PathLike],
        config: PathLike,
        settings: Mapping[str, Any],
        overwrite: bool = False,
        **kwargs: Any,
    ) -> None:
        self.label_maps = label_maps
        self.models = models
        self.config = Path(config)
        self.settings = settings
        self.overwrite = overwrite
        self.items = list(val_data_loader.dataset.data)
        self.saver: ThreadPoolExecutor | None = None
        self.saving: Future | None = None
        self.segmented = 0
        self.failures: dict[str, str] = {}
        self.failed_csv = label_maps.folder / "failed.csv"
        self.lock = threading.Lock()
        super().__init__(val_data_loader=val_data_loader, **kwargs)

    def run(self, global_epoch: int = 1) -> None:
        """Segment this process's share of the images.

        Raises:
            SystemExit: with a line, when images failed, when the label maps that are there are not of this model, settings and
                images, or when SIGINT or SIGTERM stopped it; what was segmented until then is complete.
        """
        rank, processes = share()
        try:
            images = self.label_maps.of_images(self.items)
            record = Record(self.label_maps.folder, self.models, {**self.settings, **self._sections()})
            if not self.overwrite:
                record.check(images)
        except (OSError, ValueError) as error:
            raise SystemExit(str(error)) from None
        own = dict(list(images.items())[rank::processes])
        todo = [item for path, item in own.items() if self.overwrite or not path.is_file()]
        if len(todo) < len(own):
            print(
                f"{len(own) - len(todo)} of {len(own)} images have their label map in {self.label_maps.folder}: skipped"
            )
        self.failed_csv = self._failed_csv(rank, processes)
        self.segmented, self.failures = 0, {}
        self.data_loader.dataset.data = todo
        self.state.epoch_length = len(todo)
        if todo:
            self._run(global_epoch, lambda: record.begin(images, own, self.overwrite))
        self._summarise(len(todo))

    def _run(self, global_epoch: int, begin: Callable[[], None]) -> None:
        def begin_or_say_why_not() -> None:
            try:
                begin()
            except OSError as error:
                raise SystemExit(f"label maps cannot be written to {self.label_maps.folder}: {error}") from None

        began = self.add_event_handler(Events.STARTED, begin_or_say_why_not)  # after the handler that loads the weights
        try:
            with _signals_as_interrupts(), ThreadPoolExecutor(1, "saver") as self.saver:
                super().run(global_epoch)
        except KeyboardInterrupt as stop:
            self._say(f"stopped: {self.segmented} of {self.state.epoch_length} images segmented; run it again to go on")
            raise SystemExit(128 + stop.args[0]) from None
        finally:
            began.remove()

    def _iteration(self, engine: SupervisedEvaluator, batchdata: dict[str, Any]) -> dict[str, Any]:
        """One image; see ``SupervisedEvaluator``."""
        (file,) = batchdata["file"]
        if "failure" in batchdata:
            self._failed(file, batchdata["failure"][0])
            return {}
        try:
            return super()._iteration(engine, batchdata)
        except Exception as error:
            self._failed(file, reason(error))
            return {}

    def _register_postprocessing(self, posttrans: Callable) -> None:
        @self.on(IterationEvents.MODEL_COMPLETED)
        def _hand_over(engine: Engine) -> None:
            if self.saving is not None:
                self.saving.result()  # one at a time: an image that waits would be one more in memory
            self.saving = self.saver.submit(self._finish, engine.state.batch[0], engine.state.output[0], posttrans)

    def _finish(self, image: dict[str, Any], output: dict[str, Any], posttrans: Callable) -> None:
        try:
            engine_apply_transform(image, output, posttrans)
        except Exception as error:
            self._failed(image["file"], reason(error))
        else:
            self.segmented += 1
            if not sys.stderr.isatty():  # where there is no progress bar
                self.logger.info(f"{image['file']}: segmented, {self.segmented} of {self.state.epoch_length}")

    def _failed(self, file: str, why: str) -> None:
        self._say(f"{file}: not segmented: {why}")
        with self.lock, suppress(OSError):  # the disk may be full
            self.failures[file] = why
            with self.failed_csv.open("w", newline="") as table:
                csv.writer(table).writerows([("image", "reason"), *self.failures.items()])

    def _summarise(self, count: int) -> None:
        print(f"{self.segmented} of {count} images segmented: label maps in {self.label_maps.folder}", flush=True)
        _wait_for_torchrun()
        if self.failures:
            names = ", ".join(Path(file).name for file in self.failures)
            raise SystemExit(f"{len(self.failures)} of {count} images failed ({names}); why is in {self.failed_csv}")

    def _failed_csv(self, rank: int, processes: int) -> Path:
        """Where this process writes failures; removes what earlier runs wrote, but nothing of processes beside this one."""
        folder = self.label_maps.folder
        own = folder / (f"failed_{rank}_of_{processes}.csv" if processes > 1 else "failed.csv")
        for path in folder.glob("failed*.csv"):
            written_by = re.fullmatch(r"failed(_\d+_of_(\d+))?", path.stem)
            if written_by and (path == own or written_by[2] != str(processes)):
                path.unlink(missing_ok=True)
        return own

    def _sections(self) -> dict[str, Any]:
        if not self.config.is_file():
            return {}
        content = json.loads(self.config.read_text())
        return {section: content.get(section) for section in SECTIONS}

    @staticmethod
    def _say(line: str) -> None:
        tqdm.write(line, file=sys.stderr)  # beside a progress bar, not into it


def share() -> tuple[int, int]:
    """This process's number and the number of processes, as torchrun sets them: RANK and WORLD_SIZE; without them 0 and 1.

    Raises:
        SystemExit: they do not fit together.
    """
    rank, processes = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if not rank and not processes:
        return 0, 1
    if not (rank.isdigit() and processes.isdigit() and int(rank) < int(processes)):
        raise SystemExit(
            f"RANK is {rank!r} and WORLD_SIZE {processes!r}: processes are numbered from 0 to WORLD_SIZE - 1"
        )
    return int(rank), int(processes)


def _wait_for_torchrun() -> None:
    """Under torchrun, wait until all processes are through: it stops the others when one ends with an exit code."""
    if dist.is_torchelastic_launched():
        store, _, processes = next(dist.rendezvous("env://"))
        if store.add("processes that are through", 1) == processes:
            store.set("all are through", "")
        store.wait(["all are through"], timedelta(days=365))


@contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt, with their number, inside the block, if it is the main thread's."""

    def interrupt(number: int, _: Any) -> None:
        raise KeyboardInterrupt(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
