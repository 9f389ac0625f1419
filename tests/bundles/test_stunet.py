"""pretrain_stunet as users run it: inference against that of nnU-Net 1, written out here; training, continued, evaluated."""

import csv
from itertools import combinations, product

import nibabel
import numpy as np
import pytest
import torch
from scipy import ndimage

from tests.conftest import ROOT, here, train
from tools.bundle import Bundle
from tools.bundle_code.stunet import STUNet
from tools.instantiate import copy_template, set_labels, set_values

LABELS = 5
PATCH, STRIDES, CHANNELS = (12, 16, 24), [[2, 2, 2], [1, 1, 2]], [4, 6, 8]  # z, y, x
TARGET = (2.0, 1.6, 1.5)


@pytest.fixture(scope="module")
def published():
    """A random network on (z, y, x)."""
    torch.manual_seed(0)
    network = STUNet(out_channels=1 + LABELS, channels=CHANNELS, strides=STRIDES).eval()
    torch.nn.init.normal_(network.seg_outputs[-1].weight)
    with torch.no_grad():  # so that every class is somewhere the largest
        network.seg_outputs[-1].bias.copy_(-network(torch.randn(1, 1, *PATCH)).mean((0, 2, 3, 4)))
    return network


@pytest.fixture(scope="module")
def bundle(published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stunet") / "random"
    copy_template(ROOT / "bundles" / "pretrain_stunet", folder)
    set_labels(folder, {f"organ {number}": [number] for number in range(1, 1 + LABELS)})
    strides = [stride[::-1] for stride in STRIDES]
    values = {"patch_size": list(PATCH[::-1]), "spacing": list(TARGET[::-1]), "channels": CHANNELS, "strides": strides}
    set_values(folder, values)
    turned = {n: t.permute(0, 1, 4, 3, 2) if t.ndim == 5 else t for n, t in published.state_dict().items()}
    torch.save({name: tensor.contiguous() for name, tensor in turned.items()}, folder / "models" / "model.pt")
    return Bundle(folder)


def resized(values, size, order, apart):
    """Splines at the centres of the new voxels, borders where they were, within the range of the old ones."""
    lines = [(np.arange(new) + 0.5) * old / new - 0.5 for new, old in zip(size, values.shape)]
    if apart is not None:  # the nearest slice, each resized by itself
        lines[apart] = np.floor(lines[apart] + 0.5)
    places = np.meshgrid(*lines, indexing="ij")
    if apart is None:
        found = ndimage.map_coordinates(values, places, order=order, mode="nearest")
    else:
        slices = np.moveaxis(values, apart, 0)
        plane = [np.moveaxis(place, apart, 0) for axis, place in enumerate(places) if axis != apart]
        numbers = lines[apart].astype(int).clip(0, len(slices) - 1)
        found = np.stack(
            [
                ndimage.map_coordinates(slices[number], [p[i] for p in plane], order=order, mode="nearest")
                for i, number in enumerate(numbers)
            ]
        )
        found = np.moveaxis(found, 0, apart)
    return found.clip(values.min(), values.max())


def nnunet(network, image, spacing, mode, mirrored):
    """The label map that nnU-Net 1 makes, (z, y, x), from the description of its steps."""
    inside = ndimage.find_objects(ndimage.binary_fill_holes(image != 0).astype(int))[0]
    cropped = image[inside].astype(np.float64)
    size = [round(now / new * length) for now, new, length in zip(spacing, TARGET, cropped.shape)]
    thick = max(spacing) / min(spacing) > 3
    apart = int(np.argmax(spacing)) if thick else None
    data = resized(cropped, size, 3, apart)
    data = (data - data.mean()) / (data.std() + 1e-8)
    pad = [
        (max(0, side - length) // 2, max(0, side - length) - max(0, side - length) // 2)
        for side, length in zip(PATCH, size)
    ]
    padded = torch.from_numpy(np.pad(data, pad)).float()
    weight = np.zeros(PATCH)
    weight[tuple(side // 2 for side in PATCH)] = 1
    weight = ndimage.gaussian_filter(weight, [side / 8 for side in PATCH], 0, mode="constant", cval=0)
    weight /= weight.max()
    weight[weight == 0] = weight[weight != 0].min()
    starts = []
    for length, side in zip(padded.shape, PATCH):
        steps = int(np.ceil((length - side) / (side * 0.5))) + 1
        starts.append([int(np.round(i * (length - side) / max(steps - 1, 1))) for i in range(steps)])
    total, weights = np.zeros((1 + LABELS, *padded.shape)), np.zeros(padded.shape)
    flips = [axes for number in range(4) for axes in combinations((2, 3, 4), number)] if mirrored else [()]
    with torch.inference_mode():
        for corner in product(*starts):
            box = tuple(slice(start, start + side) for start, side in zip(corner, PATCH))
            window = padded[box][None, None]
            each = [network(window.flip(axes)).softmax(1).flip(axes)[0] for axes in flips]
            total[(slice(None), *box)] += weight * torch.stack(each).mean(0).double().numpy()
            weights[box] += weight
    whole = tuple(slice(before, length - after) for (before, after), length in zip(pad, padded.shape))
    probabilities = (total / weights)[(slice(None), *whole)]
    result = np.zeros(image.shape, np.uint8)
    if mode == "smooth_labels":
        result[inside] = np.stack([resized(p, cropped.shape, 1, apart) for p in probabilities]).argmax(0)
        return result
    labels = probabilities.argmax(0)
    if mode == "labels":
        result[inside] = resized(labels, cropped.shape, 0, None)
        return result
    fast = np.zeros(cropped.shape, np.uint8)
    for label in np.unique(labels):
        fast[resized((labels == label).astype(float), cropped.shape, 1, apart) >= 0.5 - 1e-9] = label
    result[inside] = fast
    return result


@pytest.mark.parametrize(
    ("mode", "mirrored", "spacing", "shape"),
    [
        ("smooth_labels", True, (1.5, 1.0, 1.2), (18, 34, 40)),
        ("smooth_labels", False, (5.0, 1.4, 1.5), (7, 20, 36)),  # thick slices
        ("fast_labels", False, (1.5, 1.0, 1.2), (18, 34, 40)),
        ("labels", False, (2.5, 1.9, 1.8), (8, 20, 30)),  # smaller than a window along z
    ],
)
def test_label_maps_are_those_of_nnunet_1(bundle, published, tmp_path, mode, mirrored, spacing, shape):
    coarse = np.random.default_rng(0).normal(size=[max(2, length // 3) for length in shape])
    image = (100 * resized(coarse, shape, 3, None)).astype(np.float32)
    image[:, :2], image[..., -3:] = 0, 0
    (tmp_path / "images").mkdir()
    affine = np.diag([*spacing[::-1], 1.0])
    nibabel.save(nibabel.Nifti1Image(image.T, affine), tmp_path / "images" / "case.nii.gz")
    knobs = {"inferer_output": mode, "mirror_axes": [0, 1, 2] if mirrored else [], "precision": "float32"}
    with bundle.code():
        parser = bundle.parser(dataset_dir=str(tmp_path / "images"), output_dir=str(tmp_path / "maps"), **knobs)
        parser.get_parsed_content("evaluator").run()
    file = nibabel.load(tmp_path / "maps" / "case_seg.nii.gz")
    ours, expected = np.asarray(file.dataobj).T, nnunet(published, image, spacing, mode, mirrored)
    np.testing.assert_allclose(file.affine, affine, atol=1e-6)
    assert len(np.unique(expected)) >= LABELS
    assert (ours != expected).mean() < 3e-4  # float32 and float64 sums differ in their last bits


def untrained(dataset, folder, overlay):
    words = ["--bundle", ROOT / "bundles" / "pretrain_stunet", "--dataset_dir", dataset, "--output", folder]
    words += ["--labels", "{liver: liver, spleen: spleen}", "--overlay", overlay, "--patch_size", 32]
    assert here("tools", "new_pretraining", *words).returncode == 0
    values = {"channels": [4, 6, 8, 8], "strides": [[2, 2, 2], [2, 2, 2], [2, 1, 1]], "spacing": [8.0, 8.0, 8.0]}
    set_values(folder, values)
    return folder


@pytest.fixture(scope="module")
def trained(phantom_dataset, tmp_path_factory):
    folder = untrained(phantom_dataset, tmp_path_factory.mktemp("trained") / "start", "small")
    train(folder, "--max_epochs", 2, "--iterations_per_epoch", 2, "--val_interval", 1)
    return folder


def last(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def test_training_follows_the_published_recipe(trained):
    checkpoint = last(trained / "checkpoints")
    groups = checkpoint["optimizer"]["param_groups"]
    assert [(g["initial_lr"], g["momentum"], g["nesterov"], g["weight_decay"]) for g in groups] == [
        (0.01, 0.99, True, 3e-5)
    ] * 2
    assert checkpoint["epoch"] == 2
    initial = STUNet(out_channels=3, channels=[4, 6, 8, 8], strides=[(2, 2, 2), (2, 2, 2), (2, 1, 1)])
    names = [name for name, _ in initial.named_parameters()]
    assert list(checkpoint["network"]) == names
    trained_names = len(checkpoint["optimizer"]["state"])
    assert trained_names == len(names) - 2  # all but the coarsest head


def test_overlays_for_wide_minima_train(phantom_dataset, tmp_path):
    folder = untrained(phantom_dataset, tmp_path / "start", "small,sam,swa")
    train(folder, "--max_epochs", 4, "--iterations_per_epoch", 2, "--val_interval", 4)
    checkpoint, model = last(folder / "checkpoints"), torch.load(folder / "models" / "model.pt", weights_only=True)
    assert checkpoint["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.0025)  # a quarter, over the last quarter
    assert all(torch.equal(tensor, checkpoint["average"][f"module.{name}"]) for name, tensor in model.items())
    assert any(not torch.equal(tensor, checkpoint["network"][name]) for name, tensor in model.items())


def test_the_learning_rate_falls_by_epochs(trained):
    from torch.optim.lr_scheduler import PolynomialLR

    config = Bundle(trained).path / "configs" / "train.json"
    assert '"power": 0.9' in config.read_text()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.01)
    schedule = PolynomialLR(optimizer, total_iters=1000, power=0.9)
    for epoch in range(1000):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * (1 - epoch / 1000) ** 0.9, rel=1e-6)
        optimizer.step()
        schedule.step()


def test_continuing_starts_from_the_weights_and_evaluating_reads_them(trained, tmp_path):
    before = torch.load(trained / "models" / "model.pt", weights_only=True)
    torch.save(before, tmp_path / "given.pt")
    configs = f"['{trained}/configs/train.json','{trained}/configs/continue.json']"
    words = ["--weights", tmp_path / "given.pt", "--max_epochs", 1, "--iterations_per_epoch", 1, "--learning_rate", 0.0]
    train(trained, *words, "--val_interval", 1, config=configs)
    after = last(trained / "checkpoints" / "continued")
    assert after["epoch"] == 1
    assert all(torch.equal(before[name], after["network"][name]) for name in before)
    train(trained, config=f"['{trained}/configs/train.json','{trained}/configs/evaluate.json']")
    rows = list(csv.reader((trained / "eval" / "val_mean_dice_raw.csv").open()))
    assert len(rows) == 2 and 0 <= float(rows[1][-1]) <= 1


@pytest.mark.slow
def test_two_processes_train_together(trained, tmp_path):
    import os
    import shutil
    import subprocess
    import sys

    folder = tmp_path / "double"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("checkpoints"))
    configs = f"['{folder}/configs/train.json','{folder}/configs/multi_gpu_train.json']"
    words = ["--nnodes", "1", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    words += ["-m", "monai.bundle", "run", "--config_file", configs, "--bundle_root", str(folder)]
    words += ["--max_epochs", "2", "--iterations_per_epoch", "2", "--val_interval", "1", "--checkpointing", "True"]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        cwd="/", env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert last(folder / "checkpoints")["epoch"] == 2
