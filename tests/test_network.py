"""What merging knows of a network: its head, and which tensor is which kind of kernel."""

import numpy as np
import pytest
import torch

from tools.errors import UserError
from tools.network import Structure, build, describe, group_of, matches, part_of

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
        describe({"_target_": "tests.test_network.Pairs", "out_channels": 2})


def test_the_last_of_several_layers_is_found():
    torch.manual_seed(5)
    unet = describe({**UNET, "num_res_units": 2, "norm": "batch"})
    drawn = torch.rand(3)
    assert torch.equal(drawn, torch.rand(3, generator=torch.manual_seed(5)))  # describing leaves the user's seed alone
    assert unet.head["model.2.0.conv.weight"] == 1 and "model.2.0.adn.N.running_var" in unet.head
    assert "model.2.0.adn.A.weight" not in unet.head  # one slope for all channels is the backbone's
    last = "model.2.1.conv.unit0.conv"
    assert unet.last_layer == [f"{last}.weight", f"{last}.bias"] and unet.skips == [f"{last}.weight"]
    assert unet.inner == {f"{last}.weight": 1}


class Pairs(torch.nn.Module):
    """A head with an output for each pair of classes."""

    def __init__(self, out_channels):
        super().__init__()
        self.head = torch.nn.Conv3d(1, out_channels**2, 1)


class Small(torch.nn.Module):
    """A head of two layers, with something between them and something behind them."""

    def __init__(self, out_channels, between="Identity", behind="Identity", size=16):
        super().__init__()
        self.size = size
        self.backbone = torch.nn.Conv3d(1, 4, 3, padding=1)
        self.hidden = torch.nn.Conv3d(4, out_channels, 1)
        self.between = torch.nn.GroupNorm(1, out_channels) if between == "GroupNorm" else getattr(torch.nn, between)()
        self.head = torch.nn.Conv3d(out_channels, out_channels, 1)
        self.behind = getattr(torch.nn, behind)()

    def forward(self, x):
        if x.shape[2] != self.size:
            raise ValueError(f"images of {self.size} only")
        return self.behind(self.head(self.between(self.hidden(self.backbone(x)))))


class DepthwiseHead(torch.nn.Sequential):
    """The last layer sees each class alone."""

    def __init__(self, out_channels):
        classes = torch.nn.Conv3d(1, out_channels, 1)
        super().__init__(classes, torch.nn.Conv3d(out_channels, out_channels, 3, padding=1, groups=out_channels))


SMALL = {"_target_": "tests.test_network.Small", "out_channels": 2}


def test_heads_of_several_layers_that_cannot_be_stacked_are_refused():
    assert describe({**SMALL, "between": "Tanh", "size": 32}).last_layer == ["head.weight", "head.bias"]
    for definition, reason in (
        ({**SMALL, "between": "GroupNorm"}, "do not give the logits of each .does a normalisation mix the classes"),
        ({**SMALL, "behind": "ReLU"}, "none is last and linear .is there a normalisation or an activation behind it"),
        ({**SMALL, "behind": "Softmax"}, "cannot be stacked"),
        ({**SMALL, "size": 7}, "cannot be run to prove it .ValueError: images of 7 only"),
        ({"_target_": "tests.test_network.DepthwiseHead", "out_channels": 2}, "none is last and linear"),
        ({"_target_": "HighResNet", **COMMON}, "none is last and linear"),
    ):
        with pytest.raises(UserError, match=f"the head is more than one linear layer, .*{reason}"):
            describe(definition)


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


@pytest.mark.parametrize(
    "kind",
    ["AttentionUnet", "BasicUNet", "DynUNet", "FlexibleUNet", "SegResNet", "SegResNetDS", "SwinUNETR", "UNet", "UNETR"],
)
def test_the_decoder_is_what_comes_after_the_bottleneck(kind):
    """Every network has both; what meets the image is the encoder's, what meets the head the decoder's."""
    from tests.test_merge_networks import network_def

    structure = describe(network_def(kind, 2))
    tensors = build(network_def(kind, 2), 2).state_dict()
    names = [name for name in tensors if name not in structure.head and name not in structure.aliases]
    groups = {name: group_of(name) for name in names}
    kernels = [name for name in names if tensors[name].dim() == 5]
    assert groups[next(name for name in kernels if tensors[name].shape[1] == 1)] == "encoder"
    assert "decoder" in groups.values()
    upwards = [name for name in structure.transposed if "init" not in name and "encoder" not in name]
    assert all(groups[name] == "decoder" for name in upwards)
    order = [groups[name] for name in kernels]
    if kind != "AttentionUnet":  # there the levels are nested in another order
        assert order == sorted(order, key=["encoder", "decoder"].index)


def test_the_groups_of_unetr_plus_plus():
    definition = {"_target_": "tools.bundle_code.unetr_pp.UNETRPlusPlus", "in_channels": 1, "img_size": [16, 32, 32]}
    names = [*build({**definition, "out_channels": 2}, 2).state_dict()]
    assert {group_of(name) for name in names if name.startswith("unetr_pp_encoder.")} == {"encoder"}
    assert {group_of(name) for name in names if name.startswith("decoder")} == {"decoder"}


def test_the_groups_of_stunets_tensors():
    network = build({"_target_": "tools.bundle_code.stunet.STUNet", "out_channels": 2, "size": "small"}, 2)
    names = [name for name in network.state_dict() if not name.startswith("seg_outputs.")]
    assert {group_of(name) for name in names if name.startswith("conv_blocks_context.")} == {"encoder"}
    assert {group_of(name) for name in names if not name.startswith("conv_blocks_context.")} == {"decoder"}


def test_patterns_name_groups_and_tensors():
    assert matches("encoders.0.conv.weight", "encoder") and not matches("encoders.0.conv.weight", "decoder")
    assert matches("model.1.submodule.2.0.conv.weight", "decoder") and matches(
        "model.1.submodule.0.conv.weight", "encoder"
    )
    assert matches("decoders.0.x", "decoders.*") and not matches("decoders.0.x", "decoders.1.*")


def test_the_parts_of_a_nested_network_are_its_levels():
    assert part_of("encoders.0.basic_module.conv1.weight") == "encoders.0"
    assert part_of("model.0.conv.unit0.conv.weight") == "model.0"
    assert part_of("model.1.submodule.0.conv.weight") == "model.1.submodule.0"
    assert part_of("model.1.submodule.1.submodule.2.1.weight") == "model.1.submodule.1.submodule.2"
    assert part_of("head.weight") == "head.weight"
