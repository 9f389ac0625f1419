"""A few thousand damaged and hostile inputs; ``python -m tests.fuzz`` makes as many as one likes."""

import pytest

from tests.fuzz import Header, RecipeFile, Safetensors, Statistics, Torch, Vector, fuzz


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", [Torch, Safetensors, Vector, Header, Statistics, RecipeFile])
def test_damaged_and_hostile_inputs(target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counts = fuzz(target(), inputs=1000, seed=1)
    assert counts["refused"] > 100
