"""Mixed precision and channels-last for any MONAI inferer, on CPU as on CUDA (MONAI's engines autocast on CUDA only)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.inferers import Inferer, SimpleInferer
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn


class MixedPrecisionInferer(Inferer):
    """Run another inferer under bfloat16 autocast, with the input in the channels-last format; returns float32.

    Args:
        inferer: what does the work: ``SimpleInferer`` when None, or a ``SlidingWindowInferer``.
        precision: ``"bfloat16"``, where the processor computes in it (see ``autocast``), or ``"float32"`` for full precision.
        channels_last: memory format of the input, which the network's convolutions then keep.
        all_outputs: give all outputs of a network that has several, as deep supervision needs them, not the first one.

    Raises:
        ValueError: another ``precision``.
    """

    def __init__(
        self,
        inferer: Inferer | None = None,
        precision: str = "bfloat16",
        channels_last: bool = True,
        all_outputs: bool = False,
    ) -> None:
        super().__init__()
        if precision not in ("bfloat16", "float32"):
            raise ValueError(f"precision must be 'bfloat16' or 'float32', got {precision!r}")
        self.inferer = inferer or SimpleInferer()
        self.precision = precision
        self.channels_last = channels_last
        self.all_outputs = all_outputs

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor | list[Tensor]:
        def forward(window: Tensor, *args: Any, **kwargs: Any) -> Tensor | list[Tensor]:
            output = self.forward(network, window, *args, **kwargs)
            return output.float() if isinstance(output, Tensor) else [level.float() for level in output]

        plain = inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs
        return self.inferer(plain, forward, *args, **kwargs)

    def forward(
        self, network: Callable[..., Any], window: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor | Sequence[Tensor]:
        """One pass of the network, whose output keeps the precision that it was computed in."""
        if self.channels_last and window.ndim == 5:
            window = window.contiguous(memory_format=torch.channels_last_3d)
        with autocast(window.device, self.precision):
            output = network(window, *args, **kwargs)
            return output if self.all_outputs else full_size(output)


def autocast(device: torch.device, precision: str = "bfloat16") -> torch.autocast:
    """Autocast to bfloat16, or to nothing where the precision is float32 or the processor has no bfloat16.

    There PyTorch falls back to a convolution that is hundreds of times slower than float32: on any x86 CPU without AVX-512.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16" and _has_bfloat16(device))


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return True


def windows_at_once(precision: str = "bfloat16", patch_size: Sequence[int] | int = -1) -> int:
    """How many windows one pass of the network takes best: 4 on a GPU, on a CPU 1, or 2 where it computes in float32.

    One needs least memory. But for a single image in float32, unless it is large, PyTorch 2.13 takes a convolution of its own
    that is several times slower than oneDNN's (``_select_conv_backend`` names it ``Slow3d``). And of small windows a CPU takes
    up to 4, as many as make 64³ voxels: a transformer reads all its weights in every pass, however few tokens a window has.

    Args:
        precision: see ``MixedPrecisionInferer``.
        patch_size: of the windows, voxels; a number, or one for each axis; where it is 0 or less, that of the image.
    """
    if torch.cuda.is_available():
        return 4
    least = 1 if precision == "bfloat16" and _has_bfloat16(torch.device("cpu")) else 2
    sides = ensure_tuple_rep(patch_size, 3)
    return max(least, min(4, 64**3 // math.prod(sides))) if min(sides) > 0 else least


def full_size(output: Tensor | Sequence[Tensor]) -> Tensor:
    """A network's output at the size of its input: the first of several, as networks with deep supervision return them."""
    return output[0] if isinstance(output, list | tuple) else output
