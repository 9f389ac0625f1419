"""verify: sound bundles pass, each kind of damage and attack has its line, and nothing that came with a bundle is run."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import ROOT, here, run

BUNDLES = sorted(path.name for path in (ROOT / "bundles").iterdir())
ARCHIVE = "two_organs_v0.1.0.zip"


@pytest.fixture
def bundle(untrained, tmp_path):
    return Path(shutil.copytree(untrained, tmp_path / "bundle"))


@pytest.fixture
def archive(untrained, tmp_path):
    assert here("tools", "pack", untrained, "--output", tmp_path).returncode == 0
    return tmp_path / ARCHIVE


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where temporary files go; nothing may be left there."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.glob("verify-*"))  # torch leaves something of its own


def verified(subject, *flags):
    result = here("tools", "verify", subject, *flags)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAILED" not in result.stdout and result.stderr == ""
    return result.stdout


def failed(subject, check, *words, flags=()):
    """One line says what is wrong; exit code 1."""
    result = here("tools", "verify", subject, *flags)
    lines = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
    assert result.returncode == 1 and len(lines) == 1, result.stdout + result.stderr
    assert lines[0].startswith(f"FAILED  {check} "), lines[0]
    assert all(word in lines[0] for word in words), lines[0]
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert "verify-" not in lines[0]  # no temporary folder that the user would look for in vain


def edit(bundle, change, config="metadata"):
    path = bundle / "configs" / f"{config}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# sound ones


@pytest.mark.parametrize("name", BUNDLES)
def test_the_bundles_as_shipped(name):
    assert "note    weights      there are none here" in verified(ROOT / "bundles" / name)


def test_trained_bundles_and_their_zips(chain, tmp_path, temporary):
    for folder in (chain.pretrain, chain.specialists["liver"], chain.merged):
        assert "ok      network      the weights fit ResidualUNet3D" in verified(folder)
        assert here("tools", "pack", folder, "--output", tmp_path / "dist").returncode == 0
    for path in (tmp_path / "dist").glob("*.zip"):
        said = verified(path)
        assert "ok      checksum" in said and "ok      network" in said
    assert "models/pretrained is pretrain as recorded" in verified(chain.specialists["liver"])
    assert "2 task vectors, 2 of them here and as recorded" in verified(chain.merged)


def test_the_report_as_json(archive, temporary):
    report = json.loads(verified(archive, "--json"))
    assert report["ok"] and {entry["status"] for entry in report["checks"]} == {"ok", "note"}
    archive.with_name(f"{ARCHIVE}.sha256").write_text(f"{'0' * 64}  {ARCHIVE}\n")
    result = here("tools", "verify", archive, "--json")
    assert result.returncode == 1 and not json.loads(result.stdout)["ok"]


def test_a_bundle_in_the_working_directory(bundle):
    run("tools", "verify", ".", cwd=bundle)


def test_without_torch_it_says_that_the_network_was_not_built(archive, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not installed here')")
    said = run("tools", "verify", archive, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}").stdout
    assert "note    network      names and shapes of the weights were not compared" in said
    assert "FAILED" not in said


# the zip


def rezip(path, change=lambda name, data: data, extra=()):
    """Write a zip anew, as an attacker would: all checksums in it are right again."""
    with zipfile.ZipFile(path) as old:
        entries = [(info, old.read(info)) for info in old.infolist()]
    with zipfile.ZipFile(path, "w") as new:
        for info, data in entries:
            new.writestr(info, change(info.filename, data))
        for info, data in extra:
            new.writestr(info, data)
    path.with_name(f"{path.name}.sha256").unlink(missing_ok=True)


def flip(path, name):
    """Change one bit in the middle of a file in a zip."""
    with zipfile.ZipFile(path) as old:
        info = old.getinfo(name)
    data = bytearray(path.read_bytes())
    data[info.header_offset + 30 + len(name) + info.file_size // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["models/model.pt", "configs/inference.json"])
def test_a_flipped_bit(archive, temporary, name):
    flip(archive, f"two_organs/{name}")
    failed(archive, "checksum", "is not the file that two_organs_v0.1.0.zip.sha256 describes")
    archive.with_name(f"{ARCHIVE}.sha256").unlink()
    failed(archive, "zip", f"two_organs/{name} is not what was packed", "CRC")


def test_a_replaced_file_with_a_right_checksum_of_its_own(archive, temporary):
    before = archive.with_name(f"{ARCHIVE}.sha256").read_text()
    rezip(archive, lambda name, data: data.replace(b"0.5", b"0.9") if name.endswith("inference.json") else data)
    assert "note    checksum     no two_organs_v0.1.0.zip.sha256 beside it" in verified(archive)
    archive.with_name(f"{ARCHIVE}.sha256").write_text(before)
    failed(archive, "checksum", "download both again")


def test_a_truncated_zip_and_what_is_none(archive, tmp_path, temporary):
    whole = archive.read_bytes()
    archive.with_name(f"{ARCHIVE}.sha256").unlink()
    for length in (0, 100, len(whole) // 2, len(whole) - 1):
        archive.write_bytes(whole[:length])
        failed(archive, "zip", "is not a zip, or is truncated")
    assert here("tools", "verify", tmp_path / "nothing.zip").stderr == f"error: {tmp_path}/nothing.zip not found\n"


def entry(name, mode=stat.S_IFREG | 0o644, compression=zipfile.ZIP_STORED):
    info = zipfile.ZipInfo(name)
    info.external_attr, info.create_system, info.compress_type = mode << 16, 3, compression
    return info


DEFLATED = zipfile.ZIP_DEFLATED
ATTACKS = [
    (entry("two_organs/../../escaped"), b"", "leads out of the bundle"),
    (entry("/tmp/escaped"), b"", "an absolute path"),
    (entry("C:/escaped"), b"", "an absolute path"),
    (entry("two_organs\\..\\escaped"), b"", "not a portable name"),
    (entry("two_organs/docs/link", stat.S_IFLNK | 0o777), b"/etc/passwd", "a symbolic link"),
    (entry("two_organs/docs/pipe", stat.S_IFIFO | 0o644), b"", "a special file"),
    (entry("two_organs/license"), b"another", "would be written to one place"),
    (entry("two_organs/LICENSE/x"), b"another", "would be written to one place"),
    (entry("two_organs/docs/zeros", compression=DEFLATED), bytes(24 * 2**20), "as in a zip bomb"),
    (entry("two_organs/models/zeros.pt", compression=DEFLATED), bytes(64 * 2**20), "as in a zip bomb"),
    (entry("two_organs/docs/large"), bytes(26 * 2**20), "more than 25 MiB"),
    (entry("two_organs/docs/x", compression=zipfile.ZIP_LZMA), b"x", "compressed in an unusual way"),
    (entry("elsewhere/x"), b"", "all files must lie in one folder"),
    (entry("x"), b"", "all files must lie in one folder"),
]


@pytest.mark.parametrize(("info", "data", "words"), ATTACKS, ids=[attack[0].filename for attack in ATTACKS])
def test_a_hostile_zip_is_not_unpacked(archive, tmp_path, temporary, info, data, words):
    rezip(archive, extra=[(info, data)])
    before = sorted(os.listdir(tmp_path))
    failed(archive, "zip", words)
    assert sorted(os.listdir(tmp_path)) == before and not os.path.exists("/tmp/escaped")


def test_a_file_that_is_there_twice(archive, temporary):
    with pytest.warns(UserWarning, match="Duplicate"):
        rezip(archive, extra=[(entry("two_organs/LICENSE"), b"another")])
    failed(archive, "zip", "would be written to one place")


def test_entries_that_share_their_bytes(archive, temporary):
    """A zip bomb without compression: many entries in the table of contents for one file in the zip."""
    with zipfile.ZipFile(archive, "a") as file:
        model = file.getinfo("two_organs/models/model.pt")
        for number in range(3):
            copy = entry(f"two_organs/models/{number}.pt")
            copy.header_offset, copy.CRC = model.header_offset, model.CRC
            copy.compress_size = copy.file_size = model.file_size
            file.filelist.append(copy)
        file._didModify = True
    archive.with_name(f"{ARCHIVE}.sha256").unlink()
    failed(archive, "zip", "overlap")


# the bundle


class Hostile:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return (os.system, (self.command,))


def test_a_hostile_pickle_is_not_loaded(bundle, tmp_path, temporary):
    state = torch.load(bundle / "models" / "model.pt", weights_only=True)
    torch.save({**state, "evil": Hostile(f"touch {tmp_path}/executed")}, bundle / "models" / "model.pt")
    failed(bundle, "weights", "models/model.pt is not a readable file of weights", "system")
    here("tools", "pack", bundle, "--output", tmp_path / "dist")
    failed(tmp_path / "dist" / ARCHIVE, "weights", "models/model.pt is not a readable file of weights", "system")
    assert not (tmp_path / "executed").exists()


def state_with(**tensors):
    def change(bundle):
        path = bundle / "models" / "model.pt"
        state = torch.load(path, weights_only=True) | tensors
        torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, path)

    return change


def damaged_weights(bundle):
    path = bundle / "models" / "model.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


WEIGHTS = [
    (damaged_weights, "weights", ["models/model.pt is damaged"]),
    (state_with(**{"head.bias": torch.full((3,), torch.nan)}), "weights", ["head.bias has NaN"]),
    (state_with(**{"head.bias": torch.zeros(4)}), "network", ["head.bias is (4,), but (3,) in network_def"]),
    (state_with(**{"head.bias": None}), "network", ["head.bias is missing, but (3,)"]),
    (state_with(extra=torch.zeros(4)), "network", ["tensor extra is not in network_def"]),
]


@pytest.mark.parametrize(("change", "check", "words"), WEIGHTS, ids=[words[0] for *_, words in WEIGHTS])
def test_damaged_weights_and_those_of_another_network(bundle, change, check, words):
    change(bundle)
    failed(bundle, check, *words)


def pred(content):
    return content["network_data_format"]["outputs"]["pred"]


METADATA = [
    (
        lambda m: pred(m).update(channel_def={"0": "background", "2": "liver", "3": "spleen"}),
        "names the channels 0, 2, 3",
    ),
    (lambda m: pred(m).update(num_channels=4), "num_channels is 4"),
    (lambda m: pred(m).update(num_channels=10**15), "num_channels is 1000000000000000"),
    (lambda m: pred(m)["channel_def"].update({"2": "Liver"}), "two channels of channel_def have one name"),
    (
        lambda m: pred(m).update(num_channels=2, channel_def={"0": "background", "1": "liver"}),
        "out_channels of network_def",
    ),
    (lambda m: pred(m).pop("dtype"), "network_data_format#outputs#pred lacks dtype"),
    (lambda m: m["changelog"].clear(), "version 0.1.0 is not in the changelog"),
    (lambda m: m.pop("copyright"), "lacks copyright"),
    (lambda m: m.update(pytorch_version="2.13.0+cpu"), "not a version that pip installs"),
    (lambda m: m.update(network_data_format=[]), "cannot be read"),
]


@pytest.mark.parametrize(("change", "words"), METADATA, ids=[words for _, words in METADATA])
def test_wrong_metadata(bundle, change, words):
    edit(bundle, change)
    failed(bundle, "metadata", words)


CONFIGS = [
    (
        lambda c: c.update(network="$@network_deff.to(@device)"),
        "@network_deff is not there, did you mean 'network_def'?",
    ),
    (lambda c: c["inferer"].update(precision="@##absent"), "@absent is not there"),
    (lambda c: c["inferer"].update(precision="%absent"), "@absent is not there"),
    (lambda c: c.update(imports=["$import scripts"]), "fails when the bundle is run from elsewhere"),
    (lambda c: c.update(network_def="%train.json#network_def"), "inference.json must stand alone"),
    (lambda c: c.update(x="$@device + ("), "is not Python"),
    (lambda c: c.update(x="$important(@device)"), "'import' beside a reference"),
    (lambda c: c.pop("inferer"), "lacks inferer"),
    (lambda c: c["network_def"].update(_target_="scripts.absent.Net"), "scripts/ has no absent.py"),
    (lambda c: c["network_def"].update(_target_="scripts.residual_unet.Net"), "scripts/residual_unet.py has no Net"),
]


@pytest.mark.parametrize(("change", "words"), CONFIGS, ids=[words for _, words in CONFIGS])
def test_configs_that_cannot_work(bundle, change, words):
    edit(bundle, change, "inference")
    failed(bundle, "configs", "configs/inference.json", words)


def test_references_that_monai_understands_are_not_refused(bundle):
    def change(config):
        config["a"] = {"b": [1, "@#0"], "c": "@##device", "d": "%a#b", "_desc_": "@nobody reads this"}
        config["e"] = "$@a#b#1 + len(@_meta_#authors)"
        config["mail"] = "somebody@hospital.org"

    edit(bundle, change, "inference")
    (bundle / "configs" / "overlay.json").write_text('{"a#c": 1, "+e": "$[@a#c]", "f": "@e"}')
    (bundle / "configs" / "more.yaml").write_text("g: '@f'\n")
    (bundle / "configs" / "cases.json").write_text('["@nothing", 1]')  # data that a config reads
    verified(bundle)
    (bundle / "configs" / "more.yaml").write_text("g: '@h'\n")
    failed(bundle, "configs", "configs/more.yaml, g: @h is not there")


def test_scripts_that_cannot_be_imported(bundle):
    (bundle / "scripts" / "weights.py").unlink()
    failed(bundle, "configs", "scripts/ has no weights.py")
    (bundle / "scripts" / "weights.py").write_text("def model_file(:")
    result = here("tools", "verify", bundle)
    assert "scripts/weights.py is not Python" in result.stdout
    shutil.copyfile(ROOT / "tools" / "bundle_code" / "weights.py", bundle / "scripts" / "weights.py")
    (bundle / "scripts" / "group_norm.py").unlink()
    failed(bundle, "scripts", "scripts/residual_unet.py, line", "imports .group_norm, which is not beside it")


FOREIGN = {
    "models/last.ckpt": b"x",
    "docs/notes.pkl": b"x",
    "scripts/fast.so": b"x",
    "docs/notes.txt": b"\x80\x04K\x01.",
    "docs/viewer": b"\x7fELF...",
    "scripts/model.pt": b"x",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_programs_and_pickles_are_refused(bundle, name):
    (bundle / name).write_bytes(FOREIGN[name])
    failed(bundle, "other files", f"{name} is a program, or a file that can run code")


def test_a_folder_that_cannot_be_shared(bundle):
    (bundle / "LICENSE").unlink()
    failed(bundle, "layout", "LICENSE is missing")
    (bundle / "LICENSE").symlink_to(ROOT / "LICENSE")
    assert "LICENSE is a symbolic link" in here("tools", "verify", bundle).stdout


def test_large_files_that_would_be_written_elsewhere(bundle):
    large = {"path": "../../x", "url": "https://x", "hash_val": "0" * 64, "hash_type": "sha256"}
    (bundle / "large_files.yml").write_text(yaml.safe_dump({"large_files": [large]}))
    failed(bundle, "large files", "'../../x' is a path that leads out of the bundle")
    (bundle / "large_files.yml").write_text(
        yaml.safe_dump({"large_files": [large | {"path": "x", "hash_type": "md5"}]})
    )
    failed(bundle, "large files", "x needs the SHA-256 as hash_val")


# the lineage


@pytest.fixture
def family(chain, tmp_path):
    """The chain, copied: bundles and task vectors beside each other."""
    for path in (chain.merged, chain.specialists["liver"]):
        shutil.copytree(path, tmp_path / path.name)
    for path in chain.vectors.values():
        shutil.copyfile(path, tmp_path / path.name)
    return tmp_path


def test_a_merged_bundle_whose_parents_are_others(family):
    merged = family / "merged"
    recipe = merged / "docs" / "recipe.yaml"
    edit(merged, lambda m: m["lineage"].update(pretrained_sha256="0123"))
    failed(merged, "lineage", "lineage#pretrained_sha256 is no SHA-256: '0123'")
    edit(merged, lambda m: m["lineage"].update(pretrained_sha256="0" * 64))
    verified(merged)
    edit(merged, lambda m: m["lineage"]["vectors"].reverse())
    failed(merged, "lineage", "the labels of lineage#vectors are ['spleen', 'liver']")
    edit(merged, lambda m: m["lineage"]["vectors"].reverse())
    text = recipe.read_text()
    recipe.write_text(text.replace("method: average", "method: averag"))
    failed(merged, "lineage", "docs/recipe.yaml, line", "did you mean 'average'")
    recipe.write_text(text.replace("- ../../spleen.safetensors\n", ""))
    failed(merged, "lineage", "docs/recipe.yaml has 1 task vectors, the lineage in the metadata 2")
    recipe.write_text(text)
    shutil.copyfile(family / "spleen.safetensors", family / "liver.safetensors")
    failed(
        merged,
        "lineage",
        "liver.safetensors is another task vector than the liver.safetensors that the lineage records",
    )


def test_a_zip_is_compared_with_the_task_vectors_beside_it(family):
    here("tools", "pack", family / "merged", "--output", family)
    (archive,) = family.glob("*.zip")
    assert "2 of them here and as recorded" in verified(archive)
    deep = family / "a/b/c/d/e/f"  # further down than temporary folders are
    deep.mkdir(parents=True)
    shutil.copytree(family / "merged", deep / "merged")
    recipe = deep / "merged/docs/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("- ../../", "- ../../../../../../../../"))
    here("tools", "pack", deep / "merged", "--output", deep)
    assert "2 of them here and as recorded" in verified(next(deep.glob("*.zip")))
    shutil.copyfile(family / "spleen.safetensors", family / "liver.safetensors")
    failed(archive, "lineage", f"{family}/liver.safetensors is another task vector")


def test_a_specialist_with_another_starting_point(family):
    liver = family / "liver"
    shutil.copyfile(liver / "models" / "model.pt", liver / "models" / "pretrained" / "model.pt")
    failed(liver, "lineage", "models/pretrained/model.pt is not the starting point that the lineage records, pretrain")


# nothing of a bundle is run


def test_nothing_of_a_bundle_is_run_unless_told(bundle, tmp_path, temporary):
    mark = tmp_path / "executed"
    text = (bundle / "scripts" / "residual_unet.py").read_text()
    (bundle / "scripts" / "residual_unet.py").write_text(f"{text}\nopen({str(mark)!r}, 'w').close()\n")
    edit(bundle, lambda c: c.update(x=f"$open({str(mark)!r}, 'w').close()"), "inference")
    here("tools", "pack", bundle, "--output", tmp_path / "dist")
    for subject in (bundle, tmp_path / "dist" / ARCHIVE):
        assert "note    network" in (said := verified(subject)) and "add --run_code if you trust its author" in said
        assert not mark.exists()
    edit(bundle, lambda m: m.pop("copyright"))
    failed(bundle, "metadata", "lacks copyright", flags=["--run_code"])
    assert not mark.exists()  # even when told, not before everything else is in order
    assert "ok      network      the weights fit ResidualUNet3D" in verified(tmp_path / "dist" / ARCHIVE, "--run_code")
    assert mark.exists()


TARGETS = [
    {"_target_": "os.system", "command": "touch {mark}"},
    {"_target_": "ResidualUNet3D", "in_channels": {"_target_": "os.system", "command": "touch {mark}"}},
    {"_target_": "UNet", "spatial_dims": "$__import__('os').system('touch {mark}')"},
    {"_target_": "monai.networks.nets.EfficientNetBN", "model_name": "efficientnet-b0"},  # would download its weights
]


@pytest.mark.parametrize("network_def", TARGETS, ids=str)
def test_a_network_that_is_no_network_is_not_built(bundle, tmp_path, network_def):
    text = json.dumps(network_def).replace("{mark}", str(tmp_path / "executed"))
    edit(bundle, lambda c: c.update(network_def=json.loads(text)), "inference")
    assert "add --run_code if you trust its author" in verified(bundle)
    assert not (tmp_path / "executed").exists()


UNET = {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 3, "channels": [4, 8], "strides": [2]}


def random_weights(bundle, network_def):
    from monai.networks.nets import UNet

    arguments = {name: value for name, value in network_def.items() if name != "_target_"}
    torch.save(UNet(**arguments).state_dict(), bundle / "models" / "model.pt")


def test_a_network_of_monai_is_built_without_the_bundle(bundle):
    random_weights(bundle, UNET)
    edit(bundle, lambda c: c.update(network_def=UNET), "inference")
    assert "the weights fit UNet" in verified(bundle)


def test_a_stacked_head_with_spare_channels(bundle):
    inner = {**UNET, "out_channels": 4}
    random_weights(bundle, inner)
    shutil.copyfile(ROOT / "tools" / "bundle_code" / "stacked_head.py", bundle / "scripts" / "stacked_head.py")
    network_def = {"_target_": "scripts.stacked_head.without_spare_channels", "network": inner, "out_channels": 3}
    edit(bundle, lambda c: c.update(network_def=network_def), "inference")
    assert "the weights fit UNet" in verified(bundle)
    random_weights(bundle, UNET)
    failed(bundle, "network", "in network_def of configs/inference.json")


def test_a_long_verification_that_is_stopped_leaves_nothing(archive, tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    slow = (
        "import sys, time; import tools.archive as a; pieces = a.pieces; "
        "a.pieces = lambda file: (time.sleep(0.2) or piece for piece in pieces(file)); "
        "from tools.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    archive.with_name(f"{ARCHIVE}.sha256").unlink()
    process = subprocess.Popen(
        [sys.executable, "-c", slow, "verify", str(archive)],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list(temporary.glob("verify-*/*")) and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == 143
    assert os.listdir(temporary) == []
