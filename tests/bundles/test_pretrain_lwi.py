"""Learnable weight initialisation, as users do it: what its configs say, and from images without labels to a merged model."""

import json
import math
import shutil

import nibabel
import numpy as np
import pytest
import torch

from tests.conftest import ROOT, here, run, train
from tools.bundle import Bundle
from tools.instantiate import set_values

BUNDLE = ROOT / "bundles" / "pretrain_lwi"
NETWORKS = {
    "small": ({"width": 1, "patch_size": [32, 32, 32], "slabs": 2}, {"out.conv.conv.weight", "out.conv.conv.bias"}),
    "swin_unetr,small": (
        {"width": 4, "patch_size": [32, 32, 64], "slabs": 2},
        {"out.conv.conv.weight", "out.conv.conv.bias"},
    ),
    "unetr_pp,small": (
        {"width": 2, "patch_size": [32, 32, 32], "slabs": 2},
        {"out1.conv.conv.weight", "out1.conv.conv.bias"},
    ),
}
SETTINGS = ("--max_epochs", 2, "--val_interval", 1, "--patches_per_volume", 2, "--val_patches_per_volume", 1)


def start_on(dataset, output, overlay="small", **values):
    words = ["--bundle", BUNDLE, "--dataset_dir", dataset, "--output", output, "--overlay", overlay]
    result = here("tools", "new_pretraining", *words)
    assert result.returncode == 0, result.stderr
    set_values(output, {"spacing": None, **values})
    return output


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two images whose voxels along z are numbered, so that it shows which way round they are."""
    folder = tmp_path_factory.mktemp("images")
    ramp = np.broadcast_to(np.linspace(-170, 250, 48), (40, 40, 48)).astype(np.float32)
    for i in range(2):
        nibabel.save(nibabel.Nifti1Image(ramp, np.eye(4)), folder / f"ramp_{i}.nii.gz")
    return folder


def configured(folder, **overrides):
    """A parser over train.json."""
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(str(folder / "configs" / "train.json"))
    parser.update({"bundle_root": str(folder), **overrides})
    return parser


@pytest.mark.parametrize(("overlay", "axis"), [("small", 2), ("unetr_pp,small", 0)])
def test_a_crop_is_shuffled_then_kept_then_masked(images, tmp_path, overlay, axis):
    """Along the shuffled axis, z, each slab still rises: nothing was flipped, in any of 40 crops."""
    start = start_on(images, tmp_path / "start", overlay, patch_size=[32, 32, 32], slabs=4)
    assert json.loads((start / "configs/train.json").read_text())["shuffled_axis"] == axis
    orders = set()
    with Bundle(start).code():
        parser = configured(start, patches_per_volume=40)
        dataset = parser.get_parsed_content("train#dataset")
        dataset.transform.set_random_state(seed=0)
        for item in dataset:
            image, (clean, order) = item["image"], item["label"]
            masked = image[0] != clean
            assert (image[0][masked] == 0).all()
            assert abs(masked.float().mean() - 0.4) < 0.02
            along, slab = clean.movedim(axis, 0)[:, 0, 0].view(4, 8), order.movedim(axis, 0)[:, 0, 0].view(4, 8)
            assert (along.diff(dim=1) > 0).all()
            assert (slab == slab[:, :1]).all()
            places = slab[:, 0].int().tolist()
            assert torch.equal(along[torch.argsort(slab[:, 0])].flatten().sort().values, along.flatten().sort().values)
            assert (along[torch.argsort(slab[:, 0])].flatten().diff() > 0).all()  # in its former order it is one ramp
            orders.add(tuple(places))
    assert len(orders) > 15


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_no_flip_along_the_shuffled_axis(axis):
    with Bundle(BUNDLE).code():
        augmentation = configured(BUNDLE, shuffled_axis=axis).get_parsed_content("augmentation")
    flips = [t.flipper.spatial_axis for t in augmentation if t is not None and hasattr(t, "flipper")]
    assert flips == [a for a in range(3) if a != axis]


def test_the_schedule_warms_up_and_comes_down(images, tmp_path):
    start = start_on(images, tmp_path / "start", width=1, patch_size=[32, 32, 32], slabs=2)
    with Bundle(start).code():
        parser = configured(start, patches_per_volume=4, batch_size=2, max_epochs=10, warmup_steps=8, learning_rate=0.1)
        scheduler = parser.get_parsed_content("lr_scheduler")
        assert not next(h for h in parser["train"]["handlers"] if h["_target_"] == "LrScheduleHandler")["epoch_level"]
    rates = []
    for _ in range(20):  # 10 epochs of 2 steps
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    expected = [0.1 * step / 8 for step in range(8)]
    expected += [0.05 * (1 + math.cos(math.pi * step / 12)) for step in range(12)]
    assert rates == pytest.approx(expected)
    base = json.loads((BUNDLE / "configs/train.json").read_text())
    assert (base["max_epochs"], base["warmup_steps"]) == (800, "$50 * len(@train#dataloader)")


def test_published_settings():
    base, plus = (json.loads((BUNDLE / "configs" / name).read_text()) for name in ("train.json", "unetr_pp.json"))
    settings = ("patch_size", "slabs", "mask_block", "mask_fraction", "learning_rate", "weight_decay", "batch_size")
    assert [base[key] for key in settings] == [[96, 96, 96], 6, 16, 0.4, 1e-4, 1e-5, 4]
    assert [plus[key] for key in ("patch_size", "slabs", "mask_block", "batch_size")] == [[64, 128, 128], 4, 4, 2]
    definition = Bundle(BUNDLE).network_def()
    assert [definition[key] for key in ("feature_size", "hidden_size", "mlp_dim", "num_heads")] == [16, 768, 3072, 12]


def test_the_metadata_say_the_only_size_that_fits(images, tmp_path):
    start = start_on(images, tmp_path / "start", "unetr_pp,small")
    formats = Bundle(start).metadata["network_data_format"]
    assert formats["inputs"]["image"]["spatial_shape"] == [64, 64, 64]
    assert formats["outputs"]["pred"]["spatial_shape"] == [64, 64, 64]


@pytest.mark.slow
@pytest.mark.parametrize("overlay", NETWORKS)
def test_the_chain(phantom_dataset, tmp_path, overlay):
    """Images without labels → starting point → specialist → task vector → merged model → label maps."""
    values, head = NETWORKS[overlay]
    dataset = tmp_path / "unlabelled" / "Dataset002_Images"
    shutil.copytree(phantom_dataset / "imagesTr", dataset / "imagesTr")
    start = start_on(dataset, tmp_path / "start", overlay, **values)
    train(start, *SETTINGS)
    last = torch.load(start / "checkpoints" / "last.pt", weights_only=True)
    steps = 2 * (3 * 2 // 2)  # epochs of three images' patches in pairs
    assert last["lr_scheduler"]["last_epoch"] == steps
    assert len(last["heads"]) == 2 * 4
    assert -1 < last["best"] < 0
    assert len(list((start / "checkpoints").glob("restored_epoch_*.png"))) == 2
    own = Bundle(start).state()
    assert set(own) == set(last["network"])  # the network alone, no heads

    specialist, vector, merged = tmp_path / "liver", tmp_path / "liver.safetensors", tmp_path / "merged"
    words = ["--dataset_dir", phantom_dataset, "--task", "liver", "--output", specialist, "--overlay", "small"]
    result = here("tools", "new_task", "--pretrained", start, *words)
    assert result.returncode == 0, result.stderr
    assert set(json.loads((specialist / "configs/train.json").read_text())["head"]) == head
    train(specialist, "--max_epochs", 1, "--frozen_epochs", 0, "--patches_per_volume", 1)
    result = here("tools", "diff", "--pretrained", start, "--finetuned", specialist, "--output", vector)
    assert result.returncode == 0, result.stderr
    result = here("tools", "merge", "--pretrained", start, "--vectors", vector, "--output", merged)
    assert result.returncode == 0, result.stderr
    weights, tuned = Bundle(merged).state(), Bundle(specialist).state()
    assert all(torch.equal(weights[name], tuned[name]) for name in tuned if name not in head)
    if overlay != "small":
        return
    images, folder = dataset / "imagesTr", tmp_path / "label_maps"
    words = ["--bundle_root", merged, "--dataset_dir", images, "--output_dir", folder]
    run("monai.bundle", "run", "--config_file", merged / "configs/inference.json", *words, PYTHONPATH="")
    assert len(list(folder.rglob("*.nii.gz"))) == len(list(images.iterdir()))
    train(start, *SETTINGS[2:], "--max_epochs", 3)  # goes on with the heads that it had
    assert torch.load(start / "checkpoints" / "last.pt", weights_only=True)["epoch"] == 3


@pytest.mark.slow
def test_inference_restores_an_image_alone(images, tmp_path):
    start = start_on(images, tmp_path / "start", width=1, patch_size=[32, 32, 32])
    with Bundle(start).code():
        network = configured(start).get_parsed_content("network_def")
    torch.save(network.state_dict(), start / "models" / "model.pt")
    words = ["--config_file", start / "configs/inference.json", "--bundle_root", start, "--dataset_dir", images]
    run("monai.bundle", "run", *words, "--output_dir", tmp_path / "out", PYTHONPATH="")
    restored = nibabel.load(tmp_path / "out" / "ramp_0_restored.nii.gz")
    assert restored.shape == (40, 40, 48)
    assert restored.get_fdata().std() > 0


@pytest.mark.slow
def test_two_processes(phantom_dataset, tmp_path):
    """UNETR has parameters that it never uses; the heads are trained in both processes alike."""
    folder = start_on(phantom_dataset, tmp_path / "two", width=1, patch_size=[32, 32, 32], slabs=2)
    configs = f"['{folder}/configs/train.json','{folder}/configs/multi_gpu_train.json']"
    words = ["--nnodes", "1", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command = ["-m", "monai.bundle", "run", "--config_file", configs, "--bundle_root", folder, *SETTINGS]
    run("torch.distributed.run", *words, *command, PYTHONPATH="", OMP_NUM_THREADS="1")
    last = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    assert (last["epoch"], len(last["heads"])) == (2, 8)
    assert last["best"] < 0
    assert set(Bundle(folder).state()) == set(last["network"])
