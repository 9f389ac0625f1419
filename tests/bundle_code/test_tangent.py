"""The linearised network against torch.func's derivative, and what linear means: changes of the backbone add up."""

import pytest
import torch
from monai.networks.nets import DynUNet, SegResNet
from torch.func import functional_call, jvp

from tools.bundle_code.residual_unet import ResidualUNet3D
from tools.bundle_code.tangent import TangentNetwork, tangent_network

HEADS = {
    "residual": ["head.weight", "head.bias"],
    "segresnet": ["conv_final.2.conv.weight", "conv_final.2.conv.bias"],
    "dynunet": ["output_block.conv.conv.weight", "output_block.conv.conv.bias"],
}


def network(kind):
    torch.manual_seed(0)
    if kind == "residual":
        made = ResidualUNet3D(1, 3, width=8, levels=2)
        torch.nn.init.normal_(made.head.weight)
    elif kind == "segresnet":
        made = SegResNet(3, 8, 1, 3, blocks_down=(1, 1), blocks_up=(1,))
    else:
        sizes = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}
        made = DynUNet(3, 1, 3, **sizes, filters=[4, 8, 8], deep_supervision=True)
    return made.double().eval()


def moved(tangent, seed, size=0.1):
    """Move the backbone, and say by how much."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    with torch.no_grad():
        for name, parameter in tangent.network.named_parameters():
            if name in tangent.linear:
                deltas[name] = size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(deltas[name])
    return deltas


@pytest.fixture
def image():
    return torch.rand(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", HEADS)
def test_the_output_is_value_plus_derivative(kind, mode, image):
    plain = network(kind)
    tangent = TangentNetwork(network(kind), HEADS[kind]).eval().to(memory_format=torch.channels_last_3d)
    point = {name: p.detach() for name, p in plain.named_parameters() if name in tangent.linear}
    with mode():
        torch.testing.assert_close(tangent(image), plain(image))
    deltas = moved(tangent, 0)

    def of_backbone(backbone):
        return functional_call(plain, backbone, (image,))

    value, derivative = jvp(of_backbone, (point,), (deltas,))
    with mode():
        torch.testing.assert_close(tangent(image.to(memory_format=torch.channels_last_3d)), value + derivative)
        assert (tangent(image) - plain(image)).abs().max() > 1e-3  # there is something to it
    for name, parameter in tangent.network.named_parameters():  # a pass changes nothing
        assert torch.equal(parameter, point[name] + deltas[name] if name in point else parameter)


def test_changes_of_the_backbone_add_up(image):
    tangent = TangentNetwork(network("residual"), HEADS["residual"])
    with torch.no_grad():
        start = tangent(image)
        outputs = []
        for seeds in ((1,), (2,), (1, 2)):
            changed = TangentNetwork(network("residual"), HEADS["residual"])
            for seed in seeds:
                moved(changed, seed, size=1.0)
            outputs.append(changed(image) - start)
    torch.testing.assert_close(outputs[0] + outputs[1], outputs[2], rtol=1e-9, atol=1e-9)


def test_gradients_are_those_of_finite_differences(image):
    tangent = TangentNetwork(network("residual"), HEADS["residual"]).eval().to(memory_format=torch.channels_last_3d)
    moved(tangent, 3)
    names = ["decoders.0.basic_module.conv2.conv.weight", "encoders.0.basic_module.conv3.groupnorm.bias", "head.weight"]
    tangent(image).square().mean().backward()
    parameters = dict(tangent.network.named_parameters())
    for name in names:
        direction = torch.randn(parameters[name].shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        values = []
        with torch.no_grad():
            for step in (1e-4, -1e-4):
                parameters[name].add_(step * direction)
                values.append(tangent(image).square().mean())
                parameters[name].sub_(step * direction)
        expected = (values[0] - values[1]) / 2e-4
        torch.testing.assert_close((parameters[name].grad * direction).sum(), expected, rtol=1e-6, atol=1e-8)
    assert all(not buffer.requires_grad for buffer in tangent.point.buffers())


def test_it_is_made_from_a_config_and_keeps_its_point():
    target = "tools.bundle_code.residual_unet.ResidualUNet3D"
    made = tangent_network(target, HEADS["residual"], in_channels=1, out_channels=4, width=8)
    state = made.state_dict()
    assert state["network.head.weight"].shape[0] == 4 and "point.head.weight" not in state
    name = "encoders.0.basic_module.conv1.weight"
    assert torch.equal(state[f"point.{name}"], state[f"network.{name}"])
    moved(made, 0)
    other = tangent_network("SegResNet", HEADS["segresnet"], out_channels=2, init_filters=8)
    with pytest.raises(RuntimeError, match="point"):
        other.load_state_dict(state)


def test_what_cannot_be_linear_is_refused():
    with pytest.raises(ValueError, match="running statistics"):
        TangentNetwork(torch.nn.Sequential(torch.nn.Conv3d(1, 2, 1), torch.nn.BatchNorm3d(2)), ["0.bias"])
    with pytest.raises(ValueError, match=r"no tensor head\.weight"):
        TangentNetwork(torch.nn.Conv3d(1, 2, 1), ["head.weight"])
