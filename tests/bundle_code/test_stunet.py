"""STU-Net against the published description, restated here in plain PyTorch functions."""

import pytest
import torch
from torch.nn import functional as F

from tools.bundle_code.stunet import STRIDES, STUNet

# of the published table: channels, blocks, tensors, and parameters for 105, 2 and 14 output channels
PUBLISHED = {
    "small": ([16, 32, 64, 128, 256, 256], 1, 130, 14_596_941, 14_545_338, 14_551_350),
    "base": ([32, 64, 128, 256, 512, 512], 1, 130, 58_262_669, 58_159_978, 58_171_942),
    "large": ([64, 128, 256, 512, 1024, 1024], 2, 218, 440_302_605, 440_097_738, 440_121_606),
    "huge": ([96, 192, 384, 768, 1536, 1536], 3, 306, 1_457_326_221, 1_457_019_178, 1_457_054_950),
}
OFFICIAL_STRIDES = [[2, 2, 2]] * 4 + [[1, 1, 2]]  # along z, y, x
TINY = {"channels": [4, 6, 8, 8], "strides": [(2, 2, 2), (2, 2, 2), (2, 1, 1)]}


def published_names_and_shapes(channels, depth, in_channels=1, out_channels=105):
    """The table of the reference: encoder, upsampling, decoder, heads; the deepest decoder level first."""

    def level(prefix, cin, cout):
        table = []
        for b in range(depth):
            p, c = f"{prefix}.{b}.", cin if b == 0 else cout
            table += [(f"{p}conv1.weight", (cout, c, 3, 3, 3)), (f"{p}conv1.bias", (cout,))]
            table += [(f"{p}norm1.{part}", (cout,)) for part in ("weight", "bias")]
            table += [(f"{p}conv2.weight", (cout, cout, 3, 3, 3)), (f"{p}conv2.bias", (cout,))]
            table += [(f"{p}norm2.{part}", (cout,)) for part in ("weight", "bias")]
            if b == 0:
                table += [(f"{p}conv3.weight", (cout, c, 1, 1, 1)), (f"{p}conv3.bias", (cout,))]
        return table

    table, last = [], len(channels) - 1
    for s, (cin, cout) in enumerate(zip([in_channels, *channels], channels)):
        table += level(f"conv_blocks_context.{s}", cin, cout)
    for u in range(last):
        shape = (channels[last - 1 - u], channels[last - u], 1, 1, 1)
        table += [(f"upsample_layers.{u}.conv.weight", shape), (f"upsample_layers.{u}.conv.bias", shape[:1])]
    for u in range(last):
        table += level(f"conv_blocks_localization.{u}", 2 * channels[last - 1 - u], channels[last - 1 - u])
    for u in range(last):
        shape = (out_channels, channels[last - 1 - u], 1, 1, 1)
        table += [(f"seg_outputs.{u}.weight", shape), (f"seg_outputs.{u}.bias", shape[:1])]
    return table


def restated_forward(state, x, strides, depth):
    """The forward pass from the description, without the module: all logits, the finest first."""

    def level(prefix, h, stride):
        for b in range(depth):
            p, step = f"{prefix}.{b}.", tuple(stride) if b == 0 else (1, 1, 1)
            w = {name.removeprefix(p): tensor for name, tensor in state.items() if name.startswith(p)}
            r = F.conv3d(h, w["conv1.weight"], w["conv1.bias"], stride=step, padding=1)
            r = F.leaky_relu(F.instance_norm(r, weight=w["norm1.weight"], bias=w["norm1.bias"], eps=1e-5), 0.01)
            r = F.conv3d(r, w["conv2.weight"], w["conv2.bias"], padding=1)
            r = F.instance_norm(r, weight=w["norm2.weight"], bias=w["norm2.bias"], eps=1e-5)
            shortcut = F.conv3d(h, w["conv3.weight"], w["conv3.bias"], stride=step) if b == 0 else h
            h = F.leaky_relu(r + shortcut, 0.01)
        return h

    skips = []
    for s, stride in enumerate([(1, 1, 1), *strides]):
        x = level(f"conv_blocks_context.{s}", x, stride)
        skips.append(x)
    outputs = []
    for u, stride in enumerate(reversed(strides)):
        for axis, factor in enumerate(stride, start=2):
            x = x.repeat_interleave(factor, dim=axis)
        x = F.conv3d(x, state[f"upsample_layers.{u}.conv.weight"], state[f"upsample_layers.{u}.conv.bias"])
        x = level(f"conv_blocks_localization.{u}", torch.cat([x, skips[-2 - u]], 1), (1, 1, 1))
        outputs.insert(0, F.conv3d(x, state[f"seg_outputs.{u}.weight"], state[f"seg_outputs.{u}.bias"]))
    return outputs


def random_network(**arguments):
    torch.manual_seed(0)
    net = STUNet(**{**TINY, "out_channels": 3, **arguments}).double()
    for parameter in net.parameters():  # norms and biases too, so that a swapped one shows
        torch.nn.init.normal_(parameter, std=0.3)
    return net


@pytest.mark.parametrize("size", PUBLISHED)
def test_names_order_shapes_and_counts_are_the_published_ones(size):
    channels, depth, tensors, *counts = PUBLISHED[size]
    for out_channels, count in zip((105, 2, 14), counts):
        with torch.device("meta"):
            net = STUNet(out_channels=out_channels, size=size)
        found = [(name, tuple(tensor.shape)) for name, tensor in net.state_dict().items()]
        assert found == published_names_and_shapes(channels, depth, out_channels=out_channels)
        assert len(found) == tensors
        assert sum(parameter.numel() for parameter in net.parameters()) == count
        assert not list(net.buffers())


@pytest.mark.parametrize("size", PUBLISHED)
def test_tensors_of_the_published_table_load_strictly(size):
    channels, depth, *_ = PUBLISHED[size]
    with torch.device("meta"):
        net = STUNet(size=size)
        state = {name: torch.empty(shape) for name, shape in published_names_and_shapes(channels, depth)}
    net.load_state_dict(state, strict=True, assign=True)
    assert all(tensor is state[name] or tensor.shape == state[name].shape for name, tensor in net.state_dict().items())
    with pytest.raises(RuntimeError, match=r"seg_outputs\.4\.bias"):
        net.load_state_dict({**state, "seg_outputs.4.bias": torch.empty(104, device="meta")})


@pytest.mark.parametrize(("depth", "in_channels", "size"), [(1, 1, (16, 8, 12)), (2, 3, (8, 8, 4))])
def test_forward_equals_the_plain_restatement(depth, in_channels, size):
    net = random_network(depth=depth, in_channels=in_channels)
    x = torch.randn(2, in_channels, *size, dtype=torch.float64)
    expected = restated_forward(net.state_dict(), x, TINY["strides"], depth)
    outputs = net.train()(x)
    assert [output.shape[2:] for output in outputs] == [e.shape[2:] for e in expected]
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(net.eval()(x), expected[0], rtol=1e-9, atol=1e-9)  # one tensor
    assert isinstance(random_network(deep_supervision=False).train()(x[:, :1]), torch.Tensor)


def test_the_published_axes_are_these_reversed():
    """A network on (z, y, x) with the published strides is the default one with kernels reversed, on (x, y, z)."""
    assert [list(stride[::-1]) for stride in STRIDES] == OFFICIAL_STRIDES
    channels = [2, 3, 4, 4, 5, 5]
    official = random_network(channels=channels, strides=OFFICIAL_STRIDES)
    ours = random_network(channels=channels, strides=STRIDES)
    ours.load_state_dict({n: t.permute(0, 1, 4, 3, 2) if t.ndim == 5 else t for n, t in official.state_dict().items()})
    x = torch.randn(1, 1, 64, 32, 16, dtype=torch.float64)
    for a, b in zip(ours.train()(x), official.train()(x.permute(0, 1, 4, 3, 2)), strict=True):
        torch.testing.assert_close(a, b.permute(0, 1, 4, 3, 2), rtol=1e-9, atol=1e-9)
    wrong = random_network(channels=channels, strides=[(2, 2, 2)] * 5)  # loads as well, and is another function
    wrong.load_state_dict(ours.state_dict())
    assert not torch.allclose(wrong.eval()(torch.cat([x] * 2, 4))[..., :16], ours.eval()(x), rtol=0.01)


def test_checkpointing_changes_memory_and_not_gradients():
    x = torch.randn(1, 1, 16, 8, 8, dtype=torch.float64)
    gradients = []
    for checkpointing in (False, True):
        net = random_network(depth=2, checkpointing=checkpointing).train()
        sum(output.square().sum() for output in net(x)).backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    for kept, again in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, again, rtol=1e-12, atol=1e-12)
    assert [STUNet(**TINY, depth=depth).conv_blocks_context[0].checkpointing for depth in (1, 2)] == [False, True]


def test_checkpointed_blocks_run_again_in_the_backward_pass():
    net, calls = random_network(depth=2).train(), []
    net.conv_blocks_context[0][1].conv1.register_forward_hook(lambda *_: calls.append(1))
    loss = net(torch.randn(1, 1, 8, 8, 8, dtype=torch.float64))[0].sum()
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2


def test_heads_that_are_not_used_are_not_computed():
    net, calls = random_network(), []
    for level, head in enumerate(net.seg_outputs):
        head.register_forward_hook(lambda *_, level=level: calls.append(level))
    x = torch.randn(1, 1, 8, 8, 8, dtype=torch.float64)
    net.eval()(x)
    assert calls == [2]
    net.train()(x)
    assert calls == [2, 0, 1, 2]


def test_starts_from_he_normal_weights_and_zero_biases():
    torch.manual_seed(0)
    net = STUNet(channels=[32, 32], strides=[(2, 2, 2)], out_channels=2)
    weight = net.conv_blocks_context[1][0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (1 + 0.01**2) / (32 * 27)) ** 0.5, rel=0.02)
    assert all(torch.count_nonzero(m.bias) == 0 for m in net.modules() if isinstance(m, torch.nn.Conv3d))


def test_survives_torchscript():
    net = random_network().eval()
    x = torch.randn(1, 1, 8, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(torch.jit.script(net)(x), net(x))


def test_what_the_network_cannot_take_is_refused_clearly():
    net = STUNet(**TINY, out_channels=2)
    with pytest.raises(ValueError, match=r"multiple of \[8, 4, 4\], got \[8, 8, 10\]"):
        net(torch.zeros(1, 1, 8, 8, 10))
    with pytest.raises(ValueError, match=r"\[8, 4, 4\] leaves one voxel"):
        net.eval()(torch.zeros(1, 1, 8, 4, 4))
    with pytest.raises(ValueError, match=r"size must be one of 'small'.* got 'tiny'"):
        STUNet(size="tiny")
    with pytest.raises(ValueError, match="5 strides are between 6 levels, got 3 channels"):
        STUNet(channels=[1, 2, 3])
