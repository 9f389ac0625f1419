"""Spare channels are hidden, and nothing else of the network changes."""

import pytest
import torch
from monai.networks.nets import UNet

from tools.bundle_code.stacked_head import without_spare_channels


@pytest.fixture
def network():
    return UNet(3, 1, 5, channels=[4, 8], strides=[2], num_res_units=1).eval()


def test_the_first_channels_are_shown_and_the_tensors_stay(network):
    image, before = torch.rand(1, 1, 16, 16, 16), {n: t.clone() for n, t in network.state_dict().items()}
    whole = network(image)
    assert torch.equal(without_spare_channels(network, 4)(image), whole[:, :4])
    assert {n: t.shape for n, t in network.state_dict().items()} == {n: t.shape for n, t in before.items()}
    network.load_state_dict(before, strict=True)


def test_a_scripted_network_hides_them_too(network, tmp_path):
    image = torch.rand(1, 1, 16, 16, 16)
    torch.jit.script(without_spare_channels(network, 4)).save(tmp_path / "network.ts")
    assert torch.equal(torch.jit.load(tmp_path / "network.ts")(image), network(image))


class DeepSupervision(torch.nn.Identity):
    def forward(self, image):
        return [image, image[..., ::2, ::2, ::2]]


def test_every_output_of_deep_supervision_is_cut():
    outputs = without_spare_channels(DeepSupervision(), 2)(torch.rand(1, 3, 8, 8, 8))
    assert [output.shape for output in outputs] == [(1, 2, 8, 8, 8), (1, 2, 4, 4, 4)]
