"""A starting point in a new network: its backbone, and a head that knows nothing yet."""

import pytest
import torch

from tools.bundle_code.residual_unet import ResidualUNet3D
from tools.bundle_code.weights import load_backbone

HEAD = ["head.weight", "head.bias"]


@pytest.fixture
def start(tmp_path):
    network = ResidualUNet3D(out_channels=5, width=8)
    (tmp_path / "models" / "pretrained").mkdir(parents=True)
    torch.save(network.state_dict(), tmp_path / "models" / "pretrained" / "model.pt")
    return tmp_path, network.state_dict()


def test_the_backbone_is_the_starting_points_and_every_voxel_is_undecided(start):
    folder, state = start
    network = ResidualUNet3D(out_channels=2, width=8)
    backbone = load_backbone(network, folder, HEAD)
    assert backbone.keys() == state.keys() - set(HEAD)
    for name, tensor in backbone.items():
        torch.testing.assert_close(network.state_dict()[name], state[name], rtol=0, atol=0)
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)
    assert torch.count_nonzero(network(torch.randn(1, 1, 8, 8, 8))) == 0


def test_a_starting_point_of_another_size_is_refused(start):
    with pytest.raises(ValueError, match="is not of this network: tensor encoders"):
        load_backbone(ResidualUNet3D(out_channels=2, width=16), start[0], HEAD)
