"""Inflated networks give on every slice of a volume of equal slices what the 2D network gives on one."""

import math

import pytest
import torch
from monai.networks import nets
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import nn

from tools.errors import UserError
from tools.inflation import depth_taps, deviations, inflate_weights, transposed_taps, verify

ONE = {"in_channels": 1, "out_channels": 3}
UNET = {**ONE, "channels": (4, 8, 16), "strides": (2, 2)}
NETWORKS = {  # class, arguments, those of the 2D twin and of the 3D network, size of the volume
    "UNet": (nets.UNet, {**UNET, "norm": "batch"}, {}, {}, (8, 16, 16)),
    "UNet, residual": (nets.UNet, {**UNET, "num_res_units": 2}, {}, {}, (8, 16, 16)),
    "BasicUNet": (nets.BasicUNet, {**ONE, "features": (4, 4, 8, 8, 8, 4)}, {}, {}, (16, 32, 32)),
    "DynUNet": (
        nets.DynUNet,
        {**ONE, "filters": [4, 8, 8], "deep_supervision": True, "res_block": True},
        {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]},
        {
            "kernel_size": [[1, 3, 3], 3, 3],
            "strides": [1, [1, 2, 2], 2],
            "upsample_kernel_size": [[1, 2, 2], 2],
        },
        (8, 16, 16),
    ),
    "SegResNet": (
        nets.SegResNet,
        {**ONE, "init_filters": 8, "blocks_down": (1, 1), "blocks_up": (1,)},
        {},
        {},
        (8, 8, 8),
    ),
    "AttentionUnet": (nets.AttentionUnet, UNET, {}, {}, (8, 16, 16)),
    "FlexibleUNet, EfficientNet": (
        nets.FlexibleUNet,
        {**ONE, "backbone": "efficientnet-b0", "decoder_channels": (8, 8, 4, 4, 4)},
        {},
        {},
        (32, 32, 32),
    ),
    "FlexibleUNet, ResNet": (
        nets.FlexibleUNet,
        {**ONE, "backbone": "resnet10", "decoder_channels": (8, 8, 4, 4, 4)},
        {},
        {},
        (32, 32, 32),
    ),
    "UNETR": (
        nets.UNETR,
        {**ONE, "hidden_size": 12, "mlp_dim": 12, "num_heads": 2, "feature_size": 4},
        {"img_size": (32, 48)},
        {"img_size": (64, 32, 48)},
        (64, 32, 48),
    ),
    "UNETR, patches by a linear layer": (
        nets.UNETR,
        {**ONE, "hidden_size": 12, "mlp_dim": 12, "num_heads": 2, "feature_size": 4, "proj_type": "perceptron"},
        {"img_size": (32, 32)},
        {"img_size": (32, 32, 32)},
        (32, 32, 32),
    ),
    "SwinUNETR": (
        nets.SwinUNETR,
        {**ONE, "feature_size": 12, "depths": (2, 1, 1, 1), "num_heads": (2, 2, 2, 2)},
        {"window_size": (2, 2)},
        {"window_size": (4, 2, 2)},
        (32, 64, 64),
    ),
}
SWIN = {"in_chans": 1, "embed_dim": 4, "depths": (2, 2, 1, 1), "num_heads": (1, 1, 2, 2), "patch_norm": True}


def shaken(network):
    """A network none of whose tensors is what networks start with."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator).to(tensor)
            tensor.add_(0.1 * (noise.abs() if name.endswith("running_var") else noise))
    return network.double().eval()


def inflated(flat, deep, mode="centre"):
    weights, rules = inflate_weights(flat, deep, mode)
    deep.double().eval().load_state_dict(weights)
    return rules


def pair(name):
    torch.manual_seed(0)
    kind, both, for_flat, for_deep, shape = NETWORKS[name]
    return shaken(kind(spatial_dims=2, **both, **for_flat)), kind(spatial_dims=3, **both, **for_deep), shape


@pytest.mark.parametrize("name", NETWORKS)
def test_centre_inflation_is_exact(name):
    flat, deep, shape = pair(name)
    rules = inflated(flat, deep)
    error = verify(flat, deep, 1, shape, "centre")
    print(f"{name}, centre: {error:.1e}")  # for docs/inflation.md: pytest -rP
    assert error < 1e-12
    new = {name for name, rule in rules.items() if rule == "new"}
    assert all(name.endswith("relative_position_index") for name in new)


@pytest.mark.parametrize("name", ["UNet", "BasicUNet", "AttentionUnet", "SegResNet", "UNETR"])
def test_the_average_over_zero_padding_is_refused(name):
    flat, deep, shape = pair(name)
    rules = inflated(flat, deep, "average")
    assert "averaged" in rules.values()
    slices = deviations(flat, deep, 1, shape)[0]
    print(f"{name}, average: {slices[0]:.0%} on the first slice, {slices[len(slices) // 2]:.0%} on the middle one")
    assert min(slices[0], slices[-1]) > 0.01
    with pytest.raises(UserError, match="meet the zeros that pad the volume; --mode centre does not"):
        verify(flat, deep, 1, shape, "average")


def test_a_network_of_several_names_for_one_module_keeps_them_one():
    flat, deep, _ = pair("DynUNet")
    state = deep.state_dict(keep_vars=True)
    weights, _ = inflate_weights(flat, deep)
    names = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    shared = [group for group in names.values() if len(group) > 1]
    assert shared
    assert all(weights[group[0]] is weights[name] for group in shared for name in group)


def convolutions(kind, padding_mode):
    layers = [
        kind(1, 3, 3, padding=1, padding_mode=padding_mode),
        nn.ReLU(),
        kind(3, 2, 5, padding=2, padding_mode=padding_mode),
    ]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("mode", ["centre", "average", [0.2, 0.5, 0.3], [0.1, 0.2, 0.4, 0.2, 0.1]])
def test_with_repeated_slices_as_padding_all_taps_are_exact(mode):
    flat, deep = shaken(convolutions(nn.Conv2d, "replicate")), convolutions(nn.Conv3d, "replicate")
    rules = inflated(flat, deep, mode)
    assert verify(flat, deep, 1, (7, 8, 8), mode) < 1e-14
    words = {"centre": ("centred", "centred"), "average": ("averaged", "averaged")}
    expected = (
        words.get(mode) if isinstance(mode, str) else [("centred", "tapped")[len(mode) == size] for size in (3, 5)]
    )
    assert (rules["0.weight"], rules["2.weight"]) == tuple(expected)


def test_taps():
    assert depth_taps(3, "centre") == [0, 1, 0]
    assert depth_taps(4, "centre") == [0, 0, 1, 0]
    assert math.isclose(math.fsum(depth_taps(7, "average")), 1)
    for wrong in ([1, 1, 1], [0.5, 1, 0.5], [0.3, 0.3, 0.3], [float("nan")] * 3):
        with pytest.raises(UserError, match="only taps that sum to 1"):
            depth_taps(3, wrong)
    with pytest.raises(UserError, match="no mode 'center'"):
        depth_taps(3, "center")
    with pytest.raises(UserError, match="neither centre, average nor numbers"):
        depth_taps(3, ["a"])


@pytest.mark.parametrize(
    "kernel, stride, padding, extra, taps",
    [(2, 2, 0, 0, [1, 1]), (3, 2, 1, 1, [0, 1, 1]), (4, 2, 1, 0, [0, 1, 1, 0]), (3, 1, 1, 0, [0, 1, 0])],
)
def test_transposed_convolutions_are_exact_on_every_slice_and_by_the_centre_tap_are_not(
    kernel, stride, padding, extra, taps
):
    assert transposed_taps(kernel, stride, padding, extra) == taps
    torch.manual_seed(0)
    how = {"kernel_size": kernel, "stride": stride, "padding": padding, "output_padding": extra}
    flat, deep = nn.ConvTranspose2d(4, 6, groups=2, **how).double(), nn.ConvTranspose3d(4, 6, groups=2, **how)
    assert inflated(flat, deep)["weight"] == "tiled"
    slices = deviations(flat, deep, 4, (5, 6, 7))[0]
    assert len(slices) == 5 * stride
    assert max(slices) < 1e-14
    if stride > 1:  # as if it were a convolution
        with torch.no_grad():
            deep.weight.zero_()
            deep.weight[:, :, kernel // 2] = flat.weight
        with pytest.raises(UserError, match="not exact"):
            verify(flat, deep, 4, (5, 6, 7), "centre")


def test_transposed_convolutions_without_exact_taps_are_refused():
    for wrong in ((2, 2, 1, 2), (3, 2, 0, 0), (3, 2, 1, 0), (1, 2, 0, 1)):
        with pytest.raises(UserError, match="are exact at the ends"):
            transposed_taps(*wrong)
    flat, deep = (kind(1, 1, 3, stride=2, padding=1) for kind in (nn.ConvTranspose2d, nn.ConvTranspose3d))
    with pytest.raises(UserError, match="tensor weight: no taps"):
        inflate_weights(flat, deep)


def swin(dims, window, patch, downsample):
    return SwinTransformer(**SWIN, window_size=window, patch_size=patch, downsample=downsample, spatial_dims=dims)


@pytest.mark.parametrize("downsample", ["merging", "mergingv2"])
@pytest.mark.parametrize("mode", ["centre", "average", [0.3, 0.7]])
@pytest.mark.parametrize("depth, patch, window", [(32, 2, 2), (32, 2, 8), (16, 1, 16)])
def test_swin_is_exact_where_windows_divide_the_depth(depth, patch, window, mode, downsample):
    torch.manual_seed(0)
    flat = shaken(swin(2, (3, 3), (2, 2), downsample))
    deep = swin(3, (window, 3, 3), (patch, 2, 2), downsample)
    inflated(flat, deep, mode)
    error = verify(flat, deep, 1, (depth, 48, 48), mode)
    print(f"SwinTransformer, {depth} slices, patch {patch}, window {window}, {downsample}, {mode}: {error:.1e}")
    assert error < 1e-12


def test_swin_whose_windows_are_filled_up_in_plane_is_exact_too():
    """Both networks fill them up; and windows of one slice find their places in a smaller map."""
    for volume, window in (((32, 64, 48), (4, 3, 3)), ((32, 32, 48), (1, 3, 3))):
        torch.manual_seed(0)
        flat, deep = shaken(swin(2, window[1:], (2, 2), "mergingv2")), swin(3, window, (2, 2, 2), "mergingv2")
        inflated(flat, deep)
        assert verify(flat, deep, 1, volume, "centre") < 1e-12


@pytest.mark.parametrize(
    "volume, window, patch, reason",
    [
        ((24, 48, 48), (5, 3, 3), 2, "windows of 5 do not divide a depth of 12 tokens"),
        ((12, 48, 48), (3, 3, 3), 2, "a depth of 3 tokens is merged by two, and zeros fill it up"),
        ((32, 32, 48), (2, 3, 3), 2, "a window of 2×3×3 is larger in plane than its map of 2×2×3 tokens"),
        ((32, 48, 32), (2, 3, 3), 2, "a window of 2×3×3 is larger in plane than its map of 2×3×2 tokens"),
    ],
)
def test_swin_is_refused_where_it_cannot_be_exact(volume, window, patch, reason):
    torch.manual_seed(0)
    flat, deep = shaken(swin(2, window[1:], (2, 2), "mergingv2")), swin(3, window, (patch, 2, 2), "mergingv2")
    inflated(flat, deep)
    with pytest.raises(UserError, match=reason):
        verify(flat, deep, 1, volume, "centre")


def test_a_merging_in_another_order_is_not_exact():
    """So that the check would notice if blocks were taken in the order of the 2D merging with one more bit."""
    torch.manual_seed(0)
    flat, deep = shaken(swin(2, (3, 3), (2, 2), "mergingv2")), swin(3, (2, 3, 3), (2, 2, 2), "mergingv2")
    weights, _ = inflate_weights(flat, deep)
    name = "layers1.0.downsample.reduction.weight"
    blocks = weights[name].unflatten(1, (2, 2, 2, -1))
    deep.double().eval().load_state_dict({**weights, name: blocks.transpose(2, 3).flatten(1)})
    with pytest.raises(UserError, match="not exact"):
        verify(flat, deep, 1, (32, 48, 48), "centre")


def vit(dims, size, **how):
    return nets.ViT(
        1, size, 4, hidden_size=12, mlp_dim=12, num_layers=2, num_heads=2, spatial_dims=dims, qkv_bias=True, **how
    )


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("mode", ["centre", "average", [0.1, 0.2, 0.3, 0.4]])
def test_vit_is_exact_for_any_number_of_layers_of_tokens(layers, mode):
    torch.manual_seed(0)
    flat, deep = shaken(vit(2, (16, 24))), vit(3, (4 * layers, 16, 24))
    rules = inflated(flat, deep, mode)
    assert rules["patch_embedding.position_embeddings"] == ("copied" if layers == 1 else "tiled")
    error = verify(flat, deep, 1, (4 * layers, 16, 24), mode)
    print(f"ViT, {layers} layers of tokens, {mode}: {error:.1e}")
    assert error < 1e-13


def test_a_class_token_is_refused():
    torch.manual_seed(0)
    flat, deep = shaken(vit(2, (16, 16), classification=True)), vit(3, (8, 16, 16), classification=True)
    inflated(flat, deep)
    with pytest.raises(UserError, match="class token"):
        verify(flat, deep, 1, (8, 16, 16), "centre")


def test_tensors_without_a_rule_are_refused():
    flat, deep = (nets.UNet(dims, **UNET) for dims in (2, 3))
    wide = nets.UNet(3, **{**UNET, "channels": (4, 8, 32)})
    inflate_weights(flat, deep)
    with pytest.raises(UserError, match="no rule makes one from the other"):
        inflate_weights(flat, wide)


def test_taps_beside_the_centre_learn():
    """They are zero, not dead."""
    flat, deep, shape = pair("BasicUNet")
    inflated(flat, deep)
    deep(torch.randn(1, 1, *shape, dtype=torch.float64)).square().sum().backward()
    kernels = [
        module.weight.grad for module in deep.modules() if isinstance(module, nn.Conv3d) and module.kernel_size[0] == 3
    ]
    assert kernels
    assert all(grad[:, :, (0, 2)].abs().sum() > 0 for grad in kernels[:4])
