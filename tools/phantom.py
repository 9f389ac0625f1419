"""``phantom``: a procedural torso CT with labelled organs, so that everything runs without a download or a licence.

Shapes are drawn in a body frame that is rotated, scaled and bent differently in each case; organs also move, swell and
tilt on their own. Two populations differ in contrast phase, noise and habitus, as two hospitals do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from tools.errors import UserError, at_least
from tools.output import complete_output

SHAPE = (80, 64, 56)  # voxels, right to left reversed (RAS), posterior to anterior, inferior to superior
SPACING = 4.0  # millimetres


@dataclass(frozen=True)
class Ellipsoid:
    """A part of an organ in the body frame: millimetres from the centre of the torso, x to the right, y to the front.

    Attributes:
        centre: x, y, z.
        radii: along its own axes.
        tilt: rotation about y and about z, degrees.
        power: 2 is an ellipsoid, more is boxier.
    """

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    tilt: tuple[float, float] = (0.0, 0.0)
    power: float = 2.0


@dataclass(frozen=True)
class Organ:
    """A labelled structure: its parts, and its mean intensity in Hounsfield units by contrast phase."""

    parts: tuple[Ellipsoid, ...]
    native: float
    portal: float


# painted in this order: a later organ lies over an earlier one
ORGANS: dict[str, Organ] = {
    "right lung": Organ((Ellipsoid((72, 5, 95), (52, 66, 62)),), -850, -850),
    "left lung": Organ((Ellipsoid((-72, 5, 98), (50, 66, 60)),), -850, -850),
    "liver": Organ(
        (Ellipsoid((62, 8, 34), (66, 62, 50), (12, 0)), Ellipsoid((12, 38, 44), (52, 30, 28), (-14, 10))), 58, 112
    ),
    "stomach": Organ((Ellipsoid((-48, 34, 36), (32, 34, 42), (-22, 0)), Ellipsoid((-20, 48, 8), (34, 20, 18))), 22, 30),
    "spleen": Organ((Ellipsoid((-94, -24, 40), (22, 38, 36), (18, -20)),), 48, 122),
    "pancreas": Organ((Ellipsoid((-22, 8, 4), (50, 13, 13), (16, -12)), Ellipsoid((26, 10, -6), (17, 15, 20))), 38, 92),
    "gallbladder": Organ((Ellipsoid((46, 44, 2), (14, 20, 19), (20, 0)),), 12, 14),
    "right kidney": Organ((Ellipsoid((58, -38, -18), (25, 24, 46), (-10, 0)),), 33, 160),
    "left kidney": Organ((Ellipsoid((-58, -38, -8), (25, 24, 46), (10, 0)),), 33, 160),
    "inferior vena cava": Organ((Ellipsoid((22, -20, 0), (11, 11, 400), (2, 0), 2.5),), 40, 132),
    "aorta": Organ((Ellipsoid((-9, -24, 0), (11, 11, 400), (-2, 0), 2.5),), 42, 150),
    "vertebrae": Organ(
        (Ellipsoid((0, -56, 0), (23, 20, 400), (0, 0), 3.0), Ellipsoid((0, -86, 0), (9, 16, 400))), 260, 270
    ),
}
POPULATIONS = {"native": (5.0, 12.0), "portal": (10.0, 25.0)}  # noise, standard deviation in Hounsfield units


def phantom(
    output: str,
    population: str = "native",
    cases: int = 16,
    test_cases: int = 0,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Write an nnU-Net dataset of simulated torso CT with twelve labelled organs.

    Args:
        output: folder of the dataset, for example runs/Dataset001_PhantomNative.
        population: "native" (no contrast medium, little noise) or "portal" (portal-venous phase, noisy).
        cases: number of labelled cases in imagesTr and labelsTr.
        test_cases: number of labelled cases in imagesTs and labelsTs.
        seed: another seed, other patients.
        overwrite: replace the output if it exists.
    """
    from tqdm import tqdm

    if population not in POPULATIONS:
        raise UserError(f"no population {population!r}; there are {', '.join(POPULATIONS)}")
    at_least(1, cases=cases)
    at_least(0, test_cases=test_cases)
    with complete_output(output, overwrite, sign="dataset.json") as folder:
        names = [("Tr", f"phantom_{i:03d}") for i in range(cases)]
        names += [("Ts", f"phantom_{i:03d}") for i in range(cases, cases + test_cases)]
        for i, (part, name) in enumerate(tqdm(names, desc="phantom", disable=None, leave=False)):
            image, labels = simulate(population, np.random.default_rng([seed, i, list(POPULATIONS).index(population)]))
            _save(folder / f"images{part}" / f"{name}_0000.nii.gz", image)
            _save(folder / f"labels{part}" / f"{name}.nii.gz", labels)
        description = {
            "name": f"Phantom torso CT, {population}",
            "description": "Simulated by this project; not patients.",
            "reference": "simulated by python -m tools phantom",
            "licence": "Apache-2.0",
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, **{organ: i for i, organ in enumerate(ORGANS, start=1)}},
            "numTraining": cases,
            "file_ending": ".nii.gz",
        }
        (folder / "dataset.json").write_text(json.dumps(description, indent=4))
    print(f"{output}: {cases} labelled cases" + (f", {test_cases} test cases" if test_cases else ""))


def simulate(population: str, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One simulated patient.

    Args:
        population: "native" or "portal".
        random: source of all variation.

    Returns:
        The image in Hounsfield units, int16, and the label map, uint8; both of shape ``SHAPE``.
    """
    x, y, z = _body_frame(random)
    girth = random.uniform(0.92, 1.08)
    body = (np.abs(x) / (150 * girth)) ** 2.3 + (np.abs(y + 5) / (104 * girth)) ** 2.3 < 1
    wall = (np.abs(x) / 134) ** 2.3 + (np.abs(y + 3) / 90) ** 2.3 < 1
    image = np.where(body, -100.0 + random.uniform(-10, 10), -1000.0)
    image[body & ~wall] = random.uniform(-110, -60)
    muscle = wall & ~((np.abs(x) / 121) ** 2.3 + (np.abs(y - 5) / 79) ** 2.3 < 1)
    image[muscle] = random.uniform(40, 60)
    _add_bowel(image, wall & ~muscle, (x, y, z), random)

    labels = np.zeros(SHAPE, np.uint8)
    swelling = random.normal(0, 0.07)
    for number, organ in enumerate(ORGANS.values(), start=1):
        shift, size, turn = random.normal(0, 5, 3), np.exp(swelling + random.normal(0, 0.1, 3)), random.normal(0, 6, 2)
        inside = np.zeros(SHAPE, bool)
        for part in organ.parts:
            inside |= _inside(part, (x, y, z), shift, size, turn)
        inside &= body
        mean = (organ.portal if population == "portal" else organ.native) * random.normal(1, 0.07) + random.normal(0, 6)
        image[inside] = mean
        labels[inside] = number
    image[labels == _number("stomach")] += _stomach_content(random)
    _add_lesions(image, labels == _number("liver"), random)
    return _scan(image, labels, POPULATIONS[population], random), labels


def _number(organ: str) -> int:
    return 1 + list(ORGANS).index(organ)


def _body_frame(random: np.random.Generator) -> list[np.ndarray]:
    """Body coordinates, millimetres, of every voxel: rotated, scaled, shifted and smoothly bent."""
    grid = np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * SPACING for n in SHAPE], indexing="ij")
    points = np.stack([axis + amount for axis, amount in zip(grid, random.uniform(-10, 10, 3))])
    points = np.einsum("ij,jxyz->ixyz", _rotation(*random.uniform(-5, 5, 2)), points) / random.uniform(0.92, 1.1)
    for width, amplitude in ((40, 6), (18, 2.5)):
        for axis in range(3):
            field = ndimage.gaussian_filter(random.standard_normal(SHAPE), width / SPACING, mode="nearest")
            points[axis] += amplitude * field / max(field.std(), 1e-9)
    return list(points)


def _rotation(about_y: float, about_z: float) -> np.ndarray:
    a, b = np.deg2rad([about_y, about_z])
    turn_y = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    turn_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    return turn_z @ turn_y


def _inside(part: Ellipsoid, frame, shift: np.ndarray, size: np.ndarray, turn: np.ndarray) -> np.ndarray:
    offsets = np.stack([axis - centre - move for axis, centre, move in zip(frame, part.centre, shift)])
    long = np.array(part.radii) > 300  # vessels and spine run through the whole volume and keep their direction
    offsets = np.einsum("ij,jxyz->ixyz", _rotation(*(np.array(part.tilt) + turn * ~long.any())).T, offsets)
    radii = np.array(part.radii) * size
    return sum((np.abs(o) / r) ** part.power for o, r in zip(offsets, radii)) < 1


def _add_bowel(image: np.ndarray, where: np.ndarray, frame, random: np.random.Generator) -> None:
    """Soft-tissue loops with gas and fluid in the abdominal fat, to be told from organs."""
    field = ndimage.gaussian_filter(random.standard_normal(SHAPE), 2.2)
    loops = where & (field / field.std() > random.uniform(0.3, 0.8)) & (frame[2] < 40)
    image[loops] = random.uniform(20, 60)
    gas = ndimage.gaussian_filter(random.standard_normal(SHAPE), 1.5)
    image[loops & (gas / gas.std() > 1.4)] = -500


def _stomach_content(random: np.random.Generator) -> float:
    return random.choice([0.0, random.uniform(-15, 10), random.uniform(120, 260)], p=[0.5, 0.3, 0.2])


def _add_lesions(image: np.ndarray, liver: np.ndarray, random: np.random.Generator) -> None:
    voxels = np.argwhere(liver)
    for _ in range(random.integers(0, 4) if len(voxels) else 0):
        distance = np.linalg.norm((np.indices(SHAPE).T - random.choice(voxels)) * SPACING, axis=-1).T
        image[liver & (distance < random.uniform(5, 16))] += random.uniform(-45, 45)


def _scan(image: np.ndarray, labels: np.ndarray, noise: tuple[float, float], random: np.random.Generator) -> np.ndarray:
    """Tissue texture, partial volume, shading and correlated noise."""
    texture = ndimage.gaussian_filter(random.standard_normal(SHAPE), 1.5)
    image = image + np.where(labels > 0, random.uniform(2, 6) * texture / texture.std(), 0)
    image = ndimage.gaussian_filter(image, random.uniform(0.4, 0.7))
    shading = ndimage.gaussian_filter(random.standard_normal(SHAPE), 12)
    grain = ndimage.gaussian_filter(random.standard_normal(SHAPE), random.uniform(0.3, 0.6))
    image += 6 * shading / shading.std() + random.uniform(*noise) * grain / grain.std()
    return np.clip(image, -1024, 3071).round().astype(np.int16)


def _save(path: Path, array: np.ndarray) -> None:
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([SPACING, SPACING, SPACING, 1.0])
    affine[:3, 3] = -(np.array(SHAPE) - 1) / 2 * SPACING
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
