"""Demo data: CT-like phantom patients as DICOM series, with labels and segmentation masks.

    python -m data.demo [folder]

<folder>/demo.csv          PatientID,path,fold,lesion,sex,seg_path    for DINO and classification
<folder>/segmentation.csv  PatientID,img_path,seg_path,fold
<folder>/dicom/<PatientID>/  one axial series, about 50 slices of 128 x 128, 3 x 3 x 5 mm
<folder>/masks/<PatientID>.nii.gz  1 liver, 2 kidneys, 3 spleen, 4 lesion (tumours in the liver)

Half of the patients have lesions, full of iodised oil as after chemoembolisation, so that 24
patients are enough to learn their appearance. Sex shows in the amount of muscle and fat. The same
seed gives the same bytes.
"""

import hashlib
import os
import shutil
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from tqdm import tqdm

from data.demo.phantom import make_phantom

OURS = {"demo.csv", "segmentation.csv", "dicom", "masks"}
SIZE = 128  # rows and columns


def make_demo(folder, n_patients: int = 40, seed: int = 0) -> Path:
    """Write the demo data set unless it is there already, and return the path of its demo.csv.

    A complete data set is kept, whatever its number of patients and seed; an incomplete one is made
    again. Raises ValueError if `folder` holds files that are not demo data.
    """
    folder = Path(folder).expanduser().absolute()
    if _complete(folder):
        return folder / "demo.csv"
    if folder.exists() and (foreign := {p.name for p in folder.iterdir()} - OURS):
        raise ValueError(f"{folder}: not the place for demo data, it holds {sorted(foreign)[:5]}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}.partial-*"):
        if time.time() - left.stat().st_mtime > 3600:  # left by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    try:
        _write(partial, n_patients, seed)
        if not _complete(folder):  # unless another process was faster
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    except OSError:
        if not _complete(folder):
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder / "demo.csv"


def _complete(folder):
    """Return whether both CSVs are there, and every file that they name."""
    if not (folder / "segmentation.csv").is_file() or not (folder / "demo.csv").is_file():
        return False
    table = pd.read_csv(folder / "demo.csv", dtype=str)
    return all((folder / p).exists() for p in [*table["path"], *table["seg_path"]])


def _write(folder, n_patients, seed):
    (folder / "masks").mkdir(parents=True)
    rows = []
    allotted = _allot(np.random.default_rng([seed, 0]), n_patients)
    for patient, (lesion, fold, male) in enumerate(tqdm(allotted, "demo data", disable=None), 1):
        name = f"DEMO-{patient:03d}"
        rng = np.random.default_rng([seed, patient])
        in_plane = round(rng.uniform(2.8, 3.1), 2)
        spacing = (in_plane, in_plane, 5.0)
        shape = (SIZE, SIZE, int(rng.integers(44, 53)))
        hu, labels = make_phantom(rng, male, lesion, shape, spacing)
        origin = np.round([-SIZE / 2 * in_plane, -SIZE / 2 * in_plane, rng.uniform(-600, -200)], 1)
        path, seg_path = f"dicom/{name}", f"masks/{name}.nii.gz"
        sex = "M" if male else "F"
        write_series(folder / path, hu, spacing, origin, name, sex, seed)
        write_mask(folder / seg_path, labels, spacing, origin)
        rows.append([name, path, fold, int(lesion), sex, seg_path])
    table = pd.DataFrame(rows, columns=["PatientID", "path", "fold", "lesion", "sex", "seg_path"])
    table.to_csv(folder / "demo.csv", index=False, lineterminator="\n")
    columns = ["PatientID", "img_path", "seg_path", "fold"]
    table = table.rename(columns={"path": "img_path"})[columns]
    table.to_csv(folder / "segmentation.csv", index=False, lineterminator="\n")


def _allot(rng, n):
    """Return (lesion, fold, male) per patient; each fold has patients with and without lesions."""
    healthy = [(False, 4 - k % 5, (k // 5 + k % 5) % 2 == 0) for k in range((n + 1) // 2)]
    ill = [(True, k % 5, (k // 5 + k % 5) % 2 == 0) for k in range(n // 2)]
    table = healthy + ill
    return [table[i] for i in rng.permutation(n)]


def write_series(folder, hu, spacing_mm, origin_mm, patient, sex, seed):
    """Write an axial CT series, explicit VR little endian, whose file names do not sort by slice.

    hu: (X, Y, Z) int16, x to the patient's left, y to the back, z to the head. spacing_mm: (3,).
    origin_mm: (3,) DICOM patient coordinates of the centre of voxel (0, 0, 0).
    UIDs are hashes of seed and patient.
    """

    def uid(*what):
        return generate_uid(entropy_srcs=[str(seed), patient, *what])

    folder.mkdir(parents=True)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = CTImageStorage
    ds.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    ds.StudyDate = ds.SeriesDate = "20240102"
    ds.StudyTime = ds.SeriesTime = "090000"
    ds.Modality = "CT"
    ds.Manufacturer = "Phantom"
    ds.StudyDescription = "Demo phantom, not a patient"
    ds.SeriesDescription = "Abdomen portal venous 5.0"
    ds.PatientName = f"Demo^{patient}"
    ds.PatientID = patient
    ds.PatientSex = sex
    ds.PatientBirthDate = ds.AccessionNumber = ds.StudyID = ds.ReferringPhysicianName = ""
    ds.BodyPartExamined = "ABDOMEN"
    ds.SliceThickness = spacing_mm[2]
    ds.KVP = 120
    ds.PatientPosition = "HFS"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = uid("study"), uid("series")
    ds.FrameOfReferenceUID = uid("for")
    ds.SeriesNumber = 2
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing = [spacing_mm[1], spacing_mm[0]]
    ds.Rows, ds.Columns = hu.shape[1], hu.shape[0]
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = -1024, 1, "HU"
    ds.WindowCenter, ds.WindowWidth = 40, 400
    stored = np.clip(hu.astype(np.int32) + 1024, 0, 4095).astype("<u2")
    for k in range(hu.shape[2]):
        ds.SOPInstanceUID = uid("slice", str(k))
        ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.InstanceNumber = hu.shape[2] - k  # counted from the head down, as by most scanners
        position = np.asarray(origin_mm, float) + [0, 0, k * spacing_mm[2]]
        ds.ImagePositionPatient = [round(float(p), 3) for p in position]
        ds.SliceLocation = ds.ImagePositionPatient[2]
        ds.PixelData = stored[:, :, k].T.tobytes()  # rows run along y, columns along x
        name = hashlib.sha256(ds.SOPInstanceUID.encode()).hexdigest()[:12]
        ds.save_as(folder / f"{name}.dcm", enforce_file_format=True)


def write_mask(path, labels, spacing_mm, origin_mm):
    """Write a NIfTI mask with rows that run from back to front, as dcm2niix writes them."""
    rows = labels.shape[1]
    affine = np.diag([-spacing_mm[0], spacing_mm[1], spacing_mm[2], 1.0])
    affine[:3, 3] = origin_mm * [-1, -1, 1] - [0, (rows - 1) * spacing_mm[1], 0]
    nib.save(nib.Nifti1Image(labels[:, ::-1], affine), path)
