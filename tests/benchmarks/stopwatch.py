"""Compare two ways to do the same thing, in turn, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection


class Stopwatch:
    """A process that does one thing again and again, and says how long each took.

    Args:
        make: makes the function to time.
        arguments: for ``make``.
    """

    def __init__(self, make: Callable[..., Callable[[], None]], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, make, arguments), daemon=True)
        self.process.start()

    def seconds(self) -> float:
        self.connection.send("go")
        return self.connection.recv()

    def stop(self) -> None:
        self.process.kill()


def _work(connection: Connection, make: Callable[..., Callable[[], None]], arguments: Sequence[object]) -> None:
    function = make(*arguments)
    while connection.recv():
        began = time.perf_counter()
        function()
        connection.send(time.perf_counter() - began)


def compare(name: str, ours: Stopwatch, theirs: Stopwatch, runs: int = 9) -> None:
    """Print the medians of both and the median of the ratios, run by run in turn; the first two runs do not count."""
    pairs = [(ours.seconds(), theirs.seconds()) for _ in range(2 + runs)][2:]
    for stopwatch in (ours, theirs):
        stopwatch.stop()
    a, b = (statistics.median(column) for column in zip(*pairs))
    ratio = statistics.median(theirs / ours for ours, theirs in pairs)
    print(f"{name:<58} {a:8.3f} s {b:8.3f} s   {ratio:5.2f} x", flush=True)
