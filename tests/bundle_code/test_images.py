"""What counts as an image in a folder, and how images are resampled."""

import monai.transforms
import nibabel
import numpy as np
import pytest
from monai.transforms import Compose, EnsureChannelFirstd, Invertd, LoadImaged

from tools.bundle_code.images import LoadImageOrSeriesd, ReadableImages, Spacingd, image_series, list_images, reason


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def names(images):
    return [i["image"].rsplit("/", 1)[1] if isinstance(i["image"], str) else len(i["image"]) for i in images]


def test_files_of_every_format_and_nothing_else(tmp_path):
    folder = touch(tmp_path, "b.nii.gz", "a.nrrd", "c.mha", "notes.txt", "._b.nii.gz", "d.nii")
    (folder / "empty").mkdir()
    touch(folder, "scout.dcm")  # a DICOM file among images makes no series of the folder
    assert names(list_images(folder)) == ["a.nrrd", "b.nii.gz", "c.mha", "d.nii"]
    assert names(list_images(folder / "c.mha")) == ["c.mha"]


def test_an_nnunet_dataset_gives_its_test_images(tmp_path):
    touch(tmp_path, "dataset.json")
    touch(tmp_path / "imagesTr", "a_0000.nii.gz")
    assert names(list_images(tmp_path)) == ["a_0000.nii.gz"]
    touch(tmp_path / "imagesTs", "b_0000.nii.gz")
    assert names(list_images(tmp_path)) == ["b_0000.nii.gz"]


def test_channels_are_grouped_by_case(tmp_path):
    touch(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz")
    assert names(list_images(tmp_path, channels=2)) == [2, 2]
    touch(tmp_path, "both.nii.gz")  # which has its channels in itself, or is said not to
    assert names(list_images(tmp_path, channels=2)) == ["both.nii.gz", 2, 2]
    (tmp_path / "b_0001.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"case b has channels \[0\], the network needs 0 to 1"):
        list_images(tmp_path, channels=2)


def test_a_series_is_known_whatever_else_its_folder_has(tmp_path):
    series = touch(tmp_path / "ct", ".DS_Store", "AAA", "DICOMDIR", "README")
    (series / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    with pytest.raises(FileNotFoundError, match="no image in"):
        list_images(tmp_path)
    (series / "slice").write_bytes(bytes(128) + b"DICM")
    assert list_images(tmp_path) == list_images(series) == [{"image": str(series)}]


def test_the_reason_is_what_itk_says_and_not_where():
    told = "\n/work/ITK/Modules/IO/itkMetaImageIO.cxx:490:\nITK ERROR: file cannot be read"
    assert reason(RuntimeError(told)) == "RuntimeError: ITK ERROR: file cannot be read"


def test_empty_and_missing_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no image in"):
        list_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="not found: --dataset_dir must name"):
        list_images(tmp_path / "x")


def test_a_dicom_segmentation_beside_the_slices_is_passed_over(real_data):
    folder = real_data / "readers" / "dicom_ct_3slice"
    assert [path.rsplit("/", 1)[1] for path in image_series(folder)] in (
        ["01.dcm", "02.dcm", "03.dcm"],
        ["03.dcm", "02.dcm", "01.dcm"],
    )
    assert list_images(folder) == [{"image": str(folder)}]


def saved(path, array):
    nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), np.eye(4)), path)
    return {"image": str(path)}


def test_voxels_that_are_no_numbers_are_read_as_zero_and_named(tmp_path, caplog):
    array = np.ones((4, 5, 6))
    array[1, 2, 3], array[0, 0, 0] = np.nan, np.inf
    image = LoadImageOrSeriesd("image")(saved(tmp_path / "gap.nii.gz", array))["image"]
    assert image[1, 2, 3] == image[0, 0, 0] == 0 and image.sum() == 118
    assert "gap.nii.gz: 2 voxels are NaN or infinite" in caplog.text


def test_images_that_cannot_be_read_are_left_out_and_named(tmp_path, caplog):
    load = Compose([LoadImageOrSeriesd("image"), EnsureChannelFirstd("image")])
    good = [saved(tmp_path / f"{i}.nii.gz", np.full((4, 5, 6), i)) for i in range(3)]
    broken = saved(tmp_path / "broken.nii.gz", np.zeros((40, 50, 60)))
    whole = (tmp_path / "broken.nii.gz").read_bytes()
    (tmp_path / "broken.nii.gz").write_bytes(whole[: len(whole) // 2])
    data = ReadableImages([good[0], broken, *good[1:]] * 2, transform=load, progress=False)
    assert [int(item["image"].max()) for item in data] == [0, 1, 2] * 2
    assert caplog.text.count("broken.nii.gz cannot be read and is left out") == 1
    with pytest.raises(ValueError, match=r"none of the images of this part can be read \(.*broken"):
        ReadableImages([broken], transform=load, progress=False)
    two = saved(tmp_path / "two.nii.gz", np.zeros((4, 5, 6, 2)))
    with pytest.raises(ValueError, match=r"two\.nii\.gz has 2 channels, the network takes 1"):
        ReadableImages([good[0], two], transform=load, progress=False)


def test_resampling_leaves_other_entries_about_the_image_alone(tmp_path):
    """MONAI Label adds the path; MONAI 1.6's own transform takes it for metadata."""
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    voxels = np.random.default_rng(0).normal(size=(12, 10, 8)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / "ct.nii.gz")
    item = {"image": str(tmp_path / "ct.nii.gz")}
    steps = [LoadImaged("image"), EnsureChannelFirstd("image")]
    theirs = Compose([*steps, monai.transforms.Spacingd("image", [3.0, 3.0, 3.0])])(item)
    ours = Compose([*steps, Spacingd("image", [3.0, 3.0, 3.0])])
    result = ours({**item, "image_path": "ct.nii.gz", "image_number": 7})
    assert (result["image_path"], result["image_number"]) == ("ct.nii.gz", 7)
    assert np.array_equal(result["image"], theirs["image"])
    result["pred"] = result["image"]
    assert Invertd("pred", ours, "image")(result)["pred"].shape == (1, 12, 10, 8)
