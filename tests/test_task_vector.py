"""The task vector file: exact, whatever the weights; damage is found, wherever it is."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tools.errors import UserError
from tools.network import Structure
from tools.task_vector import FORMAT, Facts, TaskVector, exact_where_needed, save_task_vector
from tools.weights_file import BLOCK

FACTS = Facts(
    task="t",
    labels=["a"],
    label_map={"a": ["a"]},
    pretrained_sha256="0",
    finetuned_sha256="1",
    network_def={},
    structure=Structure({"h": 0}),
)


def saved(path, buffers=None, **backbone):
    pairs = [(name, *map(np.float32, pair)) for name, pair in backbone.items()]
    save_task_vector(path, FACTS, pairs, {"h": np.zeros((2, 3), np.float32)}, buffers or {})
    return path


def wild(size, seed=0):
    """Tiny weights from large ones and the reverse."""
    random = np.random.default_rng(seed)
    magnitudes = 10.0 ** random.uniform(-5, 2, (2, size))
    return (magnitudes * random.choice([-1, 1], (2, size))).astype(np.float32)


def test_adding_the_vector_back_gives_the_specialist_bit_for_bit(tmp_path):
    pretrained, finetuned = wild(2 * BLOCK + 100)
    shape = (2, BLOCK + 50)
    vector = TaskVector(saved(tmp_path / "v.safetensors", w=(pretrained.reshape(shape), finetuned.reshape(shape))))
    assert sum(vector.tensors["w"].remainders) > 1000  # a plain float32 difference would not have done
    restored = (pretrained.astype(np.float64) + vector.delta("w").ravel()).astype(np.float32)
    assert np.array_equal(restored, finetuned)


def test_exact_values_where_one_of_several_tasks_needs_them(tmp_path):
    vectors = [TaskVector(saved(tmp_path / f"{seed}.safetensors", w=wild(5000, seed))) for seed in (0, 1)]
    blocks = [vector.block("w", 0) for vector in vectors]
    where, exact = exact_where_needed(blocks)
    assert set(where) == {*blocks[0].positions, *blocks[1].positions}
    for vector, values in zip(vectors, exact):
        assert np.array_equal(values, vector.delta("w")[where])


def test_close_weights_need_no_remainder(tmp_path):
    pretrained = np.linspace(1, 2, 1000, dtype=np.float32)
    vector = TaskVector(saved(tmp_path / "v.safetensors", w=(pretrained, pretrained * np.float32(1.01))))
    assert vector.tensors["w"].remainders == [0]


def test_scalars_empty_tensors_and_counters_come_back(tmp_path):
    buffers = {"steps": np.int64(7), "index": np.arange(6).reshape(2, 3)}
    path = saved(tmp_path / "v.safetensors", buffers, scalar=(1.0, 1.5), empty=(np.zeros((0, 3)), np.zeros((0, 3))))
    vector = TaskVector(path)
    assert vector.delta("scalar").shape == () and vector.delta("scalar") == 0.5
    assert vector.delta("empty").shape == (0, 3)
    assert (
        vector.buffers["steps"].shape == ()
        and vector.buffers["steps"] == 7
        and np.array_equal(vector.buffers["index"], buffers["index"])
    )


def test_one_flipped_bit_anywhere_is_found(tmp_path):
    whole = bytearray(saved(tmp_path / "v.safetensors", {"steps": np.arange(4)}, w=wild(1000)).read_bytes())
    data = 8 + int.from_bytes(whole[:8], "little")
    path = tmp_path / "flipped.safetensors"
    for place in range(data, len(whole), 101):
        whole[place] ^= 16
        path.write_bytes(whole)
        with pytest.raises(UserError, match=r"flipped\.safetensors is damaged"):
            TaskVector(path).delta("w")
        whole[place] ^= 16
    path.write_bytes(whole)
    assert np.isfinite(TaskVector(path).delta("w")).all()


def test_a_wrong_header_is_refused(tmp_path):
    path = saved(tmp_path / "v.safetensors", w=wild(1000))
    tensors = load_file(path)

    def changed(change):
        from safetensors import safe_open

        with safe_open(path, framework="numpy") as file:
            facts = json.loads(file.metadata()[FORMAT])
        change(facts)
        save_file(tensors, tmp_path / "changed.safetensors", metadata={FORMAT: json.dumps(facts)})
        return tmp_path / "changed.safetensors"

    for change in (
        lambda facts: facts.pop("task"),
        lambda facts: facts.update(task2="x"),
        lambda facts: facts.update(structure={"head": {"other": 0}}),
        lambda facts: facts.update(structure=[]),
        lambda facts: facts.update(tensors=None),
        lambda facts: facts["tensors"]["w"].update(remainders=[-1]),
        lambda facts: facts["tensors"]["w"].update(remainders=["x"]),
        lambda facts: facts["tensors"]["w"].update(remainders=[5]),
        lambda facts: facts["tensors"]["w"].update(checksums=[]),
        lambda facts: facts.update(task=5),
        lambda facts: facts.update(labels=None),
        lambda facts: facts.update(labels=[1]),
        lambda facts: facts.update(labels=["Background"]),
        lambda facts: facts.update(labels=["a\nb"]),
        lambda facts: facts.update(label_map=None),
        lambda facts: facts.update(label_map={"a": 3}),
        lambda facts: facts.update(pretrained_sha256=7),
        lambda facts: facts["structure"].update(plain=7),
        lambda facts: facts["structure"].update(groups={"w": 0}),
        lambda facts: facts["tensors"].update(other={"remainders": [], "checksums": [], "pretrained": []}),
    ):
        with pytest.raises(UserError, match=r"changed\.safetensors is damaged, or is not a task vector"):
            TaskVector(changed(change))
    with pytest.raises(UserError, match="does not have 3 output channels"):
        TaskVector(changed(lambda facts: facts.update(labels=["a", "b"])))
    save_file(tensors, tmp_path / "old.safetensors", metadata={"task-vector-1": "{}"})
    with pytest.raises(UserError, match="task-vector-1 of another version of the tools: make it again by diff"):
        TaskVector(tmp_path / "old.safetensors")
