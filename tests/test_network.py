"""What merging knows of a network: its head, and which tensor is which kind of kernel."""

import numpy as np
import pytest
import torch

from tools.errors import UserError
from tools.network import Structure, describe

COMMON = {"spatial_dims": 3, "in_channels": 1, "out_channels": 4}
UNET = {"_target_": "UNet", **COMMON, "channels": [4, 8, 16], "strides": [2, 2]}


def test_heads_of_stock_networks():
    ours = {"_target_": "tools.bundle_code.residual_unet.ResidualUNet3D", "out_channels": 5, "width": 8}
    assert describe(ours) == Structure({"head.weight": 0, "head.bias": 0})
    segresnet = {"_target_": "SegResNet", **COMMON, "init_filters": 8}
    assert describe(segresnet).head == {"conv_final.2.conv.weight": 0, "conv_final.2.conv.bias": 0}
    assert describe({"_target_": "BasicUNet", **COMMON}).head == {"final_conv.weight": 0, "final_conv.bias": 0}


def test_kinds_of_tensors_in_stock_networks():
    batch = describe({**UNET, "norm": "batch"})
    assert batch.statistics and all("running_" in name for name in batch.statistics)
    assert describe(UNET).transposed == ["model.1.submodule.2.conv.weight"]  # the last one is the head
    swin = describe({"_target_": "SwinUNETR", "in_channels": 1, "out_channels": 2, "feature_size": 12})
    assert swin.head == {"out.conv.conv.weight": 0, "out.conv.conv.bias": 0}  # cannot be built on the meta device
    assert any("relative_position_bias_table" in name for name in swin.plain)
    dynunet = {"_target_": "DynUNet", **COMMON, "kernel_size": [3, 3, 3], "strides": [1, 2, 2], "filters": [4, 8, 16]}
    deep = describe({**dynunet, "upsample_kernel_size": [2, 2], "deep_supervision": True, "deep_supr_num": 1})
    assert any(name.startswith("deep_supervision_heads") for name in deep.head)
    assert deep.aliases and not set(deep.aliases.values()) & set(deep.aliases)


def test_networks_without_a_findable_head_are_refused():
    with pytest.raises(UserError, match="none of the arguments out_channels"):
        describe({"_target_": "torch.nn.Conv3d", "in": 1})
    with pytest.raises(UserError, match="cannot be built"):
        describe({"_target_": "BasicUNet", "spatial_dims": 7, "out_channels": 2})
    with pytest.raises(UserError, match="does not simply count output channels"):
        describe({**UNET, "num_res_units": 2})
    with pytest.raises(UserError, match="belongs to no convolution: the head is more than one linear layer"):
        describe({"_target_": "HighResNet", **COMMON})


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_kernel_as_matrices_multiplies_as_the_convolution_does(transposed, groups):
    """Independent reference: torch's own convolution of an image that is as small as the kernel."""
    layer = (torch.nn.ConvTranspose3d if transposed else torch.nn.Conv3d)(4, 6, 2, groups=groups, bias=False).double()
    weight = layer.weight.detach().numpy()
    structure = Structure({}, ["w"] if transposed else [], {"w": groups} if groups > 1 else {})
    matrices = structure.as_matrices("w", weight)
    assert matrices.shape == (groups, 6 // groups, 4 // groups * 8)
    assert np.array_equal(structure.from_matrices("w", matrices, weight.shape), weight)
    patches = np.random.default_rng(0).standard_normal(
        (groups, 4 // groups, 8)
    )  # each input voxel under one kernel weight
    products = np.einsum("goi,gi->go", matrices, patches.reshape(groups, -1)).ravel()
    image = torch.from_numpy(patches).reshape(1, 4, 2, 2, 2)
    if transposed:  # its adjoint: <output, image of ones at one place>
        flipped = torch.nn.functional.conv_transpose3d(image.flip(2, 3, 4), layer.weight, groups=groups)
        np.testing.assert_allclose(products, flipped[0, :, 1, 1, 1].detach().numpy())
    else:
        np.testing.assert_allclose(products, layer(image)[0, :, 0, 0, 0].detach().numpy())


def test_tensors_that_are_no_matrices_are_one_row():
    structure = Structure({}, plain=["position"])
    for name, shape in (("bias", (5,)), ("prelu", ()), ("position", (1, 3, 4))):
        tensor = np.arange(np.prod(shape, dtype=int), dtype=float).reshape(shape)
        assert structure.as_matrices(name, tensor).shape == (1, 1, tensor.size)
        assert np.array_equal(structure.from_matrices(name, structure.as_matrices(name, tensor), shape), tensor)
