"""Pseudo-labels: the specialists' own masks, in a dataset that trains, from images of any kind; a stopped run goes on."""

import json
import shlex
import shutil

import itk
import nibabel
import numpy as np
import pytest
import torch

from tests.conftest import here, run, train
from tools import pseudo_labels as module
from tools.bundle import Bundle
from tools.pseudo_labels import pseudo_labels
from tools.specialists import rebuild


def made(chain, output, *more, images=None, check=True):
    vectors = ",".join(map(str, chain.vectors.values()))
    words = ["--pretrained", chain.pretrain, "--vectors", vectors, "--images", images or chain.dataset]
    result = here("tools", "pseudo_labels", *words, "--output", output, *more)
    assert not check or result.returncode == 0, result.stderr
    return result


def voxels(path):
    return np.asarray(nibabel.load(path).dataobj)


@pytest.fixture(scope="module")
def dataset(chain, tmp_path_factory):
    output = tmp_path_factory.mktemp("pseudo") / "Dataset100 Pseudo"
    return output, made(chain, output).stdout


def test_the_label_maps_are_those_of_the_specialists(chain, dataset, tmp_path):
    """Where only one claims a voxel it has it, and where both do one of them has it; as MONAI runs the bundles."""
    claims = []
    for folder in chain.specialists.values():
        words = ["--config_file", folder / "configs/inference.json", "--bundle_root", folder]
        images = ["--dataset_dir", chain.dataset / "imagesTr", "--output_dir", tmp_path / folder.name]
        run("monai.bundle", "run", *words, *images, PYTHONPATH="")
        claims.append(tmp_path / folder.name)
    seen = set()
    for label_map in (dataset[0] / "labelsTr").iterdir():
        liver, spleen = (voxels(folder / label_map.name.replace(".nii", "_0000_seg.nii")) > 0 for folder in claims)
        found = voxels(label_map)
        assert ((found > 0) == (liver | spleen)).all()
        assert (found[liver & ~spleen] == 1).all() and (found[spleen & ~liver] == 2).all()
        seen |= set(np.unique(found))
    assert len(list((dataset[0] / "labelsTr").iterdir())) == 4 and seen > {0}


def test_the_larger_margin_has_the_voxel(chain):
    image = torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        stacked = rebuild(str(chain.pretrain), [str(path) for path in chain.vectors.values()])(image)
        for channel, folder in enumerate(chain.specialists.values(), start=1):
            own = Bundle(folder).network()(image)
            torch.testing.assert_close(stacked[:, channel], own[:, 1] - own[:, 0], rtol=1e-4, atol=1e-4)
    assert stacked.shape == (1, 3, 16, 16, 16) and not stacked[:, 0].any()


def test_a_student_learns_from_them_and_is_scored_on_the_true_labels(chain, dataset, tmp_path):
    said = json.loads((dataset[0] / "dataset.json").read_text())
    assert said["labels"] == {"background": 0, "liver": 1, "spleen": 2} and said["numTraining"] == 4
    assert [entry["task"] for entry in said["specialists"]] == ["liver", "spleen"]
    command = next(line for line in dataset[1].splitlines() if line.startswith("python -m tools new_task"))
    student = tmp_path / "student"
    words = shlex.split(command.replace("<bundle>", str(student)))[2:]
    run(*words, "--overlay", "small")
    train(student, "--max_epochs", 1, "--frozen_epochs", 0, "--patches_per_volume", 2)
    result = here(
        "tools", "evaluate", "--bundle", student, "--dataset_dir", chain.dataset, "--output", tmp_path / "scores"
    )
    assert result.returncode == 0 and "| student |" in result.stdout
    assert Bundle(student).metadata["lineage"]["data"]["dataset"].endswith("with pseudo-labels")


def test_a_label_stands_for_those_of_the_dataset_that_its_specialist_learned(chain, dataset, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(dataset[0], copy, symlinks=True)
    said = json.loads((copy / "dataset.json").read_text())
    assert said["label_map"] == {"liver": ["liver"], "spleen": ["spleen"]}
    said["label_map"]["liver"] = ["left lobe", "right lobe"]
    (copy / "dataset.json").write_text(json.dumps(said))
    words = ["--pretrained", chain.pretrain, "--dataset_dir", copy, "--output", tmp_path / "m"]
    assert here("tools", "new_task", *words, "--task", "liver").returncode == 0
    assert Bundle(tmp_path / "m").label_map == {"liver": ["left lobe", "right lobe"]}
    assert json.loads((tmp_path / "m/configs/train.json").read_text())["labels"] == {"liver": ["liver"]}


def test_other_formats_are_converted_and_damaged_images_left_out(chain, dataset, tmp_path):
    first, second, third = sorted((chain.dataset / "imagesTr").iterdir())[:3]
    images = tmp_path / "images"
    images.mkdir()
    itk.imwrite(itk.imread(str(first)), str(images / "a.mha"))
    shutil.copyfile(second, images / "b.nii.gz")
    (images / "c.nii.gz").write_bytes(third.read_bytes()[:2000])
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8, 8, 2), np.float32), np.eye(4)), images / "d.nii.gz")
    result = made(chain, tmp_path / "D", images=images)
    assert "c.nii.gz cannot be read (Compressed file ended" in result.stdout + result.stderr
    assert "d.nii.gz has 2 channels, the network takes 1; it is left out" in result.stdout + result.stderr
    own, pseudo = dataset[0] / "labelsTr", tmp_path / "D" / "labelsTr"
    for name, source in (("a", first), ("b", second)):
        expected = nibabel.load(own / source.name.replace("_0000", ""))
        found = nibabel.load(pseudo / f"{name}.nii.gz")
        np.testing.assert_array_equal(found.dataobj, expected.dataobj)
        image = nibabel.load(tmp_path / "D" / "imagesTr" / f"{name}_0000.nii.gz")
        np.testing.assert_allclose(image.affine, nibabel.load(source).affine, atol=1e-4)
        np.testing.assert_allclose(image.get_fdata(), nibabel.load(source).get_fdata(), atol=1e-3)
    assert (tmp_path / "D/imagesTr/b_0000.nii.gz").is_symlink()
    assert {path.name for path in (tmp_path / "D/overlays").iterdir()} == {"a.png", "b.png"}


def test_a_stopped_run_goes_on(chain, dataset, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_put_images", interrupted)
        assert made(chain, tmp_path / "D", "--overlays", False, check=False).returncode == 130
    assert not (tmp_path / "D").exists()
    (kept,) = (tmp_path / "D.partial").iterdir()
    times = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    assert len(times) == 4
    (kept / sorted(times)[0]).unlink()
    segmented = []
    real = module.Segmenter.load
    monkeypatch.setattr(module.Segmenter, "load", lambda self, image: segmented.append(image) or real(self, image))
    made(chain, tmp_path / "D", "--overlays", False)
    assert len(segmented) == 1
    for label_map in (dataset[0] / "labelsTr").iterdir():
        np.testing.assert_array_equal(voxels(tmp_path / "D" / "labelsTr" / label_map.name), voxels(label_map))
    assert not (tmp_path / "D.partial").exists()


def test_what_it_cannot_use_is_refused(chain, tmp_path):
    liver = chain.vectors["liver"]
    options = {"pretrained": str(chain.pretrain), "images": str(chain.dataset), "output": str(tmp_path / "D")}
    for vectors, message in (
        ("", "no task vectors"),
        (f"{liver},{liver}", "liver"),
        (str(chain.merged / "models/model.pt"), "not a task vector"),
    ):
        with pytest.raises(module.UserError, match=message):
            pseudo_labels(vectors=vectors, **options)
    with pytest.raises(module.UserError, match="another starting point"):
        pseudo_labels(vectors=str(liver), **{**options, "pretrained": str(chain.specialists["spleen"])})
    (tmp_path / "empty").mkdir()
    with pytest.raises(module.UserError, match="no image"):
        pseudo_labels(vectors=str(liver), **{**options, "images": str(tmp_path / "empty")})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(module.UserError, match="not overwritten"):
        pseudo_labels(vectors=str(liver), **{**options, "output": str(tmp_path / "mine")}, overwrite=True)
    with pytest.raises(module.UserError, match="holds the images"):
        pseudo_labels(vectors=str(liver), **{**options, "output": str(chain.dataset)}, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "mine"}
