"""convert --source lwi: both published layouts, both stages, what they compute, and what is refused."""

import numpy as np
import pytest
import torch
from monai.networks.nets import UNETR

from tests.bundle_code.test_unetr_pp import published_state, without_heads
from tests.conftest import here, train
from tools.bundle import Bundle, read_json
from tools.bundle_code.unetr_pp import UNETRPlusPlus
from tools.importers.lwi import ORGANS

UNETR_SIZE = {"feature_size": 2, "hidden_size": 24, "mlp_dim": 48, "proj_type": "perceptron"}
PLUS = {"img_size": (64, 128, 128), "width": 2, "depth": 1, "projections": (3, 3, 3, 2)}
PLANS = ("--spacing", "[3.0, 0.76, 0.76]", "--intensity", "[-958, 327, 82.92, 136.97]")


def unetr_state(classes, image=32, seed=0, **size):
    """A state_dict of LWI-VMS' UNETR, and the network of MONAI that computes the same."""
    torch.manual_seed(seed)
    network = UNETR(1, classes, image, **{**UNETR_SIZE, **size}).eval()
    features, hidden = network.encoder1.layer.conv1.conv.weight.shape[0], network.hidden_size
    state = {name: tensor for name, tensor in network.state_dict().items() if ".norm_cross_attn." not in name}
    state["vit.patch_embedding.position_embeddings"].normal_(std=0.1)
    for part in ("weight", "bias") if classes > 1 else ():
        state[f"out.conv.{part}"] = state.pop(f"out.conv.conv.{part}")
    state["vit.patch_embedding.cls_token"] = torch.zeros(1, 1, hidden)
    for i in range(1, 5):
        state |= {f"vit.temp_head{i}.weight": torch.zeros(6, hidden), f"vit.temp_head{i}.bias": torch.zeros(6)}
    for name, channels in (("encoder2.blocks.0", 2), ("encoder2.blocks.1", 2), ("encoder3.blocks.0", 4)):
        state[f"{name}.1.conv3.conv.weight"] = torch.zeros(channels * features, channels * features, 1, 1, 1)
    return state, network


def save(path, state, **extra):
    torch.save({"epoch": 12, "state_dict": state, "best_acc": np.float64(0.8), **extra}, path)
    return path


def convert(checkpoint, output, *words):
    return here("tools", "convert", "--source", "lwi", "--checkpoint", checkpoint, "--output", output, *words)


def left_out(bundle):
    text = (bundle / "docs" / "conversion.md").read_text().partition("Left out:")[2]
    return {line.split("`")[1] for line in text.splitlines() if line.startswith("| `")}


def test_the_published_unetr_is_what_the_synthetic_one_is_made_like():
    with torch.device("meta"):
        state, _ = unetr_state(14, 96, feature_size=16, hidden_size=768, mlp_dim=3072)
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == (182, 92_809_414)


def test_a_unetr_with_labels(tmp_path):
    state, network = unetr_state(14)
    result = convert(save(tmp_path / "Synapse_UNETR.pt", state), tmp_path / "start")
    assert result.returncode == 0, result.stderr
    bundle = Bundle(tmp_path / "start")
    assert bundle.labels == ORGANS
    image = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(bundle.network()(image), network(image))
    extra = {name for name in state if "temp_head" in name or ".1.conv3." in name or "cls_token" in name}
    assert len(extra) == 12
    assert left_out(tmp_path / "start") == extra | {"epoch", "best_acc"}
    transforms = bundle.resolved("preprocessing")["transforms"]
    assert transforms[4]["pixdim"] == [1.5, 1.5, 2.0]
    assert (transforms[5]["a_min"], transforms[5]["a_max"]) == (-175, 250)
    assert bundle.metadata["network_data_format"]["inputs"]["image"]["spatial_shape"] == [32, 32, 32]
    assert "all rights are its authors'" in (tmp_path / "start/docs/README.md").read_text()
    assert "all rights are its authors'" in bundle.metadata["license"]


def test_a_unetr_of_the_first_stage(tmp_path):
    state, network = unetr_state(1)
    result = convert(save(tmp_path / "model_final.pt", state), tmp_path / "start")
    assert result.returncode == 0, result.stderr
    bundle = Bundle(tmp_path / "start")
    assert bundle.labels == ["restored image"]
    image = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        output = bundle.network()(image)
        torch.testing.assert_close(output[:, 1:], network(image))
    assert not output[:, 0].any()
    config = read_json(tmp_path / "start/configs/train.json")
    assert (config["slabs"], config["patch_size"], config["shuffled_axis"]) == (6, [32, 32, 32], 2)


@pytest.mark.parametrize("lung", [False, True])
def test_unetr_pp_with_labels(tmp_path, lung):
    layout = {**PLUS, "classes": 2 if lung else 14, "lung": lung}
    if lung:
        layout |= {"img_size": (32, 192, 192), "stem": (1, 4, 4)}
    state = published_state(**layout)
    extra = {"optimizer_state_dict": None, "plot_stuff": [[np.float64(1.0)], [], [], []], "best_stuff": [np.float64(0)]}
    result = convert(save(tmp_path / "model_final_checkpoint.model", state, **extra), tmp_path / "start", *PLANS)
    assert result.returncode == 0, result.stderr
    bundle = Bundle(tmp_path / "start")
    assert bundle.labels == (["lung tumour"] if lung else ORGANS)
    arguments = {key: layout[key] for key in ("img_size", "width", "depth", "projections")}
    if lung:
        arguments |= {"stem": (1, 4, 4), "separate_projections": True, "convolutions": 2}
    network = UNETRPlusPlus(1, layout["classes"], **arguments).eval()
    network.load_state_dict(without_heads(state), strict=True)
    image = torch.rand(1, 1, *layout["img_size"])
    with torch.no_grad():
        torch.testing.assert_close(bundle.network()(image), network(image))
    transforms = bundle.resolved("preprocessing")["transforms"]
    assert (transforms[3]["axcodes"], transforms[4]["pixdim"]) == ("SPL", [3.0, 0.76, 0.76])
    low, high, scale, norm = transforms[5]["a_min"], transforms[5]["a_max"], transforms[6]["subtrahend"], transforms[6]
    hounsfield = 100.0  # becomes (100 - mean) / deviation
    assert ((hounsfield - low) / (high - low) - scale) / norm["divisor"] == pytest.approx((100 - 82.92) / 136.97)
    own = {name for name in state if name.startswith(("out2", "out3", "temp_head"))}
    assert left_out(tmp_path / "start") == own | {"epoch", "best_acc", *extra}
    weights = torch.load(bundle.model_file, weights_only=True)
    first = "decoder3.decoder_block.0.0.epa_block.{}.weight"
    tied = weights[first.format("E")].data_ptr() == weights[first.format("F")].data_ptr()
    assert tied is not lung


def test_unetr_pp_of_the_first_stage_goes_on_training(tmp_path):
    """Its bundle restores what the file restores, and knows axes, slabs and modules."""
    layout = {"img_size": (32, 32, 32), "width": 2, "depth": 1, "projections": (3, 3, 3, 2), "classes": 1}
    state = published_state(**layout)
    checkpoint = save(tmp_path / "model_ep_200.model", state)
    result = convert(checkpoint, tmp_path / "start", *PLANS, "--patch_size", "[32, 32, 32]")
    assert result.returncode == 0, result.stderr
    network = UNETRPlusPlus(1, 1, (32, 32, 32), width=2, depth=1, projections=(3, 3, 3, 2)).eval()
    network.load_state_dict(without_heads(state), strict=True)
    image = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(Bundle(tmp_path / "start").network()(image)[:, 1:], network(image))
    config = read_json(tmp_path / "start/configs/train.json")
    assert (config["slabs"], config["shuffled_axis"], config["axcodes"]) == (4, 0, "SPL")
    assert config["features"][3] == "unetr_pp_encoder.stages.3"


def test_what_does_not_fit_is_said_in_one_line(tmp_path):
    state, _ = unetr_state(14)
    plus = published_state(**{**PLUS, "img_size": (32, 32, 32)}, classes=14)
    five, _ = unetr_state(5)
    name = "vit.blocks.7.attn.qkv.weight"
    block = "decoder4.decoder_block.0.0.epa_block.qkvv.weight"
    cases = [
        (save(tmp_path / "1.pt", {n: t for n, t in state.items() if n != name}), (), f"{name} is missing"),
        (
            save(tmp_path / "2.pt", state | {name: torch.zeros(3, 3)}),
            (),
            f"{name} is (3, 3), the network's is (72, 24)",
        ),
        (save(tmp_path / "3.pt", state | {"stranger": torch.zeros(1)}), (), "nobody knows what tensor stranger is"),
        (save(tmp_path / "4.pt", state | {name: torch.full((72, 24), torch.nan)}), (), "NaN"),
        (save(tmp_path / "5.pt", {"encoder.weight": torch.zeros(2)}), (), "neither vit.patch_embedding"),
        (save(tmp_path / "6.pt", five), (), "has 4 labels: name them"),
        (tmp_path / "6.pt", ("--labels", "a,b,a,c"), "has 4 labels: name them"),
        (tmp_path / "6.pt", ("--patch_size", "[32, 32, 48]"), "that make 8 tokens"),
        (tmp_path / "6.pt", ("--spacing", "[1, 2]"), "give --spacing '[x, y, z], mm'"),
        (tmp_path / "6.pt", ("--intensity", "[0, 1, 0, 1]"), "--intensity is for UNETR++"),
        (save(tmp_path / "7.model", plus), (), "give --spacing"),
        (tmp_path / "7.model", PLANS[:2], "give --intensity"),
        (tmp_path / "7.model", (*PLANS[:2], "--intensity", "[1, 0, 0, 1]"), "the bounds must rise"),
        (tmp_path / "7.model", PLANS, "no published network has: give --patch_size"),
        (
            save(tmp_path / "8.model", {n: t for n, t in plus.items() if n != block}),
            (*PLANS, "--patch_size", "[32, 32, 32]"),
            f"{block} is missing",
        ),
        (
            save(tmp_path / "9.model", {n: t for n, t in plus.items() if ".F." not in n}),
            (*PLANS, "--patch_size", "[32, 32, 32]"),
            "epa_block.F",
        ),
        (tmp_path / "nowhere.pt", (), "not found"),
    ]
    for checkpoint, options, words in cases:
        result = convert(checkpoint, tmp_path / "output", *options)
        assert result.returncode == 1, words
        assert words in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "output").exists()


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_damaged_and_hostile_files(tmp_path):
    state, _ = unetr_state(14)
    whole = save(tmp_path / "whole.pt", state).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    save(tmp_path / "hostile.pt", state, extra=Hostile())
    for name in ("cut.pt", "hostile.pt"):
        result = convert(tmp_path / name, tmp_path / "output")
        assert result.returncode == 1
        assert "cannot be read" in result.stderr
        assert not (tmp_path / "output").exists()


@pytest.mark.slow
def test_a_converted_file_fine_tunes(tmp_path, phantom_dataset):
    state, _ = unetr_state(14)
    start, specialist = tmp_path / "start", tmp_path / "liver"
    assert convert(save(tmp_path / "Synapse_UNETR.pt", state), start).returncode == 0
    words = ["--pretrained", start, "--dataset_dir", phantom_dataset, "--task", "liver", "--output", specialist]
    result = here("tools", "new_task", *words, "--overlay", "small")
    assert result.returncode == 0, result.stderr
    train(specialist, "--max_epochs", 1, "--frozen_epochs", 0, "--patches_per_volume", 1)
    words = ["--pretrained", start, "--finetuned", specialist, "--output", tmp_path / "liver.safetensors"]
    assert here("tools", "diff", *words).returncode == 0
