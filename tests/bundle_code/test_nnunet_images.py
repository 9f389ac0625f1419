"""nnU-Net's preprocessing against closed forms; tests/test_nnunet_peer.py compares it with nnU-Net itself."""

import nibabel
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.transforms import Compose, EnsureChannelFirstd, Invertd, LoadImaged, ResampleToMatchd
from scipy import ndimage

from tools.bundle_code.image_grid import thick_axis
from tools.bundle_code.nnunet_images import CropToNonzerod, NormalizeChannelsd, ResampleToSpacingd, resize
from tools.bundle_code.sliding_window import SlidingWindow


def noise(*size):
    return np.random.default_rng(0).standard_normal(size).astype(np.float32)


def half_voxel_centres(size, before):
    lines = [(np.arange(new) + 0.5) * old / new - 0.5 for new, old in zip(size, before)]
    return np.meshgrid(*lines, indexing="ij")


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("size", [(9, 14, 8), (23, 7, 10), (12, 10, 8)])
def test_resize_is_splines_at_half_voxel_centres_within_the_images_range(size, order):
    image = noise(2, 12, 10, 8)
    expected = [
        ndimage.map_coordinates(c.astype(float), half_voxel_centres(size, c.shape), order=order, mode="nearest").clip(
            c.min(), c.max()
        )
        for c in image
    ]
    resized = resize(image, size, order)
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, expected, atol=1e-6)
    if order == 1:
        linear = torch.nn.functional.interpolate(torch.from_numpy(image)[None], size, mode="trilinear")[0]
        np.testing.assert_allclose(resized, linear, atol=1e-5)


@pytest.mark.parametrize("apart", [0, 1, 2])
def test_thick_slices_are_resized_one_by_one(apart):
    image, size = noise(1, 8, 6, 7), [11, 9, 5]
    planes = np.stack(
        [
            resize(plane[None, ..., None], [n for axis, n in enumerate(size) if axis != apart] + [1], 3)[0, ..., 0]
            for plane in np.moveaxis(image[0], apart, 0)
        ]
    )
    where = half_voxel_centres((size[apart],), (image.shape[1 + apart],))[0]
    expected = np.moveaxis(planes[np.floor(where + 0.5).astype(int)], 0, apart)
    np.testing.assert_allclose(resize(image, size, 3, apart)[0], expected, atol=1e-6)


def test_which_slices_are_thick():
    assert thick_axis((1, 1, 3), (1, 1, 1)) is None  # three times is not more than three times
    assert thick_axis((1, 1, 3.1), (1, 1, 1)) == 2
    assert thick_axis((1, 1, 1), (4, 1, 1)) == 0
    assert thick_axis((0.24, 1.25, 1.25), (9, 1, 1)) is None  # two axes are the thickest of the first grid


def volume(shape, spacing, fill=None):
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -30, 12, 5
    image = torch.from_numpy(noise(1, *shape)) if fill is None else fill
    return MetaTensor(image, torch.from_numpy(affine))


@pytest.mark.parametrize(
    "shape, spacing, size", [((100, 101, 51), (0.7, 0.7, 2.5), (47, 47, 85)), ((9, 5, 4), (1.5, 3, 0.6), (9, 10, 2))]
)
def test_the_number_of_voxels_is_rounded_and_borders_stay(shape, spacing, size):
    before = volume(shape, spacing)
    after = ResampleToSpacingd("image", [1.5] * 3)({"image": before})["image"]
    assert after.shape[1:] == size
    for corner in ([-0.5] * 3, [n - 0.5 for n in shape]):
        image_corner = [(c + 0.5) * new / old - 0.5 for c, new, old in zip(corner, size, shape)]
        world = [m.affine @ torch.tensor([*c, 1.0]).double() for m, c in ((before, corner), (after, image_corner))]
        np.testing.assert_allclose(*world, atol=1e-9)
    with pytest.raises(ValueError, match="with its geometry"):
        ResampleToSpacingd("image", [1.5] * 3)({"image": torch.rand(1, 4, 4, 4)})


def test_schemes():
    image = np.stack([100 * noise(6, 7, 8), 3 + noise(6, 7, 8), 5 * noise(6, 7, 8), noise(6, 7, 8), noise(6, 7, 8)])
    schemes = [
        {"scheme": "ct", "lower": -50.0, "upper": 80.0, "mean": 10.0, "std": 40.0},
        {"scheme": "zscore"},
        {"scheme": "rescale"},
        {"scheme": "none"},
        {"scheme": "divide", "by": 255},
    ]
    result = NormalizeChannelsd("image", schemes)({"image": MetaTensor(torch.from_numpy(image))})["image"]
    assert result.dtype == torch.float32
    result = np.asarray(result)
    np.testing.assert_allclose(result[0], (image[0].clip(-50, 80) - 10) / 40, rtol=1e-5)
    np.testing.assert_allclose(result[1], (image[1] - image[1].mean()) / image[1].std(), atol=1e-5)
    np.testing.assert_allclose(result[2], (image[2] - image[2].min()) / np.ptp(image[2]), atol=1e-6)
    np.testing.assert_array_equal(result[3], image[3])
    np.testing.assert_allclose(result[4], image[4] / 255, rtol=1e-6)
    flat = NormalizeChannelsd("image", [{"scheme": "zscore"}])({"image": torch.ones(1, 3, 3, 3)})["image"]
    assert not flat.any()


def test_zscore_of_what_is_not_zero_with_holes_filled():
    image = torch.zeros(1, 9, 9, 9)
    image[0, 2:7, 2:7, 2:7] = torch.from_numpy(noise(5, 5, 5)) + 4
    image[0, 4, 4, 4] = 0
    inside = image[0, 2:7, 2:7, 2:7].numpy()
    result = NormalizeChannelsd("image", [{"scheme": "zscore", "nonzero": True}])({"image": image})["image"]
    np.testing.assert_allclose(result[0, 2:7, 2:7, 2:7], (inside - inside.mean()) / inside.std(), rtol=1e-4, atol=1e-5)
    assert result[0, 4, 4, 4] < -2
    assert not result[0, :2].any()


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="one of ct, zscore, rescale, divide, none, got 'minmax'"):
        NormalizeChannelsd("image", [{"scheme": "minmax"}])
    with pytest.raises(ValueError, match="has 2 channels, but there are 1 schemes"):
        NormalizeChannelsd("image", [{"scheme": "none"}])({"image": torch.zeros(2, 3, 3, 3)})


@pytest.fixture
def loaded(tmp_path):
    """An image with a border of zeros, through nnU-Net's preprocessing, as a batch; and what was done to it."""

    def load(shape, spacing, target):
        data = np.zeros(shape, np.float32)
        data[3:-2, 2:, :-4] = noise(*shape)[3:-2, 2:, :-4]
        affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
        nibabel.save(nibabel.Nifti1Image(data, affine), tmp_path / "image.nii.gz")
        steps = [LoadImaged("image"), EnsureChannelFirstd("image"), CropToNonzerod("image")]
        preprocessing = Compose(
            [*steps, NormalizeChannelsd("image", [{"scheme": "zscore"}]), ResampleToSpacingd("image", target)]
        )
        return (
            data,
            next(iter(DataLoader(Dataset([{"image": tmp_path / "image.nii.gz"}], preprocessing)))),
            preprocessing,
        )

    return load


def test_a_label_map_goes_back_to_its_place_and_what_was_cropped_is_background(loaded):
    data, batch, preprocessing = loaded((22, 20, 24), (1.0, 2.0, 1.0), (1.6, 1.5, 0.9))
    assert batch["image"].shape == (1, 1, 11, 24, 22)
    labels = torch.randint(1, 5, batch["image"].shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    batch["pred"] = MetaTensor(labels).copy_meta_from(batch["image"])
    item = Invertd("pred", preprocessing, "image", nearest_interp=True)(decollate_batch(dict(batch))[0])
    expected = np.zeros(data.shape)
    places = [np.floor(p + 0.5).astype(int) for p in half_voxel_centres((17, 18, 20), labels.shape[2:])]
    expected[3:-2, 2:, :-4] = labels[0, 0].numpy()[tuple(places)]
    np.testing.assert_array_equal(item["pred"][0], expected)
    np.testing.assert_allclose(item["pred"].affine, np.diag([-1, -2, 1, 1]), atol=1e-6)
    zeros = MetaTensor(torch.zeros(1, 4, 5, 6))
    assert CropToNonzerod("image")({"image": zeros})["image"].shape == (1, 4, 5, 6)


@pytest.mark.parametrize(
    "spacing, target", [((1, 2, 1), (1.6, 1.5, 0.9)), ((1, 1, 4), (1.3, 1.3, 3)), ((1, 1, 1), (1, 1, 4))]
)
def test_smooth_labels_are_the_argmax_of_nnunets_resized_logits(loaded, spacing, target):
    data, batch, _ = loaded((22, 20, 24), spacing, target)
    logits = torch.randn(5, *batch["image"].shape[2:], generator=torch.Generator().manual_seed(0))
    inferer = SlidingWindow(64, windows="nnunet", output="smooth_labels", precision="float32")
    padded = [(64 - n) // 2 for n in logits.shape[1:]]
    window = torch.nn.functional.pad(
        logits, [n for p, m in list(zip(padded, logits.shape[1:]))[::-1] for n in (p, 64 - m - p)]
    )
    smooth = inferer(batch["image"], lambda x: window[None])[0, 0]
    expected = np.zeros(data.shape)
    apart = thick_axis(target, spacing)
    assert (apart == 2) == (spacing[2] == 4 or target[2] == 4)
    expected[3:-2, 2:, :-4] = resize(logits.double().numpy(), (17, 18, 20), 1, apart).argmax(0)
    assert len(np.unique(expected)) == 5
    assert (np.asarray(smooth) != expected).sum() <= 2  # of 10,560; sums differ in the last bit


def test_labels_of_training_lie_on_the_images_new_grid(loaded):
    """As the templates resample them: by world coordinates, nearest."""
    data, batch, _ = loaded((22, 20, 24), (1.0, 1.0, 1.0), (2.0, 2.0, 2.0))
    image = decollate_batch(dict(batch))[0]["image"]
    halves = np.zeros(data.shape, np.float32)
    halves[:, :, 10:] = 1  # the crop box is 20 long from 0, so that the plane between 9 and 10 is its middle
    label = MetaTensor(torch.from_numpy(halves)[None], torch.diag(torch.tensor([-1.0, -1, 1, 1])).double())
    match = ResampleToMatchd("label", "image", mode="nearest")
    label = match({"label": label, "image": image})["label"][0]
    assert label.shape == image.shape[1:]
    assert not label[..., : label.shape[2] // 2].any()
    assert label[..., label.shape[2] // 2 :].all()
