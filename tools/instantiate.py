"""Make a bundle for a purpose out of a template: labels, network, preprocessing and code in place, nothing left to edit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.bundle import Bundle, read_json, write_json
from tools.errors import UserError
from tools.network import WITHOUT_SPARE_CHANNELS, Structure, output_argument
from tools.vendor import SOURCE, named_modules, with_imports

LEFT_OUT = ("models", "checkpoints", "eval", "__pycache__", "splits_final.json")
TEMPLATES_OWN_LABELS = ("binary", "binary_labels", "all_labels")  # pretrain_cui has two sets, and a knob to choose
CONFIGS_WITH_NETWORK = ("train.json", "inference.json")


def data_facts(dataset_dir: str | Path) -> dict[str, str]:
    """What an nnU-Net dataset says of itself: its name (or else its folder's) as "dataset", "licence" and "reference"."""
    return stated_facts(read_json(Path(dataset_dir) / "dataset.json"), Path(dataset_dir).resolve().name)


def stated_facts(said: Mapping[str, Any], unnamed: str) -> dict[str, str]:
    """The same of the content of a dataset.json, with a name for a dataset that has none."""
    facts = {"dataset": said.get("name") or unnamed}
    facts |= {
        name: said.get(name) or said.get(other) for name, other in (("licence", "license"), ("reference", "reference"))
    }
    return {name: str(value) for name, value in facts.items() if value}


def copy_template(template: Path, output: Path) -> None:
    """Copy a bundle without its weights, checkpoints and results."""
    try:
        shutil.copytree(template, output, ignore=shutil.ignore_patterns(*LEFT_OUT))
    except shutil.Error as error:  # a line for each file
        raise UserError(f"{template} cannot be copied: {error.args[0][0][2]}") from None
    (output / "models").mkdir()


def set_labels(output: Path, label_map: Mapping[str, list[int | str]], dataset_dir: str | Path | None = None) -> None:
    """Write the output channels into train.json, inference.json and metadata.json.

    Args:
        output: the bundle.
        label_map: names of the channels 1..C, each with the labels of the training dataset that it stands for.
        dataset_dir: that dataset. If its labels stand for those of others (``pseudo_labels``), metadata.json has these.
    """
    said = read_json(Path(dataset_dir) / "dataset.json").get("label_map") if dataset_dir else None
    said = said if isinstance(said, Mapping) else {}
    original = {
        name: [s for source in sources for s in said.get(source, [source])] for name, sources in label_map.items()
    }
    count = 1 + len(label_map)
    names = {"0": "background", **{str(i): name for i, name in enumerate(label_map, start=1)}}
    for config, path in _configs(output, CONFIGS_WITH_NETWORK):
        for knob in TEMPLATES_OWN_LABELS:
            config.pop(knob, None)
        config.get("evaluator", {}).get("settings", {}).pop("binary", None)
        if "labels" in config:
            config["labels"] = dict(label_map)
        elif "network_def" in config:
            config["network_def"][output_argument(config["network_def"])] = count
        for transform in config.get("postprocessing", {}).get("transforms", []):
            if "output_dtype" in transform:
                transform["output_dtype"] = "$np.uint8" if count <= 256 else "$np.uint16"
        write_json(path, config)
    path = output / "configs" / "metadata.json"
    metadata = read_json(path)
    pred = metadata["network_data_format"]["outputs"]["pred"]
    pred["num_channels"], pred["channel_def"] = count, names
    metadata["label_map"] = original
    metadata["pred_classes"] = (
        f"{count} channels: background (constant 0) and one logit per label; argmax gives the label map"
    )
    write_json(path, metadata)


def set_values(output: Path, values: Mapping[str, Any]) -> None:
    """Set entries in whichever of train.json and inference.json has them: "loss", or inside one "train#handlers#1#max_norm".

    Raises:
        UserError: an entry that neither has, or inside of which it is to be.
    """
    unknown = set(values)
    for config, path in _configs(output, CONFIGS_WITH_NETWORK):
        for key, value in values.items():
            *outer, name = key.split("#")
            place: Any = config
            for part in outer:
                place = place[int(part)] if isinstance(place, list) else place.get(part, {})
            if name in place or (outer and place):
                place[name] = value
                unknown.discard(key)
        write_json(path, config)
    if unknown:
        raise UserError(f"{output}: neither train.json nor inference.json has {', '.join(sorted(unknown))}")


def set_starting_point(output: Path, pretrained: Bundle, structure: Structure, out_channels: int) -> None:
    """Give a template the network, preprocessing and patch size of a starting point, and the code that they need.

    Args:
        output: the bundle to change, with the template's own scripts/.
        pretrained: the starting point.
        structure: of its network.
        out_channels: of the network.

    Raises:
        UserError: code is missing.
    """
    network_def = pretrained.network_def()
    network_def[output_argument(network_def)] = out_channels
    preprocessing = pretrained.resolved("preprocessing")
    for config, path in _configs(output, CONFIGS_WITH_NETWORK):
        for knob in ("width", "spacing"):
            config.pop(knob, None)
        dropout = {"dropout": "@dropout"} if "dropout" in network_def and "dropout" in config else {}
        config["network_def"] = {**network_def, **dropout}
        config["preprocessing"] = preprocessing
        config["patch_size"] = window_size(pretrained)
        for knob in ("windows", "inferer_output"):  # how its preprocessing is undone
            if knob in config and knob in pretrained.inference:
                config[knob] = pretrained.resolved(knob)
        if "head" in config:
            config["head"] = list(structure.head)
        if "pretrained" in config and structure.last_layer:
            config["pretrained"] |= {"last_layer": structure.last_layer, "skips": structure.skips}
        if "dataset" in config:
            config["dataset"]["data"]["channels"] = pretrained.in_channels
        write_json(path, config)
    path = output / "configs" / "metadata.json"
    metadata = read_json(path)
    metadata["network_data_format"]["inputs"] = pretrained.metadata["network_data_format"]["inputs"]
    theirs = pretrained.metadata.get("required_packages_version", {})
    metadata["required_packages_version"] = {**theirs, **metadata["required_packages_version"]}
    if "image_classes" in pretrained.metadata:
        metadata["image_classes"] = pretrained.metadata["image_classes"]
    metadata["network_data_format"]["outputs"]["pred"]["spatial_shape"] = pretrained.metadata["network_data_format"][
        "outputs"
    ]["pred"]["spatial_shape"]
    write_json(path, metadata)
    assemble_scripts(output, pretrained.path / "scripts", json.dumps([network_def, preprocessing]))


def set_spare_channels(output: Path, spare: int) -> None:
    """Give a merged bundle's network the spare channels of a stacked head, and hide them; see ``tools.heads``."""
    if not spare:
        return
    path = output / "configs" / "inference.json"
    config = read_json(path)
    network = config["network_def"]
    shown = network[output_argument(network)]
    config["network_def"] = {
        "_target_": WITHOUT_SPARE_CHANNELS,
        "network": {**network, output_argument(network): shown + spare},
        "out_channels": shown,
    }
    write_json(path, config)
    _add_scripts(output, "stacked_head")


def set_modulated(output: Path) -> None:
    """Let a merged bundle run one pass for each task, with its mask; ``modulated`` in inference.json is the switch."""
    path = output / "configs" / "inference.json"
    config = read_json(path)
    inferer = {
        "_target_": "scripts.modulation.ModulatedInferer",
        "inferer": config["inferer"],
        "modulators": "$@bundle_root + '/models/modulators.pt'",
        "enabled": "@modulated",
    }
    evaluator = config["evaluator"]
    evaluator["models"].append(inferer["modulators"])
    evaluator["settings"]["modulated"] = "@modulated"
    root = config.pop("bundle_root")
    write_json(
        path, {"imports": config.pop("imports"), "bundle_root": root, "modulated": True, **config, "inferer": inferer}
    )
    _add_scripts(output, "modulation")
    without_compiling(output)


def without_compiling(output: Path) -> None:
    """Take away the overlays that compile a network: they are for those that compute with the weights that they have."""
    for overlay in ("inference_compile", "inference_trt"):
        (output / "configs" / f"{overlay}.json").unlink(missing_ok=True)


def _add_scripts(output: Path, module: str) -> None:
    for name, text in with_imports({module}, SOURCE).items():
        (output / "scripts" / name).write_text(text)


def window_size(bundle: Bundle, edge: int = 0) -> list[int]:
    """The size of a bundle's windows, voxels; or, if an edge is given, of cubes with that.

    Raises:
        UserError: its inference.json does not say it.
    """
    if edge:
        return [edge] * 3
    for key in ("patch_size", "roi_size"):
        if key in bundle.inference:
            return bundle.resolved(key)
    size = bundle.resolved("inferer").get("roi_size")
    if size is None:
        raise UserError(f"{bundle.path}/configs/inference.json: no patch_size, and no roi_size in its inferer")
    return size


def assemble_scripts(output: Path, scripts: Path, text: str) -> None:
    """Leave in a copy of a template just the code that its configs name.

    Args:
        output: the bundle.
        scripts: a folder that has the code of its network and preprocessing; all else is the template's.
        text: their definitions, as JSON.

    Raises:
        UserError: code is missing.
    """
    texts = [path.read_text() for path in sorted((output / "configs").glob("*.json"))]
    theirs = named_modules([text])
    files = with_imports(named_modules(texts) - theirs, output / "scripts")
    files |= with_imports(theirs, scripts)
    shutil.rmtree(output / "scripts")
    (output / "scripts").mkdir()
    for name, text in files.items():
        (output / "scripts" / name).write_text(text)


def _configs(output: Path, names: tuple[str, ...]):
    for name in names:
        path = output / "configs" / name
        if path.is_file():
            yield read_json(path), path


def update_metadata(output: Path, **entries: Any) -> None:
    """Set entries of metadata.json."""
    path = output / "configs" / "metadata.json"
    write_json(path, {**read_json(path), **entries})


def introduce(output: Path, title: str, facts: Mapping[str, str]) -> None:
    """Begin the bundle's README with what this copy is; the template's own text follows.

    Args:
        output: the bundle.
        title: its heading.
        facts: shown as a list.
    """
    path = output / "docs" / "README.md"
    template = path.read_text()
    lines = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    path.write_text(f"# {title}\n\n{lines}\n\n---\n\nWhat it was made from:\n\n#{template}")
