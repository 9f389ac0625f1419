"""pack: the same bytes from the same bundle, nothing private in them, and MONAI gets from it what was packed."""

import http.server
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pytest
import yaml

from tests.conftest import ROOT, here, run

NAME = "two_organs_v0.1.0.zip"


@pytest.fixture
def bundle(untrained, tmp_path):
    return Path(shutil.copytree(untrained, tmp_path / "bundle"))


@pytest.fixture
def server(tmp_path):
    """A folder, and the address under which it is served."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def pack(bundle, output, *flags):
    result = here("tools", "pack", bundle, "--output", output, *flags)
    assert result.returncode == 0, result.stderr
    return result.stdout


def download(name, url, folder):
    words = ["download", "--name", name, "--url", url, "--bundle_dir", folder, "--progress", "False"]
    run("monai.bundle", *words, PYTHONPATH="", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    return folder / name


def test_the_same_bundle_gives_the_same_bytes_wherever_and_whenever_it_is_packed(bundle, tmp_path):
    pack(bundle, tmp_path / "a")
    copy = tmp_path / "elsewhere" / "under_another_name"
    shutil.copytree(bundle, copy)
    for number, path in enumerate(sorted(copy.rglob("*"))):
        os.utime(path, (10**9 + number, 10**9 + number))
        if path.is_file():
            path.chmod(0o755 if number % 2 else 0o600)
    pack(copy, tmp_path / "b")
    files = (NAME, f"{NAME}.sha256")
    assert sorted(os.listdir(tmp_path / "a")) == sorted(os.listdir(tmp_path / "b")) == sorted(files)
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    checked = subprocess.run(["sha256sum", "-c", files[1]], cwd=tmp_path / "b", capture_output=True, text=True)
    assert checked.stdout == f"{NAME}: OK\n"


def test_only_the_bundle_is_in_the_zip_and_not_what_else_lies_in_its_folder(bundle, tmp_path):
    private = ["images/patient.nii.gz", "eval/case.csv", "checkpoints/last.pt", "splits_final.json", ".git/config"]
    leftovers = ["scripts/__pycache__/images.pyc", "models/.model.pt.1.partial", "models/x.partial", "docs/.DS_Store"]
    for name in (*private, *leftovers):
        (bundle / name).parent.mkdir(exist_ok=True)
        (bundle / name).write_text("private")
    said = pack(bundle, tmp_path / "dist")
    assert "left out: checkpoints, eval, images, splits_final.json" in said
    with zipfile.ZipFile(tmp_path / "dist" / NAME) as archive:
        entries = archive.infolist()
        assert archive.testzip() is None
        assert b"private" not in b"".join(archive.read(entry) for entry in entries)
    names = [entry.filename for entry in entries]
    assert names == sorted(names)
    assert {name.split("/")[0] for name in names} == {"two_organs"}
    needed = {
        f"two_organs/{name}" for name in ("LICENSE", "configs/inference.json", "scripts/images.py", "models/model.pt")
    }
    assert needed < set(names)
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert {entry.external_attr >> 16 for entry in entries} == {stat.S_IFREG | 0o644}


def test_folders_of_this_computer_are_pointed_out(bundle, tmp_path):
    path = bundle / "configs" / "inference.json"
    path.write_text(path.read_text().replace("\"$@bundle_root + '/images'\"", '"/data/hospital/patients"'))
    assert "note: dataset_dir in configs/inference.json says '/data/hospital/patients'" in pack(
        bundle, tmp_path / "dist"
    )


def test_what_monai_downloads_is_verified_and_segments_as_the_original(chain, server, tmp_path):
    folder, address = server
    said = pack(chain.merged, folder)
    name = re.search(r"monai.bundle download --name (\w+)", said)[1]
    (archive,) = folder.glob("*.zip")
    downloaded = download(name, f"{address}/{archive.name}", tmp_path / "there")
    for subject in (archive, downloaded):
        result = here("tools", "verify", subject)
        assert result.returncode == 0 and "ok      network" in result.stdout, result.stdout + result.stderr
    images = tmp_path / "images"
    images.mkdir()
    scan = chain.dataset / "imagesTr" / "phantom_000_0000.nii.gz"
    nibabel.save(nibabel.load(scan).slicer[8:48, 8:48, 8:40], images / "scan.nii.gz")
    maps = []
    for bundle in (chain.merged, downloaded):
        config, output = bundle / "configs" / "inference.json", tmp_path / f"maps{len(maps)}"
        words = ["--config_file", config, "--bundle_root", bundle, "--dataset_dir", images, "--output_dir", output]
        run("monai.bundle", "run", *words, PYTHONPATH="")
        (label_map,) = output.glob("*.nii.gz")
        maps.append(np.asarray(nibabel.load(label_map).dataobj))
    assert np.array_equal(*maps) and maps[0].any()


def test_weights_elsewhere_are_fetched_by_monai_and_compared(bundle, server, tmp_path):
    folder, address = server
    pack(bundle, folder, "--without_weights", "--url", f"{address}/weights/")
    (folder / "weights" / "models").mkdir(parents=True)
    shutil.copyfile(bundle / "models" / "model.pt", folder / "weights" / "models" / "model.pt")
    downloaded = download("two_organs", f"{address}/{NAME}", tmp_path / "there")
    assert not (downloaded / "models").exists()
    result = here("tools", "verify", downloaded)
    assert result.returncode == 0 and "models/model.pt not here yet" in result.stdout
    refused(here("tools", "pack", downloaded, "--output", tmp_path / "d"), "model.pt is not here yet")
    fetch = ["monai.bundle", "download_large_files", "--bundle_path", downloaded]
    run(*fetch, PYTHONPATH="", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    assert (downloaded / "models" / "model.pt").read_bytes() == (bundle / "models" / "model.pt").read_bytes()
    assert "1 files as large_files.yml describes" in here("tools", "verify", downloaded).stdout
    pack(downloaded, tmp_path / "again")
    pack(bundle, tmp_path / "whole")
    assert (tmp_path / "again" / NAME).read_bytes() == (tmp_path / "whole" / NAME).read_bytes()
    entry = yaml.safe_load((downloaded / "large_files.yml").read_text())["large_files"][0]
    assert (entry["hash_type"], entry["url"]) == ("sha256", f"{address}/weights/models/model.pt")
    other = np.fromfile(downloaded / "models" / "model.pt", np.uint8)
    other[len(other) // 2] ^= 1
    other.tofile(downloaded / "models" / "model.pt")
    assert "FAILED  large files  models/model.pt is not the file" in here("tools", "verify", downloaded).stdout


def refused(result, *words):
    """One clear line and exit code 1."""
    assert result.returncode == 1, result.stdout + result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


def link(bundle):
    (bundle / "docs" / "weights.pt").symlink_to(bundle / "models" / "model.pt")


def link_to_folder(bundle):
    (bundle / "scripts").rename(bundle.parent / "shared")
    (bundle / "scripts").symlink_to(bundle.parent / "shared")


def pipe(bundle):
    os.mkfifo(bundle / "docs" / "pipe")


def large(bundle):
    with open(bundle / "docs" / "scan.nii", "wb") as file:
        file.truncate(26 * 2**20)


def version(bundle):
    path = bundle / "configs" / "metadata.json"
    path.write_text(path.read_text().replace('"version": "0.1.0"', '"version": "latest"'))


def unnamed(bundle):
    path = bundle / "configs" / "metadata.json"
    path.write_text(path.read_text().replace('"name": "Two organs"', '"name": "肝"'))


def capitals(bundle):
    (bundle / "docs" / "readme.md").write_text("another one")


def backslash(bundle):
    (bundle / "docs" / "a\\b").write_text("a folder on Windows")


FAULTS = [
    (link, "docs/weights.pt is a symbolic link"),
    (link_to_folder, "scripts is a symbolic link"),
    (pipe, "docs/pipe is neither a file nor a folder"),
    (large, "docs/scan.nii has 26 MiB"),
    (version, "version must be three numbers"),
    (unnamed, "name must have letters"),
    (capitals, "one file on some computers"),
    (backslash, "not a portable name"),
    (lambda bundle: (bundle / "LICENSE").unlink(), "LICENSE is missing"),
    (lambda bundle: (bundle / "configs" / "metadata.json").unlink(), "configs/metadata.json is missing"),
    (lambda bundle: (bundle / "configs" / "inference.json").unlink(), "configs/inference.json is missing"),
    (lambda bundle: (bundle / "configs" / "inference.json").write_text("{"), "inference.json is not JSON"),
]


@pytest.mark.parametrize(("fault", "words"), FAULTS, ids=[words for _, words in FAULTS])
def test_what_cannot_be_shared_is_refused_and_nothing_written(bundle, tmp_path, fault, words):
    fault(bundle)
    refused(here("tools", "pack", bundle, "--output", tmp_path / "dist"), words)
    assert not (tmp_path / "dist").exists() or not os.listdir(tmp_path / "dist")


def test_flags_and_folders_that_make_no_sense_are_refused(bundle, tmp_path):
    refused(here("tools", "pack", bundle, "--output", bundle / "dist"), "inside the bundle")
    refused(here("tools", "pack", bundle, "--without_weights"), "--url belong together")
    refused(here("tools", "pack", bundle, "--url", "https://x"), "--url belong together")
    words = ["--without_weights", "--url", "x/y", "--output", tmp_path / "dist"]
    refused(here("tools", "pack", bundle, *words), "must begin with https://")
    refused(here("tools", "pack", tmp_path / "nothing"), "not a bundle folder")
    pack(bundle, tmp_path / "dist")
    refused(here("tools", "pack", bundle, "--output", tmp_path / "dist"), "exists", "--overwrite")
    pack(bundle, tmp_path / "dist", "--overwrite")


def enlarge(bundle, size):
    """Add weights of a size, which take no room on this disk."""
    with open(bundle / "models" / "large.pt", "wb") as file:
        file.truncate(size)


def test_large_weights_are_not_read_into_memory(bundle, tmp_path):
    enlarge(bundle, 600 * 2**20)
    program = (
        "import re, sys; from tools.__main__ import main; code = main(sys.argv[1:]); "
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]); sys.exit(code)"
    )
    words = [sys.executable, "-c", program, "pack", bundle, "--output", tmp_path / "dist"]
    result = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.splitlines()[-1]) < 300 * 1024  # KiB at the most, of Python and NumPy


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_pack_leaves_the_older_zip_and_nothing_else(bundle, tmp_path, stop):
    dist = tmp_path / "dist"
    pack(bundle, dist)
    before = {path.name: path.read_bytes() for path in dist.iterdir()}
    enlarge(bundle, 2**31)
    process = subprocess.Popen(
        [sys.executable, "-m", "tools", "pack", str(bundle), "--output", str(dist), "--overwrite"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell passes "ignore" on
    )
    deadline = time.time() + 60
    while not list(dist.glob(".*.zip.*.partial")) and time.time() < deadline and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(stop)
    assert process.wait(60) in (130, 143)
    assert {path.name: path.read_bytes() for path in dist.iterdir()} == before


def test_a_full_disk_is_one_line_and_nothing_is_left(bundle, tmp_path):
    """The system refuses to write a file beyond some size, half-way through: as a full disk does, with another word."""
    limit = "import os, sys, resource as r; r.setrlimit(r.RLIMIT_FSIZE, (200_000, 200_000)); "
    words = [sys.executable, "-m", "tools", "pack", bundle, "--output", tmp_path / "dist"]
    program = [sys.executable, "-c", f"{limit} os.execv(sys.argv[1], sys.argv[1:])", *map(str, words)]
    refused(subprocess.run(program, cwd=ROOT, capture_output=True, text=True), "File too large")
    assert os.listdir(tmp_path / "dist") == []
