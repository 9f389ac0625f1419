"""The local shuffle of Models Genesis, and the plain loop over blocks that defines it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
from numpy.random import RandomState

from tests.benchmarks.stopwatch import Stopwatch, compare
from tools.bundle_code.corruptions import BLOCKS, shuffle_blocks


def shuffle_one_by_one(image: np.ndarray, R: RandomState, blocks: int = BLOCKS) -> np.ndarray:
    """The same as ``shuffle_blocks``, a block at a time; single numbers from Python, which is faster at them."""
    shuffled = image.copy()
    chance = random.Random(int(R.randint(2**31)))
    for _ in range(blocks):
        size = [chance.randint(1, d // 10) for d in image.shape]
        start = [chance.randint(0, d - n) for d, n in zip(image.shape, size, strict=True)]
        window = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        block = image[window].flatten()
        R.shuffle(block)
        shuffled[window] = block.reshape(size)
    return shuffled


def compare_shuffles() -> None:
    """Print the time of both for cubes of several sizes."""
    print(f"{'local shuffle, 10,000 blocks':<58} {'ours':>10} {'plain loop':>10}   ratio")
    for shape in ((32, 32, 32), (64, 64, 32), (96, 96, 96)):
        ours, plain = (Stopwatch(_repeat, shuffle, shape) for shuffle in (shuffle_blocks, shuffle_one_by_one))
        compare(" x ".join(map(str, shape)), ours, plain)


def _repeat(shuffle: Callable[..., np.ndarray], shape: Sequence[int]) -> Callable[[], None]:
    R = RandomState(0)
    image = R.rand(*shape).astype(np.float32)
    return lambda: shuffle(image, R)
