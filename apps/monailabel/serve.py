"""Check what is to be served, then start MONAI Label with this app on this computer alone (127.0.0.1)."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from lib.bundles import find_bundles

APP = Path(__file__).resolve().parent
STUDIES = "a folder of images, or the address of a DICOMweb server"


def main() -> None:
    """Run the command line; ends with one line on what is wrong, or becomes the server."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", default="", help=STUDIES)
    parser.add_argument(
        "--bundles", default="", help="a bundle, or a folder of bundles; several with commas between them"
    )
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--train", action="store_true", help="offer training too, in copies of the bundles")
    parser.add_argument("--check", action="store_true", help="only check")
    arguments = parser.parse_args()
    studies = arguments.studies
    remote = studies.startswith(("http://", "https://"))
    if not studies:
        sys.exit(f"no studies given: STUDIES must name {STUDIES}")
    if not remote and not Path(studies).expanduser().is_dir():
        sys.exit(f"{studies} is not a folder: STUDIES must name {STUDIES}")
    try:
        bundles = find_bundles(arguments.bundles)
    except ValueError as error:
        sys.exit(str(error))
    if arguments.check:
        return
    print(f"serving {', '.join(bundles)} at http://127.0.0.1:{arguments.port}", flush=True)
    words = ["--app", APP, "--studies", studies if remote else Path(studies).expanduser().absolute()]
    words += [
        "--conf",
        "bundles",
        ",".join(map(str, bundles.values())),
        "--conf",
        "train",
        str(arguments.train).lower(),
    ]
    words += ["--host", "127.0.0.1", "--port", arguments.port]
    # the converter to DICOM SEG is a program beside this Python; MONAI Label would download one if it were not on the path
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = [sys.executable, "-m", "monailabel.main", "start_server", *map(str, words)]
    os.execve(sys.executable, command, {**os.environ, "PATH": path})


if __name__ == "__main__":
    main()
