"""TransSeg as users do it: 2D weights into windows of slices, training, a task, a merged model, label maps."""

import json

import nibabel
import pytest
import torch

from tests.conftest import ROOT, here, run, train
from tests.test_inflate import refused
from tests.test_weights_2d import block_shapes, random
from tools.bundle import Bundle
from tools.instantiate import set_values
from tools.network import instantiate

BUNDLE = ROOT / "bundles" / "pretrain_inflated"
TINY = {"width": 8, "patch_size": [32, 32, 8], "spacing": [12, 12, 12]}
HEAD = ["head.weight", "head.bias"]


def tools(*words):
    result = here("tools", *words)
    assert result.returncode == 0, result.stderr
    return result.stdout


def start_on(dataset, output, overlay="small", **values):
    words = ["--bundle", BUNDLE, "--dataset_dir", dataset, "--labels", "{liver: liver, spleen: spleen}"]
    tools("new_pretraining", *words, "--overlay", overlay, "--output", output)
    set_values(output, TINY | values)
    return output


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A 2D ViT with timm's names, for colour images of 16 × 16 pixels."""
    shapes = {"patch_embed.proj.weight": (8, 3, 8, 8), "patch_embed.proj.bias": (8,), "pos_embed": (1, 5, 8)}
    shapes |= {"cls_token": (1, 1, 8), "norm.weight": (8,), "norm.bias": (8,), "head.weight": (5, 8)}
    for block in range(4):
        shapes |= block_shapes(f"blocks.{block}", 8, 32)
    path = tmp_path_factory.mktemp("weights") / "vit.pth"
    torch.save({"model": {name: tensor.float() for name, tensor in random(shapes).items()}}, path)
    return path


@pytest.mark.parametrize("overlay", ["swin,small", "beit,small"])
def test_other_encoders(request, phantom_dataset, tmp_path, overlay):
    """They build from the bundle as ``new_pretraining`` wrote it, and their heads are found."""
    if overlay.startswith("beit"):
        request.getfixturevalue("timm")
    bundle = Bundle(start_on(phantom_dataset, tmp_path / "start", overlay, width=32))
    assert list(bundle.structure().head) == HEAD
    with bundle.code(), torch.inference_mode():
        network = instantiate(bundle.network_def(), ("cpu",)).to(memory_format=torch.channels_last_3d).eval()
        assert network(torch.randn(1, 1, 32, 32, 2)).shape == (1, 3, 32, 32, 2)


def test_2d_weights_for_windows(phantom_dataset, tmp_path, vit):
    start, out = start_on(phantom_dataset, tmp_path / "start"), tmp_path / "out"
    said = tools("inflate", "--weights", vit, "--network_def", start, "--output", out)
    assert "1 centred, 53 copied" in said
    assert "on 32×32×3 voxels of any slices the output is the 2D network's within" in said
    file, state = torch.load(vit, weights_only=True)["model"], Bundle(out).state()
    kernel = state["encoder.patch_embedding.patch_embeddings.weight"]
    assert kernel[:, 2].equal(file["patch_embed.proj.weight"].double().sum(1).float())
    assert kernel.count_nonzero() == kernel[:, 2].count_nonzero()
    assert state["encoder.cls_token"].allclose(file["cls_token"] + file["pos_embed"][:, :1])
    config, before = (json.loads((folder / "configs/train.json").read_text()) for folder in (out, start))
    assert config == before | {"use_pretrained": True}
    assert (out / "models/pretrained/model.pt").read_bytes() == (out / "models/model.pt").read_bytes()
    words = ("inflate", "--weights", vit, "--network_def")
    said = tools(*words, start, "--mode", "average", "--output", tmp_path / "average")
    assert "1 averaged" in said
    assert "of equal slices" in said
    refused(
        here("tools", *words, start, "--patch_size", 64, "--output", tmp_path / "no"),
        "takes its labels",
        tmp_path / "no",
    )
    definition = json.dumps(Bundle(start).network_def())
    refused(here("tools", *words, definition, "--output", tmp_path / "no"), "is a bundle's", tmp_path / "no")


def test_single_slices_become_windows(phantom_dataset, tmp_path):
    """A network that was trained with ``force_2d`` is a 2D network like any other: its decoder and head come along."""
    flat = start_on(phantom_dataset, tmp_path / "flat", "small,force_2d")
    deep = start_on(phantom_dataset, tmp_path / "deep")
    torch.manual_seed(0)
    with Bundle(flat).code():
        torch.save(instantiate(Bundle(flat).network_def(), ("cpu",)).state_dict(), flat / "models/model.pt")
    out = tmp_path / "out"
    said = tools("inflate", "--weights", flat / "models/model.pt", "--network_def", deep, "--output", out)
    assert "new" not in said
    assert "0 of the file left out" in said
    volume = torch.randn(1, 1, 32, 32, 4)
    with torch.inference_mode():
        expected, found = (Bundle(folder).network().cpu().eval()(volume) for folder in (flat, out))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_schedule_and_what_decays(phantom_dataset, tmp_path):
    from monai.bundle import ConfigParser

    start = start_on(phantom_dataset, tmp_path / "start")
    with Bundle(start).code():
        parser = ConfigParser()
        parser.read_config(str(start / "configs/train.json"))
        parser.update(
            {"bundle_root": str(start), "cache_rate": 0, "max_epochs": 5, "warmup_steps": 8, "learning_rate": 0.1}
        )
        scheduler = parser.get_parsed_content("lr_scheduler")
        total, names = (
            parser.get_parsed_content("total_steps"),
            dict(parser.get_parsed_content("network_def").named_parameters()),
        )
    decayed, others = scheduler.optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
    matrices = {id(parameter) for parameter in decayed["params"]}
    kept = {name for name, parameter in names.items() if id(parameter) not in matrices}
    assert {name for name in kept if names[name].dim() > 1} == {
        "encoder.cls_token", "encoder.patch_embedding.position_embeddings"
    }  # fmt: skip
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    expected = [0.1 * step / 8 for step in range(8)] + [0.1 * (total - step) / (total - 8) for step in range(8, total)]
    assert rates == pytest.approx(expected)
    assert scheduler.get_last_lr()[0] == 0


def test_only_the_plane_is_zoomed():
    """Of slices that are each of one grey value, every one keeps its own."""
    from monai.bundle import ConfigParser

    with Bundle(BUNDLE).code():
        parser = ConfigParser()
        parser.read_config(str(BUNDLE / "configs/train.json"))
        zoom = parser.get_parsed_content("train#augmentation")[0]
    zoom.set_random_state(seed=0)
    ramp = torch.arange(1, 9).float().expand(1, 32, 32, 8)
    sizes = set()
    for _ in range(20):
        image = zoom({"image": ramp.clone(), "label": ramp.clone()})["image"]
        assert image.shape == ramp.shape
        inside = image[0] > 0
        assert inside[..., 0].equal(inside[..., 7])
        assert image[0, 16, 16].tolist() == pytest.approx(range(1, 9))
        sizes.add(int(inside[:, 16, 0].sum()))
    assert min(sizes) < 24
    assert len(sizes) > 3


@pytest.mark.slow
def test_the_chain(phantom_dataset, tmp_path, vit):
    """2D weights → trained starting point → specialist → task vector → merged model → label maps."""
    start, untrained = tmp_path / "start", start_on(phantom_dataset, tmp_path / "untrained")
    tools("inflate", "--weights", vit, "--network_def", untrained, "--output", start)
    before = Bundle(start).state()
    train(start, "--max_epochs", 1, "--val_interval", 1, "--patches_per_volume", 2, "--warmup_steps", 0)
    trained = Bundle(start).state()
    kernel = "encoder.patch_embedding.patch_embeddings.weight"
    outer = trained[kernel][:, [0, 1, 3, 4]]
    assert 0 < outer.abs().max() < 0.1  # what was zero learns, and little in a few steps
    assert (trained[kernel][:, 2] - before[kernel][:, 2]).abs().max() < 0.1
    specialist, vector, merged = tmp_path / "liver", tmp_path / "liver.safetensors", tmp_path / "merged"
    words = ["--pretrained", start, "--dataset_dir", phantom_dataset, "--task", "liver", "--overlay", "small"]
    tools("new_task", *words, "--output", specialist)
    assert json.loads((specialist / "configs/train.json").read_text())["head"] == HEAD
    train(specialist, "--max_epochs", 1, "--frozen_epochs", 0, "--patches_per_volume", 1)
    tools("diff", "--pretrained", start, "--finetuned", specialist, "--output", vector)
    tools("merge", "--pretrained", start, "--vectors", vector, "--output", merged)
    weights, tuned = Bundle(merged).state(), Bundle(specialist).state()
    assert all(torch.equal(weights[name], tuned[name]) for name in tuned if name not in HEAD)
    images, folder = phantom_dataset / "imagesTr", tmp_path / "label_maps"
    words = ["--bundle_root", merged, "--dataset_dir", images, "--output_dir", folder]
    run("monai.bundle", "run", "--config_file", merged / "configs/inference.json", *words, PYTHONPATH="")
    maps = sorted(folder.rglob("*.nii.gz"))
    assert len(maps) == len(list(images.iterdir()))
    assert nibabel.load(maps[0]).shape == nibabel.load(sorted(images.iterdir())[0]).shape
