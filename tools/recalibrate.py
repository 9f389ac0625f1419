"""``recalibrate``: batch normalisation's running statistics of a merged network, measured anew on unlabelled scans.

The statistics of a merge are the mean of the specialists', but its activations are not (REPAIR, Jordan et al., ICLR 2023).
Networks with group or instance normalisation, as those here, have no such statistics and need none of this.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from tools.bundle import Bundle
from tools.errors import UserError
from tools.instantiate import update_metadata, window_size
from tools.lineage import file_sha256
from tools.output import complete_output
from tools.recipe import Recipe
from tools.scans import choose_scans
from tools.segmenter import preprocessed


def recalibrate(
    bundle: str,
    images: str,
    output: str,
    part: str = "",
    split_file: str = "",
    scans: int = 8,
    patches: int = 8,
    batch_size: int = 4,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Write a copy of a bundle whose running means and variances are those of its own activations on some scans.

    Args:
        bundle: with weights.
        images: folder of images, or an nnU-Net dataset, whose labels are not looked at.
        output: folder of the new bundle.
        part: of an nnU-Net dataset: "train", "val" or "test" of its split; default: all labelled cases.
        split_file: JSON file with the split; default: the dataset's splits_final.json.
        scans: how many to use, chosen at random.
        patches: from each of them.
        batch_size: patches that are looked at together.
        seed: of scans and patches.
        overwrite: replace the output if it exists.

    Raises:
        UserError: the network has no running statistics, or there are no scans.
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    source = Bundle(bundle)
    network = source.network()
    device = next(network.parameters()).device
    counters = {n: t.cpu().clone() for n, t in network.state_dict().items() if n.endswith("num_batches_tracked")}
    layers = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        raise UserError(f"the network of {bundle} keeps no running statistics: there is nothing to measure anew")
    cases = choose_scans(images, source, part, split_file, scans, seed)
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all that is seen
        layer.train()
    with torch.inference_mode():
        for batch in patches_of(source, cases, patches, batch_size, seed):
            network(batch.to(device))
    measured = network.cpu().state_dict() | counters
    with complete_output(output, overwrite) as folder:
        shutil.copytree(source.path, folder, ignore=shutil.ignore_patterns("eval", "checkpoints", "__pycache__"))
        torch.save(measured, folder / "models" / "model.pt")
        if (folder / "docs" / "recipe.yaml").is_file():  # its paths are relative to where it lies
            recipe = Recipe.read(source.path / "docs" / "recipe.yaml").relative_to(Path(output) / "docs")
            (folder / "docs" / "recipe.yaml").write_text(yaml.safe_dump(recipe.as_dict(), sort_keys=False))
        facts = {"of": file_sha256(source.model_file), "scans": len(cases), "patches": patches, "seed": seed}
        update_metadata(folder, lineage={**source.metadata.get("lineage", {}), "recalibrated": facts})
    print(f"{output}: {len(layers)} layers measured on {len(cases)} scans")


def patches_of(bundle: Bundle, cases: list[dict], patches: int, batch_size: int, seed: int):
    """Batches (N, in, …) of random patches, preprocessed as the bundle does; the last one may be smaller."""
    import torch
    from monai.transforms import Compose, RandSpatialCropSamplesd, SpatialPadd
    from tqdm import tqdm

    size = window_size(bundle)
    with bundle.code():
        preprocessing = bundle.parser().get_parsed_content("preprocessing")
    crop = Compose(
        [SpatialPadd("image", size), RandSpatialCropSamplesd("image", size, num_samples=patches, random_size=False)]
    ).set_random_state(seed)
    for case in tqdm(cases, desc="scans", disable=None, leave=False):
        image = preprocessed(preprocessing, case["image"], bundle.in_channels)
        pieces = [piece["image"].as_tensor() for piece in crop(image)]
        for start in range(0, len(pieces), batch_size):
            yield torch.stack(pieces[start : start + batch_size])
