"""Windows of slices: what the inflated network computes, in closed form, and against the 2D network that it was made from."""

import json
import sys
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from tests.conftest import ROOT
from tests.test_weights_2d import FILE, difference, image, random
from tools.bundle_code.slice_encoders import SwinEncoder, ViTEncoder
from tools.bundle_code.timm_encoder import TimmEncoder
from tools.bundle_code.window_segmenter import UPerNet, WindowSegmenter, window_places
from tools.errors import UserError
from tools.inflation import inflate_window, verify_window
from tools.weights_2d import fit

VIT = partial(ViTEncoder, img_size=(16, 16), patch_size=4, hidden_size=8, num_heads=2, features=(0, 1, 2, 3))
SWIN = partial(
    SwinEncoder, patch_size=2, embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 2), window_size=4, drop_path=0
)
BEIT = partial(
    TimmEncoder, name="beit_base_patch16_224", img_size=(32, 32), features=(0, 1, 2, 3), patch_size=8, embed_dim=8, depth=4,
    num_heads=2,
)  # fmt: skip


def network(encoder, window, channels=1, seed=0, **how):
    torch.manual_seed(seed)
    net = WindowSegmenter(channels, 3, encoder, window, width=8, **{"norm": ["group", {"num_groups": 2}]} | how)
    return net.double().eval()


def pair(encoder, mode, channels=1):
    """A 2D network, and the one that sees five slices with its weights."""
    flat, deep = (network(encoder, window, channels, seed=window) for window in (1, 5))
    tensors, rules = inflate_window(flat, deep, mode)
    deep.load_state_dict(tensors)
    assert [rule for rule in rules.values() if rule != "copied"] == ["centred" if mode == "centre" else "averaged"]
    return flat, deep


def encoders(request, name):
    if name == "beit":
        request.getfixturevalue("timm")
    return {"vit": VIT, "swin": SWIN, "beit": BEIT}[name]


@pytest.mark.parametrize("name", ["vit", "swin", "beit"])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_centred_window_is_the_2d_network_on_every_slice(request, name, channels):
    flat, deep = pair(encoders(request, name), "centre", channels)
    volume = image(2, channels, 32, 32, 4)
    one_by_one = torch.cat([flat(volume[..., [place]]) for place in range(4)], -1)
    assert deep(volume).shape == (2, 3, 32, 32, 4)
    error = difference(deep(volume), one_by_one)
    assert error < 1e-10
    print(f"{name}, {channels} channels, centre: {error:.1e}")
    assert verify_window(flat, deep, channels, (32, 32, 3), "centre") < 1e-10


@pytest.mark.parametrize("encoder", [VIT, SWIN])
def test_an_averaged_window_is_the_2d_network_on_the_mean_slice(encoder):
    flat, deep = pair(encoder, "average")
    volume = image(1, 1, 16, 16, 7)
    padded = torch.cat([volume[..., :1], volume[..., :1], volume, volume[..., -1:], volume[..., -1:]], -1)
    means = torch.stack([padded[..., place : place + 5].mean(-1) for place in range(7)], -1)
    error = difference(deep(volume), flat(means))
    assert error < 1e-10
    print(f"{encoder.func.__name__}, average: {error:.1e}")
    assert difference(deep(volume), flat(volume)) > 1e-4
    assert verify_window(flat, deep, 1, (16, 16, 3), "average") < 1e-10  # of equal slices
    with pytest.raises(UserError, match="differs from the 2D one"):
        verify_window(flat, deep, 1, (16, 16, 3), "centre")


def test_the_patch_embedding_is_a_convolution_of_the_volume():
    """Its kernel, seen as 3D, slides over the slices one by one."""
    net, seen = network(VIT, 5, channels=2), []
    embedding = net.encoder.patch_embedding.patch_embeddings
    embedding.register_forward_hook(lambda _, inputs, output: seen.append(output))
    volume = image(1, 2, 16, 16, 6)
    net(volume)
    slices_first = F.pad(volume.movedim(-1, 2), (0, 0, 0, 0, 2, 2), mode="replicate")
    expected = F.conv3d(slices_first, embedding.weight.unflatten(1, (2, 5)), embedding.bias, stride=(1, 4, 4))
    assert difference(torch.cat(seen).movedim(0, 1)[None], expected) < 1e-12


def test_windows_repeat_the_last_slices():
    expected = [[0, 0, 0, 1, 2], [0, 0, 1, 2, 3], [0, 1, 2, 3, 3], [1, 2, 3, 3, 3]]
    assert window_places(4, 5).tolist() == expected
    assert window_places(3, 1).tolist() == [[0], [1], [2]]
    with pytest.raises(ValueError, match="an odd number of them; got 4"):
        network(VIT, 4)


def test_the_outer_slices_learn():
    """Their weights are zero in a centred kernel, but not their gradients."""
    _, deep = pair(VIT, "centre")
    deep(image(1, 1, 16, 16, 5)).square().mean().backward()
    gradient = deep.encoder.patch_embedding.patch_embeddings.weight.grad
    assert all(gradient[:, place].abs().max() > 0 for place in range(5))


def test_chunks_of_slices_change_nothing():
    volume = image(1, 1, 16, 16, 7)
    whole, parts = (network(VIT, 5, chunk=chunk) for chunk in (16, 3))
    assert difference(parts(volume), whole(volume)) < 1e-12


def test_slices_of_another_size():
    """A ViT's position embeddings are resized; a Swin has none."""
    for encoder in (VIT, SWIN):
        assert network(encoder, 5)(image(1, 1, 24, 40, 2)).shape == (1, 3, 24, 40, 2)


def test_the_published_size():
    """74.9 million parameters in neck and decoder for a ViT-B."""
    with torch.device("meta"):
        net = WindowSegmenter(1, 14, partial(ViTEncoder, img_size=(512, 512)), norm="batch")
    count = sum(parameter.numel() for part in (net.neck, net.decoder) for parameter in part.parameters())
    assert round(count / 1e6, 1) == 74.9
    config = json.loads((ROOT / "bundles/pretrain_inflated/configs/train.json").read_text())
    assert (config["width"], config["features"], config["window"]) == (768, [3, 5, 7, 11], 5)
    assert (config["learning_rate"], config["weight_decay"]) == (3e-5, 0.05)
    assert config["batch_size"] * config["patch_size"][2] == 16  # windows in a step


def test_upernet_by_its_figure():
    """Pooled to 1, 2, 3 and 6; added from deep to fine; put together at the finest level. Norms and ReLUs are taken out."""
    channels, width = [2, 3, 4, 5], 6
    decoder = UPerNet(channels, width, "batch").double()
    for stack in decoder.modules():
        if isinstance(stack, torch.nn.Sequential):
            stack[1], stack[2] = torch.nn.Identity(), torch.nn.Identity()
    maps = [image(1, count, 24 // 2**level, 24 // 2**level) for level, count in enumerate(channels)]

    def up(x, to):
        return F.interpolate(x, to.shape[2:], mode="bilinear")

    def conv(x, stack):
        kernel = stack[0].weight
        return F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)

    pools = [
        up(conv(F.adaptive_avg_pool2d(maps[3], side), stack), maps[3])
        for side, stack in zip((1, 2, 3, 6), decoder.pooled)
    ]
    top = conv(torch.cat([maps[3], *pools], 1), decoder.bottleneck)
    two = conv(maps[2], decoder.lateral[2]) + up(top, maps[2])
    one = conv(maps[1], decoder.lateral[1]) + up(two, maps[1])
    zero = conv(maps[0], decoder.lateral[0]) + up(one, maps[0])
    levels = [conv(zero, decoder.smooth[0]), conv(one, decoder.smooth[1]), conv(two, decoder.smooth[2]), top]
    expected = conv(torch.cat([up(level, maps[0]) for level in levels], 1), decoder.fuse)
    assert difference(decoder(maps), expected) < 1e-12


def loaded(encoder, weights):
    encoder = encoder.double().eval()
    found = fit(weights, encoder.state_dict(), 3, {}, FILE)
    encoder.load_state_dict({**encoder.state_dict(), **found.tensors})
    return encoder, found


def peer(timm, name, **how):
    """timm's features of four depths, of random weights."""
    theirs = (
        timm.create_model(name, features_only=True, feature_cls="getter", out_indices=(0, 1, 2, 3), **how)
        .double()
        .eval()
    )
    weights = random(
        {name: tensor.shape for name, tensor in theirs.model.state_dict().items() if tensor.is_floating_point()}
    )
    theirs.model.load_state_dict(weights, strict=False)
    return theirs, weights


def test_vit_against_timm(timm):
    """With its class token, which has a position of its own, and without the last norm."""
    how = {"img_size": 32, "patch_size": 8, "embed_dim": 8, "num_heads": 2, "depth": 4}
    theirs, weights = peer(timm, "vit_base_patch16_224", **how)
    ours, found = loaded(ViTEncoder(3, (32, 32), 8, 8, 2, (0, 1, 2, 3)), weights)
    x = image(2, 3, 32, 32)
    for map_, expected in zip(ours(x), theirs(x), strict=True):
        assert difference(map_, expected) < 1e-13
    assert not found.left_out
    without = {name: tensor for name, tensor in weights.items() if name != "cls_token"}
    with pytest.raises(UserError, match="class_token false in network_def"):
        loaded(ViTEncoder(3, (32, 32), 8, 8, 2, (0, 1, 2, 3)), without)


def test_swin_against_timm(timm):
    how = {"img_size": 112, "patch_size": 2, "embed_dim": 8, "depths": (1, 2, 2, 1), "num_heads": (2, 2, 2, 2)}
    theirs, weights = peer(timm, "swin_base_patch4_window7_224", **how)
    ours, _ = loaded(SwinEncoder(3, 2, 8, (1, 2, 2, 1), (2, 2, 2, 2), 7), weights)
    ours.norms = torch.nn.ModuleList([torch.nn.Identity()] * 4)
    x = image(1, 3, 112, 112)
    for map_, expected in zip(ours(x), theirs(x), strict=True):
        assert difference(map_, expected.movedim(-1, 1) if expected.shape[-1] == map_.shape[1] else expected) < 1e-13


def test_beit_of_another_size_against_timm(timm):
    """Its table of relative positions is resized as timm does it."""
    theirs, weights = peer(timm, "beit_base_patch16_224", patch_size=8, embed_dim=8, depth=4, num_heads=2, img_size=32)
    larger = TimmEncoder(
        3, "beit_base_patch16_224", (48, 48), (0, 1, 2, 3), patch_size=8, embed_dim=8, depth=4, num_heads=2
    )
    _, found = loaded(larger, weights)
    name = "network.model.blocks.1.attn.relative_position_bias_table"
    assert found.tensors[name].shape == (11 * 11 + 3, 2)
    assert found.tensors[name][-3:].equal(weights["blocks.1.attn.relative_position_bias_table"][-3:])
    assert found.origins[name].endswith("4 × 4 resized to 6 × 6")
    same, found = loaded(BEIT(in_channels=3), weights)
    x = image(1, 3, 32, 32)
    for map_, expected in zip(same(x), theirs(x), strict=True):
        assert difference(map_, expected) < 1e-13


def test_channels_of_timm_would_not_do(timm):
    """Its own weights for five channels are the colours in turn, times 3/5: neither centred nor averaged grey ones."""
    kernel = image(8, 3, 4, 4)
    theirs = timm.models.adapt_input_conv(5, kernel)
    grey = kernel.sum(1)
    assert (theirs[:, 2] - grey).abs().max() > 0.1
    assert (theirs - grey[:, None] / 5).abs().max() > 0.1
    assert (theirs.sum(1) - grey).abs().max() > 0.1


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"the encoder beit_base_patch16_224 is timm's, .* pip install timm"):
        BEIT(in_channels=5)
