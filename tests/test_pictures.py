"""Pictures of label maps: of every shape of image and every name."""

import numpy as np
import pytest
from matplotlib.image import imread

from tools.pictures import draw_case


@pytest.mark.parametrize("shape", [(9, 8, 7), (9, 8, 1), (1, 8, 7)])
def test_a_single_slice_and_names_with_dollars_are_drawn(tmp_path, shape):
    image = np.random.default_rng(0).normal(size=shape)
    organ = np.zeros(shape, bool)
    organ[:, 2:5] = True
    name = "$_{left$ & $right"  # as mathematics it would be an error
    draw_case(image, np.eye(4), {"reference": {name: organ}, name: {name: organ}}, tmp_path / "case.png", title=name)
    assert imread(tmp_path / "case.png")[..., :3].std() > 0.05
