"""The fast backward pass against PyTorch's own group normalisation."""

import pytest
import torch

from tools.bundle_code import group_norm
from tools.bundle_code.group_norm import GroupNorm3d


@pytest.mark.parametrize("channels", [4, 8, 24])
@pytest.mark.parametrize("chunk", [64, 2**18])
def test_values_and_gradients_equal_pytorch(channels, chunk, monkeypatch):
    monkeypatch.setattr(group_norm, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    groups = 8 if channels >= 8 else 1
    norm = GroupNorm3d(groups, channels)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = (3 + 2 * torch.randn(2, channels, 9, 7, 5)).to(memory_format=torch.channels_last_3d).requires_grad_()
    seed = torch.randn_like(x)
    ours = norm(x)
    assert type(ours.grad_fn).__name__.startswith("_ChannelsLastGroupNorm")
    theirs = torch.nn.functional.group_norm(x, groups, norm.weight, norm.bias)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(y, (x, norm.weight, norm.bias), seed) for y in (ours, theirs))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_bfloat16_gradients_are_as_close_to_float32_as_pytorchs_are():
    torch.manual_seed(0)
    norm = GroupNorm3d(8, 16)
    x = torch.randn(1, 16, 12, 12, 12).to(memory_format=torch.channels_last_3d)
    seed = torch.randn_like(x)

    def gradient(function, dtype):
        leaf = x.to(dtype).requires_grad_()
        return torch.autograd.grad(function(leaf), leaf, seed.to(dtype))[0].float()

    def native(leaf):
        return torch.nn.functional.group_norm(leaf, 8, norm.weight.to(leaf.dtype), norm.bias.to(leaf.dtype))

    exact = gradient(native, torch.float32)
    ours, theirs = (gradient(f, torch.bfloat16) - exact for f in (norm, native))
    assert ours.abs().mean() <= 1.2 * theirs.abs().mean()
