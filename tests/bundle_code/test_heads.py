"""The head of a network is what its number of output channels changes."""

import pytest

from tools.bundle_code.heads import find_head


def test_heads_of_stock_networks():
    ours = {"_target_": "tools.bundle_code.residual_unet.ResidualUNet3D", "out_channels": 5, "width": 8}
    assert find_head(ours) == {"head.weight": 0, "head.bias": 0}
    segresnet = {"_target_": "SegResNet", "spatial_dims": 3, "init_filters": 8, "in_channels": 1, "out_channels": 4}
    assert find_head(segresnet) == {"conv_final.2.conv.weight": 0, "conv_final.2.conv.bias": 0}
    basic = {"_target_": "BasicUNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 4}
    assert find_head(basic) == {"final_conv.weight": 0, "final_conv.bias": 0}


def test_networks_without_a_findable_head_are_refused():
    with pytest.raises(ValueError, match="none of the arguments out_channels"):
        find_head({"_target_": "torch.nn.Conv3d", "in": 1})
    unet = {
        "_target_": "UNet",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 2,
        "channels": [4, 8],
        "strides": [2],
    }
    with pytest.raises(ValueError, match="does not simply count output channels"):
        find_head({**unet, "num_res_units": 2})
