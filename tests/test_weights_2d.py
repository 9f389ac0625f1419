"""timm's names for MONAI's networks: against the transformers' equations written out by those names, and against timm itself."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.networks import nets
from monai.networks.nets.swin_unetr import SwinTransformer
from safetensors.torch import save_file
from torch.nn import functional as F

from tools.errors import UserError
from tools.weights_2d import fit, read_weights

FILE = Path("weights.safetensors")
WIDTH, HEADS = 12, 2


def random(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def block_shapes(name, width, mlp, positions=0, heads=0):
    shapes = {
        f"{name}.norm1.weight": (width,),
        f"{name}.norm1.bias": (width,),
        f"{name}.attn.qkv.weight": (3 * width, width),
        f"{name}.attn.qkv.bias": (3 * width,),
        f"{name}.attn.proj.weight": (width, width),
        f"{name}.attn.proj.bias": (width,),
        f"{name}.norm2.weight": (width,),
        f"{name}.norm2.bias": (width,),
        f"{name}.mlp.fc1.weight": (mlp, width),
        f"{name}.mlp.fc1.bias": (mlp,),
        f"{name}.mlp.fc2.weight": (width, mlp),
        f"{name}.mlp.fc2.bias": (width,),
    }
    return shapes | ({f"{name}.attn.relative_position_bias_table": (positions, heads)} if positions else {})


def vit_weights(blocks=2, tokens=12, colours=3, class_token=1):
    shapes = {
        "patch_embed.proj.weight": (WIDTH, colours, 4, 4),
        "patch_embed.proj.bias": (WIDTH,),
        "pos_embed": (1, tokens + class_token, WIDTH),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
        "head.weight": (10, WIDTH),
        "head.bias": (10,),
    }
    shapes |= {"cls_token": (1, 1, WIDTH)} if class_token else {}
    for block in range(blocks):
        shapes |= block_shapes(f"blocks.{block}", WIDTH, 20)
    return random(shapes)


def norm(w, name, x):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def attention(w, name, x, heads, bias=0):
    """Tokens … × C, all of which see each other."""
    q, k, v = linear(w, f"{name}.qkv", x).unflatten(-1, (3, heads, -1)).movedim(-2, -4).unbind(-2)
    weights = (q @ k.mT / math.sqrt(q.shape[-1]) + bias).softmax(-1)
    return linear(w, f"{name}.proj", (weights @ v).movedim(-3, -2).flatten(-2))


def perceptron(w, name, x):
    return linear(w, f"{name}.fc2", F.gelu(linear(w, f"{name}.fc1", x)))


def vit_by_its_equations(w, image):
    """Dosovitskiy et al., ICLR 2021, equations 1 to 4, without the class token; image 1 × 3 × H × W to tokens."""
    x = F.conv2d(image, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=4).flatten(2).mT
    x = x + w["pos_embed"][:, -x.shape[1] :]
    for block in range(2):
        x = x + attention(w, f"blocks.{block}.attn", norm(w, f"blocks.{block}.norm1", x), HEADS)
        x = x + perceptron(w, f"blocks.{block}.mlp", norm(w, f"blocks.{block}.norm2", x))
    return norm(w, "norm", x)


def vit(colours=3, size=(12, 16), **how):
    return nets.ViT(
        colours,
        size,
        4,
        WIDTH,
        20,
        num_layers=how.pop("blocks", 2),
        num_heads=HEADS,
        spatial_dims=2,
        qkv_bias=True,
        **how,
    ).double()


def loaded(network, weights, head=(), channels=3):
    network = network.double().eval()
    found = fit(weights, network.state_dict(), channels, dict.fromkeys(head, 0), FILE)
    network.load_state_dict({**network.state_dict(), **found.tensors})
    return network, found


def difference(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


def image(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("class_token", [0, 1])
def test_vit(class_token):
    weights = vit_weights(class_token=class_token)
    network, found = loaded(vit(), weights)
    x = image(1, 3, 12, 16)
    assert difference(network(x)[0], vit_by_its_equations(weights, x)) < 1e-13
    assert found.layout == "timm's ViT"
    assert set(found.left_out) == {"head.weight", "head.bias"} | ({"cls_token"} if class_token else set())
    new = {name for name in network.state_dict() if name not in found.tensors}
    assert all("norm_cross_attn" in name for name in new)  # which MONAI's block has, and does not use


DEPTHS, WINDOW = (2, 2, 1), 3


def swin_weights(of_its_authors=False, embedding=8, patch=2, depths=DEPTHS):
    shapes = {f"patch_embed.{name}": (embedding,) for name in ("proj.bias", "norm.weight", "norm.bias")}
    shapes["patch_embed.proj.weight"] = (embedding, 3, patch, patch)
    for stage, depth in enumerate(depths):
        width = embedding * 2**stage
        for block in range(depth):
            shapes |= block_shapes(f"layers.{stage}.blocks.{block}", width, 4 * width, (2 * WINDOW - 1) ** 2, 2)
        if stage:
            name = f"layers.{stage - of_its_authors}.downsample"
            shapes |= {f"{name}.norm.weight": (2 * width,), f"{name}.norm.bias": (2 * width,)}
            shapes |= {f"{name}.reduction.weight": (width, 2 * width)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,), "head.fc.weight": (5, width), "head.fc.bias": (5,)}
    weights = random(shapes)
    return weights | {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(9, 9, dtype=torch.int64)}


def windowed(w, name, x, shifted):
    """Attention in the windows of a map H × W × C, cell by cell as Swin's section 3.2 says, without the cyclic shift."""
    height, width, _ = x.shape
    shift = WINDOW // 2 if shifted and height > WINDOW else 0
    table = w[f"{name}.relative_position_bias_table"]
    cells = [(r, c) for r in range(height) for c in range(width)]
    groups = {}
    for r, c in cells:  # the windows are moved by shift, and those at the border are what is left
        groups.setdefault(((r - shift) // WINDOW, (c - shift) // WINDOW), []).append((r, c))
    out = torch.empty_like(x)
    for members in groups.values():
        rows, columns = (np.array(axis) for axis in zip(*members))
        offsets = (rows[:, None] - rows + WINDOW - 1) * (2 * WINDOW - 1) + columns[:, None] - columns + WINDOW - 1
        bias = table[torch.from_numpy(offsets)].movedim(-1, 0)
        out[rows, columns] = attention(w, name, x[rows, columns], 2, bias)
    return out


def swin_by_its_equations(w, picture, of_its_authors=False):
    """Liu et al., ICCV 2021, section 3: what goes into each stage, 1 × C × H × W, and what comes out of the last."""
    x = F.conv2d(picture, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=2)[0].movedim(0, -1)
    x = norm(w, "patch_embed.norm", x)
    inputs = []
    for stage, depth in enumerate(DEPTHS):
        if stage:
            name = f"layers.{stage - of_its_authors}.downsample"
            x = torch.cat([x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]], -1)
            x = linear(w, f"{name}.reduction", norm(w, f"{name}.norm", x))
        inputs.append(x.movedim(-1, 0)[None])
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            x = x + windowed(w, f"{name}.attn", norm(w, f"{name}.norm1", x), block % 2 == 1)
            x = x + perceptron(w, f"{name}.mlp", norm(w, f"{name}.norm2", x))
    return inputs


def swin(**how):
    how = {"in_chans": 3, "embed_dim": 8, "patch_size": 2, "patch_norm": True, "spatial_dims": 2} | how
    return SwinTransformer(window_size=(3, 3), depths=(2, 2, 1, 1), num_heads=(2, 2, 2, 2), **how)


@pytest.mark.parametrize("downsample", ["merging", "mergingv2"])
@pytest.mark.parametrize("of_its_authors", [False, True])
def test_swin(of_its_authors, downsample):
    weights = swin_weights(of_its_authors)
    network, found = loaded(swin(downsample=downsample), weights)
    x = image(1, 3, 48, 48)
    for ours, theirs in zip(network(x, normalize=False), swin_by_its_equations(weights, x, of_its_authors)):
        assert difference(ours, theirs) < 1e-13
    assert found.layout == ("Swin's authors'" if of_its_authors else "timm's Swin")
    new = {name for name in network.state_dict() if name not in found.tensors and not name.endswith("position_index")}
    assert {name.split(".")[0] for name in new} == {"layers3", "layers4"}  # merging after stage 3, and the fourth stage
    assert all("downsample" in name for name in new if name.startswith("layers3"))
    assert set(found.left_out) == {
        *("norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"),
        "layers.0.blocks.0.attn.relative_position_index",
    }


def test_grey_images_are_seen_as_colour_ones_of_equal_channels():
    weights = vit_weights()
    grey = image(1, 1, 12, 16)
    expected = vit_by_its_equations(weights, grey.expand(-1, 3, -1, -1))
    network, found = loaded(vit(1), weights, channels=1)
    assert difference(network(grey)[0], expected) < 1e-13
    assert found.origins["patch_embedding.patch_embeddings.weight"] == "`patch_embed.proj.weight`, colours summed"
    several = image(1, 4, 12, 16)
    network, found = loaded(vit(4), weights, channels=4)
    expected = vit_by_its_equations(weights, several.mean(1, keepdim=True).expand(-1, 3, -1, -1))
    assert difference(network(several)[0], expected) < 1e-13
    assert found.origins["patch_embedding.patch_embeddings.weight"].endswith("colours summed, shared by 4 channels")


def test_patches_of_half_the_size_see_an_image_of_half_the_size():
    weights = swin_weights()
    weights["patch_embed.proj.weight"] = random({"kernel": (8, 3, 4, 4)})["kernel"]
    network, found = loaded(swin(), weights)
    x = image(1, 3, 48, 48)
    large = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = F.conv2d(large, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=4)
    expected = norm(weights, "patch_embed.norm", expected.movedim(1, -1)).movedim(-1, 1)
    assert difference(network(x, normalize=False)[0], expected) < 1e-13
    assert "every 2 × 2 of the patch summed" in found.origins["patch_embed.proj.weight"]


def test_position_embeddings_of_another_size():
    weights = vit_weights(tokens=16)
    line = torch.linspace(-1, 1, 4, dtype=torch.float64)
    weights["pos_embed"][0, 1:] = (line[:, None] + 2 * line).reshape(16, 1)
    _, found = loaded(vit(size=(32, 32)), weights)
    name = "patch_embedding.position_embeddings"
    grid = found.tensors[name].reshape(8, 8, WIDTH)
    step = grid[3, 4] - grid[3, 3]
    assert torch.allclose(
        step, torch.full_like(step, 2 * (line[1] - line[0]) / 2)
    )  # linear stays linear, rows stay rows
    assert torch.allclose(grid[4, 3] - grid[3, 3], step / 2)
    assert found.origins[name] == "`pos_embed`, without the class token's, 4 × 4 resized to 8 × 8"
    with pytest.raises(UserError, match="pos_embed is"):
        loaded(vit(size=(12, 16)), weights)


def test_a_part_of_a_network():
    torch.manual_seed(0)
    how = {"spatial_dims": 2, "n_input_channels": 3}
    encoder = nets.resnet10(**how, bias_downsample=False).state_dict()
    network = nets.FlexibleUNet(1, 2, "resnet10", decoder_channels=(8, 8, 4, 4, 4), spatial_dims=2)
    _, found = loaded(network, encoder, channels=1)
    assert {name for name in network.state_dict() if name.startswith("encoder.")} == set(found.tensors)
    assert set(found.left_out) == {"fc.weight", "fc.bias"}
    with pytest.raises(UserError, match=r"no place for layer2.0.downsample.0.bias"):
        loaded(network, nets.resnet10(**how).state_dict(), channels=1)


def test_another_number_of_labels():
    old, new = (nets.BasicUNet(2, 1, out, features=(4, 4, 4, 4, 4, 4)) for out in (4, 2))
    head = ("final_conv.weight", "final_conv.bias")
    _, found = loaded(new, old.state_dict(), head)
    assert set(found.left_out) == set(head)
    assert set(found.left_out.values()) == {"of another number of labels"}
    with pytest.raises(UserError, match=r"final_conv.weight is \(4, 4, 1, 1\), but the 2D network's"):
        loaded(new, old.state_dict())
    deep, full = (torch.nn.ModuleDict({"c": torch.nn.Conv2d(8, 8, 3, groups=groups)}) for groups in (8, 1))
    with pytest.raises(UserError, match=r"c\.weight is \(8, 1, 3, 3\)"):  # no colours: a kernel within the network
        loaded(full, deep.state_dict())


def test_what_would_not_compute_the_same_is_refused():
    with pytest.raises(
        UserError, match=r"no place for blocks.2.norm1.weight .* the number of layers must be the file's"
    ):
        loaded(vit(), vit_weights(blocks=3))
    without = nets.ViT(3, (12, 16), 4, WIDTH, 20, num_layers=2, num_heads=HEADS, spatial_dims=2)
    with pytest.raises(UserError, match=r"no place for blocks.0.attn.qkv.bias .*qkv_bias"):
        loaded(without, vit_weights())
    with pytest.raises(UserError, match=r"no place for patch_embed.norm.weight .*patch_norm"):
        loaded(swin(patch_norm=False), swin_weights())
    with pytest.raises(UserError, match=r"lacks what network_def has in blocks\.2\.attn"):
        loaded(vit(blocks=3), vit_weights())
    unbiased = {name: tensor for name, tensor in vit_weights().items() if not name.endswith("qkv.bias")}
    with pytest.raises(UserError, match=r"lacks what network_def has in blocks\.0\.attn\.qkv\.bias"):
        loaded(vit(), unbiased)
    with pytest.raises(UserError, match=r"is a BEiT, or another ViT with ls1\.gamma"):
        loaded(vit(), vit_weights() | {"blocks.0.ls1.gamma": torch.ones(WIDTH)})
    with pytest.raises(UserError, match=r"none of its names, such as conv\.weight, is in it"):
        loaded(vit(), {"conv.weight": torch.ones(2, 2)})
    with pytest.raises(UserError, match=r"patch_embed\.proj\.weight is"):
        loaded(vit(1), vit_weights(colours=4), channels=1)


def test_reading(tmp_path):
    weights = vit_weights()
    save_file(weights, tmp_path / "a.safetensors")
    torch.save({"model": weights, "epoch": 3}, tmp_path / "b.pth")
    torch.save(weights, tmp_path / "c.pth")
    for name in ("a.safetensors", "b.pth", "c.pth"):
        read = read_weights(tmp_path / name)
        assert read.keys() == weights.keys()
        assert all(read[key].equal(tensor) for key, tensor in weights.items())
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-100])
    save_file({"w": torch.full((2, 2), torch.nan)}, tmp_path / "nan.safetensors")
    for name, message in (("cut", "cannot be read"), ("nan", "has NaN or infinite values"), ("none", "not found")):
        with pytest.raises(UserError, match=message):
            read_weights(tmp_path / f"{name}.safetensors")


def peer(module):
    """A network of timm with random tensors."""
    weights = random({name: tensor.shape for name, tensor in module.state_dict().items()})
    module.double().eval().load_state_dict(weights)
    return module, weights


def test_vit_against_timm(timm):
    how = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "num_heads": HEADS, "depth": 3, "num_classes": 0}
    theirs, weights = peer(timm.models.VisionTransformer(**how, class_token=False, global_pool="avg", fc_norm=False))
    ours = nets.ViT(3, 32, 8, WIDTH, 4 * WIDTH, num_layers=3, num_heads=HEADS, spatial_dims=2, qkv_bias=True)
    ours, found = loaded(ours, weights)
    for module in ours.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6  # timm's; MONAI's is 1e-5
    x = image(1, 3, 32, 32)
    assert difference(ours(x)[0], theirs.forward_features(x)) < 1e-13
    assert not found.left_out


def test_swin_against_timm(timm):
    how = {"img_size": 96, "patch_size": 2, "embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (2, 2, 2, 2)}
    theirs, weights = peer(timm.models.SwinTransformer(**how, window_size=3, num_classes=0))
    network = SwinTransformer(
        3, 8, (3, 3), 2, (2, 2, 2, 2), (2, 2, 2, 2), patch_norm=True, spatial_dims=2, downsample="mergingv2"
    )
    network, found = loaded(network, weights)
    x = image(1, 3, 96, 96)
    outputs = network(x, normalize=False)
    features = theirs.patch_embed(x)
    assert difference(outputs[0], features.movedim(-1, 1)) < 1e-13
    for stage, output in zip(theirs.layers, outputs[:4]):
        assert difference(output, stage.downsample(features).movedim(-1, 1)) < 1e-13
        features = stage(features)
    assert set(found.left_out) == {"norm.weight", "norm.bias"}
