"""The label map of MONAI's sliding windows and an argmax, without the logits of the whole image in memory."""

import re
from itertools import product
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.inferers import SlidingWindowInferer
from monai.transforms import Compose, EnsureChannelFirstd, Invertd, LoadImaged, Orientationd, Spacingd
from monai.transforms.utils import scale_affine
from scipy import ndimage

from tools.bundle_code.inferers import MixedPrecisionInferer
from tools.bundle_code.residual_unet import ResidualUNet3D
from tools.bundle_code.sliding_window import SlidingWindow, window_starts


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = ResidualUNet3D(out_channels=6, width=8, dropout=0.0).eval()
    torch.nn.init.normal_(network.head.weight.data[1:])
    with torch.inference_mode():
        means = network(image(32, 32, 32)).mean((0, 2, 3, 4))
    network.head.bias.data -= means  # so that every class is somewhere the largest
    return network.to(memory_format=torch.channels_last_3d)  # as bundles have it


def image(*size, channels=1):
    return torch.rand(1, channels, *size, generator=torch.Generator().manual_seed(1))


SHAPES = {
    "odd sizes": ((37, 29, 45), 16, 0.5),
    "smaller than the window along every axis": ((9, 15, 11), 16, 0.5),
    "smaller along one axis": ((30, 11, 33), 16, 0.5),
    "exactly one window": ((16, 24, 16), (16, 24, 16), 0.5),
    "anisotropic windows and overlaps": ((40, 21, 30), (24, 16, 8), (0.5, 0.25, 0.6)),
    "the whole image along an axis": ((24, 24, 40), (16, 16, -1), 0.25),
    "overlap of more than half": ((12, 24, 18), (8, 16, 16), 0.8),
    "no overlap": ((33, 16, 50), 16, 0.0),
}


@pytest.mark.parametrize("mode", ["gaussian", "constant"])
@pytest.mark.parametrize("size, window, overlap", SHAPES.values(), ids=SHAPES)
def test_the_label_map_is_monais(network, size, window, overlap, mode):
    x = image(*size)
    with torch.inference_mode():
        theirs = SlidingWindowInferer(window, 3, overlap, mode)(x, network)
        options = window, 3, overlap, mode
        labels = SlidingWindow(*options, precision="float32")(x, network)
        logits = SlidingWindow(*options, output="logits", precision="float32")(x, network)
    assert len(theirs.argmax(1).unique()) > 2
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), theirs.argmax(1, keepdim=True))
    torch.testing.assert_close(logits, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32, 32), (40, 24, 16)])
def test_logits_are_monais_to_the_last_bit_where_the_order_of_windows_is(network, size):
    with torch.inference_mode():
        theirs = SlidingWindowInferer(16, 3, 0.5, "gaussian")(image(*size), network)
        ours = SlidingWindow(16, 3, output="logits", precision="float32")(image(*size), network)
    assert torch.equal(ours, theirs)


def test_labels_are_monais_in_bfloat16_and_for_several_images(network):
    x = torch.cat([image(20, 40, 24), 1 - image(20, 40, 24)])
    with torch.inference_mode():
        theirs = MixedPrecisionInferer(SlidingWindowInferer(16, 1, 0.5, "gaussian"))(x, network)
        labels = SlidingWindow(16)(x, network)
    assert torch.equal(labels.long(), theirs.argmax(1, keepdim=True))


def test_of_several_outputs_the_first_counts(network):
    image = torch.rand(1, 1, 20, 16, 16)
    inferer = SlidingWindow(16, precision="float32")
    assert torch.equal(inferer(image, lambda x: [network(x), network(x)[..., ::2]]), inferer(image, network))


def test_of_equal_logits_the_first_channel_wins():
    def steps(window):
        """Small whole numbers, so that sums and ties are exact."""
        number = (window * 7).floor()
        return torch.cat([number, 6 - number, number, torch.full_like(number, 3)], 1)

    x = image(21, 17, 30)
    with torch.inference_mode():
        theirs = SlidingWindowInferer(8, 4, 0.5, "constant")(x, steps)
        labels = SlidingWindow(8, 4, 0.5, "constant", precision="float32")(x, steps)
    best = theirs.max(1, keepdim=True).values
    assert ((theirs == best).sum(1) > 1).float().mean() > 0.3
    assert torch.equal(labels.long(), theirs.argmax(1, keepdim=True))
    assert set(labels.unique().tolist()) == {0, 1}


def test_more_than_256_classes_fit_the_label_map():
    def network(window):
        place = (window * 299.99).long()
        return torch.nn.functional.one_hot(place[:, 0], 300).movedim(-1, 1).float()

    x = image(8, 8, 8)
    labels = SlidingWindow(8, precision="float32")(x, network)
    assert labels.dtype == torch.int16
    assert torch.equal(labels, (x * 299.99).short())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured as Linux does")
def test_memory_is_not_classes_times_volume():
    """32 planes of 400 are under a window at a time."""

    def resident(entry):
        return 1024 * int(re.search(rf"{entry}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    x, network = image(64, 64, 400), torch.nn.Conv3d(1, 50, 1)
    inferer = SlidingWindow(32, 1, 0.5, precision="float32")
    inferer(x[..., :40], network)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    labels = inferer(x, network)
    assert labels.shape == x.shape
    assert resident("VmHWM") - before < 50 * x.numel() * 4 / 4


@pytest.mark.parametrize(
    "length, starts", [(300, [0, 57, 115, 172]), (228, [0, 50, 100]), (240, [0, 56, 112]), (129, [0, 1]), (128, [0])]
)
def test_windows_of_nnunet_are_evenly_spread(length, starts):
    assert [start for start, _ in window_starts(length, 128, 0.5, "nnunet")] == starts


def test_weights_of_nnunet():
    """As a delta filtered with σ = 16, one for each window; 16 voxels are one σ."""
    x = torch.zeros(1, 1, 129, 1, 1)
    x[..., 1:, :, :] = torch.arange(128.0).reshape(-1, 1, 1)
    numbers = iter((0.0, 1.0))

    def network(window):
        return torch.cat([torch.full_like(w[None], next(numbers)) for w in window])

    share = SlidingWindow((128, 1, 1), 1, windows="nnunet", output="logits", precision="float32")(x, network).flatten()
    distance = np.arange(1, 128) - 64.0
    first, second = np.exp(-(distance**2) / 512), np.exp(-((distance - 1) ** 2) / 512)
    np.testing.assert_allclose(share[1:128], second / (first + second), rtol=1e-5)
    assert share[0] == 0
    assert share[128] == 1


def test_windows_of_nnunet_against_every_voxel_written_out(network):
    """Σ weight · logit ÷ Σ weight over all windows, in one array, as float64."""
    x, side = image(30, 20, 27), 16
    total, weights = torch.zeros(6, 30, 20, 27, dtype=torch.float64), torch.zeros(30, 20, 27, dtype=torch.float64)
    line = torch.exp(-0.5 * ((torch.arange(side).double() - 8) / 2) ** 2)
    weight = line[:, None, None] * line[:, None] * line
    with torch.inference_mode():
        for corner in product((0, 7, 14), (0, 4), (0, 6, 11)):
            box = tuple(slice(start, start + side) for start in corner)
            total[(slice(None), *box)] += weight * network(x[(..., *box)])[0]
            weights[box] += weight
        ours = SlidingWindow(side, 4, windows="nnunet", output="logits", precision="float32")(x, network)
    corners = [[start for start, _ in window_starts(length, side, 0.5, "nnunet")] for length in (30, 20, 27)]
    assert corners == [[0, 7, 14], [0, 4], [0, 6, 11]]
    torch.testing.assert_close(ours[0], (total / weights).float(), rtol=1e-4, atol=1e-4)


def test_mirrored_windows_are_averaged(network):
    x = image(24, 16, 30)

    def mirrored(window):
        flips = [(), (2,), (4,), (2, 4)]
        return sum(network(window.flip(axes)).flip(axes) if axes else network(window) for axes in flips) / 4

    with torch.inference_mode():
        theirs = SlidingWindowInferer(16, 2, 0.5, "gaussian")(x, mirrored)
        ours = SlidingWindow(16, 2, mirror_axes=[0, 2], output="logits", precision="float32")(x, network)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_probabilities_are_averaged_where_that_is_asked_for(network):
    x = image(24, 16, 30)

    def probabilities(window):
        return (network(window).softmax(1) + network(window.flip(2)).softmax(1).flip(2)) / 2

    with torch.inference_mode():
        theirs = SlidingWindowInferer(16, 2, 0.5, "gaussian")(x, probabilities)
        options = {"mirror_axes": [0], "average": "probabilities", "precision": "float32"}
        ours = SlidingWindow(16, 2, output="logits", **options)(x, network)
        labels = SlidingWindow(16, 2, **options)(x, network)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(labels, ours.argmax(1, keepdim=True).to(labels))
    assert not torch.equal(labels, SlidingWindow(16, 2, mirror_axes=[0], precision="float32")(x, network))


@pytest.mark.parametrize("output", ["labels", "logits"])
def test_windows_of_air_are_not_looked_at(output):
    x = image(16, 16, 80)
    x[..., 30:60] = 0
    seen = []

    def network(window):
        seen.extend(window)
        return torch.cat([window * 0, window * 0 + 1], 1)

    results = SlidingWindow(16, 1, skip_below=0.0, output=output, precision="float32")(x, network)
    labels = results if output == "labels" else results.argmax(1, keepdim=True)
    assert len(seen) == 7  # those that begin at 0, 8, 16, 24, 48, 56, 64; at 32 and 40 there is air
    assert (labels[..., :40] == 1).all()
    assert (labels[..., 40:48] == 0).all()
    assert (labels[..., 48:] == 1).all()
    air = SlidingWindow(16, 1, skip_below=0.0, precision="float32")(torch.zeros(1, 1, 40, 16, 16), lambda w: -w)
    assert not air.any()


@pytest.mark.parametrize(
    "codes, spacing, turned",
    [("LPS", None, False), ("PSR", (1.5, 1.5, 1.5), False), ("ARI", (1.5, 2.0, 3.0), True), ("RAS", (3, 1, 2), True)],
)
def test_smooth_labels_are_the_argmax_of_monais_inverted_logits(tmp_path, codes, spacing, turned):
    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, 5, 5, padding=2)
    torch.nn.init.normal_(network.weight)
    affine = np.diag([1.0, 2.0, 2.5, 1.0])
    if turned:
        affine[:2, :2] = np.array([[0.96, -0.28], [0.28, 0.96]]) @ affine[:2, :2]
    affine[:3, 3] = -20, 5, 7
    coarse = torch.randn(1, 1, 11, 10, 8)
    volume = torch.nn.functional.interpolate(coarse, (41, 37, 29), mode="trilinear")[0, 0]
    upright = nibabel.Nifti1Image(volume.numpy(), affine)
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(tuple(codes))
    )
    file = upright.as_reoriented(turn)
    nibabel.save(file, tmp_path / "image.nii.gz")
    steps = [LoadImaged("image"), EnsureChannelFirstd("image"), Orientationd("image", "RAS", labels=None)]
    steps += [Spacingd("image", spacing, mode="bilinear")] if spacing else []
    preprocessing = Compose(steps)
    batch = next(iter(DataLoader(Dataset([{"image": tmp_path / "image.nii.gz"}], preprocessing))))
    with torch.inference_mode():
        batch["smooth"] = SlidingWindow(16, 3, output="smooth_labels", precision="float32")(batch["image"], network)
        batch["logits"] = SlidingWindowInferer(16, 3, 0.5, "gaussian")(batch["image"], network)
        batch["labels"] = SlidingWindow(16, 3, precision="float32")(batch["image"], network)
    item = decollate_batch(dict(batch))[0]
    linear = Invertd("logits", preprocessing, "image", nearest_interp=False)(dict(item))["logits"].argmax(0)
    nearest = Invertd("labels", preprocessing, "image", nearest_interp=True)(dict(item))["labels"][0]
    assert len(linear.unique()) == 5
    assert item["smooth"].shape == (1, *file.shape)
    np.testing.assert_allclose(item["smooth"].affine, file.affine, atol=1e-5)
    assert (item["smooth"][0] == linear).float().mean() > 0.9999
    assert ((item["smooth"][0] == nearest).float().mean() == 1) == (spacing is None)


@pytest.mark.parametrize("size, thick, apart", [((25, 31, 20), 1, None), ((13, 16, 10), 1, None), ((30, 19, 6), 4, 2)])
def test_fast_labels_are_nnunets_interpolated_masks(size, thick, apart):
    """Each label's mask resized by scipy, the labels in ascending order where it is a half or more."""
    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, 5, 5, padding=2)
    torch.nn.init.normal_(network.weight)
    before = (26, 20, 24)
    original = torch.diag(torch.tensor([1.0, 1.0, thick, 1.0])).double()
    affine = original @ torch.from_numpy(scale_affine(size, before)).double()  # borders stay where they were
    x = MetaTensor(image(*before), affine, {"original_affine": original, "spatial_shape": list(size)})
    with torch.inference_mode():
        options = {"windows": "nnunet", "precision": "float32"}
        labels = SlidingWindow(16, 3, **options)(x, network)[0, 0].numpy()
        fast = SlidingWindow(16, 3, output="fast_labels", **options)(x, network)
    expected = np.zeros(size, np.uint8)
    factors = [new / old for new, old in zip(size, before)]
    for label in np.unique(labels):
        mask = (labels == label).astype(float)
        for axis in range(3):
            steps = [factors[axis] if other == axis else 1 for other in range(3)]
            mask = ndimage.zoom(mask, steps, order=0 if axis == apart else 1, mode="nearest", grid_mode=True)
        expected[mask >= 0.5 - 1e-9] = label
    assert fast.shape == (1, 1, *size)
    assert len(np.unique(expected)) == 5
    assert (fast[0, 0].numpy() == expected).mean() > 0.9999
    assert not np.array_equal(expected, ndimage.zoom(labels, factors, order=0, mode="nearest", grid_mode=True))


def test_a_network_that_has_segmented_can_be_trained():
    network = ResidualUNet3D(out_channels=2, width=8).eval()
    with torch.inference_mode():
        SlidingWindow(16)(image(16, 16, 16), network)
    network(image(16, 16, 16)).sum().backward()
    assert network.head.weight.grad.any()


def test_a_network_made_in_inference_mode_segments_within_it():
    with torch.inference_mode():
        network = ResidualUNet3D(out_channels=2, width=8).eval()
        assert SlidingWindow(16)(image(16, 16, 16), network).shape == (1, 1, 16, 16, 16)


def test_smooth_labels_need_the_images_geometry(network):
    inferer = SlidingWindow(16, output="smooth_labels")
    with pytest.raises(ValueError, match="a MetaTensor from LoadImaged"):
        inferer(image(16, 16, 16), network)
    turned = torch.tensor([[0.8, -0.6, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    x = MetaTensor(image(16, 16, 16), torch.eye(4), {"original_affine": turned, "spatial_shape": [16] * 3})
    with pytest.raises(ValueError, match="keeps the directions"):
        inferer(x, network)


def test_what_cannot_be_is_refused():
    for options, message in (
        ({"mode": "hann"}, "mode must be one of 'gaussian', 'constant', got 'hann'"),
        ({"windows": "evenly"}, "windows must be one of 'monai', 'nnunet'"),
        ({"output": "label"}, "output must be one of 'labels', 'smooth_labels', 'fast_labels', 'logits'"),
        ({"average": "votes"}, "average must be one of 'logits', 'probabilities', got 'votes'"),
        ({"overlap": 1.0}, "overlap must be at least 0 and below 1, got 1.0"),
        ({"precision": "half"}, "precision must be"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            SlidingWindow(16, **options)
    for network, found in ((lambda x: x[..., ::2], "(1, 1, 8, 8, 4)"), (lambda x: {"out": x}, "dict")):
        with pytest.raises(ValueError, match=re.escape(f"one tensor of its window's size, got {found}")):
            SlidingWindow(8)(image(8, 8, 8), network)
