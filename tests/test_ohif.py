"""The whole way in a browser: a DICOM server, MONAI Label with this project's app, and OHIF, which it brings along.

Opt-in, for it needs Debian's ``orthanc``, ``orthanc-dicomweb`` and ``chromium``, and ``playwright`` in ``.venv-monailabel``.
Orthanc listens on all interfaces, so run it where there is only the loopback one::

    unshare --net sh -c 'ip link set lo up; OHIF_SCREENSHOT=ohif.png .venv/bin/python -m pytest tests/test_ohif.py'

``OHIF_BUNDLE`` and ``OHIF_IMAGE`` (NIfTI) name a merged bundle and a CT other than the tests' own, for a picture worth showing.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tests.bundles.test_inference import _write_dicom
from tests.conftest import ROOT
from tests.test_monailabel import APP, PYTHON, running
from tools.bundle import Bundle

SCREENSHOT = os.environ.get("OHIF_SCREENSHOT", "")
ORTHANC = shutil.which("Orthanc", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
SERIES, STUDY = "1.2.3.2", "1.2.3.1"
READ_SEGMENTS = (
    "import json, pydicom, sys; made = pydicom.dcmread(sys.argv[1]); "
    "print(json.dumps([[s.SegmentLabel, s.SegmentAlgorithmType] for s in made.SegmentSequence]))"
)

pytestmark = [
    pytest.mark.skipif(not SCREENSHOT, reason="OHIF_SCREENSHOT is not set: where to save the picture"),
    pytest.mark.skipif(
        not (ORTHANC and PLUGIN.is_file() and shutil.which("chromium")),
        reason="apt-get install orthanc orthanc-dicomweb chromium",
    ),
    pytest.mark.skipif(
        not list(PYTHON.parents[1].glob("lib/python*/site-packages/playwright")),
        reason="no playwright: make .venv-monailabel/ready && .venv-monailabel/bin/pip install playwright",
    ),
]


@pytest.fixture(scope="module")
def dicomweb(phantom_dataset, tmp_path_factory):
    """A DICOMweb server with one CT series, and its address."""
    import itk

    root = tmp_path_factory.mktemp("orthanc")
    image = Path(os.environ.get("OHIF_IMAGE") or phantom_dataset / "imagesTr" / "phantom_000_0000.nii.gz")
    ras = nibabel.as_closest_canonical(nibabel.load(image))
    volume = itk.image_from_array(np.ascontiguousarray(np.asarray(ras.dataobj).T))
    volume.SetSpacing([8.0, 8.0, 4.0])
    volume.SetDirection(np.diag([-1.0, -1.0, 1.0]))
    volume.SetOrigin((ras.affine[:3, 3] * [-1, -1, 1]).tolist())
    (root / "series").mkdir()
    _write_dicom(itk, volume, root / "series")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "HttpPort": port,
        "DicomServerEnabled": False,
        "RemoteAccessAllowed": False,
        "StorageDirectory": str(root / "storage"),
        "IndexDirectory": str(root / "storage"),
        "Plugins": [str(PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (root / "orthanc.json").write_text(json.dumps(settings))
    with (root / "log").open("wb") as log:
        process = subprocess.Popen([ORTHANC, str(root / "orthanc.json")], stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(60):
            try:
                urllib.request.urlopen(f"{url}/system")
                break
            except OSError:
                assert process.poll() is None, (root / "log").read_text()[-2000:]
                time.sleep(0.5)
        for path in sorted((root / "series").iterdir()):
            urllib.request.urlopen(urllib.request.Request(f"{url}/instances", path.read_bytes(), method="POST"))
        yield f"{url}/dicom-web"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def bundle(request, tmp_path_factory) -> Path:
    given = os.environ.get("OHIF_BUNDLE")
    return Path(
        shutil.copytree(given or request.getfixturevalue("chain").merged, tmp_path_factory.mktemp("b") / "merged")
    )


@pytest.fixture(scope="module")
def server(dicomweb, bundle, tmp_path_factory):
    root = tmp_path_factory.mktemp("server")
    words = [APP / "serve.py", "--studies", dicomweb, "--bundles", bundle]
    with running(words, root / "log", MONAI_LABEL_DICOMWEB_CACHE_PATH=str(root / "cache")) as server:
        yield server


def segments(path: Path) -> list[list]:
    words = [str(PYTHON), "-c", READ_SEGMENTS, str(path)]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def test_dicom_seg_names_what_is_there(server, bundle, tmp_path):
    """Also when organs are absent, whatever order the client lists them in."""
    labels = Bundle(bundle).labels
    names = list(server.info()["models"]["merged"]["labels"])
    answer = tmp_path / "image.nii.gz"
    answer.write_bytes(server.post_form(f"/infer/merged?image={SERIES}&output=image", params={}))
    present = np.unique(np.asarray(nibabel.load(answer).dataobj))[1:]
    assert 0 < len(present) <= len(labels)
    params = {"label_info": [{"name": name} for name in reversed(names)]}
    made = tmp_path / "segmentation.dcm"
    made.write_bytes(server.post_form(f"/infer/merged?image={SERIES}&output=dicom_seg", params=params))
    assert segments(made) == [[names[value - 1], "AUTOMATIC"] for value in present]


def test_a_saved_segmentation_with_an_empty_segment_keeps_its_names(server, dicomweb, tmp_path):
    """As 3D Slicer submits it: segments numbered by position, the first one empty; it becomes a DICOM SEG on the server."""
    answer = tmp_path / "image.nii.gz"
    answer.write_bytes(server.post_form(f"/infer/merged?image={SERIES}&output=image", params={}))
    image = nibabel.load(answer)
    label = np.zeros(image.shape, np.uint8)
    label[10:20, 10:20, 10:20] = 2
    nibabel.save(nibabel.Nifti1Image(label, image.affine), tmp_path / "label.nii.gz")
    info = {"label_info": [{"name": "liver", "idx": 1}, {"name": "spleen", "idx": 2}]}
    server.post_form(
        f"/datastore/label?image={SERIES}&tag=final", "PUT", name="label", file=tmp_path / "label.nii.gz", params=info
    )
    instances = f"{dicomweb}/studies/{STUDY}/instances?Modality=SEG"
    (found,) = json.loads(urllib.request.urlopen(instances).read())
    series, instance = found["0020000E"]["Value"][0], found["00080018"]["Value"][0]
    body = urllib.request.urlopen(f"{dicomweb}/studies/{STUDY}/series/{series}/instances/{instance}").read()
    start = body.index(b"DICM") - 128
    (tmp_path / "segmentation.dcm").write_bytes(body[start : body.rindex(b"\r\n--")])
    assert segments(tmp_path / "segmentation.dcm") == [["spleen", "SEMIAUTOMATIC"]]


def test_ohif_shows_the_segmentation(server):
    script = ROOT / "tests" / "ohif_browser.py"
    words = [str(PYTHON), str(script), server.url, STUDY, str(Path(SCREENSHOT).absolute())]
    result = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    coloured = int(result.stdout.split()[-1])
    assert coloured > 2000, f"only {coloured} pixels changed to a colour"
