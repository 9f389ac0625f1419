"""Every bundle as shipped: complete, valid metadata, working network, configs that say one thing once."""

import json
import re
import shutil

import pytest

from tests.conftest import ROOT, run
from tools.bundle import Bundle

BUNDLES = sorted(path.name for path in (ROOT / "bundles").iterdir())
REQUIRED = (  # the metadata schema's own list, and the changelog that the model zoo asks for
    "schema version changelog monai_version pytorch_version numpy_version required_packages_version task description "
    "authors copyright network_data_format"
).split()


def read(name, config):
    return json.loads((ROOT / "bundles" / name / "configs" / config).read_text())


def test_the_bundles_are_here():
    names = ["amos", "cui", "genesis", "inflated", "lwi", "stunet"]
    expected = ["merged_inference", *(f"pretrain_{name}" for name in names), "taskvector_template"]
    assert expected == BUNDLES


@pytest.mark.parametrize("name", BUNDLES)
def test_metadata_is_complete(name):
    metadata = read(name, "metadata.json")
    assert not [key for key in REQUIRED if key not in metadata]
    assert metadata["version"] in metadata["changelog"]
    pred = metadata["network_data_format"]["outputs"]["pred"]
    assert list(pred["channel_def"]) == [str(i) for i in range(pred["num_channels"])]
    assert pred["channel_def"]["0"] == "background"
    names = [label.lower() for label in pred["channel_def"].values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", BUNDLES)
def test_files_that_a_share_needs(name):
    folder = ROOT / "bundles" / name
    assert "Apache License" in (folder / "LICENSE").read_text()
    assert len((folder / "docs" / "README.md").read_text()) > 500
    assert not [p for p in folder.rglob("*") if p.is_symlink()]
    for path in folder.rglob("*.json"):
        assert not re.search(r"/home/|/root/|/Users/", path.read_text())


@pytest.mark.parametrize("name", BUNDLES)
def test_verify_net_in_out_from_elsewhere(name, tmp_path):
    """The network builds and gives the channels that the metadata promises, in a copy that stands alone."""
    folder = tmp_path / name
    shutil.copytree(ROOT / "bundles" / name, folder)
    configs = folder / "configs"
    words = ["--meta_file", configs / "metadata.json", "--config_file", configs / "inference.json", "--n", 2]
    result = run("monai.bundle", "verify_net_in_out", "--net_id", "network_def", *words, cwd=folder, PYTHONPATH="")
    assert "verified with no error" in result.stdout + result.stderr


def test_metadata_validates_against_the_model_zoo_schema(real_data):
    import jsonschema

    schema = json.loads(next((real_data / "schema").glob("*.json")).read_text())
    for name in BUNDLES:
        jsonschema.validate(read(name, "metadata.json"), schema)


def test_training_configs_differ_only_where_they_must():
    """Bundles stand alone, so they repeat each other; this keeps the repetition equal."""
    amos, cui, task = (read(name, "train.json") for name in ("pretrain_amos", "pretrain_cui", "taskvector_template"))
    assert {key for key in amos if amos[key] != cui.get(key)} == {"dataset_dir", "labels"}
    shared = ("loss", "lr_scheduler", "label_values", "label_transforms", "validate", "run", "network", "imports")
    assert all(amos[key] == task[key] for key in shared)
    assert {key for key in amos["train"] if amos["train"][key] != task["train"][key]} == {"handlers"}
    assert read("taskvector_template", "inference.json") == read("merged_inference", "inference.json")


@pytest.mark.parametrize("name", ["pretrain_amos", "pretrain_cui"])
def test_the_papers_recipes(name):
    base, stable, sharp = (read(name, f"{config}.json") for config in ("train", "stable", "sharp"))
    assert stable == {"learning_rate": 1e-3, "batch_size": 4, "dropout": 0.5}
    assert sharp == {"learning_rate": 1e-4, "batch_size": 8, "dropout": 0.0}
    assert base["weight_decay"] == 0.1
    assert base["patch_size"] == [96, 96, 96]


@pytest.mark.parametrize("overlays", [("stunet", "small"), ("small", "stunet")])
def test_the_decay_towards_the_start_is_not_taken_for_that_of_gradient_descent(overlays):
    """20 is right for the one; by the other it would turn the weights round."""
    values = {}
    for overlay in overlays:
        values |= read("taskvector_template", f"{overlay}.json")
    assert values["weight_decay"] == 20 and values["optimizer"]["weight_decay"] == 3e-5


def test_the_overlays_for_wide_minima():
    for overlay in ("sam", "asam", "swa", "ema"):
        assert read("pretrain_amos", f"{overlay}.json") == read("pretrain_cui", f"{overlay}.json")
        if overlay != "swa":  # whose learning rate comes down in another way
            assert read("pretrain_amos", f"{overlay}.json") == read("pretrain_stunet", f"{overlay}.json")
    for name in ("pretrain_amos", "pretrain_stunet"):
        handlers = [handler["_target_"] for handler in read(name, "train.json")["train"]["handlers"]]
        first, second = (handlers.index(f"scripts.{h}") for h in ("sharpness.SharpnessAware", "training.ClipGradients"))
        assert first < second  # so that the gradient which is used is clipped
        board = handlers.index("TensorBoardStatsHandler")
        assert f"train#handlers#{board}#_disabled_" in read(name, "multi_gpu_train.json")


def test_every_overlay_changes_something_that_exists():
    for name in BUNDLES:
        known = {**read(name, "inference.json")}
        if (ROOT / "bundles" / name / "configs" / "train.json").exists():
            known |= read(name, "train.json")
        for overlay in ("stable", "sharp", "small", "sam", "asam", "swa", "ema", "norm_budget"):
            if (ROOT / "bundles" / name / "configs" / f"{overlay}.json").exists():
                keys = {key.split("#")[0] for key in read(name, f"{overlay}.json")}
                assert not keys - set(known), (name, overlay)


def test_cui_labels_all_teeth_and_binary():
    labels = read("pretrain_cui", "train.json")["all_labels"]
    teeth = [10 * quadrant + i for quadrant in (1, 2, 3, 4) for i in range(1, 9)]
    assert sorted(labels.values()) == [*range(1, 11), *teeth]
    assert read("pretrain_cui", "train.json")["binary_labels"] == {"tooth": teeth}
    assert list(labels) == Bundle(ROOT / "bundles" / "pretrain_cui").labels


def test_vendored_code_is_up_to_date():
    assert "up to date" in run("tools", "vendor", "--check").stdout


def test_nothing_in_the_project_imports_torchvision():
    for path in ROOT.glob("tools/**/*.py"):
        assert "torchvision" not in path.read_text()
