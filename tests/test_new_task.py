"""new_task and new_pretraining: complete bundles, labels checked against the dataset, published presets."""

import json

import pytest

from tests.conftest import ROOT, here, run
from tests.test_merge import refused
from tools.bundle import Bundle
from tools.labels import parse_channels, parse_sources, resolve
from tools.new_task import PRESETS


def test_label_spelling_on_the_command_line():
    assert parse_sources(6) == [6]
    assert parse_sources("2,3") == [2, 3]
    assert parse_sources(("a", "b c")) == ["a", "b c"]
    assert parse_sources("11-13,21") == [11, 12, 13, 21]
    assert parse_channels("{left lung: 1, right lung: [2, 3]}") == {"left lung": 1, "right lung": [2, 3]}
    assert parse_channels("liver") is None


def test_published_presets():
    teeth = [10 * quadrant + i for quadrant in (1, 2, 3, 4) for i in range(1, 9)]
    values = {name: parse_sources(labels) for name, (_, labels) in PRESETS.items()}
    assert values == {
        "btcv_spleen": [1], "btcv_kidneys": [2, 3], "btcv_liver": [6], "btcv_stomach": [7], "toothfairy2_mandible": [1],
        "toothfairy2_pharynx": [7], "toothfairy2_canals": [3, 4], "toothfairy2_teeth": teeth,
    }  # fmt: skip


def test_the_bundle_names_its_labels_everywhere(chain):
    bundle = Bundle(chain.specialists["liver"])
    assert bundle.labels == ["liver"]
    assert bundle.metadata["network_data_format"]["outputs"]["pred"]["num_channels"] == 2
    assert bundle.network_def()["out_channels"] == 2
    assert bundle.network_def()["width"] == 8  # the starting point's, not the template's
    train = json.loads((bundle.path / "configs" / "train.json").read_text())
    assert train["labels"] == {"liver": ["liver"]}
    assert train["head"] == ["head.weight", "head.bias"]
    assert train["patch_size"] == Bundle(chain.pretrain).resolved("patch_size")
    assert bundle.metadata["lineage"]["pretrained"] == "pretrain"
    assert (bundle.path / "models/pretrained/model.pt").read_bytes() == (
        chain.pretrain / "models/model.pt"
    ).read_bytes()


def test_several_labels_make_one_channel_or_several(chain, tmp_path):
    words = ["tools", "new_task", "--pretrained", chain.pretrain, "--dataset_dir", chain.dataset]
    run(*words, "--task", "kidneys", "--labels", "right kidney,left kidney", "--output", tmp_path / "one")
    assert Bundle(tmp_path / "one").label_map == {"kidneys": ["right kidney", "left kidney"]}
    run(*words, "--task", "both", "--labels", "{right: right kidney, left: 9}", "--output", tmp_path / "two")
    assert Bundle(tmp_path / "two").label_map == {"right": ["right kidney"], "left": ["left kidney"]}


def test_a_region_is_its_labels_or_keeps_its_own_name(tmp_path):
    labels = {"background": 0, "whole tumor": [1, 2], "core": 2, "left": 3, "right": 4, "both": [3, 4]}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    channels = resolve(tmp_path, {"tumor": "whole tumor", "pair": "both"})
    assert channels == {"tumor": ["whole tumor"], "pair": ["left", "right"]}
    assert resolve(tmp_path, {"edge": 1, "core": 2}) == {"edge": [1], "core": ["core"]}


def test_a_label_to_ignore_is_said_to_be_trained_as_background(phantom_dataset, tmp_path, capsys):
    said = json.loads((phantom_dataset / "dataset.json").read_text())
    for ignored, warned in (({}, False), ({"ignore": 99}, True)):
        (tmp_path / "dataset.json").write_text(json.dumps(said | {"labels": said["labels"] | ignored}))
        assert resolve(tmp_path, {"liver": "liver"}) == {"liver": ["liver"]}
        assert ("training takes them for background" in capsys.readouterr().out) == warned


def test_mistakes_are_named(chain, tmp_path):
    words = [
        "tools",
        "new_task",
        "--pretrained",
        chain.pretrain,
        "--dataset_dir",
        chain.dataset,
        "--output",
        tmp_path / "x",
    ]
    refused(here(*words, "--task", "brain"), "'brain'", "which has right lung=1")
    refused(here(*words), "--task", "is missing")
    refused(here(*words, "--preset", "btcv_brain"), "no preset 'btcv_brain'", "btcv_liver")
    words[3] = ROOT / "bundles" / "pretrain_amos"
    refused(here(*words, "--task", "liver"), "model.pt not found: train the bundle first")
    words[3] = tmp_path / "nowhere"
    refused(here(*words, "--task", "liver"), "is not a bundle folder")
    assert not (tmp_path / "x").exists()


def test_a_dataset_with_other_channels_is_refused(chain, tmp_path):
    data = tmp_path / "mr"
    data.mkdir()
    (data / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T1", "1": "T2"}, "labels": {"liver": 1}}))
    words = ["--pretrained", chain.pretrain, "--dataset_dir", data, "--task", "liver", "--output", tmp_path / "x"]
    refused(here("tools", "new_task", *words), "have 2 channel(s)", "takes 1")


@pytest.mark.parametrize("labels", ["all", "{liver: liver, kidneys: [8, 9]}"])
def test_new_pretraining_takes_the_datasets_labels(chain, tmp_path, labels):
    words = ["--bundle", ROOT / "bundles" / "pretrain_cui", "--dataset_dir", chain.dataset, "--output", tmp_path / "p"]
    run("tools", "new_pretraining", *words, "--labels", labels, "--overlay", "small,stable", "--patch_size", 32)
    bundle = Bundle(tmp_path / "p")
    expected = 12 if labels == "all" else 2
    assert len(bundle.labels) == expected
    assert bundle.network_def() == {
        "_target_": "scripts.residual_unet.ResidualUNet3D", "in_channels": 1, "out_channels": 1 + expected, "width": 16,
        "dropout": 0.0,
    }  # fmt: skip
    train = json.loads((tmp_path / "p" / "configs" / "train.json").read_text())
    assert (train["dropout"], train["learning_rate"], train["patch_size"]) == (0.5, 1e-3, [32, 32, 32])
    for config in (train, bundle.inference):  # the knob that chooses between the template's own two sets of labels
        assert "binary" not in json.dumps(config)
