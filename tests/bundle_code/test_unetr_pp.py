"""UNETR++: the published counts, names and shapes, and its attention written once more, head by head."""

from math import prod

import pytest
import torch
from torch.nn import functional as F

from tools.bundle_code.unetr_pp import PairedAttention, PairedAttentionBlock, UNETRPlusPlus
from tools.network import describe

SMALL = {"img_size": (16, 32, 32), "width": 4, "depth": 2, "projections": (8, 8, 8, 4)}


def published_shapes(
    classes=14, img_size=(64, 128, 128), stem=(2, 4, 4), width=16, depth=3, projections=(64, 64, 64, 32), lung=False
):
    """Names and shapes of the published state_dict, the heads of the first stage included."""
    shapes = {}
    dims = [2 * width, 4 * width, 8 * width, 16 * width]
    tokens = [prod(n // s // 2**i for n, s in zip(img_size, stem, strict=True)) for i in range(4)]

    def block(name, level):
        c, n, p = dims[level], tokens[level], projections[level]
        shapes.update({f"{name}.gamma": (c,), f"{name}.pos_embed": (1, n, c)})
        shapes.update({f"{name}.norm.weight": (c,), f"{name}.norm.bias": (c,)})
        shapes.update({f"{name}.epa_block.temperature{i}": (4, 1, 1) for i in ("", "2")})
        shapes[f"{name}.epa_block.qkvv.weight"] = (4 * c, c)
        for part in "EF":
            shapes.update({f"{name}.epa_block.{part}.weight": (p, n), f"{name}.epa_block.{part}.bias": (p,)})
        for part in ("out_proj", "out_proj2"):
            shapes.update({f"{name}.epa_block.{part}.weight": (c // 2, c), f"{name}.epa_block.{part}.bias": (c // 2,)})
        for conv in ("conv51", "conv52") if lung else ("conv51",):
            for i in (1, 2):
                shapes[f"{name}.{conv}.conv{i}.conv.weight"] = (c, c, 3, 3, 3)
                for part in ("weight", "bias", "running_mean", "running_var"):
                    shapes[f"{name}.{conv}.norm{i}.{part}"] = (c,)
                shapes[f"{name}.{conv}.norm{i}.num_batches_tracked"] = ()
        shapes.update({f"{name}.conv8.1.weight": (c, c, 1, 1, 1), f"{name}.conv8.1.bias": (c,)})

    for i, c in enumerate(dims):
        name = f"unetr_pp_encoder.downsample_layers.{i}"
        shapes[f"{name}.0.conv.weight"] = (c, 1, *stem) if i == 0 else (c, dims[i - 1], 2, 2, 2)
        shapes.update({f"{name}.1.weight": (c,), f"{name}.1.bias": (c,)})
        for b in range(depth):
            block(f"unetr_pp_encoder.stages.{i}.{b}", i)
    for number, level in ((5, 2), (4, 1), (3, 0)):
        shapes[f"decoder{number}.transp_conv.conv.weight"] = (dims[level + 1], dims[level], 2, 2, 2)
        for b in range(depth):
            block(f"decoder{number}.decoder_block.0.{b}", level)
    shapes["decoder2.transp_conv.conv.weight"] = (dims[0], width, *stem)
    for i in (1, 2):
        shapes[f"decoder2.decoder_block.0.conv{i}.conv.weight"] = (width, width, 3, 3, 3)
        shapes[f"encoder1.conv{i}.conv.weight"] = (width, 1 if i == 1 else width, 3, 3, 3)
    shapes["encoder1.conv3.conv.weight"] = (width, 1, 1, 1, 1)
    for i, c in enumerate((width, dims[0], dims[1]), start=1):
        shapes.update({f"out{i}.conv.conv.weight": (classes, c, 1, 1, 1), f"out{i}.conv.conv.bias": (classes,)})
    for i, c in enumerate(dims, start=1):
        shapes.update({f"temp_head{i}.weight": (4, c), f"temp_head{i}.bias": (4,)})
    return shapes


def published_state(seed=0, **layout):
    """Random tensors as the authors' training would have written them; keys and values are projected alike, but for lungs."""
    torch.manual_seed(seed)
    state = {}
    for name, shape in published_shapes(**layout).items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(5)
        else:
            spread = 0.3 if len(shape) < 2 else prod(shape[1:]) ** -0.5
            state[name] = torch.randn(shape) * spread
            if name.endswith(("running_var", "norm1.weight", "norm2.weight", "norm.weight")):
                state[name] = state[name].abs() + 0.5
    if not layout.get("lung"):
        state |= {name: state[name.replace(".F.", ".E.")] for name in state if ".epa_block.F." in name}
    return state


def without_heads(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("temp_head")}


def test_published_counts_names_and_shapes():
    with torch.device("meta"):
        network = UNETRPlusPlus(1, 14, (64, 128, 128))
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
    assert parts == {
        "unetr_pp_encoder": 27_387_232, "encoder1": 7_360, "decoder5": 3_509_848, "decoder4": 2_377_624,
        "decoder3": 9_638_968, "decoder2": 30_208, "out1": 238, "out2": 462, "out3": 910,
    }  # fmt: skip
    assert sum(parts.values()) == 42_952_850
    published = published_shapes()
    assert len(published) == 644
    assert without_heads(published) == {name: tuple(t.shape) for name, t in network.state_dict().items()}


def test_the_layout_for_lung_tumours():
    with torch.device("meta"):
        network = UNETRPlusPlus(
            1, 2, (32, 192, 192), stem=(1, 4, 4), separate_projections=True, convolutions=2, attention_dropout=0.1
        )
    published = published_shapes(2, (32, 192, 192), (1, 4, 4), lung=True)
    assert without_heads(published) == {name: tuple(t.shape) for name, t in network.state_dict().items()}
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == 121.2


@pytest.mark.parametrize("lung", [False, True])
def test_a_published_file_loads_strictly(lung):
    network = UNETRPlusPlus(1, 3, **SMALL, separate_projections=lung, convolutions=1 + lung)
    state = without_heads(published_state(classes=3, lung=lung, **SMALL))
    network.load_state_dict(state, strict=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    with pytest.raises(RuntimeError, match="stranger"):
        network.load_state_dict({**state, "stranger": torch.zeros(1)})


def plain_attention(state, x, heads=4):
    """Tokens (N, C) of one image to (N, C), one head after the other."""
    tokens, channels = x.shape
    d = channels // heads
    rows = state["qkvv.weight"] @ x.T  # (4C, N)
    q, k, v_channel, v_spatial = (rows[i * channels : (i + 1) * channels] for i in range(4))
    by_channel, by_voxel = torch.zeros(channels, tokens), torch.zeros(heads, tokens, d)
    for h in range(heads):
        own = slice(h * d, (h + 1) * d)
        few_k = k[own] @ state["E.weight"].T + state["E.bias"]
        few_v = v_spatial[own] @ state["F.weight"].T + state["F.bias"]
        unit_q = q[own] / q[own].norm(dim=1, keepdim=True)
        unit_k = k[own] / k[own].norm(dim=1, keepdim=True)
        weights = F.softmax(unit_q @ unit_k.T * state["temperature"][h], 1)
        by_channel[own] = weights @ v_channel[own]
        weights = F.softmax(unit_q.T @ few_k * state["temperature2"][h], 1)
        by_voxel[h] = weights @ few_v.T
    # d slowest, then the head, then the voxel, read as rows of C numbers
    mixed = torch.tensor([by_voxel[h, n, i] for i in range(d) for h in range(heads) for n in range(tokens)])
    spatial = mixed.reshape(tokens, channels) @ state["out_proj.weight"].T + state["out_proj.bias"]
    channel = by_channel.T @ state["out_proj2.weight"].T + state["out_proj2.bias"]
    return torch.cat([spatial, channel], 1)


@pytest.mark.parametrize("separate", [False, True])
def test_paired_attention_is_as_published(separate):
    torch.manual_seed(0)
    attention = PairedAttention(12, 8, 4, 5, dropout=0.15, separate_projections=separate).eval()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 12, 8)
    with torch.no_grad():
        expected = torch.stack([plain_attention(attention.state_dict(), image) for image in x])
        torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)
    assert (attention.E is attention.F) is not separate


def test_a_block_adds_attention_and_convolutions():
    torch.manual_seed(0)
    block = PairedAttentionBlock(2 * 3 * 4, 8, 4, 5, 0.15, False, 1).eval()
    torch.nn.init.normal_(block.pos_embed)
    torch.nn.init.normal_(block.gamma)
    x = torch.randn(1, 8, 2, 3, 4)
    with torch.no_grad():
        tokens = x.reshape(1, 8, 24).permute(0, 2, 1) + block.pos_embed
        normed = F.layer_norm(tokens, (8,), block.norm.weight, block.norm.bias)
        u = (tokens + block.gamma * block.epa_block(normed)).permute(0, 2, 1).reshape(1, 8, 2, 3, 4)
        v = u
        for i in (1, 2):
            norm = getattr(block.conv51, f"norm{i}")
            v = F.conv3d(v, getattr(block.conv51, f"conv{i}").conv.weight, padding=1)
            v = F.batch_norm(v, norm.running_mean, norm.running_var, norm.weight, norm.bias)
            v = F.leaky_relu(v if i == 1 else v + u, 0.01)
        expected = u + F.conv3d(v, block.conv8[1].weight, block.conv8[1].bias)
        torch.testing.assert_close(block(x), expected)


def test_outputs_and_sizes():
    network = UNETRPlusPlus(1, 3, **SMALL)
    image = torch.rand(2, 1, 16, 32, 32)
    with torch.no_grad():
        assert [tuple(o.shape[1:]) for o in network(image)] == [(3, 16, 32, 32), (3, 8, 8, 8), (3, 4, 4, 4)]
        assert network.eval()(image).shape == (2, 3, 16, 32, 32)
    assert network.unetr_pp_encoder.stages[0][0].gamma[0].item() == pytest.approx(1e-6)
    assert not network.unetr_pp_encoder.stages[0][0].pos_embed.any()
    with pytest.raises(ValueError, match=r"made for images of \[16, 32, 32\] voxels, got \[16, 32, 16\]"):
        network(image[..., :16])
    with pytest.raises(ValueError, match="multiple of 16 x 32 x 32 voxels"):
        UNETRPlusPlus(1, 3, (16, 32, 48))


def test_torchscript_computes_the_same():
    network = UNETRPlusPlus(1, 3, **{**SMALL, "depth": 1}, deep_supervision=False).eval()
    image = torch.rand(1, 1, 16, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(network)(image), network(image))


def test_what_the_tools_see():
    definition = {"_target_": "tools.bundle_code.unetr_pp.UNETRPlusPlus", "in_channels": 1, "out_channels": 2, **SMALL}
    structure = describe(definition)
    assert set(structure.head) == {f"out{i}.conv.conv.{part}" for i in (1, 2, 3) for part in ("weight", "bias")}
    assert structure.aliases["decoder3.decoder_block.0.1.epa_block.F.bias"].endswith("E.bias")
    assert "unetr_pp_encoder.stages.0.0.pos_embed" in structure.plain
    assert "decoder2.transp_conv.conv.weight" in structure.transposed
    single = describe(definition | {"deep_supervision": False})
    assert set(single.head) == {"out1.conv.conv.weight", "out1.conv.conv.bias"}
