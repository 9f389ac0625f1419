"""A bundle in the style of the model zoo's spleen_ct_segmentation, which nobody here wrote, as a starting point."""

import shutil

import nibabel
import numpy as np
import pytest
import torch
from monai.transforms import Invertd

from tests.conftest import here, run
from tools.bundle import Bundle, write_json

NETWORK = {
    "_target_": "UNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 2,
    "channels": [4, 8, 16],
    "strides": [2, 2],
    "num_res_units": 2,
    "norm": "batch",
}
KEYS = {"keys": "@image_key"}
INFERENCE = {
    "imports": ["$import glob", "$import os"],
    "bundle_root": ".",
    "image_key": "image",
    "output_dir": "$@bundle_root + '/eval'",
    "dataset_dir": "/workspace/data/Task09_Spleen",
    "datalist": "$list(sorted(glob.glob(@dataset_dir + '/imagesTs/*.nii.gz')))",
    "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
    "network_def": NETWORK,
    "network": "$@network_def.to(@device)",
    "preprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "LoadImaged", **KEYS},
            {"_target_": "EnsureChannelFirstd", **KEYS},
            {"_target_": "Orientationd", **KEYS, "axcodes": "RAS"},
            {"_target_": "Spacingd", **KEYS, "pixdim": [1.5, 1.5, 2.0], "mode": "bilinear"},
            {"_target_": "ScaleIntensityRanged", **KEYS, "a_min": -3, "a_max": 6, "b_min": 0, "b_max": 1, "clip": True},
            {"_target_": "EnsureTyped", **KEYS, "device": "@device"},
        ],
    },
    "dataset": {"_target_": "Dataset", "data": "$[{'image': i} for i in @datalist]", "transform": "@preprocessing"},
    "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "shuffle": False},
    "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [32, 32, 16], "sw_batch_size": 4, "overlap": 0.5},
    "postprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "Activationsd", "keys": "pred", "softmax": True},
            {
                "_target_": "Invertd",
                "keys": "pred",
                "transform": "@preprocessing",
                "orig_keys": "@image_key",
                "nearest_interp": False,
            },
            {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
            {"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir"},
        ],
    },
    "handlers": [
        {
            "_target_": "CheckpointLoader",
            "load_path": "$@bundle_root + '/models/model.pt'",
            "load_dict": {"model": "@network"},
        }
    ],
    "evaluator": {
        "_target_": "SupervisedEvaluator",
        "device": "@device",
        "val_data_loader": "@dataloader",
        "network": "@network",
        "inferer": "@inferer",
        "postprocessing": "@postprocessing",
        "val_handlers": "@handlers",
    },
    "run": ["$@evaluator.run()"],
}


def metadata(**channels):
    image = {
        "type": "image",
        "format": "hounsfield",
        "modality": "CT",
        "num_channels": 1,
        "spatial_shape": [32, 32, 16],
        "dtype": "float32",
        "value_range": [0, 1],
        "is_patch_data": True,
        "channel_def": {"0": "image"},
    }
    pred = {
        **image,
        "format": "segmentation",
        "num_channels": 2,
        "channel_def": channels or {"0": "background", "1": "spleen"},
    }
    return {
        "version": "0.5.9",
        "changelog": {"0.5.9": "…"},
        "monai_version": "1.4.0",
        "pytorch_version": "2.4.0",
        "numpy_version": "1.24.4",
        "optional_packages_version": {"nibabel": "5.2.1"},
        "name": "Spleen CT segmentation",
        "task": "Decathlon spleen segmentation",
        "description": "A pre-trained model for volumetric (3D) segmentation of the spleen from CT image",
        "authors": "somebody",
        "copyright": "Copyright (c) somebody",
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": pred}},
    }


def write_bundle(folder, inference=INFERENCE, said=None, state=None):
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    write_json(folder / "configs/inference.json", inference)
    write_json(folder / "configs/metadata.json", said or metadata())
    if state is None:
        from monai.bundle import ConfigParser

        torch.manual_seed(0)
        state = ConfigParser({"n": NETWORK}).get_parsed_content("n").state_dict()
    torch.save(state, folder / "models/model.pt")
    return state


def changed(**entries):
    return {**INFERENCE, **entries}


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "Dataset001_Noise"
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    noise = np.random.default_rng(0).standard_normal((40, 30, 20)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(noise, np.diag([1, 1, 2, 1.0])), folder / "imagesTr/one_0000.nii.gz")
    nibabel.save(
        nibabel.Nifti1Image((noise > 1).astype(np.uint8), np.diag([1, 1, 2, 1.0])), folder / "labelsTr/one.nii.gz"
    )
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "high": 1},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    write_json(folder / "dataset.json", content)
    return folder


def convert(folder, output, *options):
    return here("tools", "convert", "--source", "monai", "--checkpoint", folder, "--output", output, *options)


def test_new_task_takes_it_as_it_is(tmp_path, dataset):
    write_bundle(tmp_path / "spleen")
    words = (
        "--pretrained",
        tmp_path / "spleen",
        "--dataset_dir",
        dataset,
        "--task",
        "high",
        "--output",
        tmp_path / "high",
    )
    result = here("tools", "new_task", *words)
    assert result.returncode == 0, result.stderr
    task = Bundle(tmp_path / "high")
    assert task.inference["preprocessing"]["transforms"][-1]["device"] == "@device"
    assert task.inference["preprocessing"]["transforms"][0]["keys"] == "image"
    assert task.inference["patch_size"] == [32, 32, 16]


@pytest.mark.parametrize("prefix, wrapped", [("", True), ("module.", False), ("module.", True)])
def test_weights_however_they_are_wrapped(tmp_path, prefix, wrapped):
    state = write_bundle(tmp_path / "plain")
    named = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    content = {"state_dict": named, "epoch": 3, "best": np.float64(0.9)} if wrapped else named
    write_bundle(tmp_path / "spleen", state=content)
    result = convert(tmp_path / "spleen", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    bundle = Bundle(tmp_path / "out")
    ours = bundle.state()
    assert ours.keys() == state.keys()
    assert all(ours[name].equal(tensor) for name, tensor in state.items())
    assert bundle.labels == ["spleen"]
    assert bundle.network_def() == NETWORK
    assert bundle.metadata["authors"] == "somebody"
    spacing = bundle.inference["preprocessing"]["transforms"][3]
    assert (spacing["_target_"], spacing["pixdim"], spacing["keys"]) == ("Spacingd", [1.5, 1.5, 2.0], "image")
    assert ("| `epoch` | no weights of the network |" in (bundle.path / "docs/conversion.md").read_text()) == wrapped
    checked = here("tools", "verify", bundle.path)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize(("stem", "factor"), [("mean", 1), ("repeat", 3)])
def test_the_first_layer_is_repeated_for_more_channels(tmp_path, stem, factor):
    write_bundle(tmp_path / "spleen")
    result = convert(tmp_path / "spleen", tmp_path / "out", "--in_channels", 3, "--stem", stem)
    assert result.returncode == 0, result.stderr
    before, bundle = Bundle(tmp_path / "spleen"), Bundle(tmp_path / "out")
    assert bundle.in_channels == 3 and bundle.inference["dataset"]["data"]["channels"] == 3
    image = torch.rand(1, 1, 16, 16, 16)
    with torch.inference_mode():
        one, three = (b.network().eval() for b in (before, bundle))
        for tensor in (one.state_dict(), three.state_dict()):
            for name in tensor:
                if name in ("model.0.conv.unit0.conv.bias", "model.0.residual.bias"):
                    tensor[name].zero_()  # so that the first layer is linear
        torch.testing.assert_close(three(image.repeat(1, 3, 1, 1, 1) / factor), one(image))
    assert (
        f"repeated for 3 channels{', divided by 3' if stem == 'mean' else ''} |"
        in (tmp_path / "out/docs/conversion.md").read_text()
    )
    result = convert(tmp_path / "out", tmp_path / "more", "--in_channels", 4)
    assert result.returncode == 1 and "only the first layer of a network that takes 1 channel" in result.stderr


def test_a_network_and_transforms_that_only_the_bundle_has_the_code_of(tmp_path):
    own = changed(network_def={"_target_": "scripts.mine.Net", "in_channels": 1, "out_channels": 2})
    state = {"conv.weight": torch.rand(2, 1, 3, 3, 3), "conv.bias": torch.rand(2)}
    write_bundle(tmp_path / "spleen", own, state=state)
    (tmp_path / "spleen/scripts").mkdir()
    (tmp_path / "spleen/scripts/__init__.py").write_text("")
    (tmp_path / "spleen/scripts/mine.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Module):\n    def __init__(self, in_channels, out_channels):\n"
        "        super().__init__()\n        self.conv = nn.Conv3d(in_channels, out_channels, 3, padding=1)\n\n"
        "    def forward(self, x):\n        return self.conv(x)\n"
    )
    result = convert(tmp_path / "spleen", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out/scripts/mine.py").is_file()
    assert (tmp_path / "out/scripts/sliding_window.py").is_file()


def test_what_a_bundle_lacks_is_said_in_one_line(tmp_path):
    def refused(message, *options, inference=INFERENCE, **how):
        shutil.rmtree(tmp_path / "spleen", ignore_errors=True)
        write_bundle(tmp_path / "spleen", inference, **how)
        result = convert(tmp_path / "spleen", tmp_path / "out", *options)
        assert result.returncode == 1
        assert len([line for line in result.stderr.splitlines() if line.startswith("error")]) == 1
        assert message in result.stderr, result.stderr
        assert not (tmp_path / "out").exists()

    def without(key):
        return {name: value for name, value in INFERENCE.items() if name != key}

    refused("inference.json has no 'preprocessing'", inference=without("preprocessing"))
    refused("inference.json has no 'network_def'", inference=without("network_def"))
    refused("inference.json has no 'inferer'", inference=without("inferer"))
    refused("no roi_size in its inferer", inference=changed(inferer={"_target_": "SimpleInferer"}))
    refused(
        "output channel 0 is 'tumour core', not background", said=metadata(**{"0": "tumour core", "1": "whole tumour"})
    )
    refused("but names 0: name them in order by --labels", said=metadata(**{"0": "background"}))
    refused("--labels", "--labels", "a,b")
    refused("models/best.pt not found", "--weights", "models/best.pt")
    refused("is missing, in network_def", state={"other": torch.zeros(1)})
    lambdas = changed(
        preprocessing={"_target_": "Compose", "transforms": [{"_target_": "Lambdad", "keys": "image", "func": "$abs"}]}
    )
    refused("which is not a plain value", inference=lambdas)


@pytest.mark.slow
def test_it_segments_as_before(tmp_path, dataset):
    """As MONAI's own components with these weights do."""
    from monai.bundle import ConfigParser

    state = write_bundle(tmp_path / "spleen")
    parser = ConfigParser({**INFERENCE, "device": torch.device("cpu")})
    preprocessing, inferer, network = (
        parser.get_parsed_content(key) for key in ("preprocessing", "inferer", "network_def")
    )
    network.load_state_dict(state)
    item = preprocessing({"image": str(dataset / "imagesTr/one_0000.nii.gz")})
    with torch.no_grad():
        logits = inferer(item["image"].as_tensor()[None], network.eval())[0]
        name = "model.2.1.conv.unit0.conv.bias"
        state[name] = state[name] - torch.stack(
            [(logits[0] - logits[1]).median(), torch.tensor(0.0)]
        )  # half of the voxels
        network.load_state_dict(state)
        item["pred"] = inferer(item["image"][None], network)[0].argmax(0, keepdim=True)
    expected = Invertd("pred", preprocessing, "image", nearest_interp=True)(item)["pred"][0]
    torch.save(state, tmp_path / "spleen/models/model.pt")
    assert convert(tmp_path / "spleen", tmp_path / "out").returncode == 0
    words = ("--config_file", tmp_path / "out/configs/inference.json", "--bundle_root", tmp_path / "out")
    knobs = (
        "--dataset_dir",
        dataset,
        "--output_dir",
        tmp_path / "maps",
        "--precision",
        "float32",
        "--inferer#mode",
        "constant",
    )
    run("monai.bundle", "run", *words, *knobs, PYTHONPATH="")
    labels = np.asarray(nibabel.load(tmp_path / "maps/one_0000_seg.nii.gz").dataobj)
    assert labels.shape == (40, 30, 20)
    assert 0.2 < labels.mean() < 0.8
    assert (labels != expected.numpy()).mean() < 1e-3
