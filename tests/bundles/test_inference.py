"""The merged bundle as clinicians' software runs it: any format, any orientation, copied alone, strict about weights."""

import fcntl
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios

import nibabel
import numpy as np
import pytest
import torch

from tests.conftest import ROOT, run
from tools.bundle import Bundle, read_json, write_json


def infer(bundle, images, output, *extra, check=True):
    words = ["--config_file", bundle / "configs" / "inference.json", "--bundle_root", bundle, "--dataset_dir", images]
    return run("monai.bundle", "run", *words, "--output_dir", output, *extra, check=check, PYTHONPATH="")


@pytest.fixture(scope="module")
def alone(chain, tmp_path_factory):
    """The merged bundle, copied alone to an empty folder."""
    folder = tmp_path_factory.mktemp("empty") / "merged"
    shutil.copytree(chain.merged, folder)
    return folder


@pytest.fixture(scope="module")
def ras(chain):
    return nibabel.load(chain.dataset / "imagesTr" / "phantom_000_0000.nii.gz")


def test_orientations_and_formats_give_the_same_label_map_in_their_own_geometry(alone, ras, tmp_path):
    import itk

    images = tmp_path / "images"
    images.mkdir()
    data = np.asarray(ras.dataobj)
    nibabel.save(ras, images / "ras.nii.gz")
    for name, codes in (("lps", "LPS"), ("psr", "PSR")):
        turn = nibabel.orientations.ornt_transform(
            nibabel.io_orientation(ras.affine), nibabel.orientations.axcodes2ornt(codes)
        )
        nibabel.save(ras.as_reoriented(turn), images / f"{name}.nii.gz")
    volume = itk.image_from_array(np.ascontiguousarray(data.T))
    volume.SetSpacing([8.0, 8.0, 4.0])
    volume.SetDirection(np.diag([-1.0, -1.0, 1.0]))  # RAS voxels in ITK's LPS world
    volume.SetOrigin((ras.affine[:3, 3] * [-1, -1, 1]).tolist())
    itk.imwrite(volume, str(images / "mha.mha"))
    itk.imwrite(volume, str(images / "nrrd.nrrd"))
    series = images / "dicom"
    series.mkdir()
    _write_dicom(itk, volume, series)

    infer(alone, images, tmp_path / "out")
    found = {p.name.split("_seg")[0]: nibabel.load(p) for p in (tmp_path / "out").glob("*.nii.gz")}
    assert sorted(found) == ["dicom", "lps", "mha", "nrrd", "psr", "ras"]
    reference = np.asarray(found["ras"].dataobj)
    assert found["ras"].get_data_dtype() == np.uint8
    assert {1, 2} >= set(np.unique(reference)) - {0} != set()
    for name, label_map in found.items():
        if name in ("lps", "psr"):
            original = nibabel.load(images / f"{name}.nii.gz")
            assert label_map.shape == original.shape
            np.testing.assert_allclose(label_map.affine, original.affine, atol=1e-4)
        upright = nibabel.as_closest_canonical(label_map)
        np.testing.assert_allclose(upright.affine, ras.affine, atol=1e-3)
        assert np.mean(np.asarray(upright.dataobj) == reference) > 0.999, name


def _write_dicom(itk, volume, folder):
    """A CT series with one file per slice."""
    reader = itk.GDCMImageIO.New()
    reader.KeepOriginalUIDOn()
    slices = volume.GetLargestPossibleRegion().GetSize()[2]
    array, origin = itk.array_from_image(volume), np.array(volume.GetOrigin())
    for i in range(slices):
        flat = itk.image_from_array(np.ascontiguousarray(array[i : i + 1]).astype(np.int16))
        flat.SetSpacing(volume.GetSpacing())
        flat.SetDirection(volume.GetDirection())
        flat.SetOrigin(np.add(origin, [0, 0, 4.0 * i]).tolist())
        tags = flat.GetMetaDataDictionary()
        for key, value in {
            "0008|0060": "CT", "0008|0016": "1.2.840.10008.5.1.4.1.1.2", "0020|000d": "1.2.3.1", "0020|000e": "1.2.3.2",
            "0020|0052": "1.2.3.3", "0008|0018": f"1.2.3.4.{i}", "0020|0013": str(i), "0028|1052": "0", "0028|1053": "1",
        }.items():  # fmt: skip
            tags[key] = value
        writer = itk.ImageFileWriter.New(flat, FileName=str(folder / f"{i:03d}.dcm"))
        writer.SetImageIO(reader)
        writer.UseInputMetaDataDictionaryOff()
        reader.SetMetaDataDictionary(tags)
        writer.Update()


def test_the_shipped_copy_says_that_it_has_no_weights(tmp_path, chain):
    result = infer(ROOT / "bundles" / "merged_inference", chain.dataset, tmp_path / "out", check=False)
    assert result.returncode != 0
    assert "has no weights" in result.stderr
    assert "python -m tools merge" in result.stderr
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_missing_images_are_named(alone, tmp_path):
    for folder, message in ((tmp_path / "nowhere", "not found"), (tmp_path, "no image in")):
        result = infer(alone, folder, tmp_path / "out", check=False)
        assert result.returncode != 0
        assert message in result.stderr


def test_bfloat16_and_float32_agree(alone, chain, tmp_path):
    image = chain.dataset / "imagesTr" / "phantom_001_0000.nii.gz"
    maps = []
    for precision in ("bfloat16", "float32"):
        infer(alone, image, tmp_path / precision, "--precision", precision)
        maps.append(np.asarray(nibabel.load(next((tmp_path / precision).glob("*.nii.gz"))).dataobj))
    assert np.mean(maps[0] == maps[1]) > 0.995


def test_label_map_is_the_plain_argmax_of_sliding_window_logits(alone, chain, tmp_path):
    """Against MONAI's own inferer and a hand-written rule: largest positive margin, else background."""
    import torch
    from monai.inferers import SlidingWindowInferer
    from monai.transforms import ScaleIntensityRangePercentiles

    from tools.bundle import Bundle

    path = chain.dataset / "imagesTr" / "phantom_002_0000.nii.gz"
    infer(alone, path, tmp_path / "out", "--precision", "float32")
    ours = np.asarray(nibabel.load(next((tmp_path / "out").glob("*.nii.gz"))).dataobj)
    image = torch.from_numpy(nibabel.load(path).get_fdata(dtype=np.float32))[None]
    image = ScaleIntensityRangePercentiles(0.5, 99.5, 0, 1, clip=True)(image)
    bundle = Bundle(alone)
    with bundle.code(), torch.inference_mode():
        network = bundle.parser().get_parsed_content("network_def")
        network.load_state_dict(bundle.state())
        window = bundle.resolved("patch_size")
        logits = SlidingWindowInferer(window, 4, overlap=0.5, mode="gaussian")(image[None], network.eval())[0, 1:]
    best, organ = logits.max(0)
    rule = torch.where(best > 0, organ + 1, 0).numpy()
    assert np.mean(ours == rule) > 0.9999


def test_outputs_of_a_bundle_that_resamples_its_images(alone, ras, tmp_path):
    """Labels and logits give one label map, on the image's own grid; smooth labels one with fewer steps at its surface."""
    copy = tmp_path / "copy"
    shutil.copytree(alone, copy)
    config = read_json(copy / "configs" / "inference.json")
    spacing = {"_target_": "Spacingd", "keys": "image", "pixdim": [12.0, 12.0, 9.0], "mode": "bilinear"}
    config["preprocessing"]["transforms"].insert(3, spacing)
    write_json(copy / "configs" / "inference.json", config)
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(ras.affine), nibabel.orientations.axcodes2ornt("PSL")
    )
    image = ras.as_reoriented(turn)
    nibabel.save(image, tmp_path / "psl.nii.gz")
    maps = {}
    for output in ("labels", "logits", "smooth_labels"):
        infer(copy, tmp_path / "psl.nii.gz", tmp_path / output, "--inferer_output", output)
        file = nibabel.load(tmp_path / output / "psl_seg.nii.gz")
        assert file.get_data_dtype() == np.uint8
        np.testing.assert_allclose(file.affine, image.affine, atol=1e-4)
        maps[output] = np.asarray(file.dataobj)
    assert np.array_equal(maps["labels"], maps["logits"])
    assert maps["labels"].any()
    assert maps["smooth_labels"].shape == image.shape
    assert 0.9 < np.mean(maps["smooth_labels"] == maps["labels"]) < 1
    steps = {name: sum(np.abs(np.diff(m > 0, axis=axis)).sum() for axis in range(3)) for name, m in maps.items()}
    assert steps["smooth_labels"] < steps["labels"]


def test_overlays_that_compile_the_network_give_the_same_label_map(alone, chain, tmp_path):
    """On a CPU: torch.compile without its slow code generator, and MONAI's TensorRT, which does nothing without a GPU."""
    image = chain.dataset / "imagesTr" / "phantom_001_0000.nii.gz"
    maps = {}
    for overlay, extra in (
        (None, []),
        ("inference_compile", ["--compile_backend", "aot_eager"]),
        ("inference_trt", []),
    ):
        files = [str(alone / "configs" / f"{name}.json") for name in ("inference", overlay) if name]
        words = ["--config_file", str(files), "--bundle_root", alone, "--dataset_dir", image, "--precision", "float32"]
        result = run("monai.bundle", "run", *words, "--output_dir", tmp_path / str(overlay), *extra, PYTHONPATH="")
        maps[overlay] = np.asarray(nibabel.load(next((tmp_path / str(overlay)).glob("*.nii.gz"))).dataobj)
        assert ("trt_compile() has no effect" in result.stdout + result.stderr) == (overlay == "inference_trt")
    assert maps[None].any()
    assert np.array_equal(maps[None], maps["inference_trt"])
    assert np.mean(maps[None] == maps["inference_compile"]) > 0.9999


def test_export_of_a_merged_bundle(alone, tmp_path):
    import onnxruntime

    words = [
        "--net_id",
        "network_def",
        "--meta_file",
        "configs/metadata.json",
        "--config_file",
        "configs/inference.json",
    ]
    run("monai.bundle", "verify_net_in_out", *words, cwd=alone, PYTHONPATH="")
    words += ["--ckpt_file", "models/model.pt", "--input_shape", "[1, 1, 32, 32, 32]"]
    for command, file in (("ckpt_export", "model.ts"), ("onnx_export", "model.onnx")):
        run("monai.bundle", command, *words, "--filepath", tmp_path / file, cwd=alone, PYTHONPATH="")
    image = torch.rand(1, 1, 32, 32, 32)
    with torch.inference_mode():
        expected = Bundle(alone).network().cpu()(image)
        torch.testing.assert_close(torch.jit.load(tmp_path / "model.ts")(image), expected)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_real_files_of_other_formats(alone, real_data, tmp_path):
    """A DICOM series beside a DICOM segmentation, NRRD and MetaImage from real scanners."""
    import itk

    few_windows = ("--patch_size", "[64, 64, 8]", "--overlap", 0)
    for folder in ("dicom_ct_3slice", "mha_ct_lung"):
        infer(alone, real_data / "readers" / folder, tmp_path / folder, *few_windows)
    dicom = nibabel.load(next((tmp_path / "dicom_ct_3slice").glob("*.nii.gz")))
    assert dicom.shape == (512, 512, 3)
    assert len(list((tmp_path / "dicom_ct_3slice").glob("*.nii.gz"))) == 1
    source = itk.imread(str(next((real_data / "readers" / "mha_ct_lung").iterdir())))
    assert nibabel.load(next((tmp_path / "mha_ct_lung").glob("*.nii.gz"))).shape == tuple(itk.size(source))
    infer(alone, real_data / "readers" / "nrrd_mr_breast" / "breast1_image.nrrd", tmp_path / "nrrd", *few_windows)
    source = itk.imread(str(real_data / "readers" / "nrrd_mr_breast" / "breast1_image.nrrd"))
    assert nibabel.load(next((tmp_path / "nrrd").glob("*.nii.gz"))).shape == tuple(itk.size(source))


def test_a_progress_bar_on_a_terminal(alone, chain, tmp_path):
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # rows, columns
    words = ["--config_file", alone / "configs" / "inference.json", "--bundle_root", alone]
    words += ["--dataset_dir", chain.dataset, "--output_dir", tmp_path / "out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "monai.bundle", "run", *map(str, words)],
        cwd="/",
        stdout=subprocess.DEVNULL,
        stderr=writer,
    )
    os.close(writer)
    shown = b""
    try:
        while chunk := os.read(reader, 65536):
            shown += chunk
    except OSError:  # the terminal is gone when the process ends
        pass
    assert process.wait() == 0, shown[-2000:]
    assert b"[4/4] 100%" in shown
    assert len(list((tmp_path / "out").glob("*_seg.nii.gz"))) == 4
