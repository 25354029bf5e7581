"""Reading every volume once: bad ones are named, good ones remembered, the cache is used."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import data.prepare.check
from data.cache import VolumeCache
from data.cases import Case, read_cases
from data.prepare.check import check_volumes, volume_notices
from data.standard import StandardForm
from tests.places import SHARED

DATA = SHARED / "data"
needs_data = pytest.mark.skipif(
    not DATA.exists(), reason="shared/data is not beside the repository"
)


def write(path, shape=(12, 10, 9), spacing=(1, 1, 2), dtype=np.int16, value=None):
    """A NIfTI file of noise, or of one value."""
    voxels = (
        np.random.default_rng(0).integers(0, 100, shape) if value is None else np.full(shape, value)
    )
    nib.save(nib.Nifti1Image(voxels.astype(dtype), np.diag([*spacing, 1.0])), path)
    return str(path)


def case(path, row=2, patient="p", **more):
    return Case(f"{patient}{row}", str(path), "0", row, modality=more.pop("modality", "MR"), **more)


def cache_in(folder, modality="auto"):
    return VolumeCache(folder / "cache", StandardForm(None, modality, crop_background=False))


def check(cases, cache, build=False, n_workers=0, modality="auto"):
    return check_volumes(cases, cache, build, n_workers, modality, progress=False)


@pytest.fixture
def count_reads(monkeypatch):
    """List that grows by a row number with every volume that check reads itself."""
    read, rows = data.prepare.check._read, []

    def counting(case, **settings):
        rows.append(case.row)
        return read(case, **settings)

    monkeypatch.setattr(data.prepare.check, "_read", counting)
    return rows


@pytest.mark.parametrize("build", [False, True])
def test_all_kinds_of_bad_volumes(tmp_path, build):
    (tmp_path / "text.nii.gz").write_text("no image")
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(Path(write(tmp_path / "whole.nii.gz")).read_bytes()[:-200])
    image = write(tmp_path / "image.nii.gz")
    cases = [
        case(write(tmp_path / "good.nii.gz"), 2),
        case(tmp_path / "text.nii.gz", 3),
        case(cut, 4),
        case(write(tmp_path / "thin.nii.gz", shape=(12, 12, 1)), 5),
        case(write(tmp_path / "metres.nii.gz", spacing=(0.001, 0.001, 0.001)), 6),
        case(write(tmp_path / "thick.nii.gz", spacing=(1, 1, 25)), 7),
        case(write(tmp_path / "flat.nii.gz", value=3), 8),
        case(image, 9, seg_path=write(tmp_path / "other_shape.nii.gz", shape=(12, 10, 8), value=1)),
        case(image, 10, seg_path=write(tmp_path / "shifted.nii.gz", spacing=(1, 1, 2.5), value=1)),
        case(image, 11, seg_path=write(tmp_path / "mask.nii.gz", value=1)),
        case(tmp_path / "gone.nii.gz", 12),
    ]
    found = {p.row: p for p in check(cases, cache_in(tmp_path), build)}
    assert sorted(found) == [3, 4, 5, 6, 7, 8, 9, 10, 12]
    for row, kind, what in (
        (3, "unreadable volumes", "text.nii.gz"),
        (4, "unreadable volumes", "cut.nii.gz"),
        (5, "geometry", "12 x 12 x 1 voxels; expected at least 2 along each axis"),
        (6, "geometry", "spacing 0.001 x 0.001 x 0.001 mm; expected 0.05 to 20"),
        (7, "geometry", "spacing 1 x 1 x 25 mm"),
        (8, "unreadable volumes", "flat.nii.gz"),
        (9, "unreadable volumes", "other_shape.nii.gz"),
        (10, "unreadable volumes", "shifted.nii.gz"),
        (12, "unreadable volumes", "gone.nii.gz"),
    ):
        assert found[row].kind == kind and what in found[row].what
        assert found[row].patient == f"p{row}" and not found[row].what.startswith("patient")


def test_good_volumes_are_remembered_until_they_change(tmp_path, count_reads):
    cases = [case(write(tmp_path / f"{row}.nii.gz"), row) for row in (2, 3)]
    (tmp_path / "4.nii.gz").write_text("no image")
    cases.append(case(tmp_path / "4.nii.gz", 4))
    cache = cache_in(tmp_path)
    first = check(cases, cache)
    assert count_reads == [2, 3, 4]
    memory = cache.cache_dir / "checked.jsonl"
    with open(memory, "a") as file:
        file.write('{"key": \n')  # cut short by a crash
    other = VolumeCache(cache.cache_dir, replace(cache.form, spacing=(3, 3, 3)))
    assert check(cases, other) == first  # whatever the spacing
    assert count_reads == [2, 3, 4, 4]
    write(tmp_path / "3.nii.gz", shape=(12, 10, 1))
    assert [p.row for p in check(cases, cache)] == [3, 4]
    assert count_reads == [2, 3, 4, 4, 3, 4]
    assert [p.row for p in check(cases, cache)] == [3, 4]  # good to read, still of wrong geometry
    for line in memory.read_text().splitlines()[:2]:
        assert set(json.loads(line)) == {
            "key",
            "shape",
            "spacing",
            "series",
            "labels",
            "notices",
            "values",
            "volumes",
            "look",
        }
    assert "p2" not in memory.read_text() and "nii" not in memory.read_text()


def test_what_is_in_the_cache_is_not_read(tmp_path, count_reads):
    cases = [case(write(tmp_path / f"{row}.nii.gz"), row) for row in (2, 3)]
    cache = cache_in(tmp_path)
    assert check(cases, cache, build=True) == []
    assert all(cache.has(c) for c in cases)
    assert check(cases, cache) == [] and count_reads == []


@pytest.mark.parametrize("build", [False, True])
def test_unknown_modality_is_one_problem(tmp_path, build):
    paths = [
        write(tmp_path / f"{row}.nii.gz", spacing=(1, 1, 30 if row == 3 else 1))
        for row in (2, 3, 4)
    ]
    cases = [case(path, row, modality=None) for row, path in enumerate(paths, 2)]
    cases.append(case(write(tmp_path / "5.nii.gz"), 5))
    found = check(cases, cache_in(tmp_path), build)
    assert [(p.row, p.kind) for p in found] == [(0, "modality"), (3, "geometry")]
    assert found[0].what.startswith("3 of 4 volumes") and "data.modality" in found[0].what
    assert check(cases[:1], cache_in(tmp_path, "MR"), build, modality="MR") == []


def test_parallel_processes_find_the_same(tmp_path, processes_at_once):
    cases = [
        case(write(tmp_path / f"{row}.nii.gz", shape=(9, 9, 1 + row // 8)), row)
        for row in range(6, 10)
    ]
    assert [p.row for p in check(cases, cache_in(tmp_path), n_workers=2)] == [6, 7]


def test_a_mistake_of_ours_names_the_row(tmp_path, monkeypatch):
    monkeypatch.setattr(data.prepare.check, "spacing_of", lambda affine: 1 / 0)
    with pytest.raises(RuntimeError, match="line 7 of the CSV: ZeroDivisionError"):
        check([case(write(tmp_path / "a.nii"), 7)], cache_in(tmp_path))


# ---- real data
@needs_data
@pytest.mark.parametrize("build", [False, True])
def test_one_series_under_two_patients(tmp_path, build):
    source = DATA / "dicom" / "mr_hippocampus_crop"
    for name in ("a", "b"):
        shutil.copytree(source, tmp_path / name)
    cases = [Case("p1", str(tmp_path / "a"), "0", 2), Case("p2", str(tmp_path / "b"), "1", 3)]
    found = check(cases, cache_in(tmp_path), build)
    assert [(p.row, p.patient, p.kind) for p in found] == [(3, "p2", "repeated volumes")]
    assert found[0].what.startswith("same series as patient p1, line 2")


@needs_data
def test_real_volumes(tmp_path):
    cases, found = read_cases(DATA / "hippocampus" / "segmentation.csv", {}, (), ("img_path",))
    assert found == [] and check(cases[:10], cache_in(tmp_path, "MR"), modality="MR") == []
    mask = str(DATA / "dicom" / "ct_jpeg2000_labels.nii.gz")
    series = [
        Case("p1", str(DATA / "dicom" / "ct_jpeg2000"), "0", 2, seg_path=mask),
        Case("p2", str(DATA / "dicom" / "mr_oblique_t1"), "0", 3),
        Case("p2", str(DATA / "dicom" / "mr_oblique_flair"), "0", 4),
    ]
    assert check(series, cache_in(tmp_path)) == []


def test_few_slices_are_read_with_a_notice(tmp_path):
    sizes = (2, 7, 8)
    cases = [case(write(tmp_path / f"{n}.nii", shape=(12, 12, n)), n) for n in sizes]
    cache = cache_in(tmp_path)
    assert check(cases, cache) == [] and check(cases, cache, build=True) == []
    assert cache.get(cases[0]).read_region((0, 0, 0), (12, 12, 2)).shape == (1, 12, 12, 2)
    assert [notice.row for notice in volume_notices(cases, cache)] == [2, 7]


@pytest.mark.parametrize("build", [False, True])
def test_problems_and_notices_of_channels_name_row_and_column(tmp_path, build):
    good = write(tmp_path / "good.nii")
    (tmp_path / "text.nii").write_text("no image")
    others = {
        2: (write(tmp_path / "thick.nii", spacing=(1, 1, 25)), "expected 0.05 to 20 mm"),
        3: (str(tmp_path / "text.nii"), "neither a NIfTI file"),
        4: (write(tmp_path / "flat.nii", value=3), "every voxel is 3" * (not build)),
        5: (write(tmp_path / "thin.nii", shape=(12, 12, 1)), "2 voxels along each axis"),
        6: (write(tmp_path / "two.nii", (7, 5, 5), spacing=(2, 2, 4)), ""),
        7: (None, ""),
    }
    channels = {row: {"t1": good, "t2": path} for row, (path, _) in others.items()}
    cases = [case(good, row, channels=paths) for row, paths in channels.items()]
    cache = cache_in(tmp_path)
    found = {p.row: p for p in check(cases, cache, build)}
    assert set(found) == {2, 3, 4, 5}
    for row, problem in found.items():
        assert problem.what.startswith("t2: ") and others[row][1] in problem.what, problem.what
    notices = {p.row: p.what for p in volume_notices(cases[4:], cache)}
    assert notices[7] == "t2: missing; zeros for the network"
    assert notices[6].startswith("t2: ") and "7 x 5 x 5 voxels of 2 x 2 x 4 mm" in notices[6]
    assert check(cases[4:], cache, build) == []  # what was remembered says the same
    assert {p.row: p.what for p in volume_notices(cases[4:], cache)} == notices
