"""Where label maps go, that they are whole, and that those of different models, settings or images are not mixed."""

from pathlib import Path

import itk
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage

from tools.bundle_code.label_maps import LabelMaps, Record, SaveImageOrNothingd


def items(*files):
    return [{"image": str(file)} for file in files]


def test_names_of_files_and_of_series_that_are_named_by_identifiers(tmp_path):
    maps = LabelMaps(tmp_path)
    names = {"/d/a.nii.gz": "a", "/d/b.v2.nrrd": "b.v2", "/d/1.2.3.1": "1.2.3.1", "/d/1.2.3.2": "1.2.3.2"}
    found = maps.of_images(items(*names))
    assert [path.name for path in found] == [f"{name}_seg.nii.gz" for name in names.values()]
    assert list(maps.of_images([{"image": ["/d/c_0000.nii.gz", "/d/c_0001.nii.gz"]}])) == [
        tmp_path / "c_0000_seg.nii.gz"
    ]
    with pytest.raises(ValueError, match=r"/d/a\.nii\.gz and /d/a\.mha would both have the label map a_seg\.nii\.gz"):
        maps.of_images(items("/d/a.nii.gz", "/d/a.mha"))


def test_a_label_map_of_two_files_comes_complete(tmp_path):
    """A MetaImage header names the file of its voxels."""
    data = np.arange(60, dtype=np.uint8).reshape(1, 3, 4, 5)
    image = MetaTensor(torch.from_numpy(data), meta={"filename_or_obj": "/d/scan.mha"})
    SaveImageOrNothingd("pred", LabelMaps(tmp_path, "mhd"), output_dtype=np.uint8, resample=False)({"pred": image})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scan_seg.mhd", "scan_seg.raw"]
    assert np.array_equal(itk.array_from_image(itk.imread(str(tmp_path / "scan_seg.mhd"))).T, data[0])


def test_label_maps_are_kept_only_of_the_same_model_settings_and_images(tmp_path):
    model, out = tmp_path / "model.pt", tmp_path / "out"
    model.write_bytes(b"weights")
    maps = LabelMaps(out)

    def check(*files, **settings):
        Record(out, [model], {"overlap": 0.5, **settings}).check(maps.of_images(items(*files)))

    def begin(*files, own=None, overwrite=False, **settings):
        images = maps.of_images(items(*files))
        Record(out, [model], {"overlap": 0.5, **settings}).begin(images, own or images, overwrite)

    check("/d/a.nii")
    begin("/d/a.nii", "/d/b.nii")
    check("/d/a.nii", overlap=0.25)  # nothing was segmented yet
    for name in ("a", "b"):
        (out / f"{name}_seg.nii.gz").touch()
    check("/d/a.nii", "/d/b.nii", "/d/c.nii")
    with pytest.raises(ValueError, match="label maps made with another overlap"):
        check("/d/c.nii", overlap=0.25)
    with pytest.raises(ValueError, match=r"a_seg.nii.gz was made from /d/a.nii, not from /other/a.nii"):
        check("/other/a.nii")
    model.write_bytes(b"other weights")
    with pytest.raises(ValueError, match=r"another model\.pt: take another --output_dir, or make them again"):
        check("/d/a.nii")
    model.write_bytes(b"weights")
    (out / "z_seg.nii.gz").touch()
    with pytest.raises(ValueError, match=r"z_seg.nii.gz is there, but label_maps.json does not say what made it"):
        check("/d/z.nii")

    # other processes' label maps are of the old settings; b is no longer among the images, and nobody knows what made it
    begin("/d/a.nii", "/d/z.nii", own=[out / "z_seg.nii.gz"], overwrite=True, overlap=0.25)
    assert sorted(path.name for path in out.glob("*.nii.gz")) == ["b_seg.nii.gz"]
    with pytest.raises(ValueError, match="does not say what made it"):
        check("/d/b.nii", overlap=0.25)
    (out / "a_seg.nii.gz").touch()
    begin("/d/a.nii", "/d/z.nii", own=[out / "z_seg.nii.gz"], overwrite=True, overlap=0.25)
    assert (out / "a_seg.nii.gz").exists()  # by another process of the same run
    (out / "label_maps.json").write_text("{")
    with pytest.raises(ValueError, match="does not say what made it"):
        check("/d/a.nii", overlap=0.25)


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd"])
def test_an_image_of_one_slice_keeps_its_place(tmp_path, ending):
    affine = np.diag([-2.0, -2.0, 5.0, 1.0])
    affine[:3, 3] = 10, 20, 77
    label = MetaTensor(
        torch.ones(1, 5, 4, 1, dtype=torch.uint8), affine=affine, meta={"filename_or_obj": "slice.nii.gz"}
    )
    SaveImageOrNothingd("pred", LabelMaps(tmp_path, ending))({"pred": label})
    written = LoadImage(ensure_channel_first=True)(tmp_path / f"slice_seg{ending}")
    assert written.shape == (1, 5, 4, 1)
    np.testing.assert_allclose(written.affine, affine, atol=1e-5)


def test_label_maps_among_the_images_are_not_segmented(tmp_path):
    """The output folder is that of the images, and the same command is run again."""
    images = [{"image": str(tmp_path / name)} for name in ("a.nii.gz", "a_seg.nii.gz", "b.nrrd", "b_segment.nrrd")]
    found = LabelMaps(tmp_path).of_images(images)
    assert [Path(item["image"]).name for item in found.values()] == ["a.nii.gz", "b.nrrd", "b_segment.nrrd"]
    assert len(LabelMaps(tmp_path / "elsewhere").of_images(images)) == 4
