"""``python dicom_ct.py IMAGE FOLDER``: write a NIfTI image as a DICOM CT series, a file a slice; needs pydicom and nibabel."""

import sys
from pathlib import Path

import nibabel
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid


def write(image: str, folder: str) -> None:
    """Write slices ``000.dcm``, ``001.dcm``, … from the feet upwards, in Hounsfield units rounded to integers."""
    picture = nibabel.as_closest_canonical(nibabel.load(image))
    affine = np.diag([-1, -1, 1, 1]) @ picture.affine  # from RAS to DICOM's LPS
    voxels = np.asarray(picture.dataobj).round().astype(np.int16)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    Path(folder).mkdir(parents=True)
    for number in range(voxels.shape[2]):
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = CTImageStorage
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = study, series, frame
        data.PatientID, data.PatientName, data.PatientBirthDate, data.PatientSex = "phantom", "Phantom^", "", "O"
        data.StudyID, data.StudyDate, data.StudyTime, data.AccessionNumber = "1", "20260101", "120000", ""
        data.ReferringPhysicianName, data.Manufacturer, data.PositionReferenceIndicator = "", "simulated", ""
        data.Modality, data.SeriesNumber, data.InstanceNumber = "CT", 1, number + 1
        data.SeriesDescription, data.StudyDescription = "simulated CT", "simulated CT"
        data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        data.ImageOrientationPatient = [
            float(x) for x in (*(affine[:3, 0] / spacing[0]), *(affine[:3, 1] / spacing[1]))
        ]
        data.ImagePositionPatient = [float(x) for x in affine[:3] @ [0, 0, number, 1]]
        data.PixelSpacing = [float(spacing[1]), float(spacing[0])]  # between rows, between columns
        data.SliceThickness = float(spacing[2])
        data.Columns, data.Rows = voxels.shape[:2]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.RescaleIntercept, data.RescaleSlope = 0, 1
        data.PixelData = np.ascontiguousarray(voxels[:, :, number].T).tobytes()
        data.save_as(Path(folder) / f"{number:03}.dcm", enforce_file_format=True)


if __name__ == "__main__":
    write(*sys.argv[1:])
