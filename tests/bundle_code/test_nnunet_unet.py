"""nnU-Net's U-Nets: tensors as the library that nnU-Net uses has them; tests/importers compare the functions."""

from importlib.util import find_spec

import pytest
import torch

from tools.bundle_code.nnunet_unet import NnUNet

DEFAULT = {  # nnU-Net's 3d_fullres of most datasets
    "features": [32, 64, 128, 256, 320, 320],
    "kernel_sizes": [[3, 3, 3]] * 6,
    "strides": [[1, 1, 1], *[[2, 2, 2]] * 5],
}


@pytest.mark.skipif(
    find_spec("dynamic_network_architectures") is None, reason="dynamic-network-architectures is not installed"
)
@pytest.mark.parametrize(
    "kind, blocks, decoder, tensors",
    [("PlainConvUNet", [2] * 6, [2] * 5, 108), ("ResidualEncoderUNet", [1, 3, 4, 6, 6, 6], [1] * 5, 264)],
)
def test_tensors(kind, blocks, decoder, tensors):
    from dynamic_network_architectures.architectures import unet

    residual = kind == "ResidualEncoderUNet"
    with torch.device("meta"):
        ours = NnUNet(1, 3, **DEFAULT, blocks=blocks, decoder_convolutions=decoder, residual=residual)
        theirs = getattr(unet, kind)(
            input_channels=1,
            n_stages=6,
            features_per_stage=DEFAULT["features"],
            conv_op=torch.nn.Conv3d,
            kernel_sizes=DEFAULT["kernel_sizes"],
            strides=DEFAULT["strides"],
            num_classes=3,
            n_conv_per_stage_decoder=decoder,
            conv_bias=True,
            norm_op=torch.nn.InstanceNorm3d,
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=torch.nn.LeakyReLU,
            **{"n_blocks_per_stage" if residual else "n_conv_per_stage": blocks},
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.named_parameters()}
    assert len(shapes) == tensors
    for name in [name for name in shapes if name.startswith("decoder.seg_layers")]:
        shape = shapes.pop(name)
        if "seg_layers.4" in name:
            shapes[name.replace("decoder.seg_layers.4", "head")] = shape
    assert {name: tuple(tensor.shape) for name, tensor in ours.named_parameters()} == shapes


def test_it_trains_and_is_exported():
    network = NnUNet(2, 4, [4, 8], [[1, 3, 3], [3, 3, 3]], [[1, 1, 1], [1, 2, 2]], [1, 2], [1], residual=True)
    image = torch.rand(1, 2, 4, 8, 12)
    assert network(image).shape == (1, 4, 4, 8, 12)
    network(image).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    torch.testing.assert_close(torch.jit.script(network.eval())(image), network(image))
