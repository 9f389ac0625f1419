"""diff and merge on MONAI's stock networks: heads, shared tensors, running statistics and counters all come out right."""

import json
import shutil

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from tools.bundle import Bundle, write_json
from tools.diff import diff
from tools.errors import UserError
from tools.merge import merge

COMMON = {"spatial_dims": 3, "in_channels": 1}
NETWORKS = {
    "AttentionUnet": {**COMMON, "channels": [4, 8, 16], "strides": [2, 2]},
    "BasicUNet": {**COMMON, "features": [4, 4, 8, 8, 16, 4]},
    "DynUNet": {
        **COMMON,
        "kernel_size": [3, 3, 3],
        "strides": [1, 2, 2],
        "filters": [4, 8, 16],
        "upsample_kernel_size": [2, 2],
        "deep_supervision": True,
        "deep_supr_num": 1,
        "norm_name": ["BATCH", {"affine": True}],
    },
    "FlexibleUNet": {**COMMON, "backbone": "efficientnet-b0"},
    "SegResNet": {**COMMON, "init_filters": 8},
    "SegResNetDS": {**COMMON, "init_filters": 8, "dsdepth": 2},
    "SwinUNETR": {"in_channels": 1, "feature_size": 12},
    "UNet": {**COMMON, "channels": [4, 8, 16], "strides": [2, 2], "norm": "batch"},
    "UNETR": {
        "in_channels": 1,
        "img_size": [32, 32, 32],
        "feature_size": 8,
        "hidden_size": 48,
        "mlp_dim": 96,
        "num_heads": 4,
    },
}


def network_def(kind, out_channels):
    return {"_target_": kind, **NETWORKS[kind], "out_channels": out_channels}


def network(kind, out_channels):
    from monai.bundle import ConfigParser

    return ConfigParser({"network": network_def(kind, out_channels)}).get_parsed_content("network").eval()


def bundle(folder, kind, state, labels):
    """A bundle of a stock network, such as somebody else may have made."""
    shutil.copytree(ROOT / "bundles" / "pretrain_amos", folder, ignore=shutil.ignore_patterns("models", "scripts"))
    (folder / "models").mkdir()
    shutil.copytree(ROOT / "bundles" / "pretrain_amos" / "scripts", folder / "scripts")
    inference = json.loads((folder / "configs/inference.json").read_text())
    write_json(folder / "configs/inference.json", {**inference, "network_def": network_def(kind, 1 + len(labels))})
    metadata = json.loads((folder / "configs/metadata.json").read_text())
    channels = {str(i): name for i, name in enumerate(["background", *labels])}
    metadata["network_data_format"]["outputs"]["pred"]["channel_def"] = channels
    metadata.pop("label_map", None)
    write_json(folder / "configs/metadata.json", metadata)
    torch.save(state, folder / "models/model.pt")
    return folder


def fine_tuned(kind, pretrained, labels, seed):
    """Weights as another training would leave them: all tensors changed, the head its own, statistics and counters updated."""
    torch.manual_seed(seed)
    one = network(kind, 1 + len(labels))
    state = one.state_dict()
    backbone = {n: t for n, t in pretrained.items() if n in state and t.shape == state[n].shape}
    one.load_state_dict({**state, **backbone})
    for parameter in one.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    for name, buffer in one.named_buffers():
        if name.endswith("running_var"):
            buffer += torch.rand_like(buffer)
        elif name.endswith("num_batches_tracked"):
            buffer += seed
    return one


@pytest.fixture
def chain(tmp_path, request):
    """A starting point, two specialists (one with a sigmoid head in canonical form, one with a softmax head)."""
    kind = request.param
    torch.manual_seed(0)
    start = network(kind, 4)
    folders = {"start": bundle(tmp_path / "start", kind, start.state_dict(), ["x", "y", "z"])}
    tasks = {"one": ["liver"], "two": ["spleen", "aorta"]}
    networks = {}
    for seed, (task, labels) in enumerate(tasks.items(), start=1):
        networks[task] = fine_tuned(kind, start.state_dict(), labels, seed)
        folders[task] = bundle(tmp_path / task, kind, networks[task].state_dict(), labels)
        diff(str(folders["start"]), str(folders[task]), str(tmp_path / f"{task}.safetensors"), task)
    return kind, tmp_path, start, networks


def logits_of(merged, image):
    merged = Bundle(merged)
    with merged.code(), torch.inference_mode():
        loaded = merged.parser().get_parsed_content("network_def")
        loaded.load_state_dict(merged.state(), strict=True)
        return loaded.eval()(image)


@pytest.mark.parametrize("chain", NETWORKS, indirect=True)
def test_a_merged_network_is_each_specialist_when_its_backbone_is(chain):
    kind, folder, _, networks = chain
    size = 64 if kind == "SwinUNETR" else 32
    image = torch.rand(1, 1, size, size, size, generator=torch.Generator().manual_seed(0))
    vectors = f"{folder}/one.safetensors,{folder}/two.safetensors"
    organs = {"one": slice(1, 2), "two": slice(2, 4)}
    for task, scale in (("one", (1, 0)), ("two", (0, 1))):
        options = {"method": "task_arithmetic", "scale": scale}
        merge(output=str(folder / f"m_{task}"), pretrained=str(folder / "start"), vectors=vectors, **options)
        state, own = Bundle(folder / f"m_{task}").state(), networks[task].state_dict()
        statistics = [n for n in state if n.endswith(("running_mean", "running_var", "num_batches_tracked"))]
        for name in statistics:  # those are averaged: put the specialist's in, to look at the rest
            state[name] = own[name]
        torch.save(state, folder / f"m_{task}/models/model.pt")
        with torch.inference_mode():
            own_logits = networks[task](image)
        margins = own_logits[:, 1:] - own_logits[:, :1]
        got = logits_of(folder / f"m_{task}", image)
        assert got.shape[1] == 4 and (got[:, 0] == 0).all()
        torch.testing.assert_close(got[:, organs[task]], margins, rtol=1e-3, atol=1e-4)
        channels = [0, *range(4)[organs[task]]]
        agree = (got[:, channels].argmax(1) == own_logits.argmax(1)).float().mean()
        assert agree > 0.9999  # the softmax decision is kept


@pytest.mark.parametrize("chain", ["DynUNet", "UNet"], indirect=True)
def test_statistics_are_averaged_and_counters_are_the_largest(chain):
    _, folder, _, networks = chain
    vectors = f"{folder}/one.safetensors,{folder}/two.safetensors"
    merge(output=str(folder / "m"), pretrained=str(folder / "start"), vectors=vectors, method="ties")
    merged = Bundle(folder / "m").state()
    states = [networks[task].state_dict() for task in ("one", "two")]
    found = 0
    for name, tensor in merged.items():
        if name.endswith(("running_mean", "running_var")):
            torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2)
            found += 1
        elif name.endswith("num_batches_tracked"):
            assert tensor.shape == () and tensor == max(state[name] for state in states) == 2
    assert found


@pytest.mark.parametrize("chain", ["DynUNet"], indirect=True)
def test_shared_tensors_are_merged_once_and_stay_shared(chain):
    _, folder, start, _ = chain
    vectors = f"{folder}/one.safetensors,{folder}/two.safetensors"
    parts = {"method": "dare", "parameters": {"density": 0.5}}
    merge(output=str(folder / "m"), pretrained=str(folder / "start"), vectors=vectors, sparsify=parts)
    state, original = Bundle(folder / "m").state(), start.state_dict()
    assert list(state) == list(original)

    def shared(tensors):
        places = [tensor.data_ptr() for tensor in tensors.values()]
        return [places.index(place) for place in places]

    assert shared(state) == shared(original)
    assert len(set(shared(state))) < 0.6 * len(state)
    size = (folder / "m/models/model.pt").stat().st_size
    assert size < 1.2 * (folder / "start/models/model.pt").stat().st_size
    assert np.isfinite([t.double().sum().item() for t in state.values()]).all()


@pytest.mark.parametrize("chain", ["UNet"], indirect=True)
def test_recalibrated_statistics_are_those_of_the_activations(chain, tmp_path):
    from tools.phantom import phantom
    from tools.recalibrate import recalibrate

    _, folder, _, _ = chain
    phantom(str(tmp_path / "data"), cases=2)
    merge(
        output=str(folder / "m"), pretrained=str(folder / "start"),
        vectors=f"{folder}/one.safetensors,{folder}/two.safetensors",
    )  # fmt: skip
    path = folder / "m/configs/inference.json"
    path.write_text(path.read_text().replace("[96, 96, 96]", "[32, 32, 32]"))
    options = {"images": str(tmp_path / "data"), "scans": 2, "patches": 4, "batch_size": 8}
    recalibrate(str(folder / "m"), output=str(folder / "new"), **options)
    before, after = Bundle(folder / "m").state(), Bundle(folder / "new").state()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(("running_mean", "running_var"))}

    bundle, seen = Bundle(folder / "new"), []
    loaded = network("UNet", 4)
    loaded.load_state_dict(after)
    first = next(m for m in loaded.modules() if isinstance(m, torch.nn.BatchNorm3d))
    first.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    from tools.recalibrate import patches_of
    from tools.scans import choose_scans

    with torch.inference_mode():
        for batch in patches_of(bundle, choose_scans(tmp_path / "data", bundle, "", "", 2, 0), 4, 8, 0):
            loaded(batch)
    means = torch.stack([x.mean((0, 2, 3, 4)) for x in seen]).mean(0)
    torch.testing.assert_close(first.running_mean, means, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chain", ["SegResNet"], indirect=True)
def test_a_network_without_statistics_is_not_recalibrated(chain):
    from tools.recalibrate import recalibrate

    with pytest.raises(UserError, match="keeps no running statistics"):
        recalibrate(str(chain[1] / "start"), str(chain[1]), str(chain[1] / "new"))
