"""MONAI Deploy application: a folder of DICOM CT series in, a DICOM segmentation with one named segment per organ out.

Run by MONAI Deploy App SDK 4 (``make dicom``), in an environment of its own: nothing of this project is imported. Segments are
numbered by the model's channels, so that a name stays with its organ when another organ is not in the image.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from monai.deploy.conditions import CountCondition
from monai.deploy.core import AppContext, Application
from monai.deploy.core.domain import Image
from monai.deploy.core.io_type import IOType
from monai.deploy.operators.dicom_data_loader_operator import DICOMDataLoaderOperator
from monai.deploy.operators.dicom_seg_writer_operator import DICOMSegmentationWriterOperator, SegmentDescription
from monai.deploy.operators.dicom_series_selector_operator import DICOMSeriesSelectorOperator
from monai.deploy.operators.dicom_series_to_volume_operator import DICOMSeriesToVolumeOperator
from monai.deploy.operators.monai_bundle_inference_operator import IOMapping, MonaiBundleInferenceOperator
from pydicom.sr.codedict import codes

TEXT = 64  # characters that a DICOM long string holds
SERIES = {"selections": [{"name": "CT", "conditions": {"Modality": "^CT$"}}]}  # not RTSTRUCT


class SegmentCT(Application):
    """Loads the CT series of a folder, segments it by a bundle and writes the segmentation.

    Args:
        images: folder with a DICOM study.
        bundle: a bundle with weights.
        output: folder for the segmentation.
    """

    def __init__(self, images: Path, bundle: Path, output: Path) -> None:
        self.images, self.bundle, self.output = images, bundle, output
        super().__init__()

    def compose(self) -> None:
        """Series, volume, bundle, segmentation."""
        loader = DICOMDataLoaderOperator(self, CountCondition(self, 1), input_folder=self.images, name="loader")
        largest_first = {"all_matched": True, "sort_by_sop_instance_count": True}  # not the scout
        selector = DICOMSeriesSelectorOperator(self, rules=json.dumps(SERIES), **largest_first, name="selector")
        volume = DICOMSeriesToVolumeOperator(self, name="volume")
        network = MonaiBundleInferenceOperator(
            self,
            app_context=AppContext({}),
            input_mapping=[IOMapping("image", Image, IOType.IN_MEMORY)],
            output_mapping=[IOMapping("pred", Image, IOType.IN_MEMORY)],
            bundle_path=self.bundle,
            name="network",
        )
        writer = DICOMSegmentationWriterOperator(
            self,
            segment_descriptions=segment_descriptions(self.bundle),
            output_folder=self.output,
            custom_tags={"SeriesDescription": "Automatic segmentation; research only"},
            name="writer",
        )
        self.add_flow(loader, selector, {("dicom_study_list", "dicom_study_list")})
        self.add_flow(selector, volume, {("study_selected_series_list", "study_selected_series_list")})
        self.add_flow(volume, network, {("image", "image")})
        self.add_flow(selector, writer, {("study_selected_series_list", "study_selected_series_list")})
        self.add_flow(network, writer, {("pred", "seg_image")})


def segment_descriptions(bundle: Path) -> list[SegmentDescription]:
    """One for each output channel of a bundle, background left out, in their order.

    A name that SNOMED CT has as a whole ("Liver") gets its code; any other is a tissue, and its label says which.
    """
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    channels = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    names = [channels[str(number)] for number in range(1, len(channels))]
    return [
        SegmentDescription(
            segment_label=name[:TEXT],
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=getattr(codes.SCT, "".join(map(str.capitalize, name.split())), codes.SCT.Tissue),
            algorithm_name=metadata["name"][:TEXT],
            algorithm_family=codes.DCM.ArtificialIntelligence,
            algorithm_version=metadata["version"],
        )
        for name in names
    ]


def main() -> int:
    """Read the command line, run, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, text in (
        ("--images", "folder with a DICOM study"),
        ("--bundle", "merged bundle"),
        ("--output", "folder for the DICOM segmentation"),
    ):
        parser.add_argument(name, type=Path, required=True, help=text)
    given = parser.parse_args()
    for path in (given.images, given.bundle / "configs" / "metadata.json", given.bundle / "models" / "model.pt"):
        if not path.exists():
            print(f"error: {path} not found", file=sys.stderr)
            return 1
    before = set(given.output.glob("*.dcm"))
    try:
        SegmentCT(given.images.resolve(), given.bundle.resolve(), given.output.resolve()).run()
    except Exception as error:  # an operator's, of any kind, such as weights that do not fit the network
        print(f"error: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 1
    written = sorted(set(given.output.glob("*.dcm")) - before)
    if not written:
        print(f"error: no segmentation was written for {given.images}; see above", file=sys.stderr)
        return 1
    print(f"written: {written[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
