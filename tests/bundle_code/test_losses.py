"""The loss against its formula."""

import torch

from tools.bundle_code.losses import DiceBCELoss


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
