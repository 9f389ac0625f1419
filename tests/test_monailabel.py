"""MONAI Label serving bundles, asked over HTTP as 3D Slicer and OHIF ask: this project's app, and MONAI Label's own."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from tests.bundles.test_inference import _write_dicom, infer
from tests.conftest import ROOT, here, run
from tools.bundle import Bundle
from tools.bundle_code.residual_unet import ResidualUNet3D
from tools.instantiate import copy_template, set_labels, set_values

APP = ROOT / "apps" / "monailabel"
ENVIRONMENT = ROOT / ".venv-monailabel"
PYTHON = ENVIRONMENT / "bin" / "python"
NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}
STOCK_APP = (
    "import runpy, sys; from lib.cpu_torchvision import import_torchvision; import_torchvision(); sys.argv[0] = 'monailabel'; "
    "runpy.run_module('monailabel.main', run_name='__main__')"
)

pytestmark = pytest.mark.skipif(
    not (ENVIRONMENT / "ready").is_file(), reason="no .venv-monailabel: `make .venv-monailabel/ready` sets it up"
)

JSON = {"Content-Type": "application/json"}


class Server:
    """A running server."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, path: str, method: str = "GET", data: bytes | None = None, **headers: str) -> bytes:
        """The answer's body; raises ``urllib.error.HTTPError`` for another status than 200."""
        request = urllib.request.Request(f"{self.url}{path}", data, headers, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
            return answer.read()

    def info(self) -> dict:
        return json.loads(self.ask("/info/"))

    def post_form(
        self, path: str, method: str = "POST", file: Path | None = None, name: str = "file", **fields
    ) -> bytes:
        """A form as clients send it: fields as JSON, and a file."""
        mark = uuid.uuid4().hex
        parts = [
            f'--{mark}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{json.dumps(value)}\r\n'.encode()
            for key, value in fields.items()
        ]
        if file:
            head = f'--{mark}\r\nContent-Disposition: form-data; name="{name}"; filename="{file.name}"\r\n\r\n'
            parts.append(head.encode() + file.read_bytes() + b"\r\n")
        body = b"".join(parts) + f"--{mark}--\r\n".encode()
        return self.ask(path, method, body, **{"Content-Type": f"multipart/form-data; boundary={mark}"})

    def segment(self, model: str, image: str, folder: Path, **params) -> nibabel.Nifti1Image:
        path = folder / f"{uuid.uuid4().hex}.nii.gz"
        path.write_bytes(self.post_form(f"/infer/{model}?image={image}&output=image", params=params))
        return nibabel.load(path)

    def complaint(self, model: str, image: str, **params) -> str:
        """What the client is told when the server cannot segment."""
        with pytest.raises(urllib.error.HTTPError) as caught:
            self.post_form(f"/infer/{model}?image={image}&output=image", params=params)
        assert caught.value.code == 500
        return json.loads(caught.value.read())["detail"]


@contextmanager
def running(words: list, log: Path, **environment: str) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(PYTHON), *map(str, words), "--port", str(port)],
            cwd="/",
            env={**os.environ, **NO_NETWORK, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    server = Server(port)
    try:
        for _ in range(240):
            try:
                server.info()
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-3000:]
                time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        process.wait(30)


def make_bundle(template: str, folder: Path, labels: dict, seed: int, **values) -> Path:
    copy_template(ROOT / "bundles" / template, folder)
    set_labels(folder, labels)
    path = folder / "configs" / "inference.json"
    path.write_text(path.read_text().replace('"width": 64', '"width": 8'))
    set_values(folder, values)
    torch.manual_seed(seed)
    torch.save(ResidualUNet3D(1, 1 + len(labels), width=8).state_dict(), folder / "models" / "model.pt")
    return folder


@pytest.fixture(scope="module")
def studies(phantom_dataset, tmp_path_factory) -> Path:
    """One patient, stored in four ways."""
    folder = tmp_path_factory.mktemp("studies")
    ras = nibabel.load(phantom_dataset / "imagesTr" / "phantom_000_0000.nii.gz")
    nibabel.save(ras, folder / "ras.nii.gz")
    for codes in ("LPS", "PSR"):
        turn = nibabel.orientations.ornt_transform(
            nibabel.io_orientation(ras.affine), nibabel.orientations.axcodes2ornt(codes)
        )
        nibabel.save(ras.as_reoriented(turn), folder / f"{codes.lower()}.nii.gz")
    tilt, turn = np.deg2rad(12), np.deg2rad(-7)
    about_x = [[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]]
    about_z = [[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]]
    affine = ras.affine.copy()
    affine[:3, :3] = np.array(about_x) @ about_z @ np.diag([-4.0, 4.0, 6.0])
    nibabel.save(nibabel.Nifti1Image(np.asarray(ras.dataobj), affine), folder / "oblique.nii.gz")
    return folder


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> Path:
    """A folder of bundles: two that resample their images, one with other code behind the same names, two that are not served."""
    folder = tmp_path_factory.mktemp("bundles")
    make_bundle("merged_inference", folder / "two organs", {"liver": [1], "spleen": [2]}, 0)
    labels = {"kidney_left": [1], "duct": [2], "right_kidney": [3]}
    make_bundle("pretrain_amos", folder / "deepgrow_detection", labels, 1, spacing=[5.0, 5.0, 7.0])
    shutil.copytree(folder / "deepgrow_detection", folder / "smooth")
    set_values(
        folder / "smooth", {"inferer_output": "smooth_labels"}
    )  # as converted nnU-Net and STU-Net bundles have it
    shutil.copytree(folder / "two organs", folder / "other_code")
    code = folder / "other_code" / "scripts" / "residual_unet.py"
    assert "class ResidualUNet3D(" in code.read_text()
    text = code.read_text().replace("class ResidualUNet3D(", "class _ResidualUNet3D(")
    text += (
        "\n\nclass ResidualUNet3D(_ResidualUNet3D):\n    def forward(self, x):\n        return -super().forward(x)\n"
    )
    code.write_text(text)
    copy_template(ROOT / "bundles" / "merged_inference", folder / "no_weights")
    shutil.copytree(folder / "two organs", folder / "broken")
    set_values(folder / "broken", {"network_def": {"_target_": "scripts.residual_unet.NoSuchNetwork"}})
    return folder


@pytest.fixture(scope="module")
def expected(bundles, studies, tmp_path_factory) -> dict[str, dict[str, nibabel.Nifti1Image]]:
    """What ``python -m monai.bundle run`` gives: images by bundle and study."""
    root = tmp_path_factory.mktemp("expected")
    found = {}
    for bundle in ("two organs", "deepgrow_detection", "smooth", "other_code"):
        infer(bundles / bundle, studies, root / bundle)
        found[bundle.replace(" ", "_")] = {
            study: nibabel.load(root / bundle / f"{study}_seg.nii.gz") for study in ("ras", "lps", "psr", "oblique")
        }
    return found


@pytest.fixture(scope="module")
def server(bundles, studies, tmp_path_factory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    copy = log.parent / "studies"
    shutil.copytree(studies, copy)
    with running([APP / "serve.py", "--studies", copy, "--bundles", bundles], log) as server:
        yield server


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def finished(server: Server, path: str) -> dict:
    """What has become of a task in the background."""
    while (status := json.loads(server.ask(path)))["status"] in ("SUBMITTED", "RUNNING"):
        time.sleep(0.5)
    return status


def assert_same(found: nibabel.Nifti1Image, wanted: nibabel.Nifti1Image) -> None:
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found.affine, wanted.affine, atol=1e-4)
    assert found.get_data_dtype() == np.uint8
    assert np.asarray(wanted.dataobj).any()
    differing = int((np.asarray(found.dataobj) != np.asarray(wanted.dataobj)).sum())
    assert differing == 0, f"{differing} voxels differ"


def test_labels_are_those_of_the_bundles_in_slicers_spelling(server):
    models = server.info()["models"]
    assert {name: model["labels"] for name, model in models.items()} == {
        "two_organs": {"liver": 1, "spleen": 2},
        "other_code": {"liver": 1, "spleen": 2},
        "deepgrow_detection": {"left kidney": 1, "duct": 2, "right kidney": 3},
        "smooth": {"left kidney": 1, "duct": 2, "right kidney": 3},
    }
    assert {model["type"] for model in models.values()} == {"segmentation"}
    assert "NoSuchNetwork" in server.complaint("broken", "ras")


def test_label_maps_are_those_of_monai_bundle_run_with_bundles_side_by_side(server, expected, tmp_path):
    """In turn, so that code, configs and weights of one must not stay behind for the next."""
    for study in ("ras", "lps", "psr", "oblique"):
        for model, wanted in expected.items():
            assert_same(server.segment(model, study, tmp_path), wanted[study])
    assert not np.array_equal(expected["two_organs"]["ras"].dataobj, expected["other_code"]["ras"].dataobj)
    assert not np.array_equal(expected["deepgrow_detection"]["ras"].dataobj, expected["smooth"]["ras"].dataobj)


def test_stock_app_gives_the_same(bundles, studies, expected, tmp_path):
    """MONAI Label's own app, on bundles as they are: one resamples, where MONAI 1.6 fails on ``image_path``."""
    app = tmp_path / "monaibundle"
    shutil.copytree(ENVIRONMENT / "monailabel" / "sample-apps" / "monaibundle", app)
    (app / "model").mkdir()
    (app / "model" / "two_organs").symlink_to(bundles / "two organs")
    (app / "model" / "resampled").symlink_to(bundles / "deepgrow_detection")
    (app / "model" / "smooth").symlink_to(bundles / "smooth")
    shutil.copytree(studies, tmp_path / "studies")
    words = ["-c", STOCK_APP, "start_server", "--app", app, "--studies", tmp_path / "studies", "--host", "127.0.0.1"]
    conf = {"models": "two_organs,resampled,smooth", "zoo_source": "local", "sam2": "false", "skip_trainers": "true"}
    words += [word for setting in conf.items() for word in ("--conf", *setting)]
    with running(words, tmp_path / "log", PYTHONPATH=str(APP)) as server:
        labels = {name: model["labels"] for name, model in server.info()["models"].items()}
        assert labels["two_organs"] == {"liver": 1, "spleen": 2}
        assert labels["resampled"] == labels["smooth"] == {"kidney_left": 1, "duct": 2, "right_kidney": 3}
        for study in ("ras", "oblique"):
            for model, wanted in {
                "two_organs": "two_organs",
                "resampled": "deepgrow_detection",
                "smooth": "smooth",
            }.items():
                found = server.segment(model, study, tmp_path, result_dtype="uint8")
                assert_same(found, expected[wanted][study])


def test_weights_are_those_that_lie_there_now_or_none(server, bundles, expected, tmp_path):
    path = bundles / "two organs" / "models" / "model.pt"
    state = dict(torch.load(path))
    torch.save(state, path)
    first, stat = path.read_bytes(), path.stat()
    assert_same(server.segment("two_organs", "ras", tmp_path), expected["two_organs"]["ras"])
    try:
        torch.save({name: -tensor if name.startswith("head") else tensor for name, tensor in state.items()}, path)
        assert path.stat().st_size == stat.st_size
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # a clock's smallest step: the same as a float
        second = server.segment("two_organs", "ras", tmp_path)
        assert_same(second, expected["other_code"]["ras"])  # whose code has the opposite sign

        (path.parent / "a.pt").write_bytes(first)  # a shorter name, the same time
        os.utime(path.parent / "a.pt", ns=(stat.st_atime_ns, path.stat().st_mtime_ns))
        assert_same(server.segment("two_organs", "ras", tmp_path), expected["other_code"]["ras"])
        assert_same(server.segment("two_organs", "ras", tmp_path, model_filename="a.pt"), expected["two_organs"]["ras"])
        assert_same(server.segment("two_organs", "ras", tmp_path), expected["other_code"]["ras"])
        assert "there are model.pt, a.pt" in server.complaint("two_organs", "ras", model_filename="../a.pt")

        torch.save({f"net.{name}": tensor for name, tensor in state.items()}, path)
        said = server.complaint("two_organs", "ras")
        assert "model.pt does not fit the network" in said
        assert f"{2 * len(state)} tensors" in said
        path.write_bytes(first[:1000])
        assert "not a readable file of weights" in server.complaint("two_organs", "ras")
        path.unlink()
        assert "model.pt not found" in server.complaint("two_organs", "ras")
        assert "two_organs" not in server.info()["models"]
        assert_same(server.segment("other_code", "ras", tmp_path), expected["other_code"]["ras"])
    finally:
        path.write_bytes(first)
        (path.parent / "a.pt").unlink(missing_ok=True)
    assert_same(server.segment("two_organs", "ras", tmp_path), expected["two_organs"]["ras"])


def test_a_bundle_that_is_replaced_gets_its_new_labels(server, bundles, studies, tmp_path):
    """As ``merge --overwrite`` and ``edit`` do while the server runs."""
    folder = bundles / "two organs"
    folder.rename(tmp_path / "old")
    try:
        make_bundle("merged_inference", folder, {"pancreas": [1], "gall_bladder": [2], "adrenal_left": [3]}, 2)
        labels = {"pancreas": 1, "gallbladder": 2, "left adrenal gland": 3}
        assert server.info()["models"]["two_organs"]["labels"] == labels
        infer(folder, studies / "ras.nii.gz", tmp_path / "out")
        assert_same(server.segment("two_organs", "ras", tmp_path), nibabel.load(tmp_path / "out" / "ras_seg.nii.gz"))
    finally:
        shutil.rmtree(folder)
        (tmp_path / "old").rename(folder)
    assert server.info()["models"]["two_organs"]["labels"] == {"liver": 1, "spleen": 2}


def test_all_images_in_one_go_without_a_gpu(server, expected, tmp_path):
    server.ask("/batch/infer/other_code?images=unlabeled", "POST", b"{}", **JSON)
    status = finished(server, "/batch/infer/")
    assert status["status"] == "DONE", "\n".join(status["details"])
    path = tmp_path / "label.nii.gz"
    for study, wanted in expected["other_code"].items():
        path.write_bytes(server.ask(f"/datastore/label?label={study}&tag=original"))
        assert_same(nibabel.load(path), wanted)


@pytest.fixture(scope="module")
def trainable(bundles, phantom_dataset) -> Path:
    """A starting point without training, beside the others."""
    folder = bundles / "start"
    run(
        "tools", "new_pretraining", "--bundle", ROOT / "bundles" / "pretrain_amos", "--dataset_dir", phantom_dataset,
        "--output", folder, "--overlay", "small", "--labels", "{liver: liver, spleen: spleen}", "--patch_size", 32,
    )  # fmt: skip
    for config in ("train.json", "inference.json"):
        path = folder / "configs" / config
        path.write_text(path.read_text().replace('"width": 16', '"width": 8'))
    set_values(folder, {"patches_per_volume": 2, "batch_size": 1})
    torch.manual_seed(3)
    torch.save(ResidualUNet3D(1, 3, width=8).state_dict(), folder / "models" / "model.pt")
    return folder


def train(server: Server, model: str) -> dict:
    """Train one epoch, and wait for its end."""
    server.ask(f"/train/{model}", "POST", json.dumps({"max_epochs": 1, "val_split": 0.5}).encode(), **JSON)
    return finished(server, "/train/")


def test_training_leaves_the_served_bundle_alone(trainable, phantom_dataset, tmp_path):
    """And learns from segments by their names, wherever they are in the list that a viewer saves."""
    values = Bundle(trainable).label_map
    images = tmp_path / "studies"
    images.mkdir()
    with running(
        [APP / "serve.py", "--studies", images, "--bundles", trainable, "--train"], tmp_path / "log"
    ) as server:
        for case in ("phantom_000", "phantom_001"):
            source = nibabel.load(phantom_dataset / "labelsTr" / f"{case}.nii.gz")
            theirs = np.asarray(source.dataobj)
            label = np.zeros(theirs.shape, np.uint8)
            label[np.isin(theirs, values["spleen"])] = 2
            label[np.isin(theirs, values["liver"])] = 3
            nibabel.save(nibabel.Nifti1Image(label, source.affine), tmp_path / "label.nii.gz")
            image = phantom_dataset / "imagesTr" / f"{case}_0000.nii.gz"
            server.post_form(f"/datastore/image?image={case}", "PUT", image)
            segments = [{"name": name, "idx": i} for i, name in enumerate(("duct", "spleen", "liver"), start=1)]
            words = {"name": "label", "file": tmp_path / "label.nii.gz", "params": {"label_info": segments}}
            server.post_form(f"/datastore/label?image={case}&tag=final", "PUT", **words)
        before = {
            path: sha256(path) for path in sorted(trainable.rglob("*")) if path.is_file() and path.suffix != ".pyc"
        }
        status = train(server, "start")
        assert status["status"] == "DONE", "\n".join(status["details"])
        assert before == {path: sha256(path) for path in before}
        (trained,) = trainable.parent.glob("start_trained_*")
        assert (trained / "models" / "model.pt").read_bytes() != (trainable / "models" / "model.pt").read_bytes()
        assert here("tools", "verify", trained).returncode == 0
        assert "label_values: [[3], [2]]" in (tmp_path / "log").read_text()

        server.post_form(
            "/datastore/label?image=phantom_000&tag=final", "PUT", name="label", file=tmp_path / "label.nii.gz",
            params={"label_info": [{"name": "liver", "idx": 1}]},
        )  # fmt: skip
        status = train(server, "start")
        assert status["status"] == "ERROR"
        assert "the label of phantom_000 has no spleen" in "\n".join(status["details"])
        assert len(list(trainable.parent.glob("start_trained_*"))) == 1


def test_dicom_segments_keep_their_names_when_an_organ_is_absent(studies, tmp_path):
    """By the converter that MONAI Label's server calls, on a CT series of which the model found no liver."""
    import itk

    ras = nibabel.load(studies / "ras.nii.gz")
    volume = itk.image_from_array(np.ascontiguousarray(np.asarray(ras.dataobj).T))
    volume.SetSpacing([8.0, 8.0, 4.0])
    volume.SetDirection(np.diag([-1.0, -1.0, 1.0]))
    volume.SetOrigin((ras.affine[:3, 3] * [-1, -1, 1]).tolist())
    (tmp_path / "series").mkdir()
    _write_dicom(itk, volume, tmp_path / "series")
    label = np.zeros(ras.shape, np.uint8)
    label[10:20, 10:20, 10:20] = 2
    label[30:35, 30:35, 10:20] = 3
    nibabel.save(nibabel.Nifti1Image(label, ras.affine), tmp_path / "label.nii.gz")
    code = (
        "import sys; from lib.cpu_torchvision import import_torchvision; import_torchvision()\n"
        "from lib.segments import dicom_segments; from monailabel.datastore.utils.convert import nifti_to_dicom_seg\n"
        "import pydicom\n"
        "labels = {'liver': 1, 'spleen': 2, 'duct': 3}\n"
        "asked = [{'name': name} for name in labels]\n"
        "for info in (dicom_segments([0, 2, 3], labels, 'two organs', asked), asked):\n"
        "    made = pydicom.dcmread(nifti_to_dicom_seg(sys.argv[1], sys.argv[2], info))\n"
        "    segments = made.SegmentSequence\n"
        "    print('SEGMENTS', [(s.SegmentLabel, s.SegmentedPropertyTypeCodeSequence[0].CodeValue) for s in segments])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(APP), "PATH": f"{PYTHON.parent}{os.pathsep}{os.environ['PATH']}"}
    words = [PYTHON, "-c", code, tmp_path / "series", tmp_path / "label.nii.gz"]
    result = subprocess.run([*map(str, words)], env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in result.stdout.splitlines() if line.startswith("SEGMENTS")]
    assert lines, result.stderr[-3000:]
    assert lines[0] == "SEGMENTS [('spleen', '123037004'), ('duct', '123037004')]"
    assert (
        lines[1] == "SEGMENTS [('liver', '78961009'), ('spleen', '78961009')]"
    )  # MONAI Label alone: why the app is needed


def test_bundles_of_one_folder_name_get_different_names(bundles, tmp_path):
    for run_name in ("average", "ties"):
        shutil.copytree(bundles / "two organs", tmp_path / run_name / "merged model")
    words = [bundles / "other_code", tmp_path / "average" / "merged model", tmp_path / "ties" / "merged model"]
    spec = importlib.util.spec_from_file_location("served_bundles", APP / "lib" / "bundles.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.find_bundles(",".join(map(str, words)))
    assert found == {"other_code": words[0], "average_merged_model": words[1], "ties_merged_model": words[2]}

    path = bundles / "other_code" / "configs" / "metadata.json"
    text = path.read_text()
    path.write_text(text.replace('"2": "spleen"', '"3": "spleen"'))
    try:
        with pytest.raises(ValueError, match="channel_def must be 0: background, then 1 to N without gaps"):
            module.find_bundles(str(bundles / "other_code"))
    finally:
        path.write_text(text)


@pytest.mark.parametrize(
    "studies, bundle, message",
    [
        ("", "two organs", "no studies given"),
        ("nowhere", "two organs", "nowhere is not a folder: STUDIES must name"),
        (".", "", "no bundle given"),
        (".", "two organs/configs", "configs is no bundle"),
        (".", "no_weights", "no_weights has no weights (models/model.pt)"),
    ],
)
def test_make_serve_says_in_one_line_what_is_missing(bundles, studies, bundle, message):
    words = ["make", "-s", "-C", str(ROOT), "serve", f"PYTHON={sys.executable}"]
    words += [f"STUDIES={bundles / studies if studies else ''}", f"BUNDLE={bundles / bundle if bundle else ''}"]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode != 0
    lines = [line for line in (result.stdout + result.stderr).splitlines() if not line.startswith("make")]
    assert len(lines) == 1
    assert message in lines[0]
