"""The merged bundle in MONAI Deploy App SDK: DICOM in, DICOM SEG out, equal to MONAI's own run, each organ by its name."""

import shutil
import subprocess

import nibabel
import numpy as np
import pytest
import torch

from tests.conftest import ROOT, run
from tools.bundle_code.images import LoadImageOrSeriesd
from tools.bundle_code.residual_unet import ResidualUNet3D
from tools.instantiate import set_labels

PYTHON = ROOT / ".venv-deploy" / "bin" / "python"
pytestmark = pytest.mark.skipif(
    not (ROOT / ".venv-deploy" / "ready").is_file(), reason="MONAI Deploy is not installed: make .venv-deploy/ready"
)
NAMES = ["liver", "spleen", "left kidney"]  # the spleen is never found
READ = """
import sys, highdicom, numpy
from pydicom import dcmread
segmentation = highdicom.seg.segread(sys.argv[1])
slices = [dcmread(path, stop_before_pixels=True).SOPInstanceUID for path in sys.argv[3:]]
voxels = segmentation.get_pixels_by_source_instance(slices, combine_segments=True, assert_missing_frames_are_empty=True)
names = {segment.SegmentNumber: segment.SegmentLabel for segment in segmentation.SegmentSequence}
numpy.savez(sys.argv[2], voxels=voxels.T, **{str(number): name for number, name in names.items()})
"""

OTHERS = """
import sys
from pydicom import dcmread
from pydicom.uid import generate_uid
for name, modality in (("00scout", "CT"), ("01structures", "RTSTRUCT")):  # series that come before the images
    data = dcmread(f"{sys.argv[1]}/000.dcm")
    data.SeriesInstanceUID, data.SOPInstanceUID, data.Modality = generate_uid(), generate_uid(), modality
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    data.save_as(f"{sys.argv[1]}/{name}.dcm", enforce_file_format=True)
"""


def by_deploy(*words, check=True):
    result = subprocess.run([PYTHON, *map(str, words)], capture_output=True, text=True, timeout=300)
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def study(phantom_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "ct"
    by_deploy(ROOT / "tests" / "dicom_ct.py", phantom_dataset / "imagesTr" / "phantom_000_0000.nii.gz", folder)
    by_deploy("-c", OTHERS, folder)
    return folder


@pytest.fixture(scope="module")
def three_organs(untrained, tmp_path_factory):
    bundle = tmp_path_factory.mktemp("deploy") / "three_organs"
    shutil.copytree(untrained, bundle)
    set_labels(bundle, {name: [number] for number, name in enumerate(NAMES, start=1)})
    torch.manual_seed(0)
    state = ResidualUNet3D(1, 4, width=8).state_dict()
    state["head.bias"][2] = -1e4
    torch.save(state, bundle / "models" / "model.pt")
    return bundle


def app(study, bundle, output, check=True):
    words = ["--images", study, "--bundle", bundle, "--output", output]
    return by_deploy(ROOT / "apps" / "deploy" / "app.py", *words, check=check)


def test_a_dicom_study_is_segmented_as_by_monai_and_names_stay_with_their_organs(study, three_organs, tmp_path):
    words = ["--config_file", three_organs / "configs" / "inference.json", "--bundle_root", three_organs]
    run("monai.bundle", "run", *words, "--dataset_dir", study, "--output_dir", tmp_path / "monai", PYTHONPATH="")
    expected = np.asarray(nibabel.load(next((tmp_path / "monai").glob("*.nii.gz"))).dataobj)
    assert set(np.unique(expected)) == {0, 1, 3}

    printed = app(study, three_organs, tmp_path / "seg").stdout
    (segmentation,) = (tmp_path / "seg").iterdir()
    assert f"written: {segmentation}" in printed
    by_deploy("-c", READ, segmentation, tmp_path / "seg.npz", *sorted(study.glob("???.dcm")))
    found = np.load(tmp_path / "seg.npz")
    assert [str(found[str(number)]) for number in (1, 2, 3)] == NAMES
    np.testing.assert_array_equal(found["voxels"], expected)


def test_weights_of_another_network_are_refused(study, three_organs, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(three_organs, broken)
    state = torch.load(broken / "models" / "model.pt", weights_only=True)
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, broken / "models" / "model.pt")
    result = app(study, broken, tmp_path / "seg", check=False)
    assert result.returncode == 1 and "Missing key(s)" in result.stderr
    assert not list((tmp_path / "seg").glob("*"))
    (broken / "models" / "model.pt").unlink()
    result = app(study, broken, tmp_path / "seg", check=False)
    assert result.returncode == 1 and "model.pt not found" in result.stderr


def test_a_series_that_lacks_slices_is_not_read_as_if_it_were_whole(study, tmp_path):
    shutil.copytree(study, tmp_path / "ct")
    (tmp_path / "ct" / "003.dcm").unlink()
    (tmp_path / "ct" / "004.dcm").unlink()
    assert LoadImageOrSeriesd("image")({"image": str(study)})["image"].dim() == 3
    with pytest.raises(ValueError, match="its slices are not evenly spaced"):
        LoadImageOrSeriesd("image")({"image": str(tmp_path / "ct")})
