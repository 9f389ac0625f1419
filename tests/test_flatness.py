"""The command on a tiny labelled dataset: what it writes, that it comes out the same again, and what it refuses."""

import json
import shutil

import nibabel
import numpy as np
import pytest
import torch

from tests.conftest import ROOT, here
from tools.bundle import Bundle
from tools.bundle_code.residual_unet import ResidualUNet3D
from tools.flatness import loss_definition
from tools.instantiate import copy_template, set_labels

QUICK = {"--scans": 2, "--patches": 1, "--patch_size": 8, "--points": 3, "--noise": "0.01,0.1", "--seeds": 2}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two scans of 20³ voxels with two organs."""
    folder = tmp_path_factory.mktemp("data") / "Dataset001_Two"
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    content = {
        "labels": {"background": 0, "liver": 1, "spleen": 4},
        "channel_names": {"0": "CT"},
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    random = np.random.default_rng(0)
    for case in ("one", "two"):
        label = np.zeros((20, 20, 20), np.uint8)
        label[4:9, 5:12, 6:14], label[12:17, 10:15, 4:9] = 1, 4
        image = (40.0 * label + random.normal(0, 20, label.shape)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), folder / "imagesTr" / f"{case}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), folder / "labelsTr" / f"{case}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """A starting point of two organs, the same with other weights, and two specialists; networks of 4 channels."""
    root = tmp_path_factory.mktemp("bundles")
    for seed, (name, labels) in enumerate(
        {"start": ["liver", "spleen"], "again": ["liver", "spleen"], "liver": ["liver"], "spleen": ["spleen"]}.items()
    ):
        copy_template(ROOT / "bundles" / "merged_inference", root / name)
        set_labels(root / name, {label: [label] for label in labels})
        path = root / name / "configs" / "inference.json"
        path.write_text(path.read_text().replace('"width": 64', '"width": 4'))
        torch.manual_seed(seed)
        torch.save(ResidualUNet3D(1, 1 + len(labels), width=4).state_dict(), root / name / "models" / "model.pt")
    return root


def flatness(dataset, output, *words):
    given = [word for flag, value in QUICK.items() if flag not in words for word in (flag, value)]
    return here("tools", "flatness", "--dataset_dir", dataset, "--part", "all", "--output", output, *given, *words)


def test_everything_is_written_and_comes_out_the_same_again(bundles, dataset, tmp_path):
    start, again, liver, spleen = (bundles / name for name in ("start", "again", "liver", "spleen"))
    words = ["--between", f"{start},{again}", "--plane", f"{start},{liver},{spleen}"]
    run = flatness(dataset, tmp_path / "first", "--bundle", f"{start},{again}", *words)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "first" / "flatness.json").read_text())
    assert flatness(dataset, tmp_path / "second", "--bundle", start).returncode == 0
    second = json.loads((tmp_path / "second" / "flatness.json").read_text())
    assert second["bundles"] == {"start": result["bundles"]["start"]}
    assert second["line"] is second["plane"] is None
    measured = result["bundles"]["start"]
    assert [entry["relative"] for entry in measured["noise"]] == [0.01, 0.1]
    assert measured["noise"][1]["std"] > measured["noise"][0]["std"] > 0
    assert measured["loss"] == pytest.approx(measured["noise"][0]["mean"], rel=0.05)
    for measure in ("fisher_trace", "empirical_fisher_trace", "hessian_top", "hessian_top_relative"):
        assert 0 < measured[measure] != result["bundles"]["again"][measure]
    line, plane = result["line"], result["plane"]
    assert (line["from"], line["to"], line["t"]) == ("start", "again", [0, 0.5, 1])
    ends = [result["bundles"][name]["loss"] for name in ("start", "again")]  # same labels: heads are moved too
    assert [line["loss"][0], line["loss"][-1]] == pytest.approx(ends)
    assert line["barrier"] >= 0
    assert np.shape(plane["loss"]) == (3, 3) and plane["points"]["start"] == [0, 0]
    assert list(plane["points"]) == ["start", "liver", "spleen", "average"]
    assert sorted(p.name for p in (tmp_path / "first").glob("*")) == [
        "flatness.json", "flatness.md", "flatness.png", "line.png", "plane.png",
    ]  # fmt: skip
    assert "| | start | again |" in (tmp_path / "first" / "flatness.md").read_text()


def test_the_loss_of_every_template_is_plain_and_can_be_made():
    """STU-Net's is one inside another."""
    from monai.bundle import ConfigParser

    for template in ("pretrain_amos", "pretrain_stunet", "taskvector_template"):
        bundle = Bundle(ROOT / "bundles" / template)
        definition = json.loads(json.dumps(loss_definition(bundle)))
        with bundle.code():
            loss = ConfigParser({"loss": definition}).get_parsed_content("loss")
            labels = torch.ones(1, 1, 4, 4, 4)
            assert 0 < loss(torch.zeros(1, 3, 4, 4, 4), labels).item() < 10


def test_a_line_between_two_tasks_keeps_both_heads(bundles, dataset, tmp_path):
    run = flatness(dataset, tmp_path / "line", "--between", f"{bundles / 'liver'},{bundles / 'spleen'}")
    assert run.returncode == 0, run.stderr
    line = json.loads((tmp_path / "line" / "flatness.json").read_text())["line"]
    assert line["loss"] == pytest.approx(np.mean([line["losses"]["liver"], line["losses"]["spleen"]], axis=0))
    assert line["losses"]["liver"] != line["losses"]["spleen"]


def test_what_cannot_be_measured_is_said(bundles, dataset, tmp_path):
    def refused(reason, *words, dataset=dataset):
        run = flatness(dataset, tmp_path / "output", *words)
        assert run.returncode == 1
        assert reason in run.stderr
        assert not (tmp_path / "output").exists()

    start, liver = bundles / "start", bundles / "liver"
    refused("name bundles to measure")
    refused("--between takes 2 different bundles", "--between", f"{start},{start}")
    refused("--points 1: it must be 2 or more", "--bundle", start, "--points", 1)
    refused("--noise inf: it must be numbers", "--bundle", start, "--noise", "inf")
    refused("--patch_size -8: it must be 0 or more", "--bundle", start, "--patch_size", -8)
    refused("not found", "--bundle", start, dataset=tmp_path)
    wide, broken, foreign = (tmp_path / name for name in ("wide", "broken", "foreign"))
    for folder in (wide, broken, foreign):
        shutil.copytree(liver, folder)
    torch.save(ResidualUNet3D(1, 2, width=8).state_dict(), wide / "models" / "model.pt")
    refused("are different networks (tensor decoders.0.basic_module.conv1.bias)", "--between", f"{liver},{wide}")
    state = torch.load(broken / "models" / "model.pt", weights_only=True)
    state["encoders.0.basic_module.conv1.bias"][0] = float("nan")
    torch.save(state, broken / "models" / "model.pt")
    refused("NaN or infinite", "--bundle", broken)
    set_labels(foreign, {"pancreas": ["pancreas"]})
    refused("no label for 'pancreas'", "--bundle", foreign)
    unlabelled = tmp_path / "unlabelled"
    shutil.copytree(dataset, unlabelled)
    shutil.rmtree(unlabelled / "labelsTr")
    refused("no labelled case", "--bundle", start, dataset=unlabelled)
