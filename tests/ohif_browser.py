"""Use OHIF as a radiologist does: open the study, connect, run the model. Saves a picture, prints how many pixels got a colour.

Run by ``tests/test_ohif.py`` in ``.venv-monailabel``: server's address, study, picture.
"""

from __future__ import annotations

import io
import sys
import time

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

SOFTWARE_RENDERING = [
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
    "--no-sandbox",
]


def main(url: str, study: str, picture: str) -> None:
    """Run the model in OHIF on a study.

    Args:
        url: of MONAI Label.
        study: its StudyInstanceUID.
        picture: file to save.
    """
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=SOFTWARE_RENDERING)
        page = browser.new_page(viewport={"width": 1280, "height": 620})
        page.goto(f"{url}/ohif/monai-label?StudyInstanceUIDs={study}", wait_until="domcontentloaded")
        address = page.locator("#monailabelServerURL")
        address.wait_for(timeout=60_000)
        time.sleep(8)  # the images arrive
        address.fill(f"{url}/")
        page.locator(".settingsTable button").click()
        page.get_by_text("Auto-Segmentation").wait_for(timeout=30_000)
        time.sleep(4)  # OHIF adds the segments a second later
        page.get_by_role("button", name="Confirm and Hide").click()
        before = coloured(page.screenshot())
        with page.expect_response(lambda answer: "/infer/" in answer.url, timeout=120_000) as answer:
            page.get_by_role("button", name="Run").first.click()
        if answer.value.status != 200:
            sys.exit(f"{answer.value.url}: {answer.value.status} {answer.value.text()}")
        time.sleep(6)
        print(coloured(page.screenshot(path=picture)) - before)
        browser.close()


def coloured(screenshot: bytes) -> int:
    """The pixels of the viewports, left of the panel, that are not gray."""
    pixels = np.asarray(Image.open(io.BytesIO(screenshot)).convert("RGB")).astype(int)[:, 300:980]
    return int((np.ptp(pixels, axis=2) > 40).sum())


if __name__ == "__main__":
    main(*sys.argv[1:])
