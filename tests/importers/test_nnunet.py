"""Checkpoints in nnU-Net's layout become bundles that train, merge and run; test_nnunet_peer.py has nnU-Net make and run them."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from tests.conftest import here, run, train
from tools.bundle import Bundle
from tools.network import instantiate
from tools.task_vector import TaskVector

pytestmark = pytest.mark.skipif(
    find_spec("dynamic_network_architectures") is None, reason="dynamic-network-architectures is not installed"
)
CT = {"mean": 40.0, "std": 300.0, "percentile_00_5": -900.0, "percentile_99_5": 1500.0, "median": 0, "min": 0, "max": 1}
LABELS = {"background": 0, "anterior": 1, "posterior": 2}


def flat(patch, spacing, strides, kernels, scheme, kind="PlainConvUNet"):
    """A configuration as plans had it before nnU-Net 2.4."""
    stages = len(strides)
    return {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": patch,
        "median_image_size_in_voxels": patch,
        "spacing": spacing,
        "normalization_schemes": scheme if isinstance(scheme, list) else [scheme],
        "use_mask_for_norm": [True, False] if isinstance(scheme, list) else [False],
        "UNet_class_name": kind,
        "UNet_base_num_features": 4,
        "n_conv_per_stage_encoder": [1] * stages if kind == "PlainConvUNet" else [1, 2, 2][:stages],
        "n_conv_per_stage_decoder": [1] * (stages - 1),
        "num_pool_per_axis": [0, 0, 0],
        "pool_op_kernel_sizes": strides,
        "conv_kernel_sizes": kernels,
        "unet_max_num_features": 12,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None},
        "batch_dice": False,
    }


def nested(**changes):
    """The same as nnU-Net 2.4 and later write it."""
    old = flat(**changes)
    strides, kernels = old.pop("pool_op_kernel_sizes"), old.pop("conv_kernel_sizes")
    kind = old.pop("UNet_class_name")
    blocks = {"PlainConvUNet": "n_conv_per_stage", "ResidualEncoderUNet": "n_blocks_per_stage"}[kind]
    arguments = {
        "n_stages": len(strides),
        "features_per_stage": [4, 8, 12][: len(strides)],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": kernels,
        "strides": strides,
        blocks: old.pop("n_conv_per_stage_encoder"),
        "n_conv_per_stage_decoder": old.pop("n_conv_per_stage_decoder"),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    old.pop("UNet_base_num_features"), old.pop("unet_max_num_features"), old.pop("num_pool_per_axis")
    old["architecture"] = {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
        "arch_kwargs": arguments,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    return old


def job(
    folder,
    configuration,
    image=None,
    channels=("MRI",),
    forward=(0, 1, 2),
    seed=0,
    labels=LABELS,
    base=None,
    mirror=(0, 1, 2),
    reader="SimpleITKIO",
):
    """What nnunet_peer.py needs to make a trained model's folder, and to predict an image."""
    plans = {
        "dataset_name": "Dataset001_Test",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1, 1, 1],
        "original_median_shape_after_transp": [32, 32, 32],
        "image_reader_writer": reader,
        "transpose_forward": list(forward),
        "transpose_backward": [list(forward).index(axis) for axis in range(3)],
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": CT, "1": CT},
        "configurations": {"3d_fullres": configuration}
        if base is None
        else {"base": base, "3d_fullres": configuration},
    }
    dataset = {
        "channel_names": {str(number): name for number, name in enumerate(channels)},
        "labels": labels,
        "numTraining": 2,
        "file_ending": ".nii.gz",
        "name": "Test",
        "licence": "CC0",
    }
    return {
        "folder": str(folder),
        "plans": plans,
        "dataset_json": dataset,
        "seed": seed,
        "configuration": "3d_fullres",
        "image": image if image is None or isinstance(image, list) else [str(image)],
        "mirror": mirror,
    }


THREE, ONE, TWO = [3, 3, 3], [1, 1, 1], [2, 2, 2]
SMALL = dict(
    patch=[8, 16, 24], spacing=[1.5, 1.0, 2.0], strides=[ONE, TWO, [1, 2, 2]], kernels=[[1, 3, 3], THREE, THREE]
)


def write_model(folder, described, change=0.0):
    """A trained model's folder with random weights, as nnU-Net's trainer writes it; and its network."""
    configuration = described["plans"]["configurations"]["3d_fullres"]
    arguments = dict(configuration["architecture"]["arch_kwargs"])
    arguments |= {key: f"${arguments[key]}" for key in ("conv_op", "norm_op", "nonlin")}
    kind = configuration["architecture"]["network_class_name"]
    sizes = {"input_channels": 1, "num_classes": len(described["dataset_json"]["labels"]), "deep_supervision": True}
    torch.manual_seed(described["seed"])
    network = instantiate({"_target_": kind, **arguments, **sizes}, devices=("cpu",))
    torch.manual_seed(99)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += change * torch.randn_like(parameter)
    content = {
        "network_weights": network.state_dict(),
        "optimizer_state": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.01}]},
        "grad_scaler_state": None,
        "logging": {"ema_fg_dice": [np.float32(0.5), np.float64(0.6)], "lrs": [0.01]},
        "_best_ema": np.float64(0.6),
        "current_epoch": 2,
        "init_args": {
            "plans": described["plans"],
            "configuration": "3d_fullres",
            "fold": 0,
            "dataset_json": described["dataset_json"],
            "device": torch.device("cpu"),
        },
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 2),
    }
    (folder / "fold_0").mkdir(parents=True)
    for name in ("plans", "dataset"):
        text = json.dumps(described["plans"] if name == "plans" else described["dataset_json"])
        (folder / f"{name}.json").write_text(text)
    torch.save(content, folder / "fold_0" / "checkpoint_final.pth")
    return network.eval()


def convert(folder, output, *options):
    file = folder / "fold_0" / "checkpoint_final.pth"
    return here("tools", "convert", "--source", "nnunet", "--checkpoint", file, "--output", output, *options)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of the same plans, the second trained on from the first; and the bundles made of them."""
    folder = tmp_path_factory.mktemp("models")
    networks = {}
    for name, change in (("first", 0.0), ("second", 0.02)):
        described = job(folder, nested(**SMALL, scheme="ZScoreNormalization"), forward=(1, 0, 2))
        networks[name] = write_model(folder / name, described, change)
        result = convert(folder / name, folder / f"{name}_bundle")
        assert result.returncode == 0, result.stderr
        assert "labels" in result.stdout
    return folder, networks


def test_the_network_is_the_same_with_its_axes_turned(models):
    folder, networks = models
    bundle = Bundle(folder / "first_bundle")
    image = torch.rand(1, 1, 16, 24, 32)  # y, z, x: transpose_forward is (1, 0, 2)
    with torch.no_grad():
        theirs = networks["first"](image)[0]
        ours = bundle.network()(image.permute(0, 1, 4, 2, 3)).permute(0, 1, 3, 4, 2)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_both_networks_scripted_too(tmp_path, kind):
    described = job(tmp_path, nested(**SMALL, scheme="NoNormalization", kind=kind))
    theirs = write_model(tmp_path / "model", described, change=0.1)
    result = convert(tmp_path / "model", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    ours = Bundle(tmp_path / "out").network()
    image = torch.rand(2, 1, 16, 24, 32)
    with torch.no_grad():
        expected = theirs(image)[0]
        for network in (ours, torch.jit.script(ours)):
            logits = network(image.permute(0, 1, 4, 3, 2)).permute(0, 1, 4, 3, 2)
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_what_the_bundle_says(models):
    folder, networks = models
    bundle = Bundle(folder / "first_bundle")
    assert bundle.labels == ["anterior", "posterior"]
    inference = bundle.inference
    assert inference["patch_size"] == [24, 8, 16]  # of y, z, x = 8, 16, 24
    assert inference["mirror_axes"] == [0, 1]
    assert (inference["windows"], inference["inferer_output"]) == ("nnunet", "smooth_labels")
    *_, crop, normalize, resample = inference["preprocessing"]["transforms"]
    assert crop["_target_"].endswith("CropToNonzerod")
    assert normalize["schemes"] == [{"scheme": "zscore"}]
    assert resample["spacing"] == [2.0, 1.5, 1.0]
    assert "scipy" in bundle.metadata["required_packages_version"]
    assert bundle.data == {"dataset": "Test", "licence": "CC0"}
    theirs = networks["first"].state_dict()
    assert (
        len(bundle.state()) == len(list(networks["first"].parameters())) - 2
    )  # without the head at the lower resolution
    account = (bundle.path / "docs" / "conversion.md").read_text()
    assert account.count("\n| `") == len(theirs) + 3  # every name of the checkpoint, and what is not weights
    assert "| `optimizer_state` | state of the optimiser |" in account
    checked = here("tools", "verify", bundle.path)
    assert checked.returncode == 0, checked.stderr
    assert "the weights fit NnUNet" in checked.stdout


def test_a_checkpoint_alone_has_its_plans_in_it(models, tmp_path):
    folder, _ = models
    file = shutil.copy(folder / "first/fold_0/checkpoint_final.pth", tmp_path / "alone.pth")
    result = here("tools", "convert", "--source", "nnunet", "--checkpoint", file, "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    ours, whole = (Bundle(path).inference for path in (tmp_path / "out", folder / "first_bundle"))
    assert ours == whole


def test_a_task_vector_between_two_checkpoints(models, tmp_path):
    folder, _ = models
    start, end = folder / "first_bundle", folder / "second_bundle"
    vector = tmp_path / "vector.safetensors"
    result = here("tools", "diff", "--pretrained", start, "--finetuned", end, "--output", vector)
    assert result.returncode == 0, result.stderr
    merge = ("tools", "merge", "--pretrained", start, "--vectors", vector, "--method", "task_arithmetic", "--scale", 1)
    result = here(*merge, "--output", tmp_path / "merged")
    assert result.returncode == 0, result.stderr
    merged, second = (torch.load(path / "models/model.pt", weights_only=True) for path in (tmp_path / "merged", end))
    assert TaskVector(vector).facts.structure.head == {"head.weight": 0, "head.bias": 0}
    assert merged.keys() == second.keys()
    assert all(tensor.equal(second[name]) for name, tensor in merged.items() if not name.startswith("head."))
    inference = Bundle(tmp_path / "merged").inference
    assert (inference["windows"], inference["inferer_output"]) == ("nnunet", "smooth_labels")
    assert "scipy" in Bundle(tmp_path / "merged").metadata["required_packages_version"]
    image = torch.rand(1, 1, 24, 8, 16)
    with torch.no_grad():
        a, b = (Bundle(path).network()(image).argmax(1) for path in (tmp_path / "merged", end))
    assert (a != b).sum() <= 2  # margins over background, rounded once more


def test_what_cannot_be_converted_is_refused_in_one_line(models, tmp_path):
    folder, _ = models
    described = job(folder, nested(**SMALL, scheme="ZScoreNormalization"))

    def refused(message, plans=None, dataset=None, content=None):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        shutil.copytree(folder / "first", tmp_path / "model")
        for name, changed in (("plans", plans), ("dataset", dataset)):
            if changed:
                (tmp_path / "model" / f"{name}.json").write_text(json.dumps(changed))
        file = tmp_path / "model/fold_0/checkpoint_final.pth"
        if content is not None:
            torch.save(content(torch.load(file, weights_only=False)), file)
        result = convert(tmp_path / "model", tmp_path / "out")
        assert result.returncode == 1
        assert len(result.stderr.strip().splitlines()) == 1
        assert message in result.stderr, result.stderr
        assert not (tmp_path / "out").exists()

    def configured(**changes):
        own = {**described["plans"]["configurations"]["3d_fullres"], **changes}
        return {**described["plans"], "configurations": {"3d_fullres": own}}

    refused("spacing must be above 0", plans=configured(spacing=[1, -1, 1]))
    refused("must be a multiple of the strides' product", plans=configured(patch_size=[7, 15, 23]))
    refused("the plans normalise 0 channels, dataset.json has 1", plans=configured(normalization_schemes=[]))
    labels = {name: 2 * value for name, value in described["dataset_json"]["labels"].items()}
    refused("must be numbered from 1 on", dataset={**described["dataset_json"], "labels": labels})

    def without(name):
        return lambda content: {
            **content,
            "network_weights": {k: v for k, v in content["network_weights"].items() if k != name},
        }

    regions = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
    refused("trained on regions (whole)", dataset={**described["dataset_json"], **regions})
    refused("is 2D", plans=configured(patch_size=[32, 32], spacing=[1, 1]))
    refused("second stage of a cascade", plans=configured(previous_stage="3d_lowres"))
    refused("no bundle code for its normalisation Mine", plans=configured(normalization_schemes=["Mine"]))
    refused(
        "no bundle code for its resampling_fn_data", plans=configured(resampling_fn_data="resample_torch_fornnunet")
    )
    refused("inherits from itself", plans=configured(inherits_from="3d_fullres"))
    refused("are not nnU-Net's (KeyError: 'configurations')", plans={"no": "plans"})
    other = {"network_class_name": "my.Net", "arch_kwargs": {}}
    refused("its network is Net; only PlainConvUNet and ResidualEncoderUNet", plans=configured(architecture=other))
    architecture = described["plans"]["configurations"]["3d_fullres"]["architecture"]
    dropout = {**architecture, "arch_kwargs": {**architecture["arch_kwargs"], "dropout_op": "torch.nn.Dropout3d"}}
    refused("a network whose dropout_op is torch.nn.Dropout3d", plans=configured(architecture=dropout))
    refused(
        "encoder.stages.0.0.convs.0.norm.weight, which its plans' network has",
        content=without("encoder.stages.0.0.convs.0.norm.weight"),
    )
    refused(
        "has a tensor encoder.more",
        content=lambda content: content["network_weights"].update({"encoder.more": torch.ones(1)}) or content,
    )
    refused("no checkpoint of nnU-Net 2", content=lambda content: {"state_dict": {}})
    nan = {"network_weights": {"a": torch.tensor([float("nan")])}}
    refused("tensor a has NaN", content=lambda content: nan)
    refused("holds something else than weights and numbers", content=lambda content: {**content, "hostile": Path("x")})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Balls in noise, of another spacing than the plans', with a border of zeros."""
    folder = tmp_path_factory.mktemp("data") / "Dataset001_Balls"
    random = np.random.default_rng(0)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    x, y, z = np.meshgrid(*map(np.arange, (30, 26, 22)), indexing="ij")
    for case in range(3):
        ball = ((x - 12 - 2 * case) ** 2 + (y - 13) ** 2 + 2 * (z - 11) ** 2 < 60).astype(np.uint8)
        image = (ball * 3 + random.standard_normal(ball.shape)).astype(np.float32)
        image[:3] = 0
        affine = np.diag([1.5, 1.5, 1.2, 1])
        nibabel.save(nibabel.Nifti1Image(image, affine), folder / "imagesTr" / f"ball_{case}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(ball, affine), folder / "labelsTr" / f"ball_{case}.nii.gz")
    content = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "ball": 1},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.mark.slow
def test_the_chain_from_a_converted_model(models, dataset, tmp_path):
    """Fine-tune, diff, merge and segment, each as a user does."""
    start, task = models[0] / "first_bundle", tmp_path / "ball"
    run(
        "tools",
        "new_task",
        "--pretrained",
        start,
        "--dataset_dir",
        dataset,
        "--task",
        "ball",
        "--overlay",
        "small",
        "--output",
        task,
    )
    rates = ("--learning_rate", 0.01, "--head_learning_rate", 0.1, "--weight_decay", 0.1)
    train(task, "--max_epochs", 4, "--frozen_epochs", 0, "--patches_per_volume", 24, *rates)
    run("tools", "diff", "--pretrained", start, "--finetuned", task, "--output", tmp_path / "ball.safetensors")
    vectors = tmp_path / "ball.safetensors"
    run(
        "tools",
        "merge",
        "--pretrained",
        start,
        "--vectors",
        vectors,
        "--method",
        "average",
        "--output",
        tmp_path / "merged",
    )
    found = {}
    for name, bundle in (("specialist", task), ("merged", tmp_path / "merged")):
        words = ("--config_file", bundle / "configs/inference.json", "--bundle_root", bundle, "--dataset_dir", dataset)
        run("monai.bundle", "run", *words, "--output_dir", tmp_path / name, PYTHONPATH="")
        found[name] = [nibabel.load(path) for path in sorted((tmp_path / name).glob("*.nii.gz"))]
    assert len(found["merged"]) == 3
    for specialist, merged in zip(found["specialist"], found["merged"]):
        one, other = (np.asarray(image.dataobj) for image in (specialist, merged))
        assert one.shape == (30, 26, 22)
        assert (one != other).mean() < 1e-3
        assert not one[:3].any()
    truth = np.stack([nibabel.load(path).dataobj for path in sorted((dataset / "labelsTr").iterdir())])
    balls = np.stack([image.dataobj for image in found["merged"]])
    dice = 2 * (truth & balls).sum() / (truth.sum() + balls.sum())
    print(f"Dice {dice:.3f}")
    assert dice > 0.5
