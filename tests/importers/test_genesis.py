"""convert --source genesis: both published layouts, what they compute, and what is refused."""

import pytest
import torch
from torch.nn import functional as F

from tests.bundle_code.test_genesis_unet import plain_forward, published_state
from tests.conftest import ROOT, here
from tools.bundle import Bundle, read_json
from tools.bundle_code.genesis_unet import GenesisUNet3D
from tools.importers.genesis import dynunet_name
from tools.network import instantiate

FILTERS = [4, 8, 16, 32, 40, 40]
POOLS = [[2, 2, 2]] * 4 + [[1, 2, 2]]


def nnunet_state(filters=FILTERS, pools=POOLS, seed=0):
    """A state_dict as nnU-Net 1's Generic_UNet has it, for one channel and two classes."""
    torch.manual_seed(seed)
    state = {}

    def block(name, inputs, outputs):
        state[f"{name}.conv.weight"] = torch.randn(outputs, inputs, 3, 3, 3) * (2 / 27 / inputs) ** 0.5
        for part in ("conv.bias", "instnorm.weight", "instnorm.bias"):
            state[f"{name}.{part}"] = torch.randn(outputs) * 0.3 + (part == "instnorm.weight")

    last = len(filters) - 1
    for level, (inputs, outputs) in enumerate(zip([1, *filters], filters)):
        for j in range(2):
            name = f"conv_blocks_context.{level}" + (f".{j}.blocks.0" if level == last else f".blocks.{j}")
            block(name, inputs if j == 0 else outputs, outputs)
    for i in range(last):
        deep, skip = filters[last - i], filters[last - 1 - i]
        state[f"tu.{i}.weight"] = torch.randn(deep, skip, *pools[last - 1 - i]) * deep**-0.5
        for j in range(2):
            block(f"conv_blocks_localization.{i}.{j}.blocks.0", 2 * skip if j == 0 else skip, skip)
        state[f"seg_outputs.{i}.weight"] = torch.randn(2, skip, 1, 1, 1) * 0.2
    return state


def nnunet_forward(state, x, pools=POOLS):
    """Both logits of nnU-Net 1's network, in plain functions."""
    depth = len(pools) + 1

    def block(x, name, stride=1):
        x = F.conv3d(x, state[f"{name}.conv.weight"], state[f"{name}.conv.bias"], stride=stride, padding=1)
        x = F.instance_norm(x, weight=state[f"{name}.instnorm.weight"], bias=state[f"{name}.instnorm.bias"], eps=1e-5)
        return F.leaky_relu(x, 0.01)

    skips = []
    for level in range(depth - 1):
        x = block(x, f"conv_blocks_context.{level}.blocks.0", pools[level - 1] if level else 1)
        x = block(x, f"conv_blocks_context.{level}.blocks.1")
        skips.append(x)
    x = block(x, f"conv_blocks_context.{depth - 1}.0.blocks.0", pools[-1])
    x = block(x, f"conv_blocks_context.{depth - 1}.1.blocks.0")
    for i in range(depth - 1):
        x = F.conv_transpose3d(x, state[f"tu.{i}.weight"], stride=pools[depth - 2 - i])
        x = torch.cat([x, skips.pop()], 1)
        for j in range(2):
            x = block(x, f"conv_blocks_localization.{i}.{j}.blocks.0")
    return F.conv3d(x, state[f"seg_outputs.{depth - 2}.weight"])


def save(path, state, **extra):
    torch.save(
        {"epoch": 12, "state_dict": state, "optimizer_state_dict": {"state": {}, "param_groups": []}, **extra}, path
    )
    return path


def convert(checkpoint, output, *words):
    return here("tools", "convert", "--source", "genesis", "--checkpoint", checkpoint, "--output", output, *words)


def account(bundle):
    """The two tables of conversion.md: what each tensor is from, and what was left out."""
    made, _, left = (bundle / "docs" / "conversion.md").read_text().partition("Left out:")
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in made.splitlines()
        if line.startswith("| `")
    ]
    left = [line.strip("|").split("|")[0].strip(" `") for line in left.splitlines() if line.startswith("| `")]
    return {row[0]: row[2] for row in rows}, left


def test_the_unet_of_several_gpus(tmp_path):
    original = GenesisUNet3D(1, 1, width=4)
    state = published_state(original)
    checkpoint = save(tmp_path / "Genesis_Chest_CT.pt", {f"module.{name}": tensor for name, tensor in state.items()})
    result = convert(checkpoint, tmp_path / "start")
    assert result.returncode == 0, result.stderr
    bundle = Bundle(tmp_path / "start")
    assert bundle.labels == ["restored image"]
    assert bundle.network_def() == {
        "_target_": "scripts.genesis_unet.GenesisUNet3D", "in_channels": 1, "out_channels": 2, "width": 4,
    }  # fmt: skip
    network, image = bundle.network().double(), torch.rand(1, 1, 16, 16, 24, dtype=torch.float64)
    with torch.no_grad():
        logits = network(image)
        expected = plain_forward({name: tensor.double() for name, tensor in state.items()}, image)
    assert (logits[:, :1] == 0).all()
    torch.testing.assert_close(logits[:, 1:], expected, rtol=1e-5, atol=1e-5)
    made, left = account(tmp_path / "start")
    assert set(made) == set(original.state_dict())
    assert len(left) == 42 + 2  # running statistics; epoch and optimiser
    assert {*left, *made} == {*state, "epoch", "optimizer_state_dict"}
    assert "non-commercial" in (tmp_path / "start" / "docs" / "README.md").read_text()


def test_the_network_of_nnunet(tmp_path):
    state = nnunet_state()
    assert len(state) == 98
    result = convert(save(tmp_path / "genesis_nnunet.model", state), tmp_path / "start")
    assert result.returncode == 0, result.stderr
    bundle = Bundle(tmp_path / "start")
    network, image = bundle.network().double(), torch.rand(1, 1, 32, 64, 32, dtype=torch.float64)
    with torch.no_grad():
        logits = network(image)
        expected = nnunet_forward({name: tensor.double() for name, tensor in state.items()}, image)
    assert (logits[:, :1] == 0).all()
    torch.testing.assert_close(logits[:, 1:], expected[:, 1:], rtol=1e-4, atol=1e-4)
    made, left = account(tmp_path / "start")
    aliases = [origin for origin in made.values() if "another name" in origin]
    used = {origin.removeprefix("the last row of ").partition(",")[0] for origin in made.values()} & set(state)
    assert (len(made), len(aliases), len(used)) == (144, 71, 72)  # and the head's bias, zeros
    assert used | set(left) == {*state, "epoch", "optimizer_state_dict"}
    # what the network sees of an image in [0, 1] is that of the publication: (2000 x - 224.1543) / 251.9326
    standardise = bundle.resolved("preprocessing")["transforms"][-1]
    assert standardise["subtrahend"] == pytest.approx(224.1543 / 2000)
    assert standardise["divisor"] == pytest.approx(251.9326 / 2000)
    assert read_json(tmp_path / "start/configs/train.json")["network_def"]["filters"] == FILTERS


def test_the_published_sizes_are_those_of_dynunet():
    """30,785,184 parameters in 98 tensors; without biases before normalisation and untrained heads, DynUNet's."""
    with torch.device("meta"):
        state = nnunet_state([32, 64, 128, 256, 320, 320])
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == (98, 30_785_184)
    network = instantiate(read_json(ROOT / "bundles/pretrain_genesis/configs/dynunet.json")["network_def"])
    assert sum(p.numel() for p in network.parameters()) == 30_779_810
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    mapped = {ours: tensor.shape for name, tensor in state.items() if (ours := dynunet_name(name, 6))}
    assert len(mapped) == 72
    assert all(shapes[name] == shape for name, shape in mapped.items())


def test_other_strides_take_what_fits(tmp_path):
    """The published rule for a target with cubic pooling: all blocks of convolutions fit, the deepest upsampling does not."""
    state = nnunet_state()
    checkpoint = save(tmp_path / "genesis.model", state)
    result = convert(checkpoint, tmp_path / "cubic", "--strides", "[2,2,2,2,2]")
    assert result.returncode == 0, result.stderr
    made, left = account(tmp_path / "cubic")
    new = [name for name, origin in made.items() if origin.startswith("new, at random")]
    assert new == ["upsamples.0.transp_conv.conv.weight"]
    assert "tu.0.weight" in left
    weights = Bundle(tmp_path / "cubic").state()
    assert weights["upsamples.0.transp_conv.conv.weight"].shape == (40, 40, 2, 2, 2)
    assert torch.equal(weights["bottleneck.conv1.conv.weight"], state["conv_blocks_context.5.0.blocks.0.conv.weight"])
    for wrong in ("[2,2]", "3"):
        result = convert(checkpoint, tmp_path / "wrong", "--strides", wrong)
        assert result.returncode == 1
        assert "must be a list of 5" in result.stderr
    result = convert(checkpoint, tmp_path / "wrong", "--strides", "[2,2,0,2,2]")
    assert result.returncode == 1 and "--strides must be whole numbers from 1 on" in result.stderr


def test_what_does_not_fit_is_an_error_and_not_a_training_from_scratch(tmp_path):
    cases = {}
    state = nnunet_state()
    name = "conv_blocks_localization.2.1.blocks.0.conv.weight"
    cases[name] = save(tmp_path / "shape.model", state | {name: torch.zeros(16, 16, 1, 1, 1)})
    missing = "conv_blocks_context.2.blocks.1.instnorm.weight"
    cases["what becomes downsamples.1.norm2.weight is missing"] = save(
        tmp_path / "missing.model", {n: t for n, t in state.items() if n != missing}
    )
    cases["tu.3.weight"] = save(tmp_path / "half.model", {n: t for n, t in state.items() if n != "tu.3.weight"})
    cases["neither down_tr64"] = save(tmp_path / "other.model", {"encoder.weight": torch.zeros(2)})
    cases["nobody knows what tensor"] = save(tmp_path / "more.model", state | {"stranger": torch.zeros(1)})
    unet = published_state(GenesisUNet3D(1, 1, width=2))
    cases["down_tr512.ops.1.bn1.bias"] = save(
        tmp_path / "unet.pt", {n: t for n, t in unet.items() if n != "down_tr512.ops.1.bn1.bias"}
    )
    cases["2 channels"] = save(tmp_path / "two.pt", unet | {"down_tr64.ops.0.conv1.weight": torch.zeros(2, 2, 3, 3, 3)})
    cases["NaN"] = save(tmp_path / "nan.pt", unet | {"out_tr.final_conv.bias": torch.tensor([float("nan")])})
    for words, checkpoint in cases.items():
        result = convert(checkpoint, tmp_path / "output")
        assert result.returncode == 1, words
        assert words in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "output").exists()
    (tmp_path / "cut.pt").write_bytes((tmp_path / "unet.pt").read_bytes()[:1000])
    assert "cannot be read" in convert(tmp_path / "cut.pt", tmp_path / "output").stderr
    assert (
        "--strides are for the file of nnU-Net"
        in convert(save(tmp_path / "u.pt", unet), tmp_path / "output", "--strides", "[2,2,2,2,2]").stderr
    )
