"""Calibration and head conflicts: closed forms, and the same from the logits of a whole image at once."""

import math
import shutil

import nibabel
import numpy as np
import pytest
import torch

from tests.conftest import here
from tests.test_merge import refused
from tools.bundle import Bundle, read_json, write_json
from tools.calibration import (
    Counts,
    calibrate,
    calibration_markdown,
    expected_calibration_error,
    margins,
    summarise_calibration,
)


def test_the_error_is_the_gap_between_probability_and_frequency():
    """Four voxels at 0.75 of which half are organ, and four at 0.25 of which a quarter are."""
    assert expected_calibration_error(*np.array([[4, 4], [3, 1], [2, 1]])) == pytest.approx((1 + 0) / 8)


def test_boxes_add_up_to_the_case():
    """An organ of one slice of 5 mm: two slices around it are within 10 mm, what lies further is not looked at."""
    reference = torch.zeros(4, 4, 12, dtype=torch.long)
    reference[:2, :, 5] = 1
    over = torch.full((4, 4, 12, 2), -math.inf)
    over[..., 3:8, 0] = math.log(3)  # p = 0.75 within the margin
    over[..., 0, 0] = 99  # sure and wrong, but far away
    over[:2, :, :5, 1] = 1  # the other organ's head, which claims two slices that the first one's does
    counts = Counts(reference, {"one": [1], "two": [2], "three": None}, np.diag([20, 20, 5, 1]))
    over = torch.cat([over, torch.full((4, 4, 12, 1), -1.0)], -1)
    for box in ((slice(0, 3), slice(0, 4), slice(0, 12)), (slice(3, 4), slice(0, 4), slice(0, 12))):
        counts.add(box, over[box])
    found = counts.result()
    inside = 3 * 4 * 5  # the margin along the others is one voxel, and ends at the border
    assert found["ece"] == {"one": pytest.approx(0.75 - 8 / inside), "two": None, "three": None}
    assert found["conflicts"][0] == {"labels": ["one", "two"], "ml": pytest.approx(2 * 8 * 3)}
    summary = summarise_calibration([found, {**found, "ece": dict.fromkeys(found["ece"])}]).as_dict()
    assert summary["ece"]["one"]["cases"] == 1 and summary["conflicts"][0]["ml"]["mean"] == pytest.approx(48)


def test_a_temperature_undoes_shrunk_margins_and_is_judged_on_cases_that_it_was_not_found_on():
    """Organ as often as probabilities say; then all margins are a quarter of what they were, as after a merge of four."""
    random, cases = np.random.default_rng(0), []
    for seed, by in enumerate((1, 4, 4, 4)):
        over = torch.from_numpy(random.normal(0, 3, (20, 30, 40)))
        chance = torch.rand(over.shape, generator=torch.Generator().manual_seed(seed))
        counts = Counts((chance < over.sigmoid()).long(), {"organ": [1]}, np.eye(4))
        counts.add((slice(0, 20), slice(0, 30), slice(0, 40)), over[..., None] / by)
        cases.append(counts.result())
    right, shrunk = summarise_calibration(cases[:1] * 2), summarise_calibration(cases[1:])
    assert right.temperatures["organ"] == pytest.approx(1, abs=0.03) and right.scaled_mean.mean < 0.01
    assert shrunk.temperatures["organ"] == pytest.approx(1 / 4, rel=0.03)
    assert shrunk.ece["organ"].mean > 0.1 and shrunk.scaled["organ"].mean < 0.01
    mixed = summarise_calibration(cases[:2])
    assert mixed.scaled["organ"].mean > 0.1, "each with the other's temperature"
    assert summarise_calibration(cases[:1]).temperatures == {}, "there is no other case"
    table = calibration_markdown({"merged": shrunk, "liver": right})
    assert f"| merged | {shrunk.scaled['organ'].mean:.3f} (0.25) |" in table


def test_margins_of_probabilities_are_those_of_logits_and_air_is_background():
    logits = torch.tensor([[1.0, 3.0, -2.0]])
    torch.testing.assert_close(margins(logits), torch.tensor([[2.0, -3.0]]))
    torch.testing.assert_close(margins(logits.softmax(-1), probabilities=True), margins(logits))
    assert (margins(torch.zeros(2, 3)) == -math.inf).all()


@pytest.fixture
def case(untrained, tmp_path):
    """A bundle of small windows, and an image that it turns before it looks at it."""
    shutil.copytree(untrained, tmp_path / "b")
    config = tmp_path / "b" / "configs" / "inference.json"
    config.write_text(config.read_text().replace("[96, 96, 96]", "[32, 32, 32]"))
    random, affine = np.random.default_rng(0), np.diag([-1.0, 2.0, 1.5, 1.0])
    image = random.normal(size=(40, 24, 28)).astype(np.float32)
    label = np.zeros(image.shape, np.uint8)
    label[3:9, 5:20, 2:30] = 6
    for name, array in (("image", image), ("label", label)):
        nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / f"{name}.nii.gz")
    return Bundle(tmp_path / "b"), {name: str(tmp_path / f"{name}.nii.gz") for name in ("image", "label")}, label


def test_pieces_say_what_all_logits_say(case, tmp_path):
    bundle, files, label = case
    calibrate(bundle, {tmp_path / "case.json": files}, {"liver": [6], "spleen": [7]})
    found = read_json(tmp_path / "case.json")

    network = bundle.network()
    with bundle.code(), torch.inference_mode():
        parser = bundle.parser(inferer_output="logits")
        image = parser.get_parsed_content("preprocessing")({"image": files["image"]})["image"]
        logits = parser.get_parsed_content("inferer")(image[None], network)[0].as_tensor().double().numpy()
    over = (logits[1:] - logits[:1])[:, ::-1]  # back on the file's grid, whose first axis runs to the left
    claimed = over > 0
    assert claimed.any((1, 2, 3)).all() and not claimed.all()
    volume = 0.003 * (claimed[0] & claimed[1]).sum()
    assert found["conflicts"] == [{"labels": ["liver", "spleen"], "ml": pytest.approx(volume)}]
    around = (slice(0, 19), slice(0, 24), slice(0, 28))  # 3 - 10, 9 + 10; 5 - 5, 20 + 5; 2 - 7, 28: and the borders
    probability, truth = 1 / (1 + np.exp(-over[0][around])), label[around] == 6
    bins = np.digitize(probability, np.arange(1, 15) / 15)
    error = sum(abs((probability - truth)[bins == i].sum()) for i in range(15)) / truth.size
    assert found["ece"] == {"liver": pytest.approx(error, abs=1e-5), "spleen": None}


def test_another_inferer_is_refused(case, tmp_path):
    bundle, *_ = case
    config = read_json(bundle.path / "configs" / "inference.json")
    write_json(bundle.path / "configs" / "inference.json", config | {"inferer": {"_target_": "SimpleInferer"}})
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "dataset.json").write_text('{"channel_names": {"0": "CT"}, "labels": {"liver": 1}}')
    words = ["--bundle", bundle.path, "--dataset_dir", tmp_path / "d", "--output", tmp_path / "out"]
    refused(here("tools", "evaluate", *words, "--calibration"), "SlidingWindow", "this bundle has SimpleInferer")
