"""The command: from 2D weights to a bundle that trains, merges and segments."""

import json
import shutil

import nibabel
import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks import nets
from safetensors.torch import save_file

from tests.conftest import here, run, train
from tests.test_weights_2d import block_shapes, random, swin_weights
from tools.bundle import Bundle, write_json

BASIC = {
    "_target_": "BasicUNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 4,
    "features": [4, 4, 8, 8, 8, 4],
    "bias": True,
}
UNETR = {
    "_target_": "UNETR",
    "in_channels": 1,
    "out_channels": 2,
    "img_size": [32, 32, 32],
    "feature_size": 4,
    "hidden_size": 12,
    "mlp_dim": 48,
    "num_heads": 2,
    "qkv_bias": True,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of a 2D network for colour images."""
    path = tmp_path_factory.mktemp("weights") / "colour.safetensors"
    torch.manual_seed(0)
    save_file(nets.BasicUNet(2, 3, 4, features=BASIC["features"]).state_dict(), path)
    return path


def inflate(weights, network_def, output, *options):
    text = json.dumps(network_def) if isinstance(network_def, dict) else network_def
    words = ("--weights", weights, "--network_def", text, "--output", output)
    return here("tools", "inflate", *words, *options)


def test_a_bundle_that_sees_what_the_2d_network_sees(tmp_path, weights):
    result = inflate(weights, BASIC, tmp_path / "out", "--patch_size", "16,32,32", "--labels", "a,b,c")
    assert result.returncode == 0, result.stderr
    assert "19 centred, 59 copied, 4 tiled" in result.stdout
    assert "on 16×32×32 voxels of equal slices the 3D output is the 2D one within" in result.stdout
    bundle = Bundle(tmp_path / "out")
    assert bundle.labels == ["a", "b", "c"]
    assert bundle.inference["patch_size"] == [16, 32, 32]
    colour = nets.BasicUNet(2, 3, 4, features=BASIC["features"])
    colour.load_state_dict(read(weights))
    grey = torch.randn(1, 1, 32, 32)
    with torch.inference_mode():
        expected = colour.eval()(grey.expand(-1, 3, -1, -1))
        found = bundle.network().cpu()(grey[:, :, None].expand(-1, -1, 16, -1, -1))
    assert (found - expected[:, :, None]).abs().max() < 1e-5 * expected.abs().max()
    account = (tmp_path / "out/docs/conversion.md").read_text()
    assert (
        "| `conv_0.conv_0.conv.weight` | 4 × 1 × 3 × 3 × 3 | centred: `conv_0.conv_0.conv.weight`, colours summed |"
        in account
    )
    assert (
        "| `upcat_1.upsample.deconv.weight` | 4 × 4 × 2 × 2 × 2 | tiled: `upcat_1.upsample.deconv.weight` |" in account
    )
    checked = here("tools", "verify", bundle.path)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def read(path):
    from safetensors.torch import load_file

    return load_file(path)


def test_a_vit_with_the_names_of_timm_in_a_unetr(tmp_path):
    shapes = {
        "patch_embed.proj.weight": (12, 3, 16, 16),
        "patch_embed.proj.bias": (12,),
        "norm.weight": (12,),
        "norm.bias": (12,),
    }
    shapes |= {"pos_embed": (1, 5, 12), "cls_token": (1, 1, 12)}
    for block in range(12):
        shapes |= block_shapes(f"blocks.{block}", 12, 48)
    weights = random(shapes)
    torch.save({"model": weights}, tmp_path / "vit.pth")
    result = inflate(tmp_path / "vit.pth", UNETR, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "new tensors: inflated too, for this check" in result.stdout
    bundle = Bundle(tmp_path / "out")
    assert bundle.inference["patch_size"] == [32, 32, 32]
    state = bundle.state()
    assert state["vit.blocks.3.attn.out_proj.weight"].equal(weights["blocks.3.attn.proj.weight"].float())
    positions = state["vit.patch_embedding.position_embeddings"].reshape(2, 4, 12)
    assert all(layer.equal(weights["pos_embed"][0, 1:].float()) for layer in positions)
    kernel = state["vit.patch_embedding.patch_embeddings.weight"]
    assert kernel[:, :, 8].equal(weights["patch_embed.proj.weight"].sum(1, keepdim=True).float())
    assert kernel[:, :, :8].count_nonzero() == kernel[:, :, 9:].count_nonzero() == 0
    kernel = state["encoder1.layer.conv1.conv.weight"]
    assert kernel[:, :, 0].count_nonzero()  # of its own 3D start, not that for the check


def test_a_swin_with_the_names_of_timm_in_a_swin_unetr(tmp_path):
    """Four stages of windows 3 × 3 and patches of 4, for images of half the pixel size."""
    depths = [2, 1, 1, 1]
    weights = swin_weights(embedding=12, patch=4, depths=depths)
    save_file(weights, tmp_path / "swin.safetensors")
    network_def = {
        "_target_": "SwinUNETR",
        "in_channels": 1,
        "out_channels": 2,
        "feature_size": 12,
        "depths": depths,
        "num_heads": [2, 2, 2, 2],
        "window_size": [2, 3, 3],
        "patch_norm": True,
    }
    options = ("--patch_size", "32,64,64")
    result = inflate(tmp_path / "swin.safetensors", network_def, tmp_path / "out", *options)
    assert result.returncode == 0, result.stderr
    state = Bundle(tmp_path / "out").state()
    table = state["swinViT.layers2.0.blocks.0.attn.relative_position_bias_table"].reshape(3, 25, 2)
    assert all(offset.equal(weights["layers.1.blocks.0.attn.relative_position_bias_table"].float()) for offset in table)
    kernel = weights["patch_embed.proj.weight"].sum(1).unflatten(2, (2, 2)).unflatten(1, (2, 2)).sum((2, 4))
    assert state["swinViT.patch_embed.proj.weight"][:, 0, 1].allclose(kernel.float())
    stock = {**network_def, "window_size": [3, 3, 3]}
    result = inflate(tmp_path / "swin.safetensors", stock, tmp_path / "stock", *options)
    refused(result, "windows of 3 do not divide a depth of 16 tokens; zeros fill it up", tmp_path / "stock")


def test_the_network_from_a_file_and_from_a_bundle(tmp_path, weights):
    write_json(tmp_path / "net.json", BASIC)
    options = ("--patch_size", 32)
    assert inflate(weights, tmp_path / "net.json", tmp_path / "first", *options).returncode == 0
    result = inflate(weights, tmp_path / "first", tmp_path / "second")
    assert result.returncode == 0, result.stderr
    first, second = Bundle(tmp_path / "first"), Bundle(tmp_path / "second")
    assert first.labels == second.labels == ["label_1", "label_2", "label_3"]
    assert second.inference["patch_size"] == [32, 32, 32]
    assert all(second.state()[name].equal(tensor) for name, tensor in first.state().items())


def test_other_labels_get_a_new_head_the_same_each_time(tmp_path, weights):
    heads = []
    for name in ("one", "two"):
        result = inflate(weights, BASIC, tmp_path / name, "--patch_size", "16,32,32", "--labels", "liver")
        assert result.returncode == 0, result.stderr
        assert "2 new" in result.stdout
        assert "2 of the file left out" in result.stdout
        heads.append(Bundle(tmp_path / name).state()["final_conv.weight"])
    assert heads[0].shape == (2, 4, 1, 1, 1)
    assert heads[0].equal(heads[1])
    assert "| `final_conv.weight` | of another number of labels |" in (tmp_path / "one/docs/conversion.md").read_text()


def test_another_2d_network(tmp_path):
    """Whose kernels have no depth in the first level of the 3D one: what nnU-Net does for thick slices."""
    deep = {
        "_target_": "DynUNet",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 2,
        "kernel_size": [[1, 3, 3], [3, 3, 3], 3],
        "strides": [1, [1, 2, 2], 2],
        "upsample_kernel_size": [[1, 2, 2], 2],
        "filters": [4, 8, 8],
    }
    flat = {**deep, "spatial_dims": 2, "kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}
    torch.manual_seed(0)
    torch.save(ConfigParser({"n": flat}).get_parsed_content("n").state_dict(), tmp_path / "flat.pt")
    for number, options in enumerate([(), ("--network_2d", json.dumps(flat))]):
        result = inflate(tmp_path / "flat.pt", deep, tmp_path / str(number), "--patch_size", "8,16,16", *options)
        assert result.returncode == 0, result.stderr
    wrong = json.dumps({**flat, "filters": [4, 6, 8]})
    refused(
        inflate(tmp_path / "flat.pt", deep, tmp_path / "2", "--network_2d", wrong),
        "but the 2D network's",
        tmp_path / "2",
    )


def refused(result, message, output):
    assert result.returncode == 1
    assert [line for line in result.stderr.splitlines() if line.startswith("error")] == result.stderr.splitlines()
    assert message in result.stderr, result.stderr
    assert not output.exists()


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({}, ("--mode", "average"), "meet the zeros that pad the volume; --mode centre does not"),
        ({}, ("--mode", "0.25,0.5,0.25"), "meet the zeros that pad the volume; --mode centre does not"),
        ({}, ("--mode", "0.5,1,0.5"), "only taps that sum to 1 keep what the 2D network computes"),
        ({}, ("--mode", "center"), "no mode 'center'"),
        ({}, ("--patch_size", "20,20"), "is neither a number nor three, depth first"),
        ({}, ("--patch_size", "a"), "--patch_size a is not made of numbers"),
        ({"features": [4, 4, 8, 8, 8, 8]}, (), "but the 2D network's"),
        ({"_target_": "ViT"}, (), "cannot be built"),
        ({"out_channels": None}, (), "out_channels is None"),
    ],
)
def test_what_is_refused(tmp_path, weights, changes, options, message):
    options = options if "--patch_size" in options else ("--patch_size", 32, *options)
    refused(inflate(weights, {**BASIC, **changes}, tmp_path / "out", *options), message, tmp_path / "out")


def test_definitions_that_are_none(tmp_path, weights):
    out = tmp_path / "out"
    refused(inflate(weights, "{'_target_': }", out), "is not JSON", out)
    refused(inflate(weights, tmp_path / "none.json", out), "none.json not found", out)
    refused(inflate(weights, {"in_channels": 1}, out), "names no network", out)
    refused(inflate(tmp_path / "none.pth", BASIC, out), "none.pth not found", out)
    refused(inflate(weights, {"_target_": "BasicUNet", "spatial_dims": 3}, out), "has none of the arguments", out)


@pytest.mark.slow
def test_inflated_weights_train_and_merge(tmp_path, weights, phantom_dataset):
    inflated = tmp_path / "inflated"
    words = ("--weights", weights, "--network_def", json.dumps(BASIC), "--patch_size", 32)
    run("tools", "inflate", *words, "--output", inflated)
    liver, vector, merged = tmp_path / "liver", tmp_path / "liver.safetensors", tmp_path / "merged"
    words = ("--pretrained", inflated, "--dataset_dir", phantom_dataset, "--task", "liver", "--overlay", "small")
    run("tools", "new_task", *words, "--output", liver)
    train(liver, "--max_epochs", 1, "--frozen_epochs", 0, "--patches_per_volume", 2)
    run("tools", "diff", "--pretrained", inflated, "--finetuned", liver, "--output", vector)
    run("tools", "merge", "--pretrained", inflated, "--vectors", vector, "--output", merged)
    assert Bundle(merged).labels == ["liver"]
    words = (
        "--config_file",
        merged / "configs/inference.json",
        "--bundle_root",
        merged,
        "--output_dir",
        tmp_path / "maps",
    )
    (tmp_path / "images").mkdir()
    image = sorted((phantom_dataset / "imagesTr").glob("*.nii.gz"))[0]
    shutil.copy(image, tmp_path / "images")
    run("monai.bundle", "run", *words, "--dataset_dir", tmp_path / "images", PYTHONPATH="")
    (path,) = (tmp_path / "maps").rglob("*.nii.gz")
    ours, theirs = nibabel.load(path), nibabel.load(image)
    assert ours.shape == theirs.shape
    assert (ours.affine == theirs.affine).all()
