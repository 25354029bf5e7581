import hashlib

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest

from data.demo.make import make_demo
from data.demo.phantom import LABELS
from data.readers import read_volume

PATIENTS = 2  # one of each class


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return make_demo(tmp_path_factory.mktemp("demo") / "set", PATIENTS)


def _digest(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_same_seed_gives_the_same_bytes(demo, tmp_path):
    again = make_demo(tmp_path / "set", PATIENTS)
    assert _digest(demo.parent) == _digest(again.parent)
    other = make_demo(tmp_path / "other", 1, seed=1)
    uids = [
        pydicom.dcmread(next((c.parent / "dicom/DEMO-001").iterdir())).StudyInstanceUID
        for c in (demo, other)
    ]
    assert uids[0] != uids[1]
    assert not list(tmp_path.glob(".*")), "no partial folder stays behind"


def test_every_fold_has_both_classes():
    from data.demo.make import _allot

    table = pd.DataFrame(_allot(np.random.default_rng(0), 40), columns=["lesion", "fold", "male"])
    counts = pd.crosstab(table["fold"], table["lesion"])
    assert counts.shape == (5, 2) and counts.to_numpy().min() >= 4
    assert (pd.crosstab([table["fold"], table["lesion"]], table["male"]) > 0).all(axis=None)


def test_csvs_agree_and_paths_are_relative(demo):
    table = pd.read_csv(demo)
    segmentation = pd.read_csv(demo.parent / "segmentation.csv")
    assert list(table) == ["PatientID", "path", "fold", "lesion", "sex", "seg_path"]
    assert list(segmentation) == ["PatientID", "img_path", "seg_path", "fold"]
    assert (table["path"] == segmentation["img_path"]).all()
    assert table["PatientID"].is_unique and len(table) == PATIENTS
    for row in table.itertuples():
        labels = nib.load(demo.parent / row.seg_path).get_fdata()
        assert (np.unique(labels) == range(5 if row.lesion else 4)).all()


def test_series_as_dicom(demo):
    files = sorted((demo.parent / "dicom/DEMO-001").iterdir())
    slices = [pydicom.dcmread(f) for f in files]
    z = [float(s.ImagePositionPatient[2]) for s in slices]
    assert z != sorted(z) and z != sorted(z, reverse=True), "file names must not sort by position"
    assert np.allclose(np.diff(sorted(z)), 5)
    assert len({s.SOPInstanceUID for s in slices}) == len(slices)
    assert len({s.SeriesInstanceUID for s in slices}) == 1
    assert all(u.is_valid for u in (slices[0].SOPInstanceUID, slices[0].StudyInstanceUID))
    assert slices[0].file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRLittleEndian
    assert slices[0].RescaleIntercept == -1024
    assert [s.InstanceNumber for s in sorted(slices, key=lambda s: -s.SliceLocation)] == list(
        range(1, len(slices) + 1)
    )


def test_masks_lie_on_the_organs_and_the_liver_on_the_right(demo):
    for patient in ("DEMO-001", "DEMO-002"):
        volume = read_volume(demo.parent / "dicom" / patient)
        mask = read_volume(demo.parent / f"masks/{patient}.nii.gz")
        assert volume.modality == "CT" and mask.modality is None
        to_image = np.linalg.inv(volume.affine) @ mask.affine
        index = np.argwhere(mask.voxels > 0)
        at = index @ to_image[:3, :3].T + to_image[:3, 3]
        assert np.abs(at - np.rint(at)).max() < 1e-3, "masks share the voxels of the image"
        hu = volume.voxels[tuple(np.rint(at).astype(int).T)]
        label = mask.voxels[tuple(index.T)]
        assert 60 < np.median(hu[label == LABELS["liver"]]) < 160
        assert np.median(hu[label == LABELS["kidneys"]]) > np.median(hu[label == LABELS["spleen"]])
        world = index @ mask.affine[:3, :3].T + mask.affine[:3, 3]
        center = {k: world[label == v].mean(0) for k, v in LABELS.items() if (label == v).any()}
        right, front, up = center["liver"] - center["spleen"]
        assert right > 80 and front > 0  # RAS+ mm
        assert (center["liver"] - center["kidneys"])[2] > 20
        bone = np.argwhere(volume.voxels > 350) @ volume.affine[:3, :3].T + volume.affine[:3, 3]
        assert np.median(bone[:, 1]) < center["liver"][1] - 20, "the spine is at the back"


def test_lesions_do_not_show_in_simple_statistics():
    from data.demo.phantom import make_phantom

    facts, lesions = [], []
    for i in range(24):
        rng = np.random.default_rng([0, i])
        hu, labels = make_phantom(rng, i % 4 < 2, i % 2 == 0, (64, 64, 24), (6, 6, 10))
        liver = np.isin(labels, (LABELS["liver"], LABELS["lesion"]))
        body = hu > -300
        facts.append([body.sum(), hu[body].mean(), hu[liver].mean(), liver.sum()])
        lesions.append(i % 2 == 0)
    facts, lesions = np.array(facts), np.array(lesions)
    auc = (facts[lesions][:, None] > facts[~lesions][None]).mean((0, 1))
    assert (np.abs(auc - 0.5) < 0.3).all(), auc


def test_complete_data_is_left_alone_and_incomplete_is_made_again(tmp_path):
    csv_path = make_demo(tmp_path / "set", 1)
    before = _digest(csv_path.parent)
    times = [p.stat().st_mtime_ns for p in sorted(csv_path.parent.rglob("*"))]
    make_demo(tmp_path / "set", 1)
    assert times == [p.stat().st_mtime_ns for p in sorted(csv_path.parent.rglob("*"))]
    (csv_path.parent / "masks/DEMO-001.nii.gz").unlink()
    make_demo(tmp_path / "set", 1)
    assert _digest(csv_path.parent) == before


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.docx").touch()
    with pytest.raises(ValueError, match="thesis.docx"):
        make_demo(tmp_path, 1)
    assert (tmp_path / "thesis.docx").exists()
