"""nnU-Net folders of both versions, labels by name or value, explicit splits."""

import json

import nibabel
import numpy as np
import pytest
import torch
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd, Spacingd

from tools.bundle_code import nnunet_data


def dataset(folder, description, cases=("a", "b", "c"), ending=".nii.gz", channels=1):
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    (folder / "dataset.json").write_text(json.dumps(description))
    for case in cases:
        for channel in range(channels):
            (folder / "imagesTr" / f"{case}_{channel:04d}{ending}").touch()
        (folder / "labelsTr" / f"{case}{ending}").touch()
    return folder


V1 = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver", "2": "left kidney"}}
V2 = {
    "channel_names": {"0": "T1", "1": "T2"},
    "labels": {"background": 0, "liver": 1, "kidney_left": 2, "whole": [1, 2], "ignore": 3},
    "file_ending": ".nrrd",
}


def test_version_1_labels_and_cases(tmp_path):
    folder = dataset(tmp_path / "v1", V1)
    assert nnunet_data.read_labels(folder) == {"liver": [1], "left kidney": [2]}
    assert list(nnunet_data.all_cases(folder)) == ["a", "b", "c"]
    assert nnunet_data.all_cases(folder)["a"]["image"].endswith("imagesTr/a_0000.nii.gz")


def test_version_2_regions_ignore_label_and_channels(tmp_path):
    folder = dataset(tmp_path / "v2", V2, ending=".nrrd", channels=2)
    assert nnunet_data.read_labels(folder) == {"liver": [1], "kidney_left": [2], "whole": [1, 2]}
    assert [p[-11:] for p in nnunet_data.all_cases(folder)["b"]["image"]] == ["b_0000.nrrd", "b_0001.nrrd"]
    (folder / "imagesTr" / "b_0001.nrrd").unlink()
    with pytest.raises(FileNotFoundError, match=r"case b: .*b_0001.nrrd not found"):
        nnunet_data.all_cases(folder)


def test_labels_by_name_value_and_spelling(tmp_path):
    folder = dataset(tmp_path / "v1", V1)
    assert nnunet_data.label_values(folder, {"x": "Left_Kidney", "y": 1}) == [[2], [1]]
    assert nnunet_data.label_values(folder, {"both": ["liver", 2]}) == [[1, 2]]
    with pytest.raises(ValueError, match=r"'spleen' of channel 'spleen' is not in .*liver=1, left kidney=2"):
        nnunet_data.label_values(folder, {"spleen": "spleen"})
    with pytest.raises(ValueError, match="uses one twice"):
        nnunet_data.label_values(folder, {"a": 1, "b": "liver"})


def test_label_map_keeps_values_above_the_number_of_classes():
    transform = nnunet_data.LabelsToChannelsd("label", [[48], [11, 12]])
    mapped = transform({"label": torch.tensor([[0, 48, 11, 12, 13, 200, -3]])})["label"]
    assert mapped.tolist() == [[0, 1, 2, 2, 0, 0, 0]]


def test_label_maps_off_their_image_are_refused_also_when_that_was_resampled(tmp_path):
    affine = np.diag([2.0, 2.0, 5.0, 1.0])
    files = {"image": affine, "label": affine, "elsewhere": np.eye(4)}
    for name, own in files.items():
        nibabel.save(nibabel.Nifti1Image(np.ones((9, 8, 7), np.float32), own), tmp_path / f"{name}.nii.gz")
    load = Compose([LoadImaged(("image", "label")), EnsureChannelFirstd(("image", "label"))])
    resample = Compose([Orientationd("image", "LPS", labels=None), Spacingd("image", [3.0, 3.0, 3.0])])
    for name in ("label", "elsewhere"):
        data = load({"image": str(tmp_path / "image.nii.gz"), "label": str(tmp_path / f"{name}.nii.gz")})
        data["image"] = resample(data)["image"]
        if name == "label":
            assert nnunet_data.CheckGridd("label")(data)["label"].shape == (1, 9, 8, 7)
        else:
            with pytest.raises(ValueError, match=r"elsewhere\.nii\.gz is not on the grid of its image"):
                nnunet_data.CheckGridd("label")(data)


def test_split_is_written_once_and_then_followed(tmp_path):
    folder = dataset(tmp_path / "v1", V1, cases=[f"case{i}" for i in range(10)])
    split = tmp_path / "bundle" / "splits_final.json"
    train = nnunet_data.split_cases(folder, "train", split)
    val = nnunet_data.split_cases(folder, "val", split)
    assert (len(train), len(val)) == (8, 2)
    assert not {c["image"] for c in train} & {c["image"] for c in val}
    folds = json.loads(split.read_text())
    assert sorted(case for fold in folds for case in fold["val"]) == [f"case{i}" for i in range(10)]
    split.write_text(json.dumps([{"train": ["case3"], "val": ["case9"], "test": ["case1"]}]))
    assert [c["label"][-12:] for c in nnunet_data.split_cases(folder, "test", split)] == ["case1.nii.gz"]
    with pytest.raises(ValueError, match="no part 'train' in fold 1"):
        nnunet_data.split_cases(folder, "train", split, fold=1)
    split.write_text(json.dumps([{"train": ["gone"], "val": []}]))
    with pytest.raises(ValueError, match=r"names cases that .* does not have: gone"):
        nnunet_data.split_cases(folder, "train", split)
    for text, why in (('{"train": ["case3"]}', r"json is no split: it must be a list"), ("[", r"json is no JSON")):
        split.write_text(text)
        with pytest.raises(ValueError, match=why):
            nnunet_data.split_cases(folder, "train", split)


def test_the_datasets_own_split_is_used(tmp_path):
    folder = dataset(tmp_path / "v1", V1)
    (folder / "splits_final.json").write_text(json.dumps([{"train": ["b"], "val": ["c"]}]))
    split = tmp_path / "mine.json"
    assert [c["label"][-8:] for c in nnunet_data.split_cases(folder, "train", split)] == ["b.nii.gz"]
    assert not split.exists()


def test_missing_dataset_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="--dataset_dir must name an nnU-Net raw dataset"):
        nnunet_data.read_labels(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match="no readable 'labels' entry"):
        nnunet_data.read_labels(tmp_path)


def test_real_datasets_are_read(real_data):
    for folder in sorted(real_data.glob("Dataset9*")):
        values = {v for vs in nnunet_data.read_labels(folder).values() for v in vs}
        import nibabel

        case = next(iter(nnunet_data.all_cases(folder).values()))
        assert set(np.unique(np.asarray(nibabel.load(case["label"]).dataobj)).astype(int)) <= {0, *values}
