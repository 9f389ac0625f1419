"""Scores of label maps: closed forms, an independent computation, and the rules for organs that are not there."""

import math

import nibabel
import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from scipy import ndimage

from tools.errors import UserError
from tools.scores import (
    check_grid,
    dice,
    load_reference,
    read_scores,
    rounded_score,
    score_label_map,
    surface_scores,
    write_scores,
)
from tools.summary import METRICS


def blob(seed, shape=(30, 26, 22)):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 3)
    return noise > np.quantile(noise, 0.8)


def test_a_box_and_the_same_box_one_thick_slice_higher():
    """Sides agree, top and bottom are a slice apart; surfaces count by their area, not by their voxels."""
    low, high = np.zeros((2, 50, 60, 20), bool)
    low[5:45, 10:50, 5:15] = high[5:45, 10:50, 6:16] = True
    sides, ends = 4 * 40 * 10 * 3, 2 * 40 * 40
    nsd, hd95 = surface_scores(high, low, (1, 1, 3), 2)
    assert nsd == pytest.approx(sides / (sides + ends), rel=0.03)
    assert hd95 == 3
    assert dice(high, low) == pytest.approx(0.9)
    assert surface_scores(high, low, (1, 1, 3), 3)[0] == 1
    swapped = surface_scores(high.transpose(2, 1, 0), low.transpose(2, 1, 0), (3, 1, 1), 2)
    assert swapped == pytest.approx((nsd, hd95), rel=1e-6)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.7, 1.3, 3.2)])
def test_hd95_is_that_of_distance_transforms_by_hand(spacing):
    predicted, truth = blob(0), blob(1)
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in (predicted, truth)]
    distances = [ndimage.distance_transform_edt(~surface, sampling=spacing) for surface in surfaces]
    directed = [np.percentile(distances[1 - i][surfaces[i]], 95) for i in (0, 1)]
    assert surface_scores(predicted, truth, spacing, 1)[1] == pytest.approx(max(directed), rel=1e-6)


@pytest.mark.parametrize("place", [(0, 0, 0), (11, 5, 7), (30, 24, 18)])  # 0 and the last touch the border
def test_what_lies_around_the_organs_changes_nothing(place):
    masks = np.zeros((2, 60, 50, 40), bool)
    box = tuple(slice(start, start + side) for start, side in zip(place, (30, 26, 22), strict=True))
    masks[:, *box] = blob(2), blob(3)
    predicted, truth = (torch.from_numpy(mask)[None, None] for mask in masks)
    spacing = {"include_background": True, "spacing": (0.7, 1.3, 3.2)}
    whole = float(compute_surface_dice(predicted, truth, [2], use_subvoxels=True, **spacing))
    distance = float(compute_hausdorff_distance(predicted, truth, percentile=95, **spacing))
    assert surface_scores(*masks, (0.7, 1.3, 3.2), 2) == pytest.approx((whole, distance), rel=1e-6)
    assert dice(*masks) == pytest.approx(2 * (masks[0] & masks[1]).sum() / masks.sum(), rel=1e-6)


def test_organs_that_are_not_there_follow_the_rules_and_survive_the_file(tmp_path):
    affine = np.diag([2, 2, 5, 1])
    reference, predicted = np.zeros((2, 10, 10, 10), np.uint8)
    reference[2:5, 2:5, 2:5] = (
        7  # missed; the second organ is hallucinated, the third is nowhere, the fourth not labelled
    )
    predicted[0, 0, :4] = 2
    for name, array in (("reference", reference), ("predicted", predicted)):
        nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / f"{name}.nii.gz")
    channels = {"missed": [7], "absent": [3], "nowhere": [4], "unknown": None}
    files = (tmp_path / "predicted.nii.gz", tmp_path / "reference.nii.gz")
    write_scores(tmp_path / "scores.csv", score_label_map("b", "c", *files, channels, 2.0))
    missed, absent, nowhere = read_scores(tmp_path / "scores.csv")
    assert (missed.dice, missed.nsd) == (0, 0)
    assert missed.hd95_mm == pytest.approx(math.hypot(20, 20, 50))
    assert (missed.reference_ml, missed.predicted_ml) == (0.54, 0)
    for score, volume in ((absent, 0.08), (nowhere, 0)):
        assert all(map(math.isnan, (score.dice, score.nsd, score.hd95_mm)))
        assert (score.reference_ml, score.predicted_ml) == (0, volume)
    header, _, row, _ = (tmp_path / "scores.csv").read_text().splitlines()
    assert header == "bundle,case,label,dice,nsd,hd95_mm,reference_ml,predicted_ml"
    assert row == "b,c,absent,,,,0.0,0.08"


def test_tiny_organs_have_a_volume():
    """Of micro-CT: one voxel of 20 µm is 8e-9 ml, and neither absent nor missed."""
    score = rounded_score("b", "c", "tubule", 0.5, math.nan, math.nan, 8e-9, 12.3456789)
    assert (score.reference_ml, score.predicted_ml) == (8e-9, 12.3457)
    assert math.isnan(METRICS["false_positive_ml"](score))


def test_a_reference_that_is_no_label_map_of_the_image_is_refused(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.zeros((6, 5, 4, 3), np.uint8), np.eye(4)), tmp_path / "channels.nii.gz")
    with pytest.raises(UserError, match=r"channels.nii.gz has 3 volumes, a label map has one"):
        load_reference(tmp_path / "channels.nii.gz")
    image = ((60, 50, 40), np.diag([2.0, 2.0, 5.0, 1.0]))
    check_grid("x", (image[0], image[1] + 0.004 * np.eye(4, k=3)), image)  # rounding, as other programs do
    with pytest.raises(
        UserError, match="x is not on the grid of its image: 60 × 50 × 4 voxels instead of 60 × 50 × 40"
    ):
        check_grid("x", ((60, 50, 4), image[1]), image)
    for wrong in (image[1] + 1.0 * np.eye(4, k=3), np.diag([2.0, 2.0, 5.1, 1.0]), np.full((4, 4), np.nan)):
        with pytest.raises(UserError, match=r"the same voxel lies up to (0\.5|1\.9|nan) voxels elsewhere"):
            check_grid("x", (image[0], wrong), image)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "scores.csv").write_text("bundle,case\na,b\n")
    for name in ("scores.csv", "none.csv"):
        with pytest.raises(UserError, match=r"no scores\.csv of evaluate"):
            read_scores(tmp_path / name)
