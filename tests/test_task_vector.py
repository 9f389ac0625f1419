"""The task vector file: exact, whatever the weights."""

import numpy as np
import pytest

from tools.errors import UserError
from tools.task_vector import TaskVector


def vector(**tensors):
    facts = {"task": "t", "labels": ["a"], "label_map": {"a": ["a"]}, "pretrained_sha256": "0", "finetuned_sha256": "1"}
    return TaskVector(**facts, network_def={}, head_axes={"h": 0}, head={"h": np.zeros((2, 3), np.float32)}, **tensors)


def test_adding_the_vector_back_gives_the_specialist_bit_for_bit(tmp_path):
    random = np.random.default_rng(0)
    magnitudes = 10.0 ** random.uniform(-5, 2, (2, 100_000))  # tiny weights from large ones and the reverse
    pretrained, finetuned = (magnitudes * random.choice([-1, 1], (2, 100_000))).astype(np.float32)
    v = vector()
    v.set_delta("w", pretrained.reshape(100, 1000), finetuned.reshape(100, 1000))
    assert v.remainder["w"].size  # a plain float32 difference would not have done
    v.save(tmp_path / "v.safetensors")
    back = TaskVector.load(tmp_path / "v.safetensors")
    restored = (pretrained.astype(np.float64) + back.delta("w").ravel()).astype(np.float32)
    assert np.array_equal(restored, finetuned)


def test_close_weights_need_no_remainder():
    pretrained = np.linspace(1, 2, 1000, dtype=np.float32)
    v = vector()
    v.set_delta("w", pretrained, pretrained * np.float32(1.01))
    assert not v.remainder


def test_a_remainder_outside_its_tensor_is_refused():
    v = vector(backbone={"w": np.zeros(3, np.float32)}, remainder={"w": np.ones(1, np.float32)})
    v.remainder_index = {"w": np.array([3])}
    with pytest.raises(UserError, match="remainder of tensor w does not fit"):
        v.check("file")
