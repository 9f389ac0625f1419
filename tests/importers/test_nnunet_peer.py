"""Bundles converted from nnU-Net's checkpoints segment as nnU-Net does; nnU-Net runs in its own environment."""

import json
import os
import subprocess

import nibabel
import numpy as np
import pytest
import torch
from monai.transforms import LoadImage

from tests.conftest import ROOT, here, run
from tests.importers.test_nnunet import flat, job, nested
from tools.bundle import Bundle

PYTHON = ROOT / ".venv-nnunet" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (PYTHON.parent.parent / "ready").is_file(), reason="nnU-Net is not there: make .venv-nnunet/ready"
    ),
]


def peer(tmp_path, *jobs):
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    folders = {name: str(tmp_path) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    words = [PYTHON, "-m", "tests.nnunet_peer", tmp_path / "jobs.json"]
    result = subprocess.run(words, cwd=ROOT, env={**os.environ, **folders}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images that need all of the preprocessing; the real ones where they are."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    noise = random.standard_normal((40, 36, 14)).cumsum(0).cumsum(1).astype(np.float32)
    noise[:5] = noise[:, -3:] = noise[..., :2] = 0
    nibabel.save(nibabel.Nifti1Image(noise, np.diag([-1.0, -1.2, 4.5, 1])), folder / "thick.nii.gz")
    found = {"thick": folder / "thick.nii.gz", "channels": []}
    for number, part in enumerate(
        (noise[:, :, 2:], 200 * noise[:, ::-1, :-2])
    ):  # neither has zeros where the other has
        nibabel.save(nibabel.Nifti1Image(part, np.diag([-1.0, -1.2, 2, 1])), folder / f"two_000{number}.nii.gz")
        found["channels"].append(str(folder / f"two_000{number}.nii.gz"))
    if data := os.environ.get("REAL_DATA_DIR"):
        found["hippocampus"] = f"{data}/Dataset903_Hippocampus/imagesTr/hippocampus_001_0000.nii.gz"
        ct = nibabel.load(f"{data}/Dataset902_HeadNeckCT/imagesTr/okbp_004_0000.nii.gz")
        values = np.asarray(ct.dataobj, dtype=np.float32)[10:60, 8:52, 20:64]
        values[:6] = values[:, :, -7:] = 0  # as of an image that was padded
        nibabel.save(nibabel.Nifti1Image(values, ct.affine), folder / "head_and_neck.nii.gz")
        found["head_and_neck"] = folder / "head_and_neck.nii.gz"
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory, images):
    """For each image a trained model's folder of its own kind, with what nnU-Net predicts, and the bundle made of it."""
    folder = tmp_path_factory.mktemp("models")
    three, one, two = [3, 3, 3], [1, 1, 1], [2, 2, 2]
    thick = dict(
        patch=[8, 24, 20], spacing=[4.0, 1.5, 1.4], strides=[one, [1, 2, 2], two], kernels=[[1, 3, 3], three, three]
    )
    hippocampus = dict(patch=[24, 32, 16], spacing=[1, 1, 1], strides=[one, two, [2, 2, 1]], kernels=[three] * 3)
    kinds = {
        # axes in another order, slices that stay thick, kernels and strides of different sizes, plans of nnU-Net 2.3
        "thick": dict(configuration=flat(**thick, scheme="ZScoreNormalization"), forward=[0, 2, 1], mirror=[1], seed=2),
        # two channels, one of which is normalised where it is not zero, and images that are turned to RAS
        "channels": dict(
            configuration=nested(
                patch=[8, 16, 24], spacing=[2.0, 1.4, 1.1], strides=[one, [1, 2, 2], two], kernels=[three] * 3,
                scheme=["ZScoreNormalization", "CTNormalization"],
            ),
            channels=["T1", "CT"],
            reader="NibabelIOWithReorient",
            seed=1,
        ),
        "hippocampus": dict(
            configuration={"inherits_from": "base", "spacing": [1.1, 0.9, 1.3]},
            base=nested(**hippocampus, scheme="ZScoreNormalization"),
        ),
        "head_and_neck": dict(
            configuration=nested(
                patch=[16, 24, 32], spacing=[3.0, 3.5, 3.2], strides=[one, two, [1, 2, 2]], kernels=[three] * 3,
                scheme="CTNormalization", kind="ResidualEncoderUNet",
            ),
            forward=[2, 0, 1],
            mirror=[0, 2],
            channels=["CT"],
            labels={"background": 0, "jaw": 1, "cord": 2, "larynx": 3, "ignore": 4},
        ),
    }  # fmt: skip
    peer(folder, *(job(folder / kind, image=images[kind], **kinds[kind]) for kind in images))
    for kind in images:
        options = ("--source", "nnunet", "--checkpoint", folder / kind / "fold_0/checkpoint_final.pth")
        result = here("tools", "convert", *options, "--output", folder / f"{kind}_bundle")
        assert result.returncode == 0, result.stderr
    return folder


KINDS = ["thick", "channels", "hippocampus", "head_and_neck"]


def of_image(models, images, kind):
    if kind not in images:
        pytest.skip("REAL_DATA_DIR is not set: it names a folder of real nnU-Net datasets")
    return Bundle(models / f"{kind}_bundle"), np.load(models / kind / "predicted.npz"), images[kind]


def through(bundle, image, **knobs):
    """Preprocessed image and the inferer's output."""
    with bundle.code(), torch.inference_mode():
        parser = bundle.parser(precision="float32", **knobs)
        preprocessing, inferer, network = (
            parser.get_parsed_content(key) for key in ("preprocessing", "inferer", "network_def")
        )
        network.load_state_dict(torch.load(bundle.model_file, weights_only=True))
        item = preprocessing({"image": image if isinstance(image, list) else str(image)})
        return item["image"], inferer(item["image"][None], network.eval())[0]


def in_nnunets_axes(models, kind, values):
    """C, x, y, z to C and the axes of nnU-Net's plans."""
    forward = json.loads((models / kind / "plans.json").read_text())["transpose_forward"]
    return np.asarray(values).transpose(0, *(3 - axis for axis in forward))


@pytest.mark.parametrize("kind", KINDS)
def test_preprocessing_and_logits(models, images, kind):
    bundle, theirs, image = of_image(models, images, kind)
    preprocessed, logits = through(bundle, image, inferer_output="logits")
    np.testing.assert_allclose(in_nnunets_axes(models, kind, preprocessed), theirs["data"], atol=2e-5)
    ours = in_nnunets_axes(models, kind, logits)
    exact, half = (np.abs(ours - theirs[name]) / np.ptp(ours) for name in ("logits_float32", "logits"))
    print(
        f"{kind}: image {theirs['data'].shape}, logits differ by {exact.max():.1e} of their range {np.ptp(ours):.1f}; ",
        end="",
    )
    print(
        f"by {np.quantile(half, 0.99):.1e} at 99 % of the voxels, at most {half.max():.1e}, where nnU-Net sums in float16"
    )
    assert exact.max() < 2e-5
    assert np.quantile(half, 0.9) < 2e-3  # at the borders nnU-Net's weights are smaller than float16 has


@pytest.mark.parametrize("kind", KINDS)
def test_label_maps(models, images, kind):
    bundle, theirs, image = of_image(models, images, kind)
    _, labels = through(bundle, image)
    ours = np.asarray(labels)[0].transpose()  # x, y, z to z, y, x
    if kind == "channels":  # nnU-Net's are still turned to RAS
        ours = ours[:, ::-1, ::-1]
    file = LoadImage(image_only=True)(image[0] if isinstance(image, list) else image)
    assert labels.shape[1:] == file.shape
    exact, half = (int((ours != theirs[name]).sum()) for name in ("labels_float32", "labels"))
    print(f"{kind}: of {ours.size} voxels {exact} differ; {half} where nnU-Net sums in float16")
    assert len(np.unique(ours)) >= 3
    assert exact <= 1e-4 * ours.size
    assert half <= 5e-3 * ours.size


def test_the_label_map_that_a_user_gets(models, images, tmp_path):
    bundle, theirs, image = of_image(models, images, "thick")
    words = ("--config_file", bundle.path / "configs/inference.json", "--bundle_root", bundle.path)
    run("monai.bundle", "run", *words, "--dataset_dir", image, "--output_dir", tmp_path, PYTHONPATH="")
    ours = nibabel.load(tmp_path / "thick_seg.nii.gz")
    assert ours.get_data_dtype() == np.uint8
    np.testing.assert_allclose(ours.affine, nibabel.load(image).affine)
    # bfloat16, where the processor computes in it
    assert (np.asarray(ours.dataobj).transpose() != theirs["labels_float32"]).mean() < 0.01
