"""The network against the published description, restated here in plain PyTorch functions."""

import pytest
import torch
from torch.nn import functional as F

from tools.bundle_code.residual_unet import ResidualUNet3D


def published_names_and_shapes(width=64, in_channels=1):
    """The table of the reference: eight tensors per block, encoders 0-3, then decoders 0-2."""
    c = [width, 2 * width, 4 * width, 8 * width]
    blocks = [(f"encoders.{i}", (in_channels, *c)[i], c[i]) for i in range(4)]
    blocks += [(f"decoders.{u}", c[2 - u] + c[3 - u], c[2 - u]) for u in range(3)]
    table = []
    for block, cin, cout in blocks:
        p = f"{block}.basic_module."
        table += [
            (p + "conv1.weight", (cout, cin, 1, 1, 1)),
            (p + "conv1.bias", (cout,)),
            (p + "conv2.groupnorm.weight", (cout,)),
            (p + "conv2.groupnorm.bias", (cout,)),
            (p + "conv2.conv.weight", (cout, cout, 3, 3, 3)),
            (p + "conv3.groupnorm.weight", (cout,)),
            (p + "conv3.groupnorm.bias", (cout,)),
            (p + "conv3.conv.weight", (cout, cout, 3, 3, 3)),
        ]
    return table


def restated_forward(state, x):
    """The forward pass from the description, without the module."""

    def block(prefix, h):
        p = f"{prefix}.basic_module."
        r = F.conv3d(h, state[p + "conv1.weight"], state[p + "conv1.bias"])
        h = r
        for part, last in (("conv2", False), ("conv3", True)):
            groups = 8 if r.shape[1] >= 8 else 1
            h = F.group_norm(h, groups, state[f"{p}{part}.groupnorm.weight"], state[f"{p}{part}.groupnorm.bias"], 1e-5)
            h = F.conv3d(h, state[f"{p}{part}.conv.weight"], padding=1)
            h = h if last else torch.relu(h)
        return torch.relu(h + r)

    skips = []
    for level in range(4):
        x = block(f"encoders.{level}", F.max_pool3d(x, 2, 2) if level else x)
        skips.append(x)
    for u in range(3):
        skip = skips[2 - u]
        x = block(f"decoders.{u}", torch.cat([skip, F.interpolate(x, size=skip.shape[2:], mode="nearest")], 1))
    return F.conv3d(x, state["head.weight"], state["head.bias"])


def test_backbone_has_the_published_names_order_shapes_and_count():
    with torch.device("meta"):
        state = ResidualUNet3D(out_channels=2).state_dict()
    names = [(name, tuple(t.shape)) for name, t in state.items() if not name.startswith("head.")]
    assert names == published_names_and_shapes()
    assert len(names) == 56
    assert sum(state[name].numel() for name, _ in names) == 23_882_688
    assert list(state)[-2:] == ["head.weight", "head.bias"]


@pytest.mark.parametrize(("width", "size"), [(8, (16, 17, 23)), (16, (8, 9, 33)), (4, (11, 13, 16))])
def test_forward_equals_the_plain_restatement(width, size):
    torch.manual_seed(0)
    net = ResidualUNet3D(out_channels=4, width=width, dropout=0.5).eval().double()
    for parameter in net.parameters():  # norms and biases too, so that a swapped one shows
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 1, *size, dtype=torch.float64)
    expected = restated_forward(net.state_dict(), x)
    torch.testing.assert_close(net(x), expected, rtol=1e-9, atol=1e-9)


def test_dropout_really_reaches_every_block_and_only_in_training():
    net = ResidualUNet3D(width=8, dropout=0.5)
    drops = [m for m in net.modules() if isinstance(m, torch.nn.Dropout3d)]
    assert len(drops) == 14
    assert {m.p for m in drops} == {0.5}
    x = torch.randn(1, 1, 16, 16, 16)
    assert not torch.equal(net.train()(x), net(x))
    assert torch.equal(net.eval()(x), net(x))


def test_background_logit_is_zero_and_stays_zero_in_training():
    from tools.bundle_code.losses import DiceBCELoss
    from tools.bundle_code.optimizers import adamw

    torch.manual_seed(0)
    net = ResidualUNet3D(out_channels=3, width=8)
    optimizer = adamw(net, ["head.weight", "head.bias"], 1e-2, 1e-2, 0.1, 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        DiceBCELoss()(net(torch.randn(1, 1, 16, 16, 16)), torch.randint(0, 3, (1, 1, 16, 16, 16))).backward()
        optimizer.step()
    assert torch.count_nonzero(net.head.weight[0]) == 0
    assert net.head.bias[0] == 0
    assert torch.count_nonzero(net.head.weight[1:]) == net.head.weight[1:].numel()


def test_too_small_an_input_is_refused_clearly():
    with pytest.raises(ValueError, match="at least 8 voxels, got 7"):
        ResidualUNet3D(width=8)(torch.zeros(1, 1, 16, 7, 16))
    with pytest.raises(ValueError, match="at least 2; got 1"):
        ResidualUNet3D(out_channels=1)
