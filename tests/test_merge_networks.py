"""diff and merge on MONAI's stock networks: heads, shared tensors, running statistics and counters all come out right."""

import json
import shutil
from functools import cache
from importlib.util import find_spec

import nibabel
import numpy as np
import pytest
import torch

from tests.conftest import ROOT, run
from tools.bundle import Bundle, write_json
from tools.diff import diff
from tools.distil import Student, distil
from tools.edit import edit
from tools.errors import UserError
from tools.heads import canonical_head
from tools.merge import merge
from tools.network import describe
from tools.specialists import rebuild
from tools.task_vector import TaskVector

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
    "UNet with residual units": {
        "_target_": "UNet",
        **COMMON,
        "channels": [4, 8, 16],
        "strides": [2, 2],
        "num_res_units": 2,
        "norm": "batch",
    },
    "UNETR": {
        "in_channels": 1,
        "img_size": [32, 32, 32],
        "feature_size": 8,
        "hidden_size": 48,
        "mlp_dim": 96,
        "num_heads": 4,
    },
    "VNet": {**COMMON, "act": "prelu", "bias": True},
    "PlainConvUNet": {
        "_target_": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "input_channels": 1,
        "n_stages": 3,
        "features_per_stage": [4, 8, 16],
        "conv_op": {"_target_": "torch.nn.Conv3d", "_mode_": "callable"},
        "kernel_sizes": 3,
        "strides": [1, 2, 2],
        "n_conv_per_stage": 2,
        "n_conv_per_stage_decoder": 2,
        "conv_bias": True,
        "norm_op": "$torch.nn.InstanceNorm3d",
        "norm_op_kwargs": {"affine": True},
        "nonlin": "$torch.nn.LeakyReLU",
        "deep_supervision": True,
    },
}
NNUNET = pytest.param(
    "PlainConvUNet",
    marks=pytest.mark.skipif(
        find_spec("dynamic_network_architectures") is None, reason="dynamic-network-architectures is not installed"
    ),
)
EVERY = [NNUNET if kind == "PlainConvUNet" else kind for kind in NETWORKS]
RESIDUAL = "UNet with residual units"  # its head has two layers


def network_def(kind, out_channels):
    argument = "num_classes" if kind == "PlainConvUNet" else "out_channels"
    return {"_target_": kind, argument: out_channels, **NETWORKS[kind]}


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
        if name.endswith(("running_mean", "running_var")):
            buffer += torch.rand_like(buffer)
        elif name.endswith("num_batches_tracked"):
            buffer += seed
    return one


def with_sigmoid_head(kind, one):
    """As our own training leaves it: the background's logit is zero."""
    structure, state = described(kind), one.state_dict()
    head = {name: torch.from_numpy(canonical_head(structure, name, state[name].numpy())) for name in structure.head}
    one.load_state_dict(state | head)


@cache
def described(kind):
    return describe(network_def(kind, 2))


@pytest.fixture(scope="module")
def chain(tmp_path_factory, request):
    """A starting point, two specialists (one with a sigmoid head in canonical form, one with a softmax head)."""
    kind = request.param
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    start = network(kind, 4)
    folders = {"start": bundle(folder / "start", kind, start.state_dict(), ["x", "y", "z"])}
    tasks = {"one": ["liver"], "two": ["spleen", "aorta"]}
    networks = {}
    for seed, (task, labels) in enumerate(tasks.items(), start=1):
        networks[task] = fine_tuned(kind, start.state_dict(), labels, seed)
        if task == "one":
            with_sigmoid_head(kind, networks[task])
        folders[task] = bundle(folder / task, kind, networks[task].state_dict(), labels)
        diff(str(folders["start"]), str(folders[task]), str(folder / f"{task}.safetensors"), task)
    return kind, folder, start, networks


def outputs(one, image):
    """The logits, and behind them those of deep supervision where the network returns them."""
    with torch.inference_mode():
        output = one(image)
    return output if isinstance(output, list) else [output]


def outputs_of(merged, image):
    merged = Bundle(merged)
    with merged.code():
        loaded = merged.parser().get_parsed_content("network_def")
        loaded.load_state_dict(merged.state(), strict=True)
        return outputs(loaded.eval(), image)


@pytest.mark.parametrize("chain", EVERY, indirect=True)
def test_a_merged_network_is_each_specialist_when_its_backbone_is(chain, tmp_path):
    kind, folder, _, networks = chain
    size = 64 if kind == "SwinUNETR" else 32
    image = torch.rand(1, 1, size, size, size, generator=torch.Generator().manual_seed(0))
    vectors = f"{folder}/one.safetensors,{folder}/two.safetensors"
    organs = {"one": slice(1, 2), "two": slice(2, 4)}
    for task, scale in (("one", (1, 0)), ("two", (0, 1))):
        options = {"method": "task_arithmetic", "scale": scale}
        merge(output=str(tmp_path / f"m_{task}"), pretrained=str(folder / "start"), vectors=vectors, **options)
        merged = outputs_of(tmp_path / f"m_{task}", image)
        for got, own_logits in zip(merged, outputs(networks[task], image), strict=True):
            assert own_logits[:, 0].any() == (task == "two")
            margins = own_logits[:, 1:] - own_logits[:, :1]
            assert got.shape[1] == 4 and (got[:, 0] == 0).all()
            torch.testing.assert_close(got[:, organs[task]], margins, rtol=1e-3, atol=1e-4)
            channels = [0, *range(4)[organs[task]]]
            agree = (got[:, channels].argmax(1) == own_logits.argmax(1)).float().mean()
            assert agree > 0.9999  # the softmax decision is kept


@pytest.mark.parametrize("chain", ["DynUNet", "UNet"], indirect=True)
@pytest.mark.parametrize(
    ("method", "parameters", "shares"),
    [
        ("ties", {}, (0.5, 0.5)),
        ("average", {"weights": (3, 1)}, (0.75, 0.25)),
        ("task_arithmetic", {"scale": (0.2, -0.6)}, (0.25, 0.75)),
        ("slerp", {"t": 0.1}, (0.9, 0.1)),
        ("task_arithmetic", {"scale": 0}, (0, 0)),
    ],
)
def test_statistics_are_averaged_as_the_tasks_are_and_counters_are_the_largest(
    chain, tmp_path, method, parameters, shares
):
    _, folder, start, networks = chain
    vectors = f"{folder}/one.safetensors,{folder}/two.safetensors"
    merge(output=str(tmp_path / "m"), pretrained=str(folder / "start"), vectors=vectors, method=method, **parameters)
    merged, before = Bundle(tmp_path / "m").state(), start.state_dict()
    states = [networks[task].state_dict() for task in ("one", "two")]
    found = 0
    for name, tensor in merged.items():
        if name.endswith(("running_mean", "running_var")):
            means = sum(share * state[name] for share, state in zip(shares, states, strict=True))
            torch.testing.assert_close(tensor, means if any(shares) else before[name])
            found += 1
        elif name.endswith("num_batches_tracked"):
            assert tensor.shape == () and tensor == max(state[name] for state in states) == 2
    assert found


@pytest.mark.parametrize("chain", ["DynUNet"], indirect=True)
def test_shared_tensors_are_merged_once_and_stay_shared(chain, tmp_path):
    _, folder, start, _ = chain
    vectors = f"{folder}/one.safetensors,{folder}/two.safetensors"
    parts = {"method": "dare", "parameters": {"density": 0.5}}
    merge(output=str(tmp_path / "m"), pretrained=str(folder / "start"), vectors=vectors, sparsify=parts)
    state, original = Bundle(tmp_path / "m").state(), start.state_dict()
    assert list(state) == list(original)

    def shared(tensors):
        places = [tensor.data_ptr() for tensor in tensors.values()]
        return [places.index(place) for place in places]

    assert shared(state) == shared(original)
    assert len(set(shared(state))) < 0.6 * len(state)
    size = (tmp_path / "m/models/model.pt").stat().st_size
    assert size < 1.2 * (folder / "start/models/model.pt").stat().st_size
    assert np.isfinite([t.double().sum().item() for t in state.values()]).all()


@pytest.mark.parametrize("chain", ["UNet"], indirect=True)
def test_recalibrated_statistics_are_those_of_the_activations(chain, tmp_path, capsys):
    from tools.phantom import phantom
    from tools.recalibrate import recalibrate

    _, folder, _, _ = chain
    phantom(str(tmp_path / "data"), cases=2)
    merge(
        output=str(tmp_path / "m"), pretrained=str(folder / "start"),
        vectors=f"{folder}/one.safetensors,{folder}/two.safetensors",
    )  # fmt: skip
    path = tmp_path / "m/configs/inference.json"
    path.write_text(path.read_text().replace("[96, 96, 96]", "[32, 32, 32]"))
    options = {"images": str(tmp_path / "data"), "scans": 2, "patches": 4, "batch_size": 8}
    recalibrate(str(tmp_path / "m"), output=str(tmp_path / "new"), **options)
    before, after = Bundle(tmp_path / "m").state(), Bundle(tmp_path / "new").state()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(("running_mean", "running_var"))}

    bundle, seen = Bundle(tmp_path / "new"), []
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
    recalibrate(
        str(tmp_path / "m"), output=str(tmp_path / "deep" / "er"), **options
    )  # its recipe still finds the vectors
    edit(str(tmp_path / "deep" / "er"), str(tmp_path / "edited"), remove="two")
    assert "was recalibrated, which a merge undoes" in capsys.readouterr().out


@pytest.mark.parametrize("chain", ["DynUNet"], indirect=True)
def test_the_plane_of_networks_whose_heads_have_aliases(chain, tmp_path):
    from tools.flatness import flatness
    from tools.phantom import phantom

    _, folder, _, _ = chain
    phantom(str(tmp_path / "data"), cases=2)
    for name in ("start", "one", "two"):
        shutil.copytree(folder / name, tmp_path / name)
        (tmp_path / name / "configs/train.json").unlink()
    corners = ",".join(str(tmp_path / name) for name in ("start", "one", "two"))
    quick = {"scans": 1, "patches": 1, "patch_size": 16, "points": 2, "labels": {"aorta": "stomach"}, "part": "all"}
    flatness(str(tmp_path / "data"), str(tmp_path / "plane"), plane=corners, **quick)
    assert np.isfinite(json.loads((tmp_path / "plane/flatness.json").read_text())["plane"]["loss"]).all()


@pytest.mark.parametrize("chain", [NNUNET], indirect=True)
def test_a_network_of_shared_tensors_that_returns_a_list_is_distilled_and_segments(chain, tmp_path):
    from tools.evaluate import find_cases, segment
    from tools.phantom import phantom

    _, folder, _, networks = chain
    phantom(str(tmp_path / "data"), cases=1)
    path = folder / "start/configs/inference.json"
    path.write_text(path.read_text().replace("[96, 96, 96]", "[32, 32, 32]"))
    vectors = ",".join(str(folder / f"{task}.safetensors") for task in networks)
    quick = {"scans": 1, "patches": 4, "steps": 1, "batch_size": 1}
    distil(str(folder / "start"), vectors, str(tmp_path / "data"), str(tmp_path / "m"), **quick)
    image = torch.rand(1, 1, 32, 32, 32)
    teachers = rebuild(str(folder / "start"), vectors.split(",")).networks
    for teacher, task in zip(teachers, networks, strict=True):
        own = outputs(networks[task], image)[0]
        own = own - own[:, :1] if task == "two" else own  # a softmax head
        with torch.inference_mode():
            torch.testing.assert_close(teacher(image)[0], own, rtol=1e-3, atol=1e-4)
    cases = find_cases(tmp_path / "data", "all", "", 0)
    ((_, prediction, _),) = segment(Bundle(tmp_path / "m"), cases)
    assert prediction.shape == nibabel.load(cases["phantom_000"]["label"]).shape
    assert set(np.unique(prediction)) <= {0, 1, 2, 3}


@pytest.mark.parametrize("chain", ["SegResNet"], indirect=True)
def test_a_network_without_statistics_is_not_recalibrated(chain, tmp_path):
    from tools.recalibrate import recalibrate

    with pytest.raises(UserError, match="keeps no running statistics"):
        recalibrate(str(chain[1] / "start"), str(chain[1]), str(tmp_path / "new"))


@pytest.mark.parametrize("chain", [RESIDUAL], indirect=True)
def test_tasks_with_heads_of_several_layers_come_and_go(chain, tmp_path):
    _, folder, start, networks = chain
    one, two = (str(folder / f"{task}.safetensors") for task in networks)
    merge(output=str(tmp_path / "m"), pretrained=str(folder / "start"), vectors=one)
    stock = Bundle(tmp_path / "m").inference["network_def"]
    assert stock == network_def(RESIDUAL, 2)  # alone it needs nothing beside the network itself
    edit(str(tmp_path / "m"), str(tmp_path / "both"), add=two)
    merge(output=str(tmp_path / "scratch"), pretrained=str(folder / "start"), vectors=f"{one},{two}")
    files = [(tmp_path / name / "models/model.pt").read_bytes() for name in ("both", "scratch")]
    assert files[0] == files[1]
    both = Bundle(tmp_path / "both")
    assert list(both.state()) == list(start.state_dict())
    assert both.network_def() == network_def(RESIDUAL, 5)  # three organs and the background of each task
    edit(str(tmp_path / "both"), str(tmp_path / "less"), remove="two")
    assert Bundle(tmp_path / "less").inference["network_def"] == stock


@pytest.mark.parametrize("chain", [RESIDUAL], indirect=True)
def test_a_merge_of_heads_of_several_layers_is_a_starting_point_too(chain, tmp_path):
    from tools.new_task import new_task
    from tools.phantom import phantom

    _, folder, _, _ = chain
    vectors = f"{folder}/one.safetensors,{folder}/two.safetensors"
    merge(output=str(tmp_path / "m"), pretrained=str(folder / "start"), vectors=vectors)
    structure = Bundle(tmp_path / "m").structure()
    assert structure == described(RESIDUAL)
    phantom(str(tmp_path / "data"), cases=2)
    new_task(str(tmp_path / "m"), str(tmp_path / "data"), str(tmp_path / "task"), task="liver")
    task = Bundle(tmp_path / "task")
    assert task.network_def() == network_def(RESIDUAL, 2)
    from monai.bundle import ConfigParser

    parser = ConfigParser(json.loads((tmp_path / "task/configs/train.json").read_text()))
    parser.update({"bundle_root": str(tmp_path / "task")})
    with task.code():
        loaded = parser.get_parsed_content("network_def")
        parser.get_parsed_content("optimizer")  # loads the backbone first
    state, merged = loaded.state_dict(), Bundle(tmp_path / "m").state()
    assert all(torch.equal(state[name], merged[name]) for name in state if name not in structure.head)
    logits = loaded.eval()(torch.rand(1, 1, 16, 16, 16))
    assert not logits[:, 0].any() and logits[:, 1].std() > 0
    logits.square().sum().backward()
    assert all(loaded.get_parameter(n).grad.any() for n, _ in loaded.named_parameters() if n in structure.head)


@pytest.mark.parametrize("chain", [RESIDUAL], indirect=True)
def test_a_student_with_a_head_of_several_layers_is_the_merge(chain, tmp_path):
    _, folder, _, networks = chain
    vectors = [str(folder / f"{task}.safetensors") for task in networks]
    start = Bundle(folder / "start")
    student = Student(start, start.weights(), [TaskVector(path) for path in vectors])
    merge(output=str(tmp_path / "m"), pretrained=str(folder / "start"), vectors=vectors)
    image = torch.rand(1, 1, 16, 16, 16)
    (wanted,) = outputs_of(tmp_path / "m", image)
    got = student(image, student.coefficients, {})
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, rtol=0.1, atol=0.05 * float(wanted.abs().max()))  # bfloat16
    with torch.inference_mode():
        teacher, logits = rebuild(str(folder / "start"), vectors).networks[1](image), networks["two"](image)
    torch.testing.assert_close(teacher, logits - logits[:, :1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("chain", ["VNet"], indirect=True)
def test_monai_verifies_and_exports_a_merge_of_heads_of_several_layers(chain, tmp_path):
    _, folder, _, _ = chain
    vectors = f"{folder}/one.safetensors,{folder}/two.safetensors"
    merge(output=str(tmp_path / "m"), pretrained=str(folder / "start"), vectors=vectors)
    configs = tmp_path / "m/configs"
    files = ["--config_file", configs / "inference.json", "--meta_file", configs / "metadata.json"]
    run("monai.bundle", "verify_net_in_out", "network_def", "--n", 2, *files, cwd=tmp_path / "m", PYTHONPATH="")
    weights = ["--ckpt_file", tmp_path / "m/models/model.pt", "--filepath", tmp_path / "m.ts"]
    run("monai.bundle", "ckpt_export", "network_def", *weights, *files, cwd=tmp_path / "m", PYTHONPATH="")
    image = torch.rand(1, 1, 16, 16, 16)
    torch.testing.assert_close([torch.jit.load(tmp_path / "m.ts")(image)], outputs_of(tmp_path / "m", image))


@pytest.mark.parametrize("chain", ["UNet"], indirect=True)
def test_one_task_alone_keeps_its_statistics_by_every_method_of_pairs(chain, tmp_path):
    _, folder, _, networks = chain
    for method in ("slerp", "nuslerp"):
        words = {"pretrained": str(folder / "start"), "vectors": f"{folder}/one.safetensors", "method": method}
        merge(output=str(tmp_path / method), **words)
        merged, own = Bundle(tmp_path / method).state(), networks["one"].state_dict()
        names = [name for name in own if name.endswith(("running_mean", "running_var"))]
        assert names and all(torch.allclose(merged[name], own[name]) for name in names)
