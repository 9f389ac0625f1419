"""Checkpoints in the published layout, as nnU-Net 1 and NumPy 1 write them, become bundles that run and merge."""

import io
import json
import pickle
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.conftest import ROOT, here, run, train
from tests.test_merge import refused
from tools.bundle import Bundle
from tools.bundle_code.stunet import STUNet
from tools.importers.stunet import PlansUnpickler

OFFICIAL_STRIDES = [[2, 2, 2]] * 4 + [[1, 1, 2]]  # z, y, x
TINY = [2, 3, 4, 4, 5, 5]
NAMES = list(Bundle(ROOT / "bundles" / "pretrain_stunet").labels)


class OldNumPysPickler(pickle._Pickler):
    """Names NumPy's functions as NumPy 1 did, which the published files were written with."""

    def save_global(self, obj, name=None):
        if getattr(obj, "__module__", "") == "numpy._core.multiarray":
            self.write(f"cnumpy.core.multiarray\n{obj.__name__}\n".encode())
            self.memoize(obj)
        else:
            super().save_global(obj, name)


def pickled(content):
    buffer = io.BytesIO()
    OldNumPysPickler(buffer, 4).dump(content)
    return buffer.getvalue()


def plans(**changes):
    stage = {
        "batch_size": 2,
        "patch_size": np.array([32, 32, 64]),
        "current_spacing": np.array([3.0, 4.0, 5.0]),
        "num_pool_per_axis": [4, 4, 5],
        "pool_op_kernel_sizes": OFFICIAL_STRIDES,
        "conv_kernel_sizes": [[3, 3, 3]] * 6,
    }
    content = {
        "num_modalities": 1,
        "modalities": {0: "nonCT"},
        "normalization_schemes": OrderedDict([(0, "nonCT")]),
        "use_mask_for_norm": OrderedDict([(0, False)]),
        "dataset_properties": {"intensityproperties": None},
        "num_classes": np.int64(104),
        "transpose_forward": [0, 1, 2],
        "plans_per_stage": {0: {**stage, **{k: v for k, v in changes.items() if k in stage}}},
    }
    content |= {key: value for key, value in changes.items() if key not in stage}
    init = ("", 0, "", "", False, 0, True, False, True)
    return {"init": init, "name": "STUNetTrainer", "plans": content}


@pytest.fixture
def official(tmp_path):
    """A random network on (z, y, x), and its files."""

    def make(out_channels=105, in_channels=1, channels=TINY, depth=1, info=None, strides=OFFICIAL_STRIDES):
        torch.manual_seed(0)
        network = STUNet(in_channels, out_channels, channels=channels, depth=depth, strides=strides)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        network(torch.randn(1, in_channels, 64, 64, 64))[0].square().mean().backward()
        optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.99, nesterov=True)
        optimizer.step()
        content = {
            "epoch": 4000,
            "state_dict": OrderedDict((f"module.{name}", tensor) for name, tensor in network.state_dict().items()),
            "optimizer_state_dict": optimizer.state_dict(),
            "lr_scheduler_state_dict": None,
            "plot_stuff": ([np.float64(0.5)], [np.float32(0.25)], [], [np.float64(0.75)]),
            "best_stuff": (np.float64(0.5), None, np.float64(0.1)),
            "amp_grad_scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
        }
        path = tmp_path / "tiny_ep4k.model"
        old = SimpleNamespace(Pickler=OldNumPysPickler, __name__="pickle")
        torch.save(content, path, pickle_module=old)
        assert b"numpy.core.multiarray\nscalar" in path.read_bytes()
        content = info or plans()
        content["plans"] |= {"num_classes": np.int64(out_channels - 1), "num_modalities": in_channels}
        path.with_name(f"{path.name}.pkl").write_bytes(pickled(content))
        return network.double().eval(), path

    return make


def converted(path, output, *options):
    result = here("tools", "convert", "--source", "stunet", "--checkpoint", path, "--output", output, *options)
    assert result.returncode == 0, result.stderr
    return Bundle(output), result.stdout


def same(ours, theirs, channels=1, rows=slice(None)):
    """Both networks on the same image, theirs with reversed axes."""
    x = torch.randn(1, channels, 64, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = theirs(x.permute(0, 1, 4, 3, 2)).permute(0, 1, 4, 3, 2)[:, rows]
    return torch.allclose(ours.double()(x), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_a_published_checkpoint_becomes_a_bundle_of_the_same_function(official, tmp_path):
    network, path = official()
    bundle, said = converted(path, tmp_path / "bundle")
    assert "130 tensors of tiny_ep4k.model, 0 new, 5 left out" in said
    assert same(bundle.network(), network)
    assert bundle.labels == NAMES
    assert (bundle.labels[0], bundle.labels[39], bundle.labels[103]) == ("adrenal_gland_left", "liver", "vertebrae_T9")
    config = bundle.inference
    assert (config["patch_size"], config["spacing"]) == ([64, 32, 32], [5.0, 4.0, 3.0])
    assert config["strides"] == [[2, 2, 2]] * 4 + [[2, 1, 1]]
    assert config["channels"] == TINY
    assert bundle.metadata["lineage"]["converted_from"]["source"] == "stunet"
    assert bundle.metadata["totalsegmentator_labels"]["liver"] == 5
    account = (bundle.path / "docs" / "conversion.md").read_text()
    assert "| `conv_blocks_context.0.0.conv1.weight` | 2 × 1 × 3 × 3 × 3 |" in account and "axes turned" in account
    assert "| `optimizer_state_dict` | momentum of the optimiser |" in account


def test_the_label_tables_are_consistent():
    mapping = Bundle(ROOT / "bundles" / "pretrain_stunet").metadata["totalsegmentator_labels"]
    assert sorted(NAMES) == NAMES == list(mapping)
    assert sorted(mapping.values()) == list(range(1, 105))
    known = {"spleen": 1, "kidney_right": 2, "kidney_left": 3, "gallbladder": 4, "liver": 5, "urinary_bladder": 104}
    assert known.items() <= mapping.items()


def test_plans_may_be_of_either_numpy(tmp_path):
    content = {"n": np.int64(3), "size": np.arange(3)}
    for text in (pickled(content), pickle.dumps(content, 4)):
        found = PlansUnpickler(io.BytesIO(text)).load()
        assert found["n"] == 3 and found["size"].tolist() == [0, 1, 2]


def test_small_is_recognised_and_loads_strictly(official, tmp_path):
    channels = [16, 32, 64, 128, 256, 256]
    _, path = official(channels=channels)
    bundle, _ = converted(path, tmp_path / "bundle")
    assert bundle.inference["size"] == "small" and bundle.inference["channels"] is None
    assert sum(tensor.numel() for tensor in bundle.state().values()) == 14_596_941
    assert bundle.network().seg_outputs[4].out_channels == 105
    result = here("tools", "verify", bundle.path)
    assert "the weights fit STUNet, 130 tensors" in result.stdout, result.stdout + result.stderr


def test_heads_are_kept_by_name(official, tmp_path):
    network, path = official()
    bundle, said = converted(path, tmp_path / "bundle", "--labels", "[spleen, liver]")
    assert bundle.labels == ["spleen", "liver"]
    assert same(bundle.network(), network, rows=[0, 77, 40])
    assert "130 tensors" in said and "6 left out" in said
    assert "| `102 of 105 rows of seg_outputs.*` |" in (bundle.path / "docs" / "conversion.md").read_text()
    assert bundle.metadata["totalsegmentator_labels"] == {"spleen": 1, "liver": 5}
    assert json.loads((bundle.path / "configs/train.json").read_text())["labels"] == {
        "spleen": ["spleen"],
        "liver": ["liver"],
    }


@pytest.mark.parametrize("stem", ["repeat", "mean"])
def test_the_stem_is_repeated_for_more_channels(official, tmp_path, stem):
    network, path = official()
    bundle, _ = converted(path, tmp_path / "bundle", "--in_channels", 4, "--stem", stem)
    ours = bundle.network().double()
    one = torch.randn(1, 1, 64, 32, 32, dtype=torch.float64)
    fourth = torch.cat([one * 0, one * 0, one * 0, one], 1)
    factor = 1 if stem == "repeat" else 4
    theirs = network((one / factor).permute(0, 1, 4, 3, 2)).permute(0, 1, 4, 3, 2)
    torch.testing.assert_close(ours(fourth), theirs, rtol=1e-5, atol=1e-4)
    if stem == "mean":
        expected = network(one.permute(0, 1, 4, 3, 2)).permute(0, 1, 4, 3, 2)
        torch.testing.assert_close(ours(one.expand(-1, 4, -1, -1, -1)), expected, rtol=1e-5, atol=1e-4)
    assert bundle.in_channels == 4
    assert bundle.inference["dataset"]["data"]["channels"] == 4
    assert len(bundle.resolved("preprocessing")["transforms"][-1]["schemes"]) == 4


def test_other_checkpoints_of_the_same_code(official, tmp_path):
    """Four channels, CT normalisation, axes in another order, fewer strides than levels have, labels without names."""
    properties = {
        c: {"mean": 40.0, "sd": 300.0, "percentile_00_5": -900.0, "percentile_99_5": 1500.0} for c in range(4)
    }
    strides = [[2, 2, 2]] * 2
    info = plans(
        normalization_schemes={0: "CT", 1: "nonCT", 2: "noNorm", 3: "MRI"},
        use_mask_for_norm={0: False, 1: True, 2: False, 3: False},
        dataset_properties={"intensityproperties": properties},
        transpose_forward=[1, 0, 2],
        pool_op_kernel_sizes=strides,
        patch_size=np.array([16, 32, 48]),
    )
    network, path = official(5, 4, info=info, strides=[*strides, *[[1, 1, 1]] * 3])
    bundle, _ = converted(path, tmp_path / "bundle", "--labels", "{tumour: 2, oedema: 4}")
    assert bundle.labels == ["tumour", "oedema"]
    assert bundle.label_map == {"tumour": [2], "oedema": [4]}
    assert bundle.inference["patch_size"] == [48, 16, 32]
    assert [scheme["scheme"] for scheme in bundle.resolved("preprocessing")["transforms"][-1]["schemes"]] == [
        "ct", "zscore", "none", "zscore",
    ]  # fmt: skip
    x = torch.randn(1, 4, 48, 16, 32, dtype=torch.float64)
    theirs = network(x.permute(0, 1, 3, 4, 2)).permute(0, 1, 4, 2, 3)[:, [0, 2, 4]]  # y, z, x there
    torch.testing.assert_close(bundle.network().double()(x), theirs, rtol=1e-5, atol=1e-4)
    assert converted(path, tmp_path / "named", "--labels", "a,b,c,d")[0].labels == ["a", "b", "c", "d"]
    assert converted(path, tmp_path / "numbers")[0].label_map == {"1": [1], "2": [2], "3": [3], "4": [4]}


def test_the_chain_from_a_converted_starting_point(official, phantom_dataset, tmp_path):
    """By both recipes, sigmoid and AdamW, softmax and SGD with deep supervision; merged, and run as a user does."""
    info = plans(patch_size=np.array([32, 32, 32]), current_spacing=np.array([8.0, 8.0, 8.0]))
    info["plans"]["plans_per_stage"][0]["pool_op_kernel_sizes"] = [[2, 2, 2]] * 2 + [[1, 2, 2]]
    _, path = official(channels=[4, 4, 6, 6], info=info, strides=[[2, 2, 2]] * 2 + [[1, 2, 2]])
    start, _ = converted(path, tmp_path / "start")
    vectors = []
    for task, overlay in (("liver", "small"), ("spleen", "small,stunet")):
        words = ["--pretrained", start.path, "--dataset_dir", phantom_dataset, "--task", task, "--overlay", overlay]
        result = here("tools", "new_task", *words, "--output", tmp_path / task)
        assert result.returncode == 0, result.stderr
        train(tmp_path / task, "--max_epochs", 2, "--frozen_epochs", 0, "--patches_per_volume", 2, "--val_interval", 1)
        vectors.append(tmp_path / f"{task}.safetensors")
        words = ["--pretrained", start.path, "--finetuned", tmp_path / task, "--output", vectors[-1]]
        assert here("tools", "diff", *words).returncode == 0
    official_recipe = torch.load(tmp_path / "spleen" / "checkpoints" / "last.pt", weights_only=True)["optimizer"]
    assert [group["momentum"] for group in official_recipe["param_groups"]] == [0.99, 0.99]
    assert {round(group["initial_lr"], 6) for group in official_recipe["param_groups"]} == {0.001}
    assert len(official_recipe["state"]) == len(start.state()) - 2  # all are trained but the coarsest head
    assert list(start.structure().head) == [
        f"seg_outputs.{level}.{part}" for level in range(3) for part in ("weight", "bias")
    ]
    words = ["--pretrained", start.path, "--vectors", ",".join(map(str, vectors)), "--output", tmp_path / "merged"]
    assert here("tools", "merge", *words).returncode == 0
    configs = tmp_path / "merged" / "configs"
    words = ["--config_file", configs / "inference.json", "--bundle_root", tmp_path / "merged"]
    words += ["--dataset_dir", phantom_dataset / "imagesTr", "--output_dir", tmp_path / "maps"]
    result = run("monai.bundle", "run", *words, PYTHONPATH="")
    assert "4 of 4 images segmented" in result.stdout
    assert Bundle(tmp_path / "merged").inference["inferer_output"] == "smooth_labels"


def test_what_cannot_be_converted_is_refused_in_a_line(official, tmp_path):
    _, path = official()
    words = ["tools", "convert", "--source", "stunet", "--checkpoint", path, "--output", tmp_path / "x"]
    pkl = path.with_name(f"{path.name}.pkl")
    good = pkl.read_bytes()

    class Hostile:
        def __reduce__(self):
            return print, ("executed",)

    for content, message in (
        (pickled({**plans(), "extra": Hostile()}), "it names builtins.print"),
        (good[: len(good) // 2], "cannot be read"),
        (pickled({"plans": []}), "has no plans of nnU-Net 1"),
        (pickled(plans(plans_per_stage={})), "name the .model.pkl of the checkpoint by --plans"),
        (pickled({**plans(), "name": "STUNetTrainer_large_ep4k"}), "is of STUNetTrainer_large_ep4k"),
        (pickled(plans(num_classes=6)), "of another training: 6 classes of 1 channels, but"),
        (
            pickled(plans(pool_op_kernel_sizes=[[2, 2, 0], *OFFICIAL_STRIDES[1:]])),
            "strides must be whole numbers from 1 on",
        ),
        (pickled(plans(current_spacing=[1.5, 1.5, np.nan])), "spacing must be above 0"),
        (pickled(plans(patch_size=[32, 33, 64])), "the patch size [64, 33, 32] must be a multiple"),
    ):
        pkl.write_bytes(content)
        result = here(*words)
        refused(result, message)
        assert "executed" not in result.stdout
    pkl.unlink()
    refused(here(*words), "strides, spacing and normalisation are in it", "--plans")
    pkl.write_bytes(good)
    refused(here(*words, "--labels", "[lver]"), "no label 'lver', did you mean 'liver'?")
    refused(here(*words, "--labels", "{liver: 105}"), "the checkpoint has 1 to 104")
    refused(here(*words, "--labels", "[liver, liver]"), "--labels must name some labels, each once")
    refused(here(*words, "--labels", "[]"), "--labels must name some labels, each once")
    refused(here(*words, "--in_channels", "two"), "--in_channels must be a whole number, got 'two'")
    refused(here(*words, "--stem", "sum"), "--stem must be repeat or mean")
    refused(here(*words, "--sten", "mean"), "did you mean 'stem'?")
    whole = torch.load(path, weights_only=False)
    state = whole["state_dict"]
    for change, message in (
        (
            {"module.conv_blocks_context.3.0.conv2.weight": torch.zeros(4, 4, 3, 3, 2)},
            "is (4, 4, 3, 3, 2), but (4, 4, 3, 3, 3)",
        ),
        (
            {"module.conv_blocks_context.0.0.norm1.running_mean": torch.zeros(2)},
            "norm1.running_mean is none of STU-Net",
        ),
        ({"module.seg_outputs.0.bias": torch.full((105,), torch.nan)}, "seg_outputs.0.bias has NaN"),
        ({"module.conv_blocks_context.0.0.conv1.weight": torch.zeros(3)}, "is damaged, or not from STU-Net"),
    ):
        torch.save({**whole, "state_dict": {**state, **change}}, path)
        refused(here(*words), message)
    torch.save({**whole, "state_dict": {"a": torch.zeros(1)}}, path)
    refused(here(*words), "is not of STU-Net")
    torch.save({**whole, "extra": Hostile()}, path)
    result = here(*words)
    refused(result, "it holds something else than weights and numbers")
    assert "executed" not in result.stdout
    torch.save(whole, path)
    path.write_bytes(path.read_bytes()[:10_000])
    refused(here(*words), "cannot be read")
    assert not (tmp_path / "x").exists()


def test_four_channels_are_not_repeated_to_sixteen(official, tmp_path):
    info = plans(normalization_schemes=dict.fromkeys(range(4), "MRI"), use_mask_for_norm=dict.fromkeys(range(4), False))
    network, path = official(3, 4, info=info)
    bundle, _ = converted(path, tmp_path / "bundle", "--in_channels", 4)
    assert same(bundle.network(), network, channels=4)
    words = ["--checkpoint", path, "--output", tmp_path / "x", "--in_channels", 8]
    refused(here("tools", "convert", "--source", "stunet", *words), "takes 4 channels, and only one can be repeated")
