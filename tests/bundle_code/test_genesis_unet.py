"""The U-Net of Models Genesis: its published counts and names, and what it computes, written once more in plain functions."""

import pytest
import torch
from torch.nn import functional as F

from tools.bundle_code.genesis_unet import GenesisUNet3D
from tools.network import describe


def published_names():
    """Names of the published file's state_dict, without "module.", and how many parameters each part has."""
    names = []
    for part in ("down_tr64", "down_tr128", "down_tr256", "down_tr512", "up_tr256", "up_tr128", "up_tr64"):
        if part.startswith("up"):
            names += [f"{part}.up_conv.weight", f"{part}.up_conv.bias"]
        for unit in range(2):
            names += [f"{part}.ops.{unit}.conv1.{name}" for name in ("weight", "bias")]
            norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
            names += [f"{part}.ops.{unit}.bn1.{name}" for name in norm]
    return [*names, "out_tr.final_conv.weight", "out_tr.final_conv.bias"]


def published_state(network, seed=0):
    """A file's content as the authors' training would have written it, for the tensors of a network."""
    torch.manual_seed(seed)
    state = {}
    own = network.state_dict()
    for name in published_names():
        if name in own:
            state[name] = torch.randn(own[name].shape) * (0.1 if own[name].ndim > 1 else 0.5)
        elif name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        else:
            state[name] = torch.rand(own[name.rpartition(".")[0] + ".weight"].shape)
    return state


def plain_forward(state, x):
    """Logits, with the batch statistics that the published network always uses."""

    def unit(x, name):
        x = F.conv3d(x, state[f"{name}.conv1.weight"], state[f"{name}.conv1.bias"], padding=1)
        x = F.batch_norm(x, None, None, state[f"{name}.bn1.weight"], state[f"{name}.bn1.bias"], training=True)
        return x.relu()

    skips = []
    for part in ("down_tr64", "down_tr128", "down_tr256", "down_tr512"):
        x = F.max_pool3d(x, 2) if skips else x
        x = unit(unit(x, f"{part}.ops.0"), f"{part}.ops.1")
        skips.append(x)
    for part, skip in zip(("up_tr256", "up_tr128", "up_tr64"), skips[-2::-1], strict=True):
        x = F.conv_transpose3d(x, state[f"{part}.up_conv.weight"], state[f"{part}.up_conv.bias"], stride=2)
        x = unit(unit(torch.cat([x, skip], 1), f"{part}.ops.0"), f"{part}.ops.1")
    return F.conv3d(x, state["out_tr.final_conv.weight"], state["out_tr.final_conv.bias"])


def test_published_counts():
    with torch.device("meta"):
        network = GenesisUNet3D(1, 1)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
    assert parts == {
        "down_tr64": 56_448, "down_tr128": 332_352, "down_tr256": 1_328_256, "down_tr512": 5_310_720,
        "up_tr256": 9_177_088, "up_tr128": 2_294_784, "up_tr64": 573_952, "out_tr": 65,
    }  # fmt: skip
    assert sum(parts.values()) == 19_073_665
    assert len(published_names()) == 106


def test_the_published_file_loads_strictly():
    network = GenesisUNet3D(1, 1)
    state = published_state(network)
    assert len(state) == 106
    network.load_state_dict(state, strict=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    with pytest.raises(RuntimeError, match=r"down_tr64.ops.0.conv1.weight"):
        network.load_state_dict({name: t for name, t in state.items() if name != "down_tr64.ops.0.conv1.weight"})
    with pytest.raises(RuntimeError, match="stranger"):
        network.load_state_dict({**state, "stranger": torch.zeros(1)})


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_the_network_is_the_plain_one(memory_format):
    network = GenesisUNet3D(1, 1, width=4).eval()
    state = {name: tensor.double() for name, tensor in published_state(network).items()}
    network.load_state_dict(state)
    network = network.double().to(memory_format=memory_format)
    images = torch.rand(2, 1, 16, 24, 16, dtype=torch.float64)
    with torch.no_grad():
        together = network(images.contiguous(memory_format=memory_format))
        for image, logits in zip(images, together, strict=True):
            torch.testing.assert_close(logits[None], plain_forward(state, image[None]), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(logits[None], network(image[None]), rtol=1e-5, atol=1e-5)  # no batch mates


def test_background_row_and_sizes():
    network = GenesisUNet3D(1, 3, width=2)
    assert (network(torch.rand(1, 1, 16, 16, 16))[:, 0] == 0).all()
    for size, shown in (((12, 16, 16), "12 x 16 x 16"), ((8, 8, 8), "8 x 8 x 8")):
        with pytest.raises(ValueError, match=rf"multiple of 8 voxels.*got {shown}"):
            network(torch.rand(1, 1, *size))


def test_what_the_tools_see():
    structure = describe({"_target_": "tools.bundle_code.genesis_unet.GenesisUNet3D", "out_channels": 2, "width": 2})
    assert structure.head == {"out_tr.final_conv.weight": 0, "out_tr.final_conv.bias": 0}
    assert structure.transposed == [f"up_tr{n}.up_conv.weight" for n in (256, 128, 64)]
    assert not structure.statistics
