"""Coefficients learned from unlabelled scans: they bring the merge nearer to its specialists, and end in an ordinary recipe."""

import re
import shutil

import numpy as np
import pytest
import torch
import yaml

from tests.conftest import here, run
from tests.gains import make_plane
from tools.bundle import Bundle
from tools.distil import Pool, Student, distil, entropy_of, learn, masks_loss, validate
from tools.errors import UserError
from tools.specialists import rebuild
from tools.task_vector import TaskVector


@pytest.fixture
def student(chain):
    start = Bundle(chain.pretrain)
    return Student(start, start.weights(), [TaskVector(path) for path in chain.vectors.values()])


def test_the_student_is_the_merge_and_the_teachers_are_the_specialists(chain, student):
    image = torch.rand(1, 1, 24, 24, 24, generator=torch.Generator().manual_seed(0))
    teachers = rebuild(str(chain.pretrain), list(map(str, chain.vectors.values()))).networks
    for teacher, folder in zip(teachers, chain.specialists.values(), strict=True):
        specialist = Bundle(folder)
        with specialist.code(), torch.inference_mode():
            network = specialist.parser().get_parsed_content("network_def")
            network.load_state_dict(specialist.state())
            torch.testing.assert_close(teacher(image), network.eval()(image), rtol=1e-4, atol=1e-5)
    merged = Bundle(chain.merged)
    with merged.code(), torch.inference_mode():
        network = merged.parser().get_parsed_content("network_def")
        network.load_state_dict(merged.state())
        torch.testing.assert_close(student(image, student.coefficients, {}), network.eval()(image))


def with_any_head(student):
    """A random head, which sees organs in noise; whether a trained one does depends on how far its training came."""
    student.head = {name: 0.3 * torch.randn_like(tensor) for name, tensor in student.head.items()}
    for tensor in student.head.values():
        tensor[0] = 0


def test_learning_finds_the_coefficients_that_made_the_masks(student):
    """Soft masks of a merge with known coefficients, as if a specialist had made them."""
    torch.manual_seed(0)

    def noise(tensor):
        return 0.2 * tensor.abs().mean() * torch.randn_like(tensor)

    student.deltas = [{name: noise(student.base[name]) for name in deltas} for deltas in student.deltas]
    with_any_head(student)
    images = torch.rand(8, 1, 16, 16, 16)
    wanted = torch.tensor([0.9, 0.1]).expand(len(student.names), 2)
    with torch.inference_mode():
        pool = Pool(images, student(images, wanted, {})[:, 1:].sigmoid())
    least = validate(student, pool.split()[1], wanted, {}, 2)  # soft masks leave some loss
    before, after = learn(student, pool, steps=40, batch_size=2, learning_rate=0.03)
    assert after - least < 0.3 * (before - least)
    means = student.coefficients.mean(0)
    assert means[0] > 0.5 > means[1]


def test_learning_that_does_not_help_changes_nothing(student):
    images = torch.rand(4, 1, 16, 16, 16)
    with torch.inference_mode():
        pool = Pool(images, student(images, student.coefficients, {})[:, 1:].sigmoid())
    coefficients = student.coefficients.clone()
    before, after = learn(student, pool, steps=3, batch_size=2, learning_rate=1.0)
    assert after == before
    assert torch.equal(student.coefficients, coefficients)


def test_heads_are_learned_but_the_background_stays_zero(student):
    torch.manual_seed(0)
    with_any_head(student)
    images = torch.rand(8, 1, 16, 16, 16)
    other = {name: tensor + 0.5 * torch.randn_like(tensor) for name, tensor in student.head.items()}
    with torch.inference_mode():
        pool = Pool(images, student(images, student.coefficients, other)[:, 1:].sigmoid())
    least = validate(student, pool.split()[1], student.coefficients, other, 2)
    own = dict(student.head)
    before, after = learn(student, pool, 40, batch_size=2, learning_rate=1e-6, head_learning_rate=0.03)
    assert after - least < 0.5 * (before - least)
    for name, tensor in student.head.items():
        assert (tensor[0] == 0).all() and (tensor[1:] != own[name][1:]).any()
    learned = student.learned_heads()
    assert {key.split("/")[0] for key in learned} == {task.sha256 for task in student.tasks}
    for number, task in enumerate(student.tasks, start=1):  # one organ each
        for name in task.head:
            both = student.head[name].numpy()[[0, number]]
            np.testing.assert_array_equal(learned[f"{task.sha256}/{name}"], both)


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
    here("tools", "merge", "--recipe", recipe, "--output", tmp_path / "again")
    assert (tmp_path / "again/models/model.pt").read_bytes() == (tmp_path / "m/models/model.pt").read_bytes()


def test_learned_heads_stay_with_their_tasks(chain, tmp_path):
    vectors = ",".join(map(str, chain.vectors.values()))
    distil(
        str(chain.pretrain), vectors, str(chain.dataset), str(tmp_path / "m"),
        scans=1, patches=4, steps=3, heads=True, head_learning_rate=0.01,
    )  # fmt: skip
    merged, own = Bundle(tmp_path / "m").state(), Bundle(chain.merged).state()
    head = [name for name in merged if name in Bundle(chain.merged).structure().head]
    assert any(not torch.equal(merged[name], own[name]) for name in head)
    assert all((merged[name][0] == 0).all() for name in head)
    recipe = yaml.safe_load((tmp_path / "m/docs/recipe.yaml").read_text())
    assert recipe["heads"] == "heads.safetensors"
    here("tools", "merge", "--recipe", tmp_path / "m/docs/recipe.yaml", "--output", tmp_path / "again")
    assert (tmp_path / "again/models/model.pt").read_bytes() == (tmp_path / "m/models/model.pt").read_bytes()
    assert here("tools", "edit", tmp_path / "m", tmp_path / "less", "--remove", "liver").returncode == 0
    less = Bundle(tmp_path / "less").state()
    assert all(torch.equal(less[name], merged[name][[0, 2]]) for name in head)
    coefficients = [o["parameters"]["scale"][1] for o in recipe["overrides"]]
    left = yaml.safe_load((tmp_path / "less/docs/recipe.yaml").read_text())
    assert [o["parameters"]["scale"] for o in left["overrides"]] == [[c] for c in coefficients]
    more = here("tools", "edit", tmp_path / "less", tmp_path / "more", "--add", chain.vectors["liver"])
    assert more.returncode == 0, more.stderr
    state = Bundle(tmp_path / "more").state()
    assert all(torch.equal(state[name], merged[name][[0, 2, 1]]) for name in head)  # the file still has the liver's
    (tmp_path / "m/docs/heads.safetensors").write_bytes(b"damaged")
    result = here("tools", "merge", "--recipe", tmp_path / "m/docs/recipe.yaml", "--output", tmp_path / "none")
    assert result.returncode == 1 and "heads.safetensors" in result.stderr


def test_what_it_cannot_learn_from_is_refused(chain, tmp_path):
    options = {"pretrained": str(chain.pretrain), "vectors": str(chain.vectors["liver"]), "output": str(tmp_path / "m")}
    with pytest.raises(UserError, match="not found"):
        distil(**options, images=str(tmp_path / "none"))
    with pytest.raises(UserError, match="too few to learn from"):
        distil(**options, images=str(chain.dataset), scans=1, patches=1)
    with pytest.raises(UserError, match="comes from another starting point"):
        distil(**{**options, "pretrained": str(chain.specialists["spleen"])}, images=str(chain.dataset))


@pytest.fixture(scope="module")
def plane(tmp_path_factory):
    return make_plane(tmp_path_factory.mktemp("plane"))


def learned(plane, output, *more, images="."):
    vectors = f"{plane}/bright.safetensors,{plane}/dark.safetensors"
    words = ["--pretrained", plane / "start", "--vectors", vectors, "--images", plane / "Dataset001_Quarters" / images]
    return here("tools", "distil", *words, "--output", output, "--learning_rate", 0.05, "--steps", 40, *more)


def test_labels_train_the_coefficients_that_find_the_organs(plane, tmp_path):
    """1/T finds the bright organ, which needs 0.3 < λ < 0.6, but not the dark one, which needs 0.6 < λ < 1.2."""
    result = learned(plane, tmp_path / "m", "--objective", "labels", "--coefficients", "task")
    assert result.returncode == 0, result.stderr
    recipe = yaml.safe_load((tmp_path / "m/docs/recipe.yaml").read_text())
    bright, dark = recipe["parameters"]["scale"]
    assert 0.3 < bright < 0.6 < dark < 1.2 and "overrides" not in recipe
    found, left = (float(word) for word in re.findall(r"([\d.]+)% as", result.stdout))
    assert left > 1.5 * found  # the dark organ too


def test_a_dataset_that_calls_its_labels_otherwise_can_be_learned_from(plane, tmp_path):
    shutil.copytree(plane, tmp_path / "p")
    description = tmp_path / "p/Dataset001_Quarters/dataset.json"
    description.write_text(description.read_text().replace('"bright"', '"hell"'))
    words = ("--objective", "labels", "--coefficients", "task")
    assert "map it by --labels" in learned(tmp_path / "p", tmp_path / "m", *words).stderr
    result = learned(tmp_path / "p", tmp_path / "m", *words, "--labels", "{bright: hell}")
    assert result.returncode == 0, result.stderr


def test_an_output_that_could_not_be_written_is_refused_before_anything_is_learned(plane, tmp_path, monkeypatch):
    monkeypatch.setattr("tools.distil.learn", lambda *_, **__: pytest.fail("it learned"))
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents/letter.txt").touch()
    result = learned(plane, tmp_path / "documents", "--overwrite")
    assert result.returncode == 1 and "so not an older output" in result.stderr
    result = learned(plane, plane / "start", "--overwrite")
    assert result.returncode == 1 and "would replace" in result.stderr


def test_entropy_is_that_of_each_tasks_softmax(plane, tmp_path):
    logits = torch.zeros(1, 4, 2, 2, 2)
    assert entropy_of([1, 2])(logits, None).item() == pytest.approx((np.log(2) + np.log(3)) / 2)
    logits[:, 1:] = -20  # sure, and empty
    assert entropy_of([1, 2])(logits, None).item() < 1e-6
    result = learned(plane, tmp_path / "m", "--objective", "entropy")
    assert result.returncode == 0, result.stderr
    before, after = (float(word) for word in result.stdout.split("patches: ")[1].split()[::4][:2])
    assert after < before


def test_objectives_that_cannot_be_learned_are_refused(plane, tmp_path):
    assert "did you mean 'labels'" in learned(plane, tmp_path / "m", "--objective", "lables").stderr
    result = learned(plane, tmp_path / "m", "--objective", "labels", images="imagesTr")
    assert "needs an nnU-Net dataset" in result.stderr
