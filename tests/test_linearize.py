"""A linearised starting point through the whole chain: trained by MONAI, merged, and exactly the sum of what its tasks do."""

import shutil

import pytest
import torch

from tests.conftest import here, run, train
from tools.bundle import Bundle, read_json, write_json
from tools.diff import diff
from tools.merge import merge
from tools.task_vector import TaskVector


@pytest.fixture(scope="module")
def linear(chain, tmp_path_factory):
    """The chain's starting point, linearised, and two specialists of it, the first trained as users do."""
    root = tmp_path_factory.mktemp("linear")
    run("tools", "linearize", "--bundle", chain.pretrain, "--output", root / "start")
    for task in ("liver", "spleen"):
        words = ["--pretrained", root / "start", "--dataset_dir", chain.dataset, "--task", task, "--overlay", "small"]
        assert here("tools", "new_task", *words, "--output", root / task).returncode == 0
    train(root / "liver", "--max_epochs", 2, "--frozen_epochs", 1, "--patches_per_volume", 4)
    state = Bundle(
        root / "start"
    ).state()  # the second one is far from the start: there a network is not linear by itself
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if name.startswith("network.") and ".head." not in name:
            state[name] = tensor + 0.3 * tensor.std(correction=0) * torch.randn(tensor.shape, generator=generator)
    state["network.head.weight"] = torch.randn(2, 8, 1, 1, 1, generator=generator) * torch.tensor([0.0, 1.0]).view(
        2, 1, 1, 1, 1
    )
    state["network.head.bias"] = torch.tensor([0.0, 0.5])
    torch.save(state, root / "spleen" / "models" / "model.pt")
    for task in ("liver", "spleen"):
        diff(str(root / "start"), str(root / task), str(root / f"{task}.safetensors"))
    return root


def logits(bundle, image, state=None):
    with bundle.code(), torch.inference_mode():
        network = bundle.parser().get_parsed_content("network_def")
        network.load_state_dict(state or bundle.state())
        return network.eval()(image)


def test_it_segments_as_the_bundle_that_it_was_made_of(chain, linear):
    image = torch.rand(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        logits(Bundle(linear / "start"), image), logits(Bundle(chain.pretrain), image), rtol=1e-3, atol=1e-3
    )
    assert Bundle(linear / "start").labels == Bundle(chain.pretrain).labels


def test_a_task_vector_is_as_large_as_ever_and_training_leaves_the_point_alone(chain, linear):
    plain, own = TaskVector(chain.vectors["liver"]), TaskVector(linear / "liver.safetensors")
    assert [name.removeprefix("network.") for name in own.tensors] == [*plain.tensors]
    start, trained = (Bundle(linear / name).state() for name in ("start", "liver"))
    assert all(torch.equal(start[name], trained[name]) for name in start if name.startswith("point."))
    changed = [name for name in own.tensors if not torch.equal(start[name], trained[name])]
    assert len(changed) > 50


def test_a_merged_network_is_the_sum_of_what_its_tasks_do(chain, linear, tmp_path):
    files = [linear / f"{task}.safetensors" for task in ("liver", "spleen")]
    merge(str(tmp_path / "m"), pretrained=str(linear / "start"), vectors=files, method="task_arithmetic", scale=1.0)
    bundle = Bundle(tmp_path / "m")
    image = torch.rand(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    merged = logits(bundle, image)
    states = {name: Bundle(linear / name).state() for name in ("start", "liver", "spleen")}
    for channel, task in enumerate(("liver", "spleen"), start=1):
        head = {name: tensor for name, tensor in states[task].items() if ".head." in name}
        start, liver, spleen = (logits(Bundle(linear / task), image, states[by] | head)[:, 1] for by in states)
        torch.testing.assert_close(merged[:, channel], liver + spleen - start, rtol=1e-3, atol=1e-3)
        assert (spleen - start).abs().max() > 0.1
    for overlay in ("inference_compile", "inference_trt"):
        assert not (tmp_path / "m" / "configs" / f"{overlay}.json").exists()
    run(
        "monai.bundle", "run", "--config_file", tmp_path / "m/configs/inference.json", "--bundle_root", tmp_path / "m",
        "--dataset_dir", chain.dataset / "imagesTr", "--output_dir", tmp_path / "eval", "--overlap", 0, PYTHONPATH="",
    )  # fmt: skip
    assert len([*(tmp_path / "eval").rglob("*.nii.gz")]) == len([*(chain.dataset / "imagesTr").iterdir()])


def test_vectors_of_the_network_itself_are_refused(chain, linear, tmp_path):
    result = here(
        "tools",
        "merge",
        "--pretrained",
        linear / "start",
        "--vectors",
        chain.vectors["liver"],
        "--output",
        tmp_path / "m",
    )
    assert result.returncode == 1 and "comes from another starting point" in result.stderr
    assert not (tmp_path / "m").exists()


def test_a_specialist_whose_point_was_changed_is_refused(linear, tmp_path):
    shutil.copytree(linear / "spleen", tmp_path / "changed")
    state = Bundle(tmp_path / "changed").state()
    name = next(name for name in state if name.startswith("point."))
    torch.save(state | {name: state[name] + 1}, tmp_path / "changed/models/model.pt")
    result = here(
        "tools",
        "diff",
        "--pretrained",
        linear / "start",
        "--finetuned",
        tmp_path / "changed",
        "--output",
        tmp_path / "v.safetensors",
    )
    assert result.returncode == 1 and f"differ in tensor {name}" in result.stderr


def test_what_cannot_be_linearised_is_refused(chain, linear, tmp_path):
    result = here("tools", "linearize", "--bundle", linear / "start", "--output", tmp_path / "twice")
    assert result.returncode == 1 and "is linearised already" in result.stderr
    shutil.copytree(chain.pretrain, tmp_path / "b")
    config = read_json(tmp_path / "b/configs/inference.json")
    arguments = {"spatial_dims": 3, "in_channels": 1, "out_channels": 4, "channels": [4, 8], "strides": [2]}
    config["network_def"] = {"_target_": "UNet", **arguments, "norm": "batch"}
    write_json(tmp_path / "b/configs/inference.json", config)
    result = here("tools", "linearize", "--bundle", tmp_path / "b", "--output", tmp_path / "c")
    assert result.returncode == 1 and "running statistics" in result.stderr and not (tmp_path / "c").exists()


def test_how_flat_it_is_can_be_measured(chain, linear, tmp_path):
    """The Hessian needs second derivatives of forward derivatives."""
    words = [
        "--bundle",
        linear / "start",
        "--dataset_dir",
        chain.dataset,
        "--part",
        "all",
        "--scans",
        1,
        "--patches",
        1,
    ]
    words += ["--patch_size", 16, "--noise", 0.1, "--seeds", 1, "--output", tmp_path / "flatness"]
    run("tools", "flatness", *words)
    measured = read_json(tmp_path / "flatness/flatness.json")["bundles"]["start"]
    assert measured["hessian_top"] > 0
