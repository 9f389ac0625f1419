"""report: one page that needs nothing else, says what the folders say, and takes no name for HTML.

The tests that look at it in a browser are skipped without Debian's ``chromium`` and Python's ``playwright``.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT, here
from tests.test_merge import refused
from tools.bundle import Bundle, read_json, write_json
from tools.bundle_code.residual_unet import ResidualUNet3D
from tools.instantiate import copy_template, set_labels, update_metadata
from tools.lineage import file_sha256
from tools.mergeability import mergeability
from tools.report_page.charts import contour_map, grid_map
from tools.report_page.evaluation import Evaluation
from tools.report_page.page import as_csv
from tools.task_vector import TaskVector

HOSTILE = "</script><script>alert(1)</script>"
ORGANS = {"liver": [1], HOSTILE: [2]}
UNNAMED = """[...document.querySelectorAll('input, select, canvas, svg, pre, [tabindex]')].filter(element =>
    element.checkVisibility() && !element.labels?.length &&
    !element.getAttribute('aria-label')).map(element => element.outerHTML)"""
PAPER = "getComputedStyle(document.documentElement).backgroundColor.match(/[0-9.]+/g).map(Number)[0]"


def small_bundle(path: Path, labels: dict, state: dict) -> Path:
    copy_template(ROOT / "bundles" / "merged_inference", path)
    set_labels(path, labels)
    config = path / "configs" / "inference.json"
    text = config.read_text().replace('"width": 64', '"width": 8').replace("[96, 96, 96]", "[32, 32, 32]")
    config.write_text(text)
    update_metadata(path, name=path.name)
    torch.save(state, path / "models" / "model.pt")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A starting point, two specialists that see their organ everywhere, their task vectors, a merge, and a dataset."""
    root = tmp_path_factory.mktemp("report")
    torch.manual_seed(0)
    start = ResidualUNet3D(1, 3, width=8).state_dict()
    small_bundle(root / "start", ORGANS, start)
    for name, (label, values) in zip(("liver", "other"), ORGANS.items(), strict=True):
        network = ResidualUNet3D(1, 2, width=8)
        own = {
            n: start[n] + 0.1 * torch.randn_like(t) if t.shape == start[n].shape else t
            for n, t in network.state_dict().items()
        }
        network.load_state_dict(own)
        bias = [module for module in network.modules() if isinstance(module, torch.nn.Conv3d)][-1].bias
        torch.nn.init.zeros_(bias)
        bias.data[1] = 50 if name == "liver" else -50
        small_bundle(root / name, {label: values}, network.state_dict())
        words = ["--pretrained", root / "start", "--finetuned", root / name, "--output", root / f"{name}.safetensors"]
        done(here("tools", "diff", *words))
    vectors = f"{root}/liver.safetensors,{root}/other.safetensors"
    done(here("tools", "merge", "--pretrained", root / "start", "--vectors", vectors, "--output", root / "merged"))
    dataset(root / "data")
    return root


def dataset(path: Path) -> None:
    """Three cases whose voxels run from left to right, to the front and down, with other axes first."""
    for name in ("imagesTr", "labelsTr"):
        (path / name).mkdir(parents=True)
    affine = np.array([[0, 0, 2.0, 0], [-3.0, 0, 0, 0], [0, -4.0, 0, 0], [0, 0, 0, 1]])
    rng = np.random.default_rng(0)
    for case in range(3):
        truth = np.zeros((20, 12, 16), np.uint8)
        truth[2 : 8 + case, 3:9, 4:14] = 1
        truth[14:18, 1:4, 2:5] = 2
        image = 100.0 * truth + rng.normal(0, 10, truth.shape)
        nibabel.save(nibabel.Nifti1Image(image.astype(np.float32), affine), path / "imagesTr" / f"c{case}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(truth, affine), path / "labelsTr" / f"c{case}.nii.gz")
    labels = {"background": 0, "liver": 1, HOSTILE: 2}
    description = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 3, "file_ending": ".nii.gz"}
    (path / "dataset.json").write_text(json.dumps(description))


@pytest.fixture(scope="module")
def evaluation(folder) -> Path:
    bundles = ",".join(str(folder / name) for name in ("start", "liver", "other", "merged"))
    words = ["--bundle", bundles, "--against", "liver,other", "--overlays", False, "--calibration"]
    words += ["--dataset_dir", folder / "data", "--output", folder / "evaluation"]
    done(here("tools", "evaluate", *words))
    return folder / "evaluation"


@pytest.fixture(scope="module")
def search(folder) -> Path:
    """A search of two coefficients on a grid, as the command writes it; the Dice is a parabola's."""
    made = folder / "search"
    made.mkdir()
    names = ["scale/liver", f"scale/{HOSTILE}"]
    rows = [["trial", "state", *names, "mean_dice", "cases", "seconds"]]
    rows += [
        [n, "complete", x / 4, y / 4, 0.9 - (x - 1) ** 2 - (y - 3) ** 2, 3, 1]
        for n, (x, y) in enumerate(np.ndindex(5, 5))
    ]
    (made / "trials.csv").write_text(as_csv(rows) + "25,pruned,0.3,0.3,,1,1\n")
    best = {"values": dict(zip(names, (0.25, 0.75))), "mean_dice": 0.9}
    facts = {
        "method": "task_arithmetic",
        "tasks": ["liver", HOSTILE],
        "best": best,
        "default": best | {"mean_dice": 0.8},
    }
    (made / "search.json").write_text(json.dumps(facts))
    return made


@pytest.fixture(scope="module")
def flatness(folder) -> Path:
    made = folder / "flatness"
    made.mkdir()
    noise = [{"relative": r, "mean": 1 + r, "std": r / 2} for r in (0.01, 0.1)]
    line = {"from": "liver", "to": HOSTILE, "t": [0, 0.5, 1], "loss": [1, 2, 1], "barrier": 1}
    axis = np.linspace(-1, 1, 9)
    plane = {
        "x": axis.tolist(),
        "y": axis.tolist(),
        "loss": np.add.outer(axis**2, axis**2).tolist(),
        "points": {HOSTILE: [0, 0]},
    }
    facts = {"bundles": {"liver": {"loss": 1, "fisher_trace": 2.5, "noise": noise}}, "line": line, "plane": plane}
    (made / "flatness.json").write_text(json.dumps(facts))
    return made


@pytest.fixture(scope="module")
def page(folder, evaluation, search, flatness) -> Path:
    words = ["--bundle", folder / "merged", "--evaluation", evaluation, "--search", search, "--flatness", flatness]
    done(here("tools", "report", *words, "--dataset_dir", folder / "data", "--output", folder / "report.html"))
    return folder / "report.html"


def done(result) -> None:
    assert result.returncode == 0, result.stderr


class Page(HTMLParser):
    """The page as a browser reads it: its elements, the text of each kind, and every address."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open.append(tag)
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data

    @property
    def sections(self) -> list[str]:
        return [attributes["id"] for tag, attributes in self.elements if tag == "section"]

    def download(self, name: str) -> str:
        (address,) = (a["href"] for tag, a in self.elements if tag == "a" and a.get("download") == name)
        return base64.b64decode(address.split(",")[1]).decode()


def test_a_merged_bundle_alone(folder, tmp_path):
    result = here("tools", "report", "--bundle", folder / "merged", "--output", tmp_path / "page.html")
    assert "not in it: Dice by task, Slices, Coefficients, Loss landscape" in result.stdout
    page = Page(tmp_path / "page.html")
    assert page.sections == ["agreement", "lineage", "missing"]
    lineage = Bundle(folder / "merged").metadata["lineage"]
    hashes = [
        lineage["pretrained_sha256"],
        *(v["sha256"] for v in lineage["vectors"]),
        file_sha256(folder / "merged/models/model.pt"),
    ]
    assert all(any(sha256 in text for text in page.texts["code"]) for sha256 in hashes)
    for command in ("tools evaluate", "tools search", "tools flatness"):
        assert any(command in text for text in page.texts["code"])
    assert page.download("recipe.yaml") == (folder / "merged/docs/recipe.yaml").read_text()
    cosine = mergeability([TaskVector(folder / f"{name}.safetensors") for name in ("liver", "other")])["cosine"][0][1]
    assert f"{cosine:.2f}" in page.texts["td"]


def test_vectors_that_are_elsewhere(folder, tmp_path):
    shutil.copytree(folder / "merged", tmp_path / "sent")
    words = ["tools", "report", "--bundle", tmp_path / "sent", "--output", tmp_path / "page.html", "--overwrite"]
    assert "Agreement of the task vectors" in here(*words).stdout
    vectors = f"{folder}/liver.safetensors,{folder}/other.safetensors"
    assert "Agreement" not in here(*words, "--vectors", vectors).stdout
    foreign = tmp_path / "foreign.safetensors"
    words_of_diff = [
        "--pretrained",
        folder / "start",
        "--finetuned",
        folder / "liver",
        "--task",
        "foreign",
        "--output",
        foreign,
    ]
    done(here("tools", "diff", *words_of_diff))
    refused(here(*words, "--vectors", foreign), "foreign.safetensors", "is none of the task vectors")


def test_everything_is_in_the_one_file_and_no_name_is_html(page):
    parsed = Page(page)
    assert parsed.sections == ["scores", "slices", "agreement", "coefficients", "landscape", "lineage"]
    scripts = [attributes for tag, attributes in parsed.elements if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "slices-data"}, {}]
    data, script = parsed.texts["script"]
    assert json.loads(data)["labels"] == ["liver", HOSTILE]
    assert HOSTILE in parsed.texts["th"]
    policy = next(a["content"] for _, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert (
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy and "default-src 'none'" in policy
    )
    addresses = [a[key] for _, a in parsed.elements for key in ("src", "href") if key in a]
    assert addresses and all(address.startswith(("#", "data:")) for address in addresses)
    assert not re.search(r"https?://|@import|url\(", page.read_text())
    named = [a for tag, a in parsed.elements if tag == "svg"]
    assert len(named) == 6 and all(a["role"] == "img" and a["aria-label"] for a in named)


def test_the_numbers_are_those_of_the_evaluation(page, evaluation):
    scores = list(csv.DictReader((evaluation / "scores.csv").open()))
    own = np.mean([float(row["dice"]) for row in scores if (row["bundle"], row["label"]) == ("merged", "liver")])
    assert own > 0.1
    rows = list(csv.DictReader(io.StringIO(Page(page).download("merge_scores.csv"))))
    table = {(row["label"], row["column"]): row for row in rows if row["metric"] == "dice"}
    assert float(table["liver", "merge"]["mean"]) == pytest.approx(own, abs=1e-6)
    assert table["liver", "specialists"]["bundle"] == "liver" and table["liver", "starting point"]["bundle"] == "start"
    calibrated = read_json(evaluation / "calibration.json")["bundles"]["merged"]
    error = next(
        float(row["mean"]) for row in rows if (row["label"], row["column"], row["metric"]) == ("liver", "merge", "ece")
    )
    assert error == calibrated["ece"]["liver"]["mean"] > 0
    assert f"liver and {HOSTILE}" in Page(page).texts["th"]
    share = next(
        float(row["mean"]) for row in rows if (row["label"], row["metric"]) == ("liver", "normalized_accuracy")
    )
    assert share == pytest.approx(own / float(table["liver", "specialists"]["mean"]))
    assert any(text.startswith(f"{own:.3f}") for text in Page(page).texts["td"])
    assert as_csv([["=1+1", "-liver", -0.5]]) == "'=1+1,'-liver,-0.5\r\n"


def test_the_pictures_are_the_label_maps(page, folder, evaluation):
    """Decoded as page.js does, and turned by nibabel: from the patient's right, from the front, from the feet."""
    data = json.loads(Page(page).texts["script"][0])
    assert data["columns"] == ["reference", "specialists", "merge", "starting point"]
    assert sorted(case["name"] for case in data["cases"]) == ["c0", "c1", "c2"]
    case = data["cases"][0]
    assert case["size"] == [2, 3, 4] and case["organs"] == [[1, 2]] * 4
    sources = {0: folder / "data" / "labelsTr", 2: evaluation / "label_maps" / "merged"}
    for column, source in sources.items():
        expected = np.asarray(nibabel.as_closest_canonical(nibabel.load(source / f"{case['name']}.nii.gz")).dataobj)
        np.testing.assert_array_equal(
            np.round(volume(case["maps"][column], case) / data["stride"]), expected[::-1, ::-1]
        )
    image = nibabel.as_closest_canonical(nibabel.load(folder / "data" / "imagesTr" / f"{case['name']}_0000.nii.gz"))
    shown = volume(case["image"], case).ravel()
    assert np.corrcoef(shown, np.asarray(image.dataobj)[::-1, ::-1].ravel())[0, 1] > 0.95
    x, y, z = case["first"]
    assert volume(case["maps"][0], case)[x].any() and volume(case["maps"][0], case)[:, y].any() and z < 12


def volume(address: str, case: dict) -> np.ndarray:
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))).convert("L"), int)
    x, y, z = case["shape"]
    tiles = [sheet[i // case["across"] * y :, i % case["across"] * x :][:y, :x].T for i in range(z)]
    return np.stack(tiles, axis=2)


def test_scans_without_organs_and_labels_of_test_cases_alone(folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(folder / "data", data)
    for part in ("images", "labels"):
        (data / f"{part}Tr").rename(data / f"{part}Ts")
    for path in (data / "labelsTs").iterdir():
        label = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(np.zeros(label.shape, np.uint8), label.affine), path)
    words = ["--bundle", folder / "merged", "--dataset_dir", data]
    done(here("tools", "evaluate", *words, "--part", "Ts", "--overlays", False, "--output", tmp_path / "evaluation"))
    done(here("tools", "report", *words, "--evaluation", tmp_path / "evaluation", "--output", tmp_path / "page.html"))
    assert "slices" in Page(tmp_path / "page.html").sections
    assert "no case has an organ" in (tmp_path / "page.html").read_text()


def test_a_bundle_with_the_name_of_a_column_has_its_own_and_labels_that_were_not_scored_none(folder, evaluation):
    """Another merge in a folder called "merge"; the starting point has a third organ, of which only calibration knows."""
    other = evaluation.with_name("other_evaluation")
    shutil.copytree(evaluation, other)
    summary, facts, errors = (
        json.loads((other / f"{name}.json").read_text()) for name in ("summary", "evaluation", "calibration")
    )
    summary["bundles"]["merge"] = json.loads(json.dumps(summary["bundles"]["merged"]))
    summary["bundles"]["merge"]["labels"]["liver"]["dice"]["mean"] = 0.123
    facts["bundles"]["merge"] = "0" * 64
    errors["bundles"]["start"]["ece"]["spleen"] = {"mean": None, "low": None, "high": None, "cases": 0}
    for name, content in (("summary", summary), ("evaluation", facts), ("calibration", errors)):
        (other / f"{name}.json").write_text(json.dumps(content))
    found = Evaluation.read(other, "start", Bundle(folder / "merged"))
    assert found.columns() == ["starting point", "specialists", "merge", "merge (bundle)"]
    assert found.value("merge (bundle)", "liver", "dice")["mean"] == 0.123
    assert found.value("merge", "liver", "dice")["mean"] != 0.123 and found.value("merge", "liver", "ece")["mean"] >= 0
    assert set(found.summary["bundles"]["start"]["labels"]) == set(ORGANS)


def test_the_best_cell_of_a_grid_is_framed():
    x, y = [0.0, 0.5, 1.0], [0.0, 1.0]
    svg = ElementTree.fromstring(grid_map(x, y, np.array([[1, 2, 3], [4, 5, np.nan]]), (1, 1), ("a", "b<c", "Dice")))
    cells = {cell.find("title").text: cell.attrib for cell in svg.iter("rect") if cell.find("title") is not None}
    (frame,) = (rect.attrib for rect in svg.iter("rect") if rect.get("class") == "frame")
    assert len(cells) == 5 and "best at 0.5, 1" in svg.get("aria-label")
    assert [cells["a 0.5, b<c 1: 5.0000"][key] for key in "xy"] == [frame[key] for key in "xy"]


def test_contours_follow_the_function():
    """Of a slope along x every band is a stripe as high as the plane, and they follow each other from bright to dark."""
    axis = np.linspace(0, 1, 11)
    svg = ElementTree.fromstring(contour_map(axis, axis, np.tile(axis, (11, 1)), {"θ0": (0, 0)}, "loss"))
    bands = [path for path in svg.iter("path") if path.find("title") is not None]
    corners = [np.array(re.findall(r"([\d.]+),([\d.]+)", band.get("d")), float) for band in bands]
    edges = [(points[:, 0].min(), points[:, 0].max()) for points in corners]
    assert len(bands) > 5 and all(np.ptp(points[:, 1]) == pytest.approx(298, abs=0.2) for points in corners)
    assert all(a[1] == pytest.approx(b[0], abs=0.2) for a, b in pairwise(edges))
    assert bands[0].get("fill") == "#fde725" and bands[-1].get("fill") == "#440154"


def test_folders_of_something_else_are_refused(folder, evaluation, tmp_path):
    words = ["tools", "report", "--bundle", folder / "merged", "--output", tmp_path / "page.html"]
    for flag, name in (("evaluation", "summary.json"), ("search", "trials.csv"), ("flatness", "flatness.json")):
        refused(here(*words, f"--{flag}", tmp_path), f"is no output of {flag.replace('evaluation', 'evaluate')}", name)
    refused(here(*words[:2], "--bundle", folder / "start", *words[4:]), "is no merged bundle")
    other = tmp_path / "other"
    shutil.copytree(folder / "merged", other)
    torch.save(ResidualUNet3D(1, 3, width=8).state_dict(), other / "models/model.pt")
    refused(
        here(*words[:2], "--bundle", other, *words[4:], "--evaluation", evaluation), "evaluate the bundle as it is now"
    )
    metadata = read_json(other / "configs/metadata.json")
    metadata["lineage"]["vectors"] = ["liver"]
    write_json(other / "configs/metadata.json", metadata)
    refused(here(*words[:2], "--bundle", other, *words[4:]), "not as merge writes it", "verify")
    refused(here(*words, "--evaluation", evaluation, "--dataset_dir", _without_cases(folder, tmp_path)), "no case of")
    assert not (tmp_path / "page.html").exists()


def _without_cases(folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "data"
    shutil.copytree(folder / "data", path)
    for file in [*path.glob("*Tr/*")]:
        file.rename(file.with_name(f"x{file.name}"))
    return path


@pytest.fixture(scope="module")
def browser():
    if not shutil.which("chromium"):
        pytest.skip("no Chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, page):
    """Opens the page; afterwards nobody has complained, and nothing but the file was loaded."""
    complaints, loaded, contexts = [], [], []

    def opened(**settings):
        contexts.append(browser.new_context(**settings))
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("dialog", lambda dialog: complaints.append(f"dialog {dialog.message}"))
        tab.on("request", lambda request: loaded.append(request.url))
        tab.goto(page.as_uri())
        if settings.get("java_script_enabled", True):
            tab.wait_for_function("document.getElementById('position').value")
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert not complaints
    assert {url for url in loaded if not url.startswith("data:")} == {page.as_uri()}


def coloured(tab, pane: int) -> int:
    """The pixels of a pane that are not gray."""
    picture = Image.open(io.BytesIO(tab.locator("#panes canvas").nth(pane).screenshot())).convert("RGB")
    return int((np.ptp(np.asarray(picture).astype(int), axis=2) > 40).sum())


def test_toggles_and_slider(open_page):
    tab = open_page(viewport={"width": 1200, "height": 900})
    liver, other = (tab.locator(f'input[name="organ"][value="{number}"]') for number in (1, 2))
    both = coloured(tab, 0)
    other.uncheck()
    liver_only = coloured(tab, 0)
    liver.uncheck()
    assert both >= liver_only > 500 and coloured(tab, 0) == 0
    assert "no organ" in tab.locator("#panes canvas").first.get_attribute("aria-label")
    liver.check()
    slider = tab.locator("#slice")
    before = tab.evaluate("document.getElementById('position').value")
    slider.focus()
    slider.press("End")
    last = tab.evaluate("document.getElementById('position').value")
    assert before != last and last.split(" of ")[0] == last.split(" of ")[1]
    for plane, count in (("coronal", 20), ("sagittal", 16), ("axial", 12)):
        tab.get_by_label(plane, exact=True).check()
        assert tab.evaluate("document.getElementById('position').value").endswith(f"of {count}")
    panes = tab.locator("#panes figure")
    shown = [panes.nth(i).is_visible() for i in range(panes.count())]
    tab.get_by_label("starting point", exact=True).check()
    assert shown == [True, True, True, False] and panes.nth(3).is_visible()
    organs = coloured(tab, 2)
    tab.get_by_label("errors", exact=True).check()
    assert tab.locator("#errors").is_visible() and coloured(tab, 2) not in (0, organs)
    tab.locator("#case").select_option("0")
    tab.wait_for_function("document.getElementById('panes').textContent.includes('Dice')")


def test_light_dark_and_what_is_chosen(open_page):
    for scheme in ("light", "dark"):
        tab = open_page(color_scheme=scheme)
        assert (tab.evaluate(PAPER) > 128) == (scheme == "light")
        for choice in ("dark", "light"):
            tab.locator("#theme").select_option(choice)
            assert (tab.evaluate(PAPER) > 128) == (choice == "light")
        tab.locator("#theme").select_option("dark")
        tab.emulate_media(media="print")
        assert tab.evaluate(PAPER) == 255, "paper is white"


def test_a_phone_and_a_keyboard(open_page):
    tab = open_page(viewport={"width": 360, "height": 740}, device_scale_factor=2, has_touch=True)
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    unnamed = tab.evaluate(UNNAMED)
    assert unnamed == []
    assert HOSTILE in tab.locator("#scores th").all_inner_texts()


def test_without_javascript(open_page):
    tab = open_page(java_script_enabled=False)
    assert tab.get_by_text("The slices need JavaScript").is_visible() and not tab.locator("#viewer").is_visible()
    assert tab.locator("#agreement svg").first.is_visible()
