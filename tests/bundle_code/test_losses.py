"""The losses against their formulas."""

import json

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.losses import DiceCELoss
from monai.losses import DiceFocalLoss as MonaiDiceFocalLoss
from scipy import ndimage

from tests.conftest import ROOT
from tools.bundle_code.losses import DeepSupervision, DiceBCELoss, DiceFocalLoss


def test_published_loss_is_soft_dice_with_smoothing_one_plus_bce():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 4, 5, 6, 7), torch.randint(0, 3, (2, 1, 5, 6, 7))  # organ 3 is absent
    p = torch.sigmoid(logits[:, 1:])
    t = torch.stack([target[:, 0] == organ for organ in (1, 2, 3)], 1).float()
    axes = (2, 3, 4)
    dice = 1 - (2 * (p * t).sum(axes) + 1) / (p.sum(axes) + t.sum(axes) + 1)
    bce = -(t * torch.log(p) + (1 - t) * torch.log(1 - p)).mean()
    torch.testing.assert_close(DiceBCELoss()(logits, target), dice.mean() + bce)
    torch.testing.assert_close(DiceBCELoss(present_only=True)(logits, target), dice[:, :2].mean() + bce)


def test_background_channel_has_no_part():
    logits = torch.randn(1, 3, 4, 4, 4, requires_grad=True)
    DiceBCELoss()(logits, torch.zeros(1, 1, 4, 4, 4)).backward()
    assert torch.count_nonzero(logits.grad[:, 0]) == 0
    assert torch.count_nonzero(logits.grad[:, 1:]) > 0


def test_the_focal_loss_is_that_of_a_softmax():
    """(1 - p)² · -log p of the true class, over voxels and classes, as MONAI averages; with soft Dice, background included."""
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 4, 5, 6), torch.randint(0, 3, (2, 1, 4, 5, 6))
    p = torch.softmax(logits, 1)
    t = torch.nn.functional.one_hot(target[:, 0], 3).movedim(-1, 1).float()
    axes = (2, 3, 4)
    dice = 1 - (2 * (p * t).sum(axes) + 1e-5) / (p.sum(axes) + t.sum(axes) + 1e-5)
    focal = (-((1 - p) ** 2) * torch.log(p) * t).mean()
    torch.testing.assert_close(DiceFocalLoss()(logits, target), dice.mean() + focal)
    stock = MonaiDiceFocalLoss(to_onehot_y=True, softmax=True)(logits, target)
    assert abs(stock - dice.mean() - focal) > 0.01  # its focal term is of sigmoids


def nnunet_loss(logits, target):
    """Soft Dice of nnU-Net 1 per sample without background, and cross-entropy, from the description."""
    p = torch.softmax(logits, 1)
    t = torch.nn.functional.one_hot(target[:, 0].long(), logits.shape[1]).movedim(-1, 1).to(p)
    axes = (2, 3, 4)
    tp, fp, fn = ((a * b).sum(axes) for a, b in ((p, t), (p, 1 - t), (1 - p, t)))
    dice = (2 * tp + 1e-5) / (2 * tp + fp + fn + 1e-5 + 1e-8)
    return -dice[:, 1:].mean() - (t * torch.log_softmax(logits, 1)).sum(1).mean()


@pytest.fixture
def stunet_loss():
    """As bundles/pretrain_stunet trains with it."""
    config = json.loads((ROOT / "bundles" / "pretrain_stunet" / "configs" / "train.json").read_text())["loss"]
    arguments = {name: value for name, value in config["loss"].items() if name != "_target_"}
    assert (config["_target_"], config["loss"]["_target_"]) == ("scripts.losses.DeepSupervision", "DiceCELoss")
    return DeepSupervision(DiceCELoss(**arguments))


def test_deep_supervision_is_nnunets_loss(stunet_loss):
    """But for the constant 1: the Dice term there is −Dice, here 1 − Dice. Labels go down as scikit-image's order 0 does."""
    torch.manual_seed(0)
    target = torch.randint(0, 4, (2, 1, 32, 32, 32), dtype=torch.uint8)
    sizes = [(32, 32, 32), (16, 16, 16), (8, 8, 8), (4, 4, 4), (2, 4, 4)]
    logits = [torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True) for size in sizes]
    expected = torch.zeros((), dtype=torch.float64)
    for weight, level in zip((8 / 15, 4 / 15, 2 / 15, 1 / 15), logits):
        factors = [new / old for new, old in zip(level.shape[2:], target.shape[2:])]
        small = [ndimage.zoom(one[0].numpy(), factors, order=0, mode="nearest", grid_mode=True) for one in target]
        expected = expected + weight * nnunet_loss(level, torch.from_numpy(np.stack(small))[:, None])
    found = stunet_loss(logits, MetaTensor(target))
    torch.testing.assert_close(found, 1 + expected, rtol=1e-6, atol=1e-6)
    ours = torch.autograd.grad(found, logits[:4])
    theirs = torch.autograd.grad(expected, logits[:4])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)
    assert logits[4].grad is None  # no part in it


def test_deep_supervision_of_one_tensor_is_the_loss_itself():
    logits, target = torch.randn(1, 3, 4, 4, 4), torch.randint(0, 3, (1, 1, 4, 4, 4))
    wrapped = DeepSupervision(DiceBCELoss())
    assert wrapped(logits, target) == DiceBCELoss()(logits, target) == wrapped([logits], target)
