"""U-Net Transplant's checkpoints, written as the published code writes them: a pickled class, numbered tensors."""

import sys
from types import ModuleType

import pytest
import torch

from tests.conftest import here
from tools.bundle import Bundle
from tools.bundle_code.residual_unet import ResidualUNet3D
from tools.task_vector import TaskVector

WIDTH = 16


@pytest.fixture(scope="module")
def task_class():
    """A class that pickles as ``task.Task.Task``, as long as its module is there."""
    modules = {"task": ModuleType("task"), "task.Task": ModuleType("task.Task")}

    class Task:
        def __init__(self, **attributes):
            vars(self).update(attributes)

    Task.__module__, Task.__qualname__ = "task.Task", "Task"
    modules["task.Task"].Task = Task
    sys.modules.update(modules)
    yield Task
    for name in modules:
        del sys.modules[name]


def network(seed):
    torch.manual_seed(seed)
    return ResidualUNet3D(width=WIDTH)


def backbone(seed):
    return {name: tensor for name, tensor in network(seed).state_dict().items() if not name.startswith("head")}


def numbered(tensors):
    return torch.nn.ParameterList(tensors.values()).state_dict()


def head(index, channels):
    conv = torch.nn.Conv3d(WIDTH, channels, 1)
    return {f"task_heads.{index}.weight": conv.weight.detach(), f"task_heads.{index}.bias": conv.bias.detach()}


@pytest.fixture(scope="module")
def files(tmp_path_factory, task_class):
    """Kidneys and liver on BTCV from one starting point, that starting point itself, and one trained on teeth."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(1)
    start = backbone(0)
    tasks = {
        "Kidney": (5, "BTCV_Abdomen", {2: 1, 3: 1}),
        "Liver": (5, "BTCV_Abdomen", {6: 1}),
        "Teeth": (8, "ToothFairy2", {11: 1, 48: 1}),
    }
    for seed, (name, (index, dataset, predicted)) in enumerate(tasks.items(), 1):
        delta = {key: 0.01 * tensor for key, tensor in backbone(seed).items()}
        task = task_class(
            dataset_name=dataset,
            dataset_idx=index,
            task_name=name,
            labels_to_predict=predicted,
            label_ranges={name: [0, 1]},
        )
        content = {
            "pretrain_state_dict": numbered(start),
            "delta_state_dict": numbered(delta),
            "heads_state_dict": head(index, 1),
            "task": [task],
        }
        torch.save(content, folder / f"TaskVector_{name}.pth")
    for name, index, channels in (("AMOS", 0, 16), ("Cui", 4, 42)):
        content = {
            "epoch": 50,
            "backbone_state_dict": {f"_orig_mod.{key}": tensor for key, tensor in start.items()}
            | {"_orig_mod.final_conv.weight": torch.zeros(3, WIDTH, 1, 1, 1)},
            "heads_state_dict": head(index, channels),
            "optimizer_state_dict": {"state": {}, "param_groups": []},
            "scheduler_state_dict": {},
        }
        torch.save(content, folder / f"Pretrain_{name}.pth")
    return folder


def convert(file, output, *options):
    return here("tools", "convert", "--source", "unettransplant", "--checkpoint", file, "--output", output, *options)


def converted(file, output, *options):
    result = convert(file, output, *options)
    assert result.returncode == 0, result.stderr
    return Bundle(output)


def test_a_starting_point(files, tmp_path):
    file = files / "Pretrain_AMOS.pth"
    bundle = converted(file, tmp_path / "amos")
    ours, theirs = bundle.state(), torch.load(file, weights_only=False)
    assert all(ours[name].equal(tensor) for name, tensor in backbone(0).items())
    assert bundle.labels[:2] == ["spleen", "right kidney"]
    assert len(bundle.labels) == 15
    assert not ours["head.weight"][0].any()
    assert ours["head.bias"][1:].equal(theirs["heads_state_dict"]["task_heads.0.bias"][:15])
    account = (bundle.path / "docs/conversion.md").read_text()
    assert "channel 15 of the head` | AMOS has no label 16" in account
    assert "final_conv.weight` | not part of the backbone" in account
    assert bundle.network_def()["width"] == WIDTH
    with torch.no_grad():
        image = torch.rand(1, 1, 16, 16, 16)
        features = network(0).eval()
        features.head = torch.nn.Identity()
        kernel = theirs["heads_state_dict"]["task_heads.0.weight"]
        logits = torch.nn.functional.conv3d(features(image), kernel, theirs["heads_state_dict"]["task_heads.0.bias"])[
            :, :15
        ]
        rule = torch.where(logits.amax(1) < 0, 0, logits.argmax(1) + 1)  # the published one
        assert bundle.network()(image).argmax(1).equal(rule)
    assert here("tools", "verify", bundle.path).returncode == 0


def test_a_starting_point_without_a_head_gets_a_new_one(files, tmp_path):
    content = torch.load(files / "Pretrain_AMOS.pth", weights_only=False)
    torch.save({"backbone_state_dict": content["backbone_state_dict"]}, tmp_path / "trimmed.pth")
    assert "say by --labels" in convert(tmp_path / "trimmed.pth", tmp_path / "out").stderr
    bundle = converted(tmp_path / "trimmed.pth", tmp_path / "out", "--labels", "liver,spleen")
    state = bundle.state()
    assert bundle.labels == ["liver", "spleen"]
    assert not state["head.weight"].any()
    assert all(state[name].equal(tensor) for name, tensor in backbone(0).items())
    assert "new: zeros" in (bundle.path / "docs/conversion.md").read_text()


def test_labels_of_teeth_go_by_their_numbers(files, tmp_path):
    bundle = converted(files / "Pretrain_Cui.pth", tmp_path / "cui")
    assert bundle.labels[:2] == ["lower jawbone", "upper jawbone"]
    assert bundle.labels[-2:] == ["tooth 41", "tooth 42"]
    assert len(bundle.labels) == 36  # 19, 20, 29, 30, 39 and 40 are no teeth
    row = torch.load(files / "Pretrain_Cui.pth", weights_only=False)["heads_state_dict"]["task_heads.4.bias"][20]
    assert bundle.state()["head.bias"][1 + bundle.labels.index("tooth 21")] == row


def test_task_vectors_come_out_as_they_were_and_merge(files, tmp_path):
    start = converted(files / "TaskVector_Kidney.pth", tmp_path / "start", "--part", "start")
    vectors = []
    for name in ("Kidney", "Liver"):
        bundle = converted(files / f"TaskVector_{name}.pth", tmp_path / name)
        assert here("tools", "verify", bundle.path).returncode == 0
        vectors.append(tmp_path / f"{name}.safetensors")
        result = here("tools", "diff", "--pretrained", start.path, "--finetuned", bundle.path, "--output", vectors[-1])
        assert result.returncode == 0, result.stderr
        vector = TaskVector(vectors[-1])
        assert vector.task == name
        delta = torch.load(files / f"TaskVector_{name}.pth", weights_only=False)["delta_state_dict"]
        names = list(backbone(0))
        for number in (9, 10, 55):
            theirs = delta[str(number)]
            torch.testing.assert_close(
                torch.from_numpy(bundle.weights().array(names[number])), backbone(0)[names[number]] + theirs
            )
    kidneys, liver = (Bundle(tmp_path / name) for name in ("Kidney", "Liver"))
    assert kidneys.label_map == {"Kidney": ["right kidney", "left kidney"]}
    assert liver.label_map == {"liver": ["liver"]}
    files_said = ",".join(map(str, vectors))
    result = here(
        "tools", "merge", "--pretrained", start.path, "--vectors", files_said, "--output", tmp_path / "merged"
    )
    assert result.returncode == 0, result.stderr
    assert Bundle(tmp_path / "merged").labels == ["Kidney", "liver"]
    teeth = converted(files / "TaskVector_Teeth.pth", tmp_path / "teeth", "--normalization", "zscore")
    assert teeth.label_map == {"Teeth": ["tooth 11", "tooth 48"]}
    assert teeth.inference["preprocessing"]["transforms"][-1]["_target_"] == "NormalizeIntensityd"


def test_another_starting_point_is_noticed(files, tmp_path):
    other = torch.load(files / "TaskVector_Liver.pth", weights_only=False)
    other["pretrain_state_dict"] = numbered(backbone(7))
    torch.save(other, tmp_path / "other.pth")
    bundle = converted(tmp_path / "other.pth", tmp_path / "liver")
    start = converted(files / "TaskVector_Kidney.pth", tmp_path / "start", "--part", "start")
    result = here(
        "tools",
        "diff",
        "--pretrained",
        start.path,
        "--finetuned",
        bundle.path,
        "--output",
        tmp_path / "liver.safetensors",
    )
    assert result.returncode == 1
    assert "was fine-tuned from the starting point in other.pth" in result.stderr


class Hostile:
    def __reduce__(self):
        return print, ("executed",)


def test_what_is_wrong_is_said_in_one_line(files, tmp_path, task_class, capfd):
    def refused(message, change, *options, name="TaskVector_Liver.pth"):
        content = torch.load(files / name, weights_only=False)
        change(content)
        torch.save(content, tmp_path / name)
        result = convert(tmp_path / name, tmp_path / "out", *options)
        assert result.returncode == 1
        assert len(result.stderr.strip().splitlines()) == 1
        assert message in result.stderr, result.stderr
        assert not (tmp_path / "out").exists()
        assert "executed" not in capfd.readouterr().out + result.stdout

    def same(content):
        pass

    refused("holds something else than weights", lambda c: c["task"].append(Hostile()))
    refused("holds something else than weights", lambda c: vars(c["task"][0]).update(more=Hostile()))
    refused("no backbone_state_dict and no delta_state_dict", lambda c: c.pop("delta_state_dict"))
    refused("does not number its tensors from 0 to 54", lambda c: c["delta_state_dict"].pop("3"))
    refused("tensor 10 has NaN", lambda c: c["delta_state_dict"]["10"].fill_(float("nan")))
    refused(
        "tensor 2, encoders.0.basic_module.conv2.groupnorm.weight",
        lambda c: c["delta_state_dict"].update({"2": torch.zeros(5)}),
    )
    refused("labels for 0 channels, its head has 1", lambda c: c["task"].clear())
    refused("has no heads_state_dict", lambda c: c.pop("heads_state_dict"))
    refused("only task_heads.0 to 8 are known", lambda c: c.update(heads_state_dict=head(12, 1)))
    refused(
        "heads of BTCV_Abdomen, ToothFairy2: choose one by --dataset",
        lambda c: c["heads_state_dict"].update(head(8, 1)),
    )
    refused("names 2 channels, the head of", same, "--labels", "a,b")
    refused("--part must be one of specialist, start", same, "--part", "merged")
    refused("--part must be one of start", same, "--part", "specialist", name="Pretrain_AMOS.pth")
    refused(
        "encoders.3.extra is missing, or too much",
        lambda c: c["backbone_state_dict"].update({"encoders.3.extra": torch.ones(1)}),
        name="Pretrain_AMOS.pth",
    )
    refused("must be one of percentile, zscore", same, "--normalization", "hu")
    named = converted(files / "TaskVector_Liver.pth", tmp_path / "named", "--labels", "{hepar: 6}")
    assert named.label_map == {"hepar": [6]}
