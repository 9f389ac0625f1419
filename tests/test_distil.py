"""Coefficients learned from unlabelled scans: they bring the merge nearer to its specialists, and end in an ordinary recipe."""

import numpy as np
import pytest
import torch
import yaml

from tests.conftest import run
from tools.bundle import Bundle
from tools.distil import Pool, Student, distil, learn, masks_loss
from tools.errors import UserError
from tools.task_vector import TaskVector


@pytest.fixture
def student(chain):
    start = Bundle(chain.pretrain)
    return Student(start, start.weights(), [TaskVector(path) for path in chain.vectors.values()])


def test_the_student_is_the_merge_and_the_teachers_are_the_specialists(chain, student):
    image = torch.rand(1, 1, 24, 24, 24, generator=torch.Generator().manual_seed(0))
    for number, folder in enumerate(chain.specialists.values()):
        specialist = Bundle(folder)
        with specialist.code(), torch.inference_mode():
            network = specialist.parser().get_parsed_content("network_def")
            network.load_state_dict(specialist.state())
            torch.testing.assert_close(student.teacher(number)(image), network.eval()(image), rtol=1e-4, atol=1e-5)
    merged = Bundle(chain.merged)
    with merged.code(), torch.inference_mode():
        network = merged.parser().get_parsed_content("network_def")
        network.load_state_dict(merged.state())
        torch.testing.assert_close(
            student(image, student.coefficients), network.eval()(image), rtol=0.1, atol=0.05
        )  # bfloat16


def test_learning_finds_the_coefficients_that_made_the_masks(student):
    """Soft masks of a merge with known coefficients, as if a specialist had made them."""
    torch.manual_seed(0)
    student.deltas = [{name: 2 * delta for name, delta in deltas.items()} for deltas in student.deltas]
    images = torch.rand(8, 1, 16, 16, 16)
    wanted = torch.tensor([0.9, 0.1]).expand(len(student.names), 2)
    with torch.inference_mode():
        pool = Pool(images, student(images, wanted)[:, 1:].sigmoid())
    before, after = learn(student, pool, steps=40, batch_size=2, learning_rate=0.03)
    assert after < 0.7 * before
    means = student.coefficients.mean(0)
    assert means[0] > means[1]


def test_learning_that_does_not_help_changes_nothing(student):
    images = torch.rand(4, 1, 16, 16, 16)
    with torch.inference_mode():
        pool = Pool(images, student(images, student.coefficients)[:, 1:].sigmoid())
    coefficients = student.coefficients.clone()
    before, after = learn(student, pool, steps=3, batch_size=2, learning_rate=1.0)
    assert after == before
    assert torch.equal(student.coefficients, coefficients)


def test_the_loss_sees_organs_not_background():
    masks = torch.zeros(1, 2, 10, 10, 10)
    masks[:, 0, 4:6, 4:6, 4:6] = 1
    exact = torch.cat([torch.zeros(1, 1, 10, 10, 10), 20 * masks - 10], 1)
    empty = torch.full_like(exact, -10.0)
    assert masks_loss(exact, masks) < 0.01
    assert masks_loss(empty, masks) > 0.5  # 8 of 2000 voxels are wrong


def test_the_command_writes_a_recipe_that_merges_again_to_the_same_bytes(chain, tmp_path):
    vectors = ",".join(map(str, chain.vectors.values()))
    words = ["tools", "distil", "--pretrained", chain.pretrain, "--vectors", vectors, "--images", chain.dataset]
    text = run(*words, "--scans", 1, "--patches", 8, "--steps", 10, "--output", tmp_path / "m").stdout
    assert "loss on held-out patches" in text
    recipe = tmp_path / "m" / "docs" / "recipe.yaml"
    overrides = yaml.safe_load(recipe.read_text())["overrides"]
    assert np.shape([override["parameters"]["scale"] for override in overrides]) == (56, 2)
    run("tools", "merge", "--recipe", recipe, "--output", tmp_path / "again")
    assert (tmp_path / "again/models/model.pt").read_bytes() == (tmp_path / "m/models/model.pt").read_bytes()


def test_what_it_cannot_learn_from_is_refused(chain, tmp_path):
    options = {"pretrained": str(chain.pretrain), "vectors": str(chain.vectors["liver"]), "output": str(tmp_path / "m")}
    with pytest.raises(UserError, match="not found"):
        distil(**options, images=str(tmp_path / "none"))
    with pytest.raises(UserError, match="too few to learn from"):
        distil(**options, images=str(chain.dataset), scans=1, patches=1)
    with pytest.raises(UserError, match="comes from another starting point"):
        distil(**{**options, "pretrained": str(chain.specialists["spleen"])}, images=str(chain.dataset))
