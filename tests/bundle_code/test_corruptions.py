"""The corruptions: rates and sizes against closed forms, the shuffle against a plain loop, and nothing else changed."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, CopyItemsd
from numpy.random import RandomState

from tests.benchmarks.corruptions import shuffle_one_by_one
from tools.bundle_code.corruptions import (
    RandBezierIntensityd,
    RandLocalShuffled,
    RandMaskBlocksd,
    RandPaintd,
    bezier_curve,
    block_mask,
    inner_noise,
    outer_noise,
    shuffle_blocks,
)

SHAPE = (64, 64, 32)


def intervals(mask, axis):
    """First and last index of what is True along an axis."""
    found = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
    return found[0], found[-1]


def test_the_shuffle_has_the_statistics_of_the_plain_loop():
    """Voxels are numbered, so that it can be seen where each value came from."""
    image = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    found = {}
    for shuffle in (shuffle_one_by_one, shuffle_blocks):
        moved = shuffle(image, RandomState(0))
        origin = np.stack(np.unravel_index(moved.ravel(), SHAPE))
        distance = np.abs(origin - np.stack(np.unravel_index(image.ravel(), SHAPE)))
        found[shuffle] = {
            "moved": (distance.sum(0) > 0).mean(),
            "lost": 1 - len(np.unique(moved)) / moved.size,
            "distance": distance.mean(1),
            "moved at the border": (distance.sum(0) > 0).reshape(SHAPE)[0].mean(),
        }
        assert distance.max(1).tolist() == [5, 5, 2]  # blocks of 6 x 6 x 3 voxels at most
    ours, plain = found[shuffle_blocks], found[shuffle_one_by_one]
    for name in ours:
        np.testing.assert_allclose(ours[name], plain[name], rtol=0.15 if "border" in name else 0.05, err_msg=name)
    assert abs(ours["moved"] - 0.78) < 0.02


def test_blocks_permute_and_do_not_compound():
    image = np.arange(20**3).reshape(20, 20, 20)
    for seed in range(20):
        once = shuffle_blocks(image, RandomState(seed), blocks=1)
        assert np.array_equal(np.sort(once.ravel()), image.ravel())  # a block alone is permuted, nothing lost
        many = shuffle_blocks(image, RandomState(seed), blocks=400)
        origin = np.stack(np.unravel_index(many.ravel(), image.shape))
        assert (
            np.abs(origin - np.indices(image.shape).reshape(3, -1)) < 2
        ).all()  # read from the image: no compounding


@pytest.mark.parametrize("channels", [1, 2])
def test_chances_of_each_corruption(channels):
    count = 1000
    image = torch.rand(channels, 20, 21, 22, generator=torch.Generator().manual_seed(0))
    shuffle, paint = RandLocalShuffled("image"), RandPaintd("image")
    shuffle.blocks = 50
    bezier = RandBezierIntensityd("image")
    changed, rising = {"shuffle": 0, "inner": 0, "outer": 0}, []
    for transform in (shuffle, paint, bezier):
        transform.set_random_state(seed=1)
    levels = torch.linspace(0, 1, 20 * 21 * 22).reshape(1, 20, 21, 22).repeat(channels, 1, 1, 1)
    for _ in range(count):
        changed["shuffle"] += sum((shuffle({"image": image})["image"] != image).flatten(1).any(1).tolist())
        fractions = (paint({"image": image})["image"] != image).flatten(1).float().mean(1)
        changed["inner"] += ((fractions > 0) & (fractions < 0.3)).sum().item()
        changed["outer"] += (fractions > 0.3).sum().item()
        mapped = bezier({"image": levels})["image"]
        assert torch.equal(mapped[0], mapped[-1])  # one curve for all channels
        if not torch.equal(mapped, levels):
            steps = mapped[0].flatten().diff()
            assert (steps >= 0).all() or (steps <= 0).all()
            assert {mapped.min().item(), mapped.max().item()} == {0, 1}
            rising.append(bool((steps >= 0).all()))
    sigma = (0.25 / (count * channels)) ** 0.5
    # in-painting draws no window at all in 5 % of its cases
    for name, chance in (("shuffle", 0.5), ("inner", 0.18 * 0.95), ("outer", 0.72)):
        assert abs(changed[name] / (count * channels) - chance) < 4 * sigma, name
    assert abs(len(rising) / count - 0.9) < 4 * (0.09 / count) ** 0.5
    assert abs(np.mean(rising) - 0.5) < 4 * (0.25 / len(rising)) ** 0.5


def test_the_curve_is_that_of_bernstein_polynomials():
    inner = RandomState(0).rand(2, 2)
    x, y = bezier_curve(inner, falling=False)
    points = np.array([[0, 0], *inner, [1, 1]])
    for k in (0, 137, 500, 999):
        s = k / 999
        for _ in range(3):  # de Casteljau
            points = (1 - s) * points[:-1] + s * points[1:]
        np.testing.assert_allclose([x[k], y[k]], points[0], atol=1e-12)
        points = np.array([[0, 0], *inner, [1, 1]])
    assert (np.diff(x) >= 0).all()
    assert (np.diff(y) >= 0).all()
    np.testing.assert_array_equal(bezier_curve(inner, falling=True)[1], y[::-1])


def test_sizes_of_painted_windows():
    R = RandomState(0)
    inner = [inner_noise(SHAPE, R) for _ in range(300)]
    outer = [~outer_noise(SHAPE, R) for _ in range(300)]
    for masks, longest, shortest in ((inner, 21, 10), (outer, 37, 28)):
        for mask in filter(np.any, masks):
            low, high = intervals(mask, 0)
            assert low >= 3
            assert high <= 60
            assert high - low + 1 >= shortest
            assert intervals(mask, 2)[0] >= 3
            assert intervals(mask, 2)[1] <= 28
        runs = [np.flatnonzero(np.diff(mask.any((1, 2)).astype(int))).size for mask in masks]
        alone = [np.subtract(*intervals(m, 0)[::-1]) + 1 for m, r in zip(masks, runs, strict=True) if r == 2]
        assert shortest <= min(alone)
        assert min(alone) <= longest
    assert abs(np.mean([mask.mean() for mask in inner]) - 0.055) < 0.005
    assert abs(np.mean([1 - mask.mean() for mask in outer]) - 0.68) < 0.01
    assert abs(np.mean([not mask.any() for mask in inner]) - 0.05) < 0.04
    assert all(mask.any() for mask in outer)


def test_noise_is_uniform_and_each_voxels_own():
    painted = RandPaintd("image", prob=1, outer=1).set_random_state(seed=0)({"image": torch.full((1, *SHAPE), 2.0)})
    noise = painted["image"][painted["image"] != 2]
    assert (noise >= 0).all()
    assert (noise < 1).all()
    assert abs(noise.mean() - 0.5) < 0.01
    assert abs(noise.var() - 1 / 12) < 0.002
    assert len(noise.unique()) > 0.99 * len(noise)


def test_masked_blocks():
    mask = block_mask((32, 48, 20), 16, 0.75, RandomState(0))
    blocks = [mask[x : x + 16, y : y + 16, z : z + 16] for x in (0, 16) for y in (0, 16, 32) for z in (0, 16)]
    assert sum(bool(block.all()) for block in blocks) == 9
    assert sum(bool(block.any()) for block in blocks) == 9
    item = {"image": torch.ones(2, 32, 48, 20)}
    masked = RandMaskBlocksd("image").set_random_state(seed=0)(item)
    assert torch.equal(masked["image"], 1 - masked["mask"].repeat(2, 1, 1, 1))
    assert masked["mask"].shape == (1, 32, 48, 20)
    assert (item["image"] == 1).all()
    with pytest.raises(ValueError, match="of which 1 would be masked: make mask_block smaller"):
        RandMaskBlocksd("image", block_size=16)({"image": torch.ones(1, 16, 16, 16)})


ALL = (RandLocalShuffled, RandBezierIntensityd, RandPaintd, RandMaskBlocksd)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("make", [np.array, torch.tensor, MetaTensor])
def test_the_same_seed_gives_the_same_and_what_went_in_stays(kind, make):
    given = make(RandomState(0).rand(1, 33, 40, 35).astype(np.float32))
    before = given.copy() if isinstance(given, np.ndarray) else given.clone()
    first, second, third = (
        kind("image", **({} if kind is RandMaskBlocksd else {"prob": 1})).set_random_state(seed=seed)({"image": given})
        for seed in (0, 0, 1)
    )
    assert type(first["image"]) is type(given)
    assert first["image"].dtype == given.dtype
    assert (first["image"] == second["image"]).all()
    assert (first["image"] != third["image"]).any()
    assert (given == before).all()


def test_the_target_is_the_image_before():
    chain = Compose([CopyItemsd("image", names="label"), *(kind("image", prob=1.0) for kind in ALL[:3])])
    image = MetaTensor(torch.rand(2, 17, 30, 41))
    result = chain.set_random_state(seed=0)({"image": image})
    assert torch.equal(result["label"], image)
    assert not torch.equal(result["image"], image)


@pytest.mark.parametrize(("kind", "smallest"), [(RandLocalShuffled, 10), (RandPaintd, 14)])
def test_an_axis_that_is_too_small(kind, smallest):
    kind("image", prob=1.0).set_random_state(seed=0)({"image": torch.rand(1, smallest, 40, smallest)})
    with pytest.raises(
        ValueError, match=rf"needs {smallest} voxels along each axis, the image has 40 x {smallest - 1} x 40"
    ):
        kind("image")({"image": torch.rand(1, 40, smallest - 1, 40)})


def test_every_seed_fits_the_smallest_image():
    for seed in range(300):
        shuffle_blocks(np.zeros((10, 10, 10)), RandomState(seed), 20)
        inner_noise((14, 14, 14), RandomState(seed))
        outer_noise((14, 14, 15), RandomState(seed))
