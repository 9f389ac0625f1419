"""The simulated torso: reproducible, anatomically in order, and different between patients and populations."""

import numpy as np
import pytest

from tools.errors import UserError
from tools.phantom import ORGANS, SHAPE, phantom, simulate


@pytest.fixture(scope="module")
def patients():
    return {
        population: [simulate(population, np.random.default_rng([i, 7])) for i in range(4)]
        for population in ("native", "portal")
    }


def centre(labels, organ):
    return np.argwhere(labels == 1 + list(ORGANS).index(organ)).mean(0)


def test_the_same_seed_gives_the_same_patient(patients):
    image, labels = simulate("native", np.random.default_rng([0, 7]))
    assert np.array_equal(image, patients["native"][0][0])
    assert np.array_equal(labels, patients["native"][0][1])


def test_no_patients_are_refused(tmp_path):
    with pytest.raises(UserError, match="--cases 0: it must be 1 or more"):
        phantom(str(tmp_path / "none"), cases=0)
    assert not list(tmp_path.iterdir())


def test_images_are_hounsfield_units_with_every_organ(patients):
    for image, labels in [p for group in patients.values() for p in group]:
        assert image.shape == labels.shape == SHAPE
        assert image.dtype == np.int16
        assert image.min() >= -1024
        assert set(range(1, 1 + len(ORGANS))) <= set(np.unique(labels))
        assert np.median(image[labels == 1]) < -600  # lung
        assert np.median(image[labels == 1 + list(ORGANS).index("vertebrae")]) > 150


def test_organs_lie_where_they_belong(patients):
    for _, labels in [p for group in patients.values() for p in group]:
        assert centre(labels, "liver")[0] > centre(labels, "spleen")[0]  # x grows to the patient's right (RAS arrays)
        assert centre(labels, "right kidney")[0] > centre(labels, "vertebrae")[0] > centre(labels, "left kidney")[0]
        assert centre(labels, "vertebrae")[1] < centre(labels, "stomach")[1]  # behind
        assert centre(labels, "right lung")[2] > centre(labels, "right kidney")[2]  # above


def test_contrast_phase_and_noise_differ_between_populations(patients):
    kidney = 1 + list(ORGANS).index("left kidney")
    native, portal = (np.mean([np.median(i[m == kidney]) for i, m in patients[p]]) for p in ("native", "portal"))
    assert portal > native + 80
    volumes = [np.sum(m == kidney) for _, m in patients["portal"]]
    assert np.std(volumes) > 0.05 * np.mean(volumes)
