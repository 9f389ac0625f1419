"""Sliding windows: seconds and resident memory above network and image, of MONAI's inferer and an argmax, and of ours.

Seconds too of nnU-Net's predictor, and of a specialist for each task instead of one merged network.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNETR
from torch import Tensor, nn

from tools.bundle_code.inferers import MixedPrecisionInferer, windows_at_once
from tools.bundle_code.residual_unet import PointwiseConv3d, ResidualUNet3D
from tools.bundle_code.sliding_window import SlidingWindow

GIB = 2**30
ROOT = Path(__file__).parents[2]
TASKS = 5
IMAGE = (1, 1, 144, 144, 192)
SMALL_WINDOW = 32
WINDOWS = {"roi_size": 96, "overlap": 0.5, "mode": "gaussian"}  # those of the bundles


def monai(image: Tensor, network: nn.Module) -> Tensor:
    """MONAI's inferer and an argmax in its defaults, float32 and contiguous, with the windows of the bundles."""
    return SlidingWindowInferer(**WINDOWS)(image, contiguous(network)).argmax(1, keepdim=True)


def contiguous(network: nn.Module) -> nn.Module:
    """The network without what makes its activations channels-last."""
    for module in network.modules():
        if isinstance(module, PointwiseConv3d):
            module.__class__ = nn.Conv3d
    return network


def monai_in_bfloat16(image: Tensor, network: nn.Module) -> Tensor:
    """The same in our precision and memory format."""
    network.to(memory_format=torch.channels_last_3d)
    return MixedPrecisionInferer(SlidingWindowInferer(**WINDOWS))(image, network).argmax(1, keepdim=True)


def keep_freed_memory() -> None:
    """As the bundles do; they have Ignite for it, which nnU-Net's environment lacks."""
    from tools.bundle_code.training import ReuseMemory

    ReuseMemory(large=False)()


def ours(image: Tensor, network: nn.Module) -> Tensor:
    """The inferer of the bundles, with freed memory kept as they do."""
    keep_freed_memory()
    return SlidingWindow(**WINDOWS)(image, network)


def smooth(image: Tensor, network: nn.Module) -> Tensor:
    """The same, with labels on the grid of an image of two thirds of the voxel size."""
    from monai.data import MetaTensor

    keep_freed_memory()
    fine = [round(1.5 * length) for length in image.shape[2:]]
    meta = {"original_affine": torch.diag(torch.tensor([2 / 3] * 3 + [1.0])), "spatial_shape": fine}
    return SlidingWindow(**WINDOWS, output="smooth_labels")(MetaTensor(image, torch.eye(4), meta), network)


def nnunets_windows(image: Tensor, network: nn.Module) -> Tensor:
    """The inferer of the bundles with the windows of nnU-Net."""
    keep_freed_memory()
    return SlidingWindow(**WINDOWS, windows="nnunet")(image, network)


def one_small_window(image: Tensor, network: nn.Module, at_a_time: int = 1) -> Tensor:
    """The inferer of the bundles with small windows, one in each pass."""
    keep_freed_memory()
    return SlidingWindow(SMALL_WINDOW, sw_batch_size=at_a_time)(image, network)


def several_small_windows(image: Tensor, network: nn.Module) -> Tensor:
    """The same with as many in each pass as the bundles take."""
    return one_small_window(image, network, windows_at_once(patch_size=SMALL_WINDOW))


def specialists(image: Tensor, network: nn.Module) -> Tensor:
    """The inferer of the bundles on a network for each task; returns the last one's labels."""
    for _ in range(TASKS):
        labels = ours(image, network)
    return labels


def unet(out_channels: int = 16) -> nn.Module:
    return ResidualUNet3D(out_channels=out_channels, width=16, dropout=0.0)


def one_task() -> nn.Module:
    """A specialist of one organ."""
    return unet(2)


def all_tasks() -> nn.Module:
    """The merged network of as many."""
    return unet(1 + TASKS)


def transformer() -> nn.Module:
    """The study's UNETR, 24 M parameters."""
    return UNETR(1, 16, SMALL_WINDOW, feature_size=8, hidden_size=384, mlp_dim=1536, proj_type="perceptron")


def one_layer() -> nn.Module:
    """105 classes at almost no cost, so that what is measured is stitching."""
    return PointwiseConv3d(1, 105)


def compare_inference() -> None:
    """Print a line for each way, with ratios to the first."""
    print(
        f"{torch.get_num_threads()} threads; seconds, ratio, memory above network and image, labels unlike the first's"
    )
    compare("16 classes, width 16", unet, IMAGE, [monai, monai_in_bfloat16, ours, smooth])
    compare_with_nnunet()
    compare_with_specialists()
    for name, make in (("16 classes, UNETR", transformer), ("16 classes, width 16", unet)):
        compare(
            f"{name}, windows of {SMALL_WINDOW}³", make, (1, 1, 96, 96, 96), [one_small_window, several_small_windows]
        )
    compare("105 classes, one layer", one_layer, (1, 1, 150, 150, 150), [monai, monai_in_bfloat16, ours])
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if free < 30 * GIB:
        print(f"\nMONAI's way is left out: its 105 channels take 20 GiB, and {free / GIB:.0f} GiB are free")
    ways = [monai, ours] if free >= 30 * GIB else [ours]
    compare("105 classes, one layer", one_layer, (1, 1, 300, 300, 400), ways)


def compare(name: str, make: Callable[[], nn.Module], size: Sequence[int], ways: Sequence[Callable]) -> None:
    print(f"\n{name}, image of {' × '.join(map(str, size[2:]))}")
    first: tuple[float, Tensor] | None = None
    for way in ways:
        seconds, memory, labels = measure(make, size, way)
        first = first or (seconds, labels)
        unlike = "" if labels.shape != first[1].shape else f"{(labels != first[1]).sum().item():>10} voxels"
        print(
            f"{way.__name__:<20} {seconds:8.2f} s {first[0] / seconds:6.2f} x {memory / GIB:8.2f} GiB {unlike}",
            flush=True,
        )


def compare_with_nnunet() -> None:
    """nnU-Net's predictor, in its own environment, and the bundles' inferer with the same windows."""
    python = ROOT / ".venv-nnunet" / "bin" / "python"
    print(f"\n16 classes, width 16, image of {' × '.join(map(str, IMAGE[2:]))}, windows of nnU-Net, no mirroring")
    if not python.exists():
        print("left out: nnU-Net is not installed (make .venv-nnunet/ready)")
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "labels"
        words = [python, "-m", "tests.benchmarks.nnunet_predictor", file]
        done = subprocess.run(words, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE)
        theirs, expected = (
            float(done.stdout.split()[-1]),
            torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8),
        )
    print(f"{'nnU-Net':<20} {theirs:8.2f} s")
    seconds, memory, labels = measure(unet, IMAGE, nnunets_windows)
    unlike = (labels != expected).sum().item()
    print(
        f"{'ours':<20} {seconds:8.2f} s {theirs / seconds:6.2f} x {memory / GIB:8.2f} GiB {unlike:>10} voxels",
        flush=True,
    )


def compare_with_specialists() -> None:
    """One merged network against a network for each task."""
    print(f"\n{TASKS} tasks, image of {' × '.join(map(str, IMAGE[2:]))}: a specialist for each, and one merged network")
    apart, _, _ = measure(one_task, IMAGE, specialists)
    merged, _, _ = measure(all_tasks, IMAGE, ours)
    print(
        f"{apart:8.2f} s {merged:8.2f} s: {apart / merged:.2f} x, {apart / merged / TASKS:.2f} x for each task",
        flush=True,
    )


def measure(make: Callable[[], nn.Module], size: Sequence[int], way: Callable) -> tuple[float, int, Tensor]:
    """Seconds, bytes above network and image, and flat labels of one pass in a process of its own."""
    context = multiprocessing.get_context("spawn")
    mine, other = context.Pipe()
    process = context.Process(target=_measure, args=(other, make, size, way), daemon=True)
    process.start()
    seconds, memory, labels = mine.recv()
    process.join()
    return seconds, memory, torch.frombuffer(labels, dtype=torch.uint8)


def _measure(connection: Connection, make: Callable[[], nn.Module], size: Sequence[int], way: Callable) -> None:
    torch.manual_seed(0)
    network, image = make().eval(), torch.rand(size)
    with torch.inference_mode():
        before = _resident("VmRSS")
        way(image[..., :100, :100, :100], network)  # what is set up once
        began = time.perf_counter()
        labels = way(image, network)
        seconds = time.perf_counter() - began
    connection.send((seconds, _resident("VmHWM") - before, bytearray(labels.to(torch.uint8).numpy().tobytes())))


def _resident(entry: str) -> int:
    """Bytes, as the kernel counts them (Linux)."""
    return 1024 * int(re.search(rf"{entry}:\s+(\d+)", Path("/proc/self/status").read_text())[1])
