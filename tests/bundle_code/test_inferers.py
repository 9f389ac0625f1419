"""Mixed precision through an inferer: close to float32, float32 out, and any other inferer inside."""

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer

from tools.bundle_code.inferers import MixedPrecisionInferer, windows_at_once
from tools.bundle_code.residual_unet import ResidualUNet3D
from tools.bundle_code.stunet import STUNet


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return ResidualUNet3D(out_channels=3, width=8, dropout=0.0).eval()


@pytest.mark.parametrize("inner", [None, SlidingWindowInferer(16, 2, overlap=0.5, mode="gaussian")])
def test_bfloat16_is_close_to_float32(network, inner):
    x = MetaTensor(torch.rand(1, 1, 24, 20, 28))
    with torch.no_grad():
        half, full = (MixedPrecisionInferer(inner, precision)(x, network) for precision in ("bfloat16", "float32"))
        plain = inner(x.as_tensor(), network) if inner else network(x.as_tensor())
    torch.testing.assert_close(full, plain, rtol=1e-4, atol=1e-5)
    assert half.dtype == torch.float32
    assert torch.equal(half, full) == (torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"))  # see autocast
    assert (half - full).norm() < 0.05 * full.norm()


def test_gradients_flow_in_bfloat16(network):
    x = torch.rand(1, 1, 24, 24, 24)
    grads = []
    for precision in ("bfloat16", "float32"):
        network.zero_grad()
        MixedPrecisionInferer(precision=precision)(x, network).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in network.parameters()]).double())
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.99


def test_other_precisions_are_refused():
    with pytest.raises(ValueError, match="'bfloat16' or 'float32', got 'half'"):
        MixedPrecisionInferer(precision="half")


def test_all_outputs_of_a_network_with_deep_supervision_or_the_first():
    torch.manual_seed(0)
    network = STUNet(channels=[4, 4, 4], strides=[(2, 2, 2)] * 2, out_channels=3).train()
    x = torch.rand(1, 1, 8, 8, 8)
    several = MixedPrecisionInferer(all_outputs=True)(x, network)
    assert [tuple(level.shape[2:]) for level in several] == [(8, 8, 8), (4, 4, 4)]
    assert {level.dtype for level in several} == {torch.float32}
    assert torch.equal(MixedPrecisionInferer()(x, network), several[0])
    assert isinstance(MixedPrecisionInferer(all_outputs=True)(x, network.eval()), torch.Tensor)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of processors")
def test_so_many_windows_at_once_that_no_convolution_is_pytorchs_slow_one():
    """In float32 it takes that for a single small image, and nothing else says so than the backend it selects."""
    image, weight = torch.zeros(windows_at_once("float32"), 8, 32, 32, 32), torch.zeros(8, 8, 3, 3, 3)
    arguments = (image, weight, None, (1, 1, 1), (1, 1, 1), (1, 1, 1), False, (0, 0, 0), 1)
    assert torch._C._select_conv_backend(*arguments) == torch._C._ConvBackend.Mkldnn
    assert windows_at_once("float32") <= 2  # memory


@pytest.mark.skipif(torch.cuda.is_available(), reason="of processors")
def test_small_windows_go_several_at_once_and_need_no_more_memory_than_a_large_one():
    assert [windows_at_once(patch_size=[side] * 3) for side in (16, 32)] == [4, 4]
    large = windows_at_once()
    assert large <= 2
    assert [windows_at_once(patch_size=size) for size in (64, [96, 96, 96], [32, 32, -1])] == [large] * 3
    assert windows_at_once(patch_size=[64, 64, 32]) == 2
