"""Learning without labels, as users do it: from new_pretraining to a merged model, each network, each objective."""

import json
import os
import shutil
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import torch

from tests.conftest import ROOT, here, run, train
from tests.test_merge import refused
from tools.bundle import Bundle

BUNDLE = ROOT / "bundles" / "pretrain_genesis"
SETTINGS = ("--max_epochs", 2, "--val_interval", 1, "--patches_per_volume", 12, "--val_patches_per_volume", 2)
QUICK = ("--patches_per_volume", 2, "--val_patches_per_volume", 1)


def start_on(dataset, output, overlay="small", *words):
    result = here(
        "tools", "new_pretraining", "--bundle", BUNDLE, "--dataset_dir", dataset, "--output", output, "--overlay", overlay, *words
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for config in ("train.json", "inference.json"):
        path = output / "configs" / config
        path.write_text(path.read_text().replace('"width": 8', '"width": 2'))
    return output


def checkpoint(folder):
    return torch.load(folder / "checkpoints" / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def start(tmp_path_factory, phantom_dataset):
    """Trained on the images of the phantoms, whose labels it does not look at."""
    dataset = tmp_path_factory.mktemp("unlabelled") / "Dataset002_Images"
    shutil.copytree(phantom_dataset / "imagesTr", dataset / "imagesTr")
    folder = start_on(dataset, tmp_path_factory.mktemp("genesis") / "start")
    train(folder, *SETTINGS)
    return folder


def test_it_learns_and_draws_what_it_restores(start):
    metadata = json.loads((start / "configs/metadata.json").read_text())
    assert metadata["lineage"]["data"] == {"dataset": "Dataset002_Images"}
    assert "Self-supervised" in metadata["task"]
    assert sorted(p.name for p in (start / "checkpoints").glob("*.png")) == [
        "restored_epoch_0001.png", "restored_epoch_0002.png",
    ]  # fmt: skip
    assert list((start / "checkpoints").glob("events.out.tfevents*"))
    last = checkpoint(start)
    assert -0.25 < last["best"] < 0  # the error of grey everywhere is 0.25 at most
    state = torch.load(start / "models" / "model.pt", weights_only=True)
    assert torch.count_nonzero(state["out_tr.final_conv.weight"][0]) == 0
    assert torch.count_nonzero(state["out_tr.final_conv.bias"][0]) == 0


def test_the_same_seed_trains_the_same_network(start, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(start, folder, ignore=shutil.ignore_patterns("checkpoints", "models"))
    train(folder, *SETTINGS)
    first, again = checkpoint(start), checkpoint(folder)
    assert first["best"] == again["best"]
    assert all(torch.equal(first["network"][name], again["network"][name]) for name in first["network"])


@pytest.mark.parametrize(
    "overlay",
    [
        "small,mae",
        *(pytest.param(o, marks=pytest.mark.slow) for o in ("residual,small,mr", "small,published", "small,dynunet")),
    ],
)
def test_other_objectives_networks_and_recipes(start, tmp_path, overlay):
    folder = start_on(_dataset(start), tmp_path / "start", overlay)
    if "dynunet" in overlay:
        for config in ("train.json", "inference.json"):
            path = folder / "configs" / config
            path.write_text(path.read_text().replace("[32, 64, 128, 256, 320, 320]", "[2, 2, 2, 2, 2, 2]"))
    train(folder, "--max_epochs", 1, "--val_interval", 1, *QUICK)
    assert checkpoint(folder)["best"] < 0
    assert list((folder / "checkpoints").glob("*.png"))
    assert Bundle(folder).network()


def _dataset(start):
    return json.loads((start / "configs/train.json").read_text())["dataset_dir"]


def test_a_mask_is_an_entry_of_the_target(start, tmp_path):
    """With blocks of the size of the patch nothing could be masked, and that is said."""
    folder = start_on(_dataset(start), tmp_path / "start", "small,mae")
    result = train(folder, "--max_epochs", 1, "--mask_block", 32, *QUICK, check=False)
    assert result.returncode != 0
    assert "make mask_block smaller" in result.stdout + result.stderr


def test_the_chain_from_a_start_without_labels(start, phantom_dataset, tmp_path):
    vectors = []
    for task in ("liver", "spleen"):
        specialist, vector = tmp_path / task, tmp_path / f"{task}.safetensors"
        words = ["--dataset_dir", phantom_dataset, "--task", task, "--output", specialist, "--overlay", "small"]
        assert here("tools", "new_task", "--pretrained", start, *words).returncode == 0
        config = json.loads((specialist / "configs/train.json").read_text())
        assert config["head"] == ["out_tr.final_conv.weight", "out_tr.final_conv.bias"]
        assert config["preprocessing"]["transforms"][-1]["a_min"] == -1000  # CT as in pre-training
        train(specialist, "--max_epochs", 2, "--frozen_epochs", 1, "--patches_per_volume", 2)
        words = ["--pretrained", start, "--finetuned", specialist, "--output", vector]
        assert here("tools", "diff", *words).returncode == 0
        vectors.append(str(vector))
    merged = tmp_path / "merged"
    result = here("tools", "merge", "--pretrained", start, "--vectors", ",".join(vectors), "--output", merged)
    assert result.returncode == 0, result.stderr
    bundle = Bundle(merged)
    assert bundle.labels == ["liver", "spleen"]
    assert bundle.network()(torch.rand(1, 1, 16, 16, 16)).shape[1] == 3
    own = Bundle(tmp_path / "liver").state()
    assert torch.equal(own["out_tr.final_conv.weight"][1], bundle.state()["out_tr.final_conv.weight"][1])
    assert not torch.equal(own["down_tr64.ops.0.conv1.weight"], Bundle(start).state()["down_tr64.ops.0.conv1.weight"])


def test_inference_restores_an_image_alone(start, tmp_path):
    folder, images = tmp_path / "copy", tmp_path / "images"
    shutil.copytree(start, folder)
    images.mkdir()
    rng = np.random.default_rng(0)
    affine = np.diag([-2, 1.5, 3, 1.0])
    nibabel.save(nibabel.Nifti1Image(rng.normal(0, 300, (40, 45, 33)).astype(np.int16), affine), images / "ct.nii.gz")
    words = ["--config_file", folder / "configs/inference.json", "--bundle_root", folder, "--dataset_dir", images]
    run("monai.bundle", "run", *words, "--output_dir", tmp_path / "out", PYTHONPATH="")
    restored = nibabel.load(tmp_path / "out" / "ct_restored.nii.gz")
    assert restored.shape == (40, 45, 33)
    np.testing.assert_allclose(restored.affine, affine)
    values = restored.get_fdata()
    assert values.min() > 0
    assert values.max() < 1
    assert values.std() > 0


def test_new_pretraining_without_labels_is_told_what_is_wrong(start, tmp_path):
    words = ["tools", "new_pretraining", "--bundle", BUNDLE, "--output", tmp_path / "x"]
    refused(here(*words, "--dataset_dir", tmp_path / "nowhere"), "not found")
    refused(here(*words, "--dataset_dir", _dataset(start), "--labels", "{liver: 1}"), "trained without labels")
    (tmp_path / "4d").mkdir()
    for name in "ab":
        nibabel.save(
            nibabel.Nifti1Image(np.zeros((16, 16, 16, 2), np.float32), np.eye(4)), tmp_path / "4d" / f"{name}.nii.gz"
        )
    refused(here(*words, "--dataset_dir", tmp_path / "4d"), ".nii.gz has 2 channels, the network takes 1")
    images = ["--dataset_dir", _dataset(start)]
    refused(
        here(*words, *images, "--patch_size", 12), "does not take patches of [12, 12, 12] voxels", "a multiple of 8"
    )
    assert not (tmp_path / "x").exists()
    said = here(*words, *images, "--overlay", "small,residual")
    assert "overlay residual comes last: width is 64, not 8 as in small" in said.stdout
    several = start_on(f"{_dataset(start)},{_dataset(start)}/imagesTr", tmp_path / "several")
    assert len(json.loads((several / "configs/train.json").read_text())["dataset_dir"]) == 2


@pytest.mark.slow
def test_two_processes(start, tmp_path):
    folder = start_on(_dataset(start), tmp_path / "two")
    configs = f"['{folder}/configs/train.json','{folder}/configs/multi_gpu_train.json']"
    words = ["--nnodes", "1", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command = ["-m", "monai.bundle", "run", "--config_file", configs, "--bundle_root", str(folder), "--max_epochs", "2"]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, *command, "--patches_per_volume", "8"],
        cwd="/", env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert checkpoint(folder)["best"] < 0
    assert len(list((folder / "checkpoints").glob("*.png"))) == 1
