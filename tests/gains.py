"""A tiny chain whose Dice is known in closed form: a network of two gains, whose organs appear at a known λ."""

import json
import shutil

import nibabel
import numpy as np
import torch

from tests.conftest import ROOT
from tools.bundle import read_json, write_json
from tools.diff import diff

NETWORK = '''"""Two gains, one for each organ."""

from torch import nn


class Gains(nn.Module):
    def __init__(self, out_channels):
        super().__init__()
        self.encoder = nn.Conv3d(1, 1, 1, bias=False)
        self.decoder = nn.Conv3d(1, 1, 1, bias=False)
        self.head = nn.Conv3d(2, out_channels, 1)

    def forward(self, x):
        import torch

        return self.head(torch.cat([self.encoder(x), self.decoder(x)], 1))
'''
ORGANS = {"bright": ([10.0, 0.0], -3.0), "dark": ([0.0, -10.0], -6.0)}  # the head's weights and its bias


def bundle(folder, gains, organs):
    shutil.copytree(ROOT / "bundles/pretrain_amos", folder, ignore=shutil.ignore_patterns("models"))
    (folder / "models").mkdir()
    (folder / "scripts/gains.py").write_text(NETWORK)
    inference = read_json(folder / "configs/inference.json")
    inference["network_def"] = {"_target_": "scripts.gains.Gains", "out_channels": 1 + len(organs)}
    transforms = inference["preprocessing"]["transforms"]
    inference["preprocessing"]["transforms"] = [t for t in transforms if not t["_target_"].startswith("ScaleIntensity")]
    write_json(folder / "configs/inference.json", inference | {"patch_size": [8, 8, 8]})
    metadata = read_json(folder / "configs/metadata.json")
    channels = {str(i): name for i, name in enumerate(["background", *organs])}
    metadata["network_data_format"]["outputs"]["pred"]["channel_def"] = channels
    metadata.pop("label_map", None)
    write_json(folder / "configs/metadata.json", metadata)
    weights, biases = zip(([0.0, 0.0], 0.0), *(ORGANS[organ] for organ in organs))
    state = {f"{part}.weight": torch.full((1, 1, 1, 1, 1), gain) for part, gain in zip(("encoder", "decoder"), gains)}
    state |= {"head.weight": torch.tensor(weights).view(-1, 2, 1, 1, 1), "head.bias": torch.tensor(biases)}
    torch.save(state, folder / "models/model.pt")
    return folder


def make_plane(root):
    """A starting point, task vectors of the tasks "bright" and "dark", a dataset and a split of it.

    An image is 1, 0.5, -0.5 and -1 in quarters: the first is "bright", the last is "dark".

    The bright organ is found, and only it, for 0.3 < λ < 0.6 of its task, the dark one for 0.6 < λ < 1.2 of its own.
    """
    start = bundle(root / "start", (0.0, 0.0), list(ORGANS))
    for task, gains in {"bright": (1.0, 0.0), "dark": (0.0, 1.0)}.items():
        diff(str(start), str(bundle(root / task, gains, [task])), str(root / f"{task}.safetensors"), task)
    data = root / "Dataset001_Quarters"
    for folder in ("imagesTr", "labelsTr"):
        (data / folder).mkdir(parents=True)
    write_json(
        data / "dataset.json", {"labels": {"background": 0, "bright": 1, "dark": 2}, "channel_names": {"0": "x"}}
    )
    values = np.repeat([1.0, 0.5, -0.5, -1.0], 2)
    for number in range(12):
        image = np.broadcast_to(values[:, None, None], (8, 6 + number, 6)).astype(np.float32)
        label = (image == 1) + 2 * (image == -1)
        nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), data / f"imagesTr/case{number}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(label.astype(np.uint8), np.eye(4)), data / f"labelsTr/case{number}.nii.gz")
    names = [f"case{number}" for number in range(12)]
    (root / "split.json").write_text(json.dumps([{"train": [], "val": names[:6], "test": names[6:]}]))
    return root


def dice(organ, scale):
    """Of an organ's task at a λ: half of the voxels found are right when its neighbour is found too."""
    weights, bias = ORGANS[organ]
    threshold = -bias / (scale * np.abs(weights).max()) if scale else np.inf
    return 0.0 if threshold > 1 else 1.0 if threshold > 0.5 else 2 / 3


def relabel(dataset, numbers, change):
    """Change the label maps of some cases."""
    for number in numbers:
        path = dataset / f"labelsTr/case{number}.nii.gz"
        label = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(change(np.asarray(label.dataobj)), label.affine), path)
