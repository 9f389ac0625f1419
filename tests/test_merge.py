"""diff and merge on trained bundles: exactness, lineage, refusals, and nothing half-written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file

from tests.conftest import ROOT, here, run
from tools.bundle import Bundle, read_json, write_json
from tools.errors import UserError
from tools.heads import stacked_head
from tools.recipe import Recipe
from tools.task_vector import FORMAT, TaskVector
from tools.weights_file import WeightsFile


def logits(bundle, x):
    bundle = Bundle(bundle)
    with bundle.code(), torch.inference_mode():
        network = bundle.parser().get_parsed_content("network_def")
        network.load_state_dict(bundle.state())
        return network.eval()(x)


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 1, 24, 24, 24, generator=torch.Generator().manual_seed(0))


def merge(chain, output, tasks, *flags, check=True):
    vectors = ",".join(str(chain.vectors[task]) for task in tasks)
    return run(
        "tools", "merge", "--pretrained", chain.pretrain, "--vectors", vectors, "--output", output, *flags, check=check
    )


def test_one_vector_at_scale_one_is_the_specialist(chain, tmp_path, image):
    merge(chain, tmp_path / "m", ["liver"], "--method", "task_arithmetic", "--scale", 1)
    merged, specialist = Bundle(tmp_path / "m").state(), Bundle(chain.specialists["liver"]).state()
    assert all(torch.equal(merged[name], specialist[name]) for name in specialist)  # bit for bit, so predictions too
    assert torch.equal(logits(tmp_path / "m", image), logits(chain.specialists["liver"], image))


def test_scale_zero_is_the_starting_point_with_the_new_heads(chain, tmp_path):
    merge(chain, tmp_path / "m", ["liver", "spleen"], "--method", "task_arithmetic", "--scale", 0)
    before, after = Bundle(chain.pretrain).state(), Bundle(tmp_path / "m").state()
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("head."))
    heads = [Bundle(chain.specialists[task]).state()["head.weight"][1:] for task in ("liver", "spleen")]
    assert torch.equal(after["head.weight"], torch.cat([torch.zeros(1, 8, 1, 1, 1), *heads]))


def test_average_is_the_mean_of_the_specialists(chain):
    state = Bundle(chain.merged).state()
    specialists = [Bundle(folder).state() for folder in chain.specialists.values()]
    for name in state:
        if not name.startswith("head."):
            torch.testing.assert_close(state[name], sum(s[name] for s in specialists) / 2, rtol=1e-5, atol=1e-6)


def test_stacked_heads_keep_every_tasks_own_logits(chain, image):
    """With one backbone, the merged head gives each specialist's logits, channel by channel."""
    heads = [np.random.default_rng(i).standard_normal((1 + i, 8, 1, 1, 1)).astype(np.float32) for i in (1, 2)]
    for head in heads:
        head[0] = 0
    features = np.random.default_rng(0).standard_normal((8, 100))  # float64: products of float32 are exact in it
    stacked = stacked_head(heads, (0,))[..., 0, 0, 0] @ features
    separate = [(head[1:, :, 0, 0, 0] @ features) for head in heads]
    np.testing.assert_allclose(stacked, np.concatenate([np.zeros((1, 100)), *separate]), rtol=1e-6)


def test_merged_bundle_records_where_it_comes_from(chain, tmp_path):
    metadata = Bundle(chain.merged).metadata
    assert metadata["network_data_format"]["outputs"]["pred"]["channel_def"] == {
        "0": "background",
        "1": "liver",
        "2": "spleen",
    }
    lineage = metadata["lineage"]
    assert lineage["method"] == "average"
    assert [v["task"] for v in lineage["vectors"]] == ["liver", "spleen"]
    assert lineage["pretrained_sha256"] == TaskVector(chain.vectors["liver"]).facts.pretrained_sha256
    run("tools", "merge", "--recipe", chain.merged / "docs" / "recipe.yaml", "--output", tmp_path / "again")
    assert (tmp_path / "again/models/model.pt").read_bytes() == (chain.merged / "models/model.pt").read_bytes()


def test_inspect_reads_all_of_them(chain):
    text = run("tools", "inspect", chain.merged, *chain.vectors.values(), "--json").stdout
    facts = json.loads(text)
    assert [item["kind"] for item in facts["items"]] == ["bundle", "task vector", "task vector"]
    assert facts["conflicts"]["tasks"] == ["liver", "spleen"]
    assert facts["conflicts"]["cosine"][0][0] == pytest.approx(1, abs=1e-5)
    assert 0 < facts["conflicts"]["sign_conflict"][0][1] < 1


def refused(result, *words):
    """One clear line, exit code 1, no traceback."""
    assert result.returncode == 1, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0], lines[0]


def changed(chain, tmp_path, change):
    """A copy of the liver vector with something changed."""
    tensors = load_file(chain.vectors["liver"])
    from safetensors import safe_open

    with safe_open(chain.vectors["liver"], framework="numpy") as file:
        metadata = dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, tmp_path / "changed.safetensors", metadata=metadata)
    return tmp_path / "changed.safetensors"


def test_vectors_of_another_starting_point_are_refused(chain, tmp_path):
    def other(tensors, metadata):
        facts = json.loads(metadata[FORMAT])
        facts.update(pretrained_sha256="0" * 64, pretrained_name="elsewhere")
        metadata[FORMAT] = json.dumps(facts)

    path = changed(chain, tmp_path, other)
    arguments = ["tools", "merge", "--pretrained", chain.pretrain, "--vectors", f"{path},{chain.vectors['spleen']}"]
    result = run(*arguments, "--output", tmp_path / "m", check=False)
    refused(result, "changed.safetensors", "another starting point", "elsewhere 000000000000")
    assert os.listdir(tmp_path) == ["changed.safetensors"]
    run(*arguments, "--output", tmp_path / "m", "--other_start")
    run("tools", "merge", "--recipe", tmp_path / "m/docs/recipe.yaml", "--output", tmp_path / "n")
    assert (tmp_path / "m/models/model.pt").read_bytes() == (tmp_path / "n/models/model.pt").read_bytes()

    def forged(tensors, metadata):  # it says the right starting point, and has the checksums of another
        facts = json.loads(metadata[FORMAT])
        first = next(iter(facts["tensors"].values()))
        first["pretrained"] = ["0" * 16 for _ in first["pretrained"]]
        metadata[FORMAT] = json.dumps(facts)

    path = changed(chain, tmp_path, forged)
    vectors = f"{chain.vectors['spleen']},{path}"
    refused(
        here("tools", "merge", "--pretrained", chain.pretrain, "--vectors", vectors, "--output", tmp_path / "o"),
        "another start",
    )
    assert "come from different starting points" in run("tools", "inspect", path, chain.vectors["spleen"]).stdout


def test_damaged_vectors_are_refused(chain, tmp_path):
    whole = chain.vectors["liver"].read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for content, words in (
        (whole[: len(whole) // 2], ["is damaged"]),
        (b"\xff" * 8 + whole[8:], ["is damaged"]),
        (b"", ["is damaged"]),
        (b"not a tensor file", ["is damaged"]),
        (whole[:8] + b"{" * header + whole[8 + header :], ["is damaged"]),
    ):
        (tmp_path / "bad.safetensors").write_bytes(content)
        arguments = [
            "--pretrained",
            chain.pretrain,
            "--vectors",
            tmp_path / "bad.safetensors",
            "--output",
            tmp_path / "m",
        ]
        refused(run("tools", "merge", *arguments, check=False), "bad.safetensors", *words)
    save_file({"x": np.zeros(3)}, tmp_path / "plain.safetensors")
    with pytest.raises(UserError, match="not a task vector"):
        TaskVector(tmp_path / "plain.safetensors")

    def slightly(tensors, metadata):
        tensors["backbone/encoders.0.basic_module.conv1.bias"][3] += 1e-6

    bad = changed(chain, tmp_path, slightly)
    arguments = ["--pretrained", chain.pretrain, "--vectors", bad, "--output", tmp_path / "m"]
    words = ["changed.safetensors is damaged", "tensor encoders.0.basic_module.conv1.bias"]
    refused(run("tools", "merge", *arguments, check=False), *words)
    assert sorted(os.listdir(tmp_path)) == ["bad.safetensors", "changed.safetensors", "plain.safetensors"]


class Hostile:
    def __reduce__(self):
        return (os.system, ("touch /tmp/this-must-not-exist",))


def test_damaged_and_hostile_checkpoints_are_refused(chain, tmp_path):
    bundle = tmp_path / "start"
    shutil.copytree(chain.pretrain, bundle)
    model = bundle / "models" / "model.pt"
    whole = model.read_bytes()
    state = Bundle(chain.pretrain).state()

    def attempt(*words):
        arguments = ["--pretrained", bundle, "--vectors", chain.vectors["liver"], "--output", tmp_path / "m"]
        refused(run("tools", "merge", *arguments, check=False), *words)
        assert not (tmp_path / "m").exists()

    model.write_bytes(whole[: len(whole) // 2])
    attempt("model.pt", "not a readable file of weights")
    torch.save({**state, "evil": Hostile()}, model)
    attempt("model.pt", "not a readable file of weights")
    assert not os.path.exists("/tmp/this-must-not-exist")
    torch.save({**state, "head.bias": state["head.bias"] * float("nan")}, model)
    attempt("head.bias has NaN")
    torch.save({name: tensor for name, tensor in state.items() if "decoders.2" not in name}, model)
    attempt("another starting point")
    model.unlink()
    attempt("model.pt not found")


def test_two_vectors_of_one_organ_are_refused(chain, tmp_path):
    refused(merge(chain, tmp_path / "m", ["liver", "liver"], check=False), "both", "task 'liver'", "diff --task")
    again = tmp_path / "again.safetensors"
    words = ["--pretrained", chain.pretrain, "--finetuned", chain.specialists["liver"], "--task", "again"]
    run("tools", "diff", *words, "--output", again)
    words = ["--pretrained", chain.pretrain, "--vectors", f"{chain.vectors['liver']},{again}"]
    refused(here("tools", "merge", *words, "--output", tmp_path / "m"), "both", "label 'liver'")


def test_existing_output_is_kept_unless_told_otherwise(chain, tmp_path):
    refused(merge(chain, chain.merged, ["liver"], check=False), "exists", "--overwrite")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refused(merge(chain, tmp_path / "mine", ["liver"], "--overwrite", check=False), "not an older output")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    words = ["--vectors", chain.vectors["liver"], "--overwrite"]
    for output in (chain.pretrain, chain.vectors["liver"]):
        before = sorted(output.rglob("*"))
        refused(here("tools", "merge", "--pretrained", chain.pretrain, *words, "--output", output), "would replace")
        assert sorted(output.rglob("*")) == before
    words = ["--pretrained", chain.pretrain, "--finetuned", chain.specialists["liver"], "--overwrite"]
    refused(here("tools", "diff", *words, "--output", chain.merged), "is to be a file, and is a folder")
    assert (chain.merged / "models/model.pt").is_file()
    run(
        "tools",
        "merge",
        "--pretrained",
        chain.pretrain,
        "--vectors",
        chain.vectors["liver"],
        "--output",
        2024,
        cwd=tmp_path,
    )
    assert (tmp_path / "2024" / "models" / "model.pt").is_file()


def test_the_plan_of_a_merge_without_the_merge(chain, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "pretrained": str(chain.pretrain),
                "vectors": [str(path) for path in chain.vectors.values()],
                "method": "task_arithmetic",
                "overrides": [{"tensors": "decoders.*", "parameters": {"scale": 0.1}}],
                "exclude": ["encoders.0.*"],
                "sparsify": "dare",
                "postprocess": ["lines"],
                "dtype": "float16",
                "seed": 7,
            }
        )
    )
    lines = run("tools", "merge", "--recipe", tmp_path / "recipe.yaml", "--dry_run").stdout.splitlines()
    assert lines[0] == "task_arithmetic, 2 task vectors, output channels: background, liver, spleen"
    assert lines[1].startswith("first dare: density=") and lines[1].endswith("seed=7")
    assert lines[2].startswith("then lines: ") and lines[3] == "dtype: float16"
    rows = {line.split()[0]: line for line in lines[4:]}
    assert "starting point" in rows["encoders.0"] and "scale" not in rows["encoders.0"]
    assert rows["encoders.1"].endswith("scale=0.4") and rows["decoders.0"].endswith("scale=0.1")
    assert os.listdir(tmp_path) == ["recipe.yaml"]
    flags = ["--method", "average", "--weights", 0, "--dry_run"]
    refused(merge(chain, tmp_path / "m", ["liver"], *flags, check=False), "at least one of the weights must be above 0")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"exclude": ["encodr"]}, "line 6: exclude: no tensor is called 'encodr', did you mean 'encoder'?"),
        (
            {"exclude": ["decoders.0.*", "encodrs.1.*"]},
            "line 7: exclude: no tensor is called 'encodrs.1.*', did you mean 'encoders.1.*'?",
        ),
        ({"include": ["head"]}, "line 6: include: 'head' is the head, which is not merged: each task keeps its own"),
        (
            {"overrides": [{"tensors": "head.*", "parameters": {}}]},
            "line 6: overrides: 'head.*' is the head",
        ),
    ],
)
def test_a_pattern_that_means_nothing_is_a_mistake(chain, tmp_path, entry, message):
    recipe = {"pretrained": str(chain.pretrain), "vectors": [str(chain.vectors["liver"])], "method": "average", **entry}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    result = here("tools", "merge", "--recipe", tmp_path / "recipe.yaml", "--dry_run")
    assert result.returncode == 1 and f"recipe.yaml, {message}" in result.stderr


def test_merged_weights_in_half_precision(chain, tmp_path):
    whole = Bundle(chain.merged).state()
    for dtype in (torch.float16, torch.bfloat16):
        recipe = replace(Recipe.read(chain.merged / "docs" / "recipe.yaml"), dtype=str(dtype)[6:])
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.as_dict()))
        run("tools", "merge", "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "m", "--overwrite")
        half = Bundle(tmp_path / "m").state()
        assert all(torch.equal(half[name], tensor.to(dtype)) for name, tensor in whole.items())


def test_diff_merge_and_inspect_need_neither_torch_nor_monai(chain, tmp_path):
    """Their seconds of imports, and gigabytes of installation, are for training and running networks."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not installed here')")
    (tmp_path / "monai.py").write_text("raise ImportError('monai is not installed here')")
    path = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    vector, bundle = tmp_path / "v.safetensors", tmp_path / "m"
    specialist = chain.specialists["liver"]
    run("tools", "diff", "--pretrained", chain.pretrain, "--finetuned", specialist, "--output", vector, **path)
    assert vector.read_bytes() == chain.vectors["liver"].read_bytes()
    run("tools", "merge", "--pretrained", chain.pretrain, "--vectors", vector, "--output", bundle, **path)
    run("tools", "inspect", vector, bundle, specialist, chain.pretrain, **path)
    names = [line.split()[0] for line in run("tools", "merge", "--list", **path).stdout.splitlines()]
    assert names[:3] == ["average", "task_arithmetic", "ties"]
    assert "share of each task vector's entries" in run("tools", "merge", "--list", "--method", "ties", **path).stdout
    assert "Model soups" in run("tools", "merge", "--list", "--method", "average", **path).stdout


def test_an_unknown_flag_is_refused_before_anything_happens(chain, tmp_path):
    refused(merge(chain, tmp_path / "m", ["liver"], "--sclae", 0.5, check=False), "--sclae", "did you mean 'scale'")
    refused(merge(chain, tmp_path / "m", ["liver"], "--method", "ties", "--density", 7, check=False), "density")
    refused(
        merge(chain, tmp_path / "m", ["liver"], "--vectors", "other", check=False), "--vectors is there twice", "commas"
    )
    refused(run("tools", "merg", check=False), "did you mean 'merge'")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_merge_leaves_the_old_output_untouched(chain, tmp_path, stop):
    output = tmp_path / "merged"
    shutil.copytree(chain.merged, output)
    before = {p.relative_to(output): p.read_bytes() for p in sorted(output.rglob("*")) if p.is_file()}
    vectors = ",".join(map(str, chain.vectors.values()))
    words = ["merge", "--pretrained", chain.pretrain, "--vectors", vectors, "--output", output, "--overwrite"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tools", *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell passes "ignore" on
    )
    deadline = time.time() + 120
    while not list(tmp_path.glob(".merged.*.partial")) and time.time() < deadline and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(stop)
    assert process.wait(60) in (130, 143)
    assert {p.relative_to(output): p.read_bytes() for p in sorted(output.rglob("*")) if p.is_file()} == before
    assert os.listdir(tmp_path) == ["merged"]


@pytest.mark.parametrize("command", ["diff", "merge"])
def test_a_full_disk_is_one_line_and_nothing_is_left(chain, tmp_path, command):
    """The system refuses to write a file beyond some size, half-way through: as a full disk does, with another word."""
    words = {
        "diff": ["--finetuned", chain.specialists["liver"], "--output", tmp_path / "v.safetensors"],
        "merge": ["--vectors", chain.vectors["liver"], "--output", tmp_path / "m"],
    }
    line = [sys.executable, "-m", "tools", command, "--pretrained", chain.pretrain, *words[command]]
    limit = "import os, sys, resource as r; r.setrlimit(r.RLIMIT_FSIZE, (200_000, 200_000)); "
    limited = limit + "os.execv(sys.argv[1], sys.argv[1:])"
    program = [sys.executable, "-c", limited, *map(str, line)]
    refused(subprocess.run(program, cwd=ROOT, capture_output=True, text=True), "File too large")
    assert os.listdir(tmp_path) == []


def test_diff_refuses_another_network_and_another_start(chain, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(chain.pretrain, other)
    state = Bundle(other).state()
    state["encoders.0.basic_module.conv1.bias"] += 1
    torch.save(state, other / "models/model.pt")
    arguments = ["--finetuned", chain.specialists["liver"], "--output", tmp_path / "v.safetensors"]
    refused(run("tools", "diff", "--pretrained", other, *arguments, check=False), "was fine-tuned from pretrain")
    state["encoders.0.basic_module.conv1.bias"] = torch.zeros(3)
    torch.save(state, other / "models/model.pt")
    refused(run("tools", "diff", "--pretrained", other, *arguments, check=False), "not the same network", "conv1.bias")


def test_diff_looks_at_what_weights_do_not_show(chain, tmp_path):
    """The activation, the preprocessing, and names that no task vector may have."""
    other = tmp_path / "other"
    shutil.copytree(chain.specialists["liver"], other)
    words = [
        "--pretrained",
        chain.pretrain,
        "--finetuned",
        other,
        "--output",
        tmp_path / "v.safetensors",
        "--overwrite",
    ]
    inference, metadata = (read_json(other / f"configs/{name}.json") for name in ("inference", "metadata"))
    definition = {**inference["network_def"], "activation": "elu"}
    write_json(other / "configs/inference.json", inference | {"network_def": definition})
    result = here("tools", "diff", *words)
    refused(result, "are not the same network: activation is not set in the first and elu in the second")
    transforms = [*inference["preprocessing"]["transforms"], {"_target_": "ScaleIntensityd", "keys": "image"}]
    preprocessing = {**inference["preprocessing"], "transforms": transforms}
    write_json(other / "configs/inference.json", inference | {"preprocessing": preprocessing})
    assert "preprocesses images otherwise" in here("tools", "diff", *words).stdout
    write_json(other / "configs/inference.json", inference)
    assert "preprocesses" not in here("tools", "diff", *words).stdout
    refused(here("tools", "diff", *words, "--task", "li\nver"), "other, or --task: task and labels must be names")
    write_json(other / "configs/metadata.json", metadata | {"label_map": {"liver": 1}})
    refused(here("tools", "diff", *words), "label_map must have a list for each label")


def test_half_a_precision_does_not_round_the_fine_tuning_away(chain, tmp_path):
    """A starting point in float16, a specialist in float32: merged in float32, bit for bit unless told otherwise."""
    for name, path in (("start", chain.pretrain), ("liver", chain.specialists["liver"])):
        shutil.copytree(path, tmp_path / name)
        write_json(
            tmp_path / name / "configs/metadata.json", read_json(path / "configs/metadata.json") | {"lineage": {}}
        )
    torch.save({n: t.half() for n, t in Bundle(chain.pretrain).state().items()}, tmp_path / "start/models/model.pt")
    words = ["--pretrained", tmp_path / "start", "--method", "task_arithmetic", "--scale", 1]
    run("tools", "diff", *words[:2], "--finetuned", tmp_path / "liver", "--output", tmp_path / "v.safetensors")
    words += ["--vectors", tmp_path / "v.safetensors", "--output"]
    run("tools", "merge", *words, tmp_path / "m")
    merged, specialist = Bundle(tmp_path / "m").state(), Bundle(tmp_path / "liver").state()
    assert all(torch.equal(merged[name], specialist[name]) for name in specialist if not name.startswith("head."))
    path = tmp_path / "start/models/model.pt"
    data = bytearray(path.read_bytes())
    data[WeightsFile(path).entries["encoders.0.basic_module.conv1.weight"].offset + 5] ^= 4
    path.write_bytes(data)
    refused(here("tools", "merge", *words, tmp_path / "n", "--other_start"), "model.pt is damaged")


def test_heads_that_do_not_fit_a_half_precision_are_refused(chain, tmp_path):
    liver = tmp_path / "liver"
    shutil.copytree(chain.specialists["liver"], liver)
    state = Bundle(liver).state()
    torch.save(state | {"head.bias": state["head.bias"] + torch.tensor([0.0, 1e5])}, liver / "models/model.pt")
    run("tools", "diff", "--pretrained", chain.pretrain, "--finetuned", liver, "--output", tmp_path / "v.safetensors")
    recipe = {"pretrained": str(chain.pretrain), "vectors": [str(tmp_path / "v.safetensors")], "dtype": "float16"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = here("tools", "merge", "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "m")
    refused(result, "head.bias does not fit float16")
    assert not (tmp_path / "m").exists()


def test_a_starting_point_without_its_head_is_refused(chain, tmp_path):
    shutil.copytree(chain.pretrain, tmp_path / "start")
    state = Bundle(tmp_path / "start").state()
    del state["head.bias"]
    torch.save(state, tmp_path / "start/models/model.pt")
    words = ["--pretrained", tmp_path / "start", "--vectors", chain.vectors["liver"], "--output", tmp_path / "m"]
    refused(here("tools", "merge", *words), "lacks the tensor head.bias of the head")


def test_the_same_diff_gives_the_same_bytes(chain, tmp_path):
    run(
        "tools",
        "diff",
        "--pretrained",
        chain.pretrain,
        "--finetuned",
        chain.specialists["liver"],
        "--output",
        tmp_path / "v",
    )
    assert (tmp_path / "v").read_bytes() == chain.vectors["liver"].read_bytes()
