"""evaluate: Dice by its definition, at the image's own grid, matched by label names."""

import csv
import json
import os
import shutil
from dataclasses import replace

import nibabel
import numpy as np
import pytest

from tests.conftest import ROOT, here, run
from tests.gains import make_plane
from tests.test_merge import refused
from tools.bundle import Bundle, read_json, write_json
from tools.errors import UserError
from tools.evaluate import evaluate, find_cases, found_channels, reference_bundles, segment
from tools.scores import read_scores, write_scores
from tools.unfinished import kept_file


@pytest.fixture(scope="module")
def evaluation(chain, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluation") / "out"
    bundles = f"{chain.merged},{chain.specialists['liver']}"
    run("tools", "evaluate", "--bundle", bundles, "--dataset_dir", chain.dataset, "--output", output)
    return output


def test_dice_is_the_overlap_of_the_written_label_maps(chain, evaluation):
    rows = list(csv.DictReader((evaluation / "scores.csv").open()))
    assert {(r["bundle"], r["label"]) for r in rows} == {
        ("merged", "liver"),
        ("merged", "spleen"),
        ("liver", "liver"),
    }
    assert len(rows) == 3 * 4
    ids = json.loads((chain.dataset / "dataset.json").read_text())["labels"]
    for row in rows:
        predicted = nibabel.load(evaluation / "label_maps" / row["bundle"] / f"{row['case']}.nii.gz")
        truth = nibabel.load(chain.dataset / "labelsTr" / f"{row['case']}.nii.gz")
        np.testing.assert_allclose(predicted.affine, truth.affine)
        channel = ["liver", "spleen"].index(row["label"]) + 1 if row["bundle"] == "merged" else 1
        a, b = np.asarray(predicted.dataobj) == channel, np.asarray(truth.dataobj) == ids[row["label"]]
        assert float(row["dice"]) == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()), abs=1e-6)
        assert float(row["reference_ml"]) == pytest.approx(b.sum() * 0.256, rel=1e-3)


def test_summary_and_pictures(evaluation):
    summary = json.loads((evaluation / "summary.json").read_text())
    merged, liver = summary["bundles"]["merged"], summary["bundles"]["liver"]
    dice = {label: found["dice"]["mean"] for label, found in merged["labels"].items()}
    assert merged["mean"]["dice"]["mean"] == pytest.approx((dice["liver"] + dice["spleen"]) / 2)
    assert summary["against"] == ["liver"]  # whose task vector was merged
    share = dice["liver"] / liver["labels"]["liver"]["dice"]["mean"]
    assert summary["normalized_accuracy"]["merged"]["labels"] == pytest.approx({"liver": share})
    assert [(test["bundle"], test["label"], test["cases"]) for test in summary["paired"]] == [("merged", "liver", 4)]
    assert "| merged | " in (evaluation / "summary.md").read_text()
    facts = read_json(evaluation / "evaluation.json")
    assert facts["labels"] == {"merged": ["liver", "spleen"], "liver": ["liver"]} and facts["tolerance_mm"] == 2
    pictures = sorted(evaluation.glob("*.png"))
    assert [p.stem for p in pictures] == [f"phantom_00{i}" for i in range(4)]
    assert all(p.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and p.stat().st_size > 10_000 for p in pictures)


def test_what_others_are_compared_with(chain, tmp_path, capsys):
    liver, merged = Bundle(chain.specialists["liver"]), Bundle(chain.merged)
    shutil.copytree(liver.path, tmp_path / "again")
    again, start = Bundle(tmp_path / "again"), Bundle(chain.pretrain)
    assert reference_bundles([start, merged, liver], []) == {"liver": "liver"}
    assert reference_bundles([liver, again], []) == {}  # nothing was merged
    assert reference_bundles([merged, liver, again], []) == {}
    assert "liver and again have 'liver': --against must say" in capsys.readouterr().out
    assert reference_bundles([merged, liver, again], ["again"]) == {"liver": "again"}
    assert reference_bundles([merged, liver, again], [str(chain.merged)]) == {"liver": "merged", "spleen": "merged"}
    relative = os.path.relpath(tmp_path / "again")
    assert reference_bundles([merged, Bundle(relative)], [f"{tmp_path}/again/"]) == {"liver": "again"}
    with pytest.raises(UserError, match="not among the bundles, did you mean 'again'"):
        reference_bundles([merged, again], ["agan"])
    with pytest.raises(UserError, match="liver and again have 'liver'"):
        reference_bundles([merged, liver, again], ["liver", "again"])


def test_a_stopped_evaluation_goes_on(untrained, tmp_path):
    """It is stopped by the second case, whose label map is on another grid."""
    shutil.copytree(untrained, tmp_path / "b")
    config = tmp_path / "b" / "configs" / "inference.json"
    config.write_text(config.read_text().replace("[96, 96, 96]", "[32, 32, 32]"))
    for folder in ("imagesTs", "labelsTs"):
        (tmp_path / "d" / folder).mkdir(parents=True)
    labels = {"background": 0, "liver": 1, "spleen": 2}
    (tmp_path / "d" / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": labels}))
    random = np.random.default_rng(0)
    for name in ("first", "second"):
        image = random.normal(size=(24, 24, 24)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), tmp_path / "d/imagesTs" / f"{name}_0000.nii.gz")
        grid = np.diag([1, 1, 1 if name == "first" else 2, 1])
        label = nibabel.Nifti1Image(np.full((24, 24, 24), 1, np.uint8), grid)
        nibabel.save(label, tmp_path / "d/labelsTs" / f"{name}.nii.gz")
    words = ["tools", "evaluate", "--bundle", tmp_path / "b", "--dataset_dir", tmp_path / "d", "--part", "Ts"]
    words += ["--overlays", "False", "--output", tmp_path / "out", "--workers"]
    refused(here(*words, 1), "case second: ", "second.nii.gz is not on the grid of its image")
    assert not (tmp_path / "out").exists()
    (kept,) = (tmp_path / "out.partial").iterdir()
    (scored,) = kept.glob("first_*.csv")
    assert {path.name[:-24] for path in kept.glob("*.nii.gz")} == {"first", "second"} and len(list(kept.iterdir())) == 3
    write_scores(scored, [replace(score, dice=0.123) for score in read_scores(scored)])
    nibabel.save(nibabel.Nifti1Image(np.ones((24, 24, 24), np.uint8), np.eye(4)), tmp_path / "d/labelsTs/second.nii.gz")
    result = here(*words, 0)
    assert result.returncode == 0, result.stderr
    assert "b: goes on, 2 of 2 cases were segmented before" in result.stdout
    rows = list(csv.DictReader((tmp_path / "out" / "scores.csv").open()))
    assert [row["case"] for row in rows] == ["first", "first", "second", "second"]
    assert rows[0]["dice"] == "0.123"  # what was kept, and not measured again
    assert (tmp_path / "out/label_maps/b/second.nii.gz").is_file() and not (tmp_path / "out.partial").exists()


def test_what_is_kept_of_a_case_is_of_these_very_files(tmp_path):
    """A corrected label may be older than what was kept: copies keep the time of their original."""
    for name in ("image", "label", "other"):
        (tmp_path / name).write_text("12")
    image, label, other = (str(tmp_path / name) for name in ("image", "label", "other"))
    kept = kept_file(tmp_path, "case", ".csv", image, label)
    assert kept == kept_file(tmp_path, "case", ".csv", image, label) and kept.name.startswith("case_")
    assert kept != kept_file(tmp_path, "case", ".csv", image, other) and kept != kept_file(
        tmp_path, "case", ".csv", [image, other], label
    )
    os.utime(label, (0, 0))
    assert kept != kept_file(tmp_path, "case", ".csv", image, label)


def test_a_voxel_value_says_something_in_the_training_dataset_only(plane, tmp_path):
    """The specialist of "bright" was trained on the region of the values 1 and 3 of another dataset."""
    shutil.copytree(plane / "bright", tmp_path / "b")
    trained = {"label_map": {"bright": [1, 2]}, "lineage": {"data": {"dataset": "Dataset001_Quarters"}}}
    path = tmp_path / "b/configs/metadata.json"
    write_json(path, read_json(path) | trained)
    shutil.copytree(plane / "Dataset001_Quarters", tmp_path / "Dataset002_Other")
    (tmp_path / "Dataset002_Other/dataset.json").write_text(json.dumps({"labels": {"dark": 1, "edge": 2, "bright": 3}}))
    bundle = Bundle(tmp_path / "b")
    assert found_channels(bundle, plane / "Dataset001_Quarters", {}) == {"bright": [1, 2]}
    assert found_channels(bundle, tmp_path / "Dataset002_Other", {}) == {"bright": [3]}
    assert found_channels(bundle, tmp_path / "Dataset002_Other", {"bright": "edge"}) == {"bright": [2]}
    merged = {"vectors": [{"labels": ["bright"], "data": {"dataset": "Dataset001_Quarters"}}]}
    write_json(path, read_json(path) | {"lineage": merged})
    assert Bundle(tmp_path / "b").dataset_of("bright") == "Dataset001_Quarters"


def test_other_label_names_are_mapped_or_refused(chain, tmp_path):
    data = tmp_path / "renamed"
    shutil.copytree(chain.dataset, data)
    description = json.loads((data / "dataset.json").read_text())
    description["labels"] = {
        {"liver": "hepar", "spleen": "lien"}.get(k, k): v for k, v in description["labels"].items()
    }
    (data / "dataset.json").write_text(json.dumps(description))
    words = ["--bundle", chain.merged, "--dataset_dir", data, "--output", tmp_path / "out", "--overlays", False]
    refused(here("tools", "evaluate", *words), "none of the labels", "liver, spleen", "--labels")
    result = run("tools", "evaluate", *words, "--labels", "{liver: hepar}")
    assert "not scored, because the dataset does not have them: spleen" in result.stdout


def test_split_parts_choose_the_cases(chain, tmp_path):
    split = tmp_path / "split.json"
    split.write_text(json.dumps([{"train": [], "val": [], "test": ["phantom_002"]}]))
    words = ["--bundle", chain.specialists["liver"], "--dataset_dir", chain.dataset, "--output", tmp_path / "out"]
    run("tools", "evaluate", *words, "--split_file", split, "--part", "test", "--overlays", False)
    assert {row["case"] for row in csv.DictReader((tmp_path / "out" / "scores.csv").open())} == {"phantom_002"}
    words[-1] = tmp_path / "other"
    refused(
        here("tools", "evaluate", *words, "--split_file", tmp_path / "no.json", "--part", "test"),
        "not found",
    )
    refused(here("tools", "evaluate", *words, "--split_file", split, "--part", "gone"), "no part 'gone'")


def test_a_bundle_without_weights_is_refused(chain, tmp_path):
    bundle = tmp_path / "bare"
    shutil.copytree(chain.merged, bundle)
    (bundle / "models" / "model.pt").unlink()
    words = ["--bundle", bundle, "--dataset_dir", chain.dataset, "--output", tmp_path / "out"]
    refused(here("tools", "evaluate", *words), "model.pt not found")
    assert not (tmp_path / "out").exists()


def test_an_empty_part_is_refused(tmp_path):
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": {"liver": 1}}))
    (tmp_path / "imagesTr" / "a_0000.nii.gz").touch()
    (tmp_path / "labelsTr" / "a.nii.gz").touch()
    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": ["a"], "val": []}]))
    with pytest.raises(UserError, match="part 'val' of the split has no cases"):
        evaluate(str(ROOT / "bundles" / "taskvector_template"), str(tmp_path), str(tmp_path / "out"), part="val")
    assert not (tmp_path / "out").exists()


def test_a_bundle_whose_inferer_gives_logits_is_segmented_as_before(chain, tmp_path):
    """MONAI's inferer, and an argmax in postprocessing, as in any other bundle."""
    other = tmp_path / "other"
    shutil.copytree(chain.merged, other)
    config = read_json(other / "configs" / "inference.json")
    for knob in ("windows", "mirror_axes", "skip_below", "inferer_output"):
        del config[knob]
    windows = {"roi_size": "@patch_size", "sw_batch_size": "@sw_batch_size", "overlap": "@overlap", "mode": "gaussian"}
    config["inferer"] = {
        "_target_": "scripts.inferers.MixedPrecisionInferer",
        "inferer": {"_target_": "SlidingWindowInferer", **windows},
    }
    for transform in config["postprocessing"]["transforms"]:
        transform.pop("_disabled_", None)
    write_json(other / "configs" / "inference.json", config)
    cases = find_cases(chain.dataset, "all", "", 0)
    maps = [[prediction for _, prediction, _ in segment(Bundle(b), cases)] for b in (chain.merged, other)]
    assert maps[0][0].any()
    assert all(np.array_equal(*pair) for pair in zip(*maps, strict=True))


@pytest.fixture(scope="module")
def plane(tmp_path_factory):
    """A merge whose Dice is 1 for the bright organ and 0 for the dark one."""
    root = make_plane(tmp_path_factory.mktemp("plane"))
    vectors = f"{root}/bright.safetensors,{root}/dark.safetensors"
    words = ["--pretrained", root / "start", "--vectors", vectors, "--output", root / "merged"]
    assert here("tools", "merge", *words).returncode == 0
    return root


def evaluated(plane, output, *more, bundles="merged", data="Dataset001_Quarters"):
    words = ["--bundle", ",".join(str(plane / name) for name in bundles.split(",")), "--output", output]
    return here("tools", "evaluate", *words, "--dataset_dir", plane / data, "--overlays", False, *more)


def test_what_was_begun_with_other_labels_is_not_gone_on_with(plane, tmp_path, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(plane / "Dataset001_Quarters", data)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tools.evaluate._write_results", interrupted)
        assert evaluated(plane, tmp_path / "out", data=data).returncode == 130
    assert len(list((tmp_path / "out.partial").glob("*/*.csv"))) == 12
    write_json(data / "dataset.json", read_json(data / "dataset.json") | {"labels": {"bright": 2, "dark": 1}})
    assert evaluated(plane, tmp_path / "out", data=data).returncode == 0
    assert {row.dice for row in read_scores(tmp_path / "out" / "scores.csv")} == {0.0}


def test_voxels_of_the_ignore_label_do_not_count(plane, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(plane / "Dataset001_Quarters", data)
    write_json(data / "dataset.json", {"labels": {"background": 0, "bright": 1, "dark": 2, "ignore": 3}})
    for path in (data / "labelsTr").iterdir():
        label = nibabel.load(path)
        voxels = np.asarray(label.dataobj).copy()
        voxels[:, :3] = np.where(voxels[:, :3] == 1, 3, voxels[:, :3])  # half of the bright organ
        nibabel.save(nibabel.Nifti1Image(voxels, label.affine), path)
    assert evaluated(plane, tmp_path / "out", "--calibration", data=data).returncode == 0
    for row in read_scores(tmp_path / "out" / "scores.csv"):
        assert row.dice == (1 if row.label == "bright" else 0) and row.predicted_ml == pytest.approx(
            row.reference_ml * row.dice
        )
    words = ["--pretrained", plane / "start", "--vectors", f"{plane}/bright.safetensors,{plane}/dark.safetensors"]
    words += [
        "--dataset_dir",
        data,
        "--split_file",
        plane / "split.json",
        "--space",
        "{scale: [0.5]}",
        "--sampler",
        "grid",
    ]
    assert here("tools", "search", *words, "--per_task", "none", "--output", tmp_path / "s").returncode == 0
    assert read_json(tmp_path / "s" / "search.json")["best"]["dice"] == {"bright": 1.0, "dark": 0.0}


def test_labels_without_a_specialist_are_in_the_table_too(plane, tmp_path):
    text = evaluated(plane, tmp_path / "out", "--against", "bright", bundles="merged,bright").stdout
    assert "| | bright | dark | mean | worst |" in text
    assert "| merged | 1.000 [1.000, 1.000] (1.50)* | 0.000 [0.000, 0.000] | 0.500 [0.500, 0.500] | 1.50 |" in text


def test_what_cannot_be_meant_is_refused(plane, tmp_path):
    output = tmp_path / "out"
    refused(evaluated(plane, output, "--labels", "bright=1"), "--labels 'bright=1' is not a dictionary")
    refused(
        evaluated(plane, output, "--labels", "{brigt: 1}"), "no bundle has a channel 'brigt', did you mean 'bright'"
    )
    shutil.copytree(plane / "merged", tmp_path / "specialists")
    refused(evaluated(plane, output, bundles=f"merged,{tmp_path}/specialists"), "must not be called 'specialists'")
    shutil.rmtree(tmp_path / "specialists")
    refused(evaluated(plane, output, "--part", "val"), "has no splits_final.json", "--split_file")
    refused(evaluated(plane, output, "--workers", -1), "--workers -1: it must be 0 or more")
    refused(evaluated(plane, output, "--tolerance", "inf"), "--tolerance inf: it must be a number")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["imagesTr/case3_0000", "labelsTr/case3"])
def test_a_damaged_file_is_named(plane, tmp_path, part):
    data = tmp_path / "data"
    shutil.copytree(plane / "Dataset001_Quarters", data)
    path = data / f"{part}.nii.gz"
    path.write_bytes(path.read_bytes()[:60])
    refused(evaluated(plane, tmp_path / "out", data=data), f"{path} cannot be read (")
    words = [
        "--pretrained",
        plane / "start",
        "--vectors",
        f"{plane}/bright.safetensors",
        "--images",
        data,
        "--scans",
        12,
    ]
    if "images" in part:
        refused(here("tools", "distil", *words, "--output", tmp_path / "m"), f"{path} cannot be read (")
    else:
        refused(
            here("tools", "distil", *words, "--objective", "labels", "--output", tmp_path / "m"),
            f"{path} cannot be read (",
        )
