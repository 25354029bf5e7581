"""DICOM SEG masks, against formulas in space that know nothing of frames."""

import nibabel as nib
import numpy as np
import pytest
from pydicom.uid import RLELossless, generate_uid

from data.cache import VolumeCache
from data.cases import NOTICE, read_cases
from data.inference.restore import read_truth
from data.prepare.check import check_volumes, volume_notices
from data.prepare.masks import find_masks
from data.readers import Onto, VolumeError, read_mask, read_volume
from data.standard import StandardForm
from tests.conftest import write_cases
from tests.data.dicom.factory import AXIAL, OBLIQUE, make_series, move_to, save_series
from tests.data.dicom.segs import ball, item, make_seg, pixels, save_seg
from utils.classes import Classes

# in the middle of the phantom, which is 14 x 15 x 20 mm; other slices have no frame
SEGMENTS = {"Liver": ball(-5, 4, 0, radius=3.9), "Spleen": ball(-1, 4, 3, radius=3.2)}


def a_series(orientation=AXIAL, tilt=0.0, patient="phantom-1", uid=None):
    """8 slices of 10 x 11 pixels, so that packed frames do not begin with a byte."""
    series = make_series(columns=11, orientation=orientation, series_uid=uid)
    frame = generate_uid()
    for k, ds in enumerate(series):
        ds.FrameOfReferenceUID, ds.StudyInstanceUID, ds.PatientID = frame, "1.2.3", patient
        if tilt:
            move_to(ds, np.array(ds.ImagePositionPatient, float) + [0, tilt * k, 0])
    return series


def expected(segments, affine, shape) -> np.ndarray:
    """The label map of segments 1, 2, ... on a grid, later over earlier."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    labels = np.zeros(shape, int)
    for number, inside in enumerate(segments.values(), 1):
        labels[inside(index @ affine[:3, :3].T + affine[:3, 3])] = number
    return labels


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
@pytest.mark.parametrize(("orientation", "tilt"), [(AXIAL, 0), (OBLIQUE, 0), (AXIAL, 0.9)])
def test_frames_are_placed_by_position(kind, orientation, tilt, tmp_path):
    series = a_series(orientation, tilt)
    scan = read_volume(save_series(series, tmp_path / "scan"))
    syntax = {} if kind == "BINARY" else {"syntax": RLELossless}
    save_seg(make_seg(series, SEGMENTS, kind), tmp_path / "seg" / "any name", **syntax)
    mask = read_mask(tmp_path / "seg", onto=Onto.of(scan))
    wanted = expected(SEGMENTS, scan.affine, scan.voxels.shape)
    assert np.unique(wanted).tolist() == [0, 1, 2]
    assert not wanted.any((0, 1)).all(), "each slice has a frame"
    np.testing.assert_array_equal(mask.affine, scan.affine)
    np.testing.assert_array_equal(mask.voxels, wanted)
    alone = read_mask(tmp_path / "seg")  # on the frames' own stack
    np.testing.assert_array_equal(
        alone.voxels, expected(SEGMENTS, alone.affine, alone.voxels.shape)
    )
    assert alone.voxels.astype(bool).sum() == wanted.astype(bool).sum()


def test_the_scan_may_be_a_file_of_another_format_with_its_axes_turned(tmp_path):
    series = a_series(OBLIQUE)
    scan = read_volume(save_series(series, tmp_path / "scan"))
    turn = np.array([[2, -1], [0, 1], [1, -1]])
    affine = scan.affine @ nib.orientations.inv_ornt_aff(turn, scan.voxels.shape)
    voxels = nib.apply_orientation(scan.voxels, turn)
    nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "scan.nii")
    save_seg(make_seg(series, SEGMENTS), tmp_path / "seg.dcm")
    row = {"path": "scan.nii", "seg_path": "seg.dcm", "modality": "CT"}
    cases, _ = cases_of(tmp_path, {"liver": 1, "spleen": 2}, row)
    classes = Classes.from_config({"liver": 1, "spleen": 2})
    truth = read_truth(cases[0], cached(tmp_path, cases).get(cases[0]), classes)
    np.testing.assert_array_equal(truth, expected(SEGMENTS, affine, voxels.shape))


def cases_of(folder, classes, *rows):
    """Cases, problems and notices of rows."""
    rows = [{"PatientID": f"p{i}", "fold": "0", **row} for i, row in enumerate(rows)]
    write_cases(folder / "c.csv", rows)
    classes = classes and Classes.from_config(classes)
    optional = ["labelled_classes", *(name for name, _ in (classes.files if classes else ()))]
    cases, problems = read_cases(folder / "c.csv", {"train": ["0"]}, [], ["path"], optional)
    cases, others = find_masks(cases, classes, folder)
    return cases, [*problems, *others]


def cached(folder, cases):
    cache = VolumeCache(folder / "cache", StandardForm(None, "auto", crop_background=False))
    problems = check_volumes(cases, cache, True, 0, "auto", progress=False)
    assert not problems, problems
    return cache


def write(folder, name, segments, **options) -> dict:
    """A series and its SEG; returns their cells."""
    series = a_series(patient=name)
    save_series(series, folder / name)
    save_seg(make_seg(series, segments, **options), folder / f"{name}.dcm")
    return {"path": name, "seg_path": f"{name}.dcm"}


def truths(folder, classes, *rows) -> tuple[list[np.ndarray], list[str]]:
    """Where each class is, of each case, {name: bool}; problems and notices."""
    cases, problems = cases_of(folder, classes, *rows)
    made, cache = Classes.from_config(classes), cached(folder, cases)
    indices = [read_truth(case, cache.get(case), made) for case in cases]
    found = [{n: np.isin(x, made.indices_of(n)) for n in made.names} for x in indices]
    return found, [p.what for p in [*problems, *volume_notices(cases, cache)]]


def inside(folder, row, segment) -> np.ndarray:
    scan = read_volume(folder / row["path"])
    return expected({"": segment}, scan.affine, scan.voxels.shape) > 0


def test_labels_name_segments_that_are_numbered_anew_in_each_file(tmp_path):
    one = write(tmp_path, "a", SEGMENTS)
    other = write(tmp_path, "b", dict(reversed(SEGMENTS.items())))
    cases, problems = cases_of(tmp_path, {"liver": 1, "spleen": 2}, one, other)
    said = [p.what for p in problems if p.kind == "classes"]
    assert len(said) == 2 and "segment 1 is 'Liver' in line 2, 'Spleen' in line 3" in said[0]
    assert "classes: {liver: 'Liver'}" in said[0]
    found, said = truths(tmp_path, {"liver": "liver", "spleen": "Spleen"}, one, other)
    for row, of_case in zip((one, other), found, strict=True):
        np.testing.assert_array_equal(of_case["spleen"], inside(tmp_path, row, SEGMENTS["Spleen"]))
    overlap = inside(tmp_path, one, SEGMENTS["Spleen"]) & inside(tmp_path, one, SEGMENTS["Liver"])
    what = f"{overlap.sum()} voxels are in 1 Liver and in 2 Spleen, which counts"
    assert overlap.any() and any(what in line for line in said), said


def test_segments_of_more_classes_are_drawn_over_those_of_fewer_and_others_not(tmp_path):
    core, whole = ball(-5, 4, 0, radius=3), ball(-5, 4, 0, radius=6)
    row = write(tmp_path, "a", {"core": core, "whole": whole, "Body": ball(0, 0, 0, radius=99)})
    for classes in ({"W": [1, 2], "C": 1}, {"W": ["core", "whole"], "C": "core"}):
        (found,), said = truths(tmp_path, classes, row)
        np.testing.assert_array_equal(found["C"], inside(tmp_path, row, core))
        np.testing.assert_array_equal(found["W"], inside(tmp_path, row, whole))
        assert any("segments of no class: 3 Body" in what for what in said), said


def test_an_absent_segment_is_absent_and_said_with_those_that_are_there(tmp_path):
    row = write(tmp_path, "a", {"Spleen": SEGMENTS["Spleen"]})
    (found,), said = truths(tmp_path, {"liver": "Liver"}, row)
    assert not found["liver"].any()
    assert any("no segment 'Liver'; it has 1 Spleen" in what for what in said)
    assert any("no class is in the mask" in what for what in said)
    classes = {"liver": "Liver", "spleen": "Spleen"}
    _, problems = cases_of(tmp_path, classes, row | {"labelled_classes": "spleen"})
    assert not problems, "a class that is not labelled is not missed"


def test_a_cell_may_name_a_segment(tmp_path):
    row = write(tmp_path, "a", SEGMENTS)
    seg = row.pop("seg_path")
    cells = {"liver_path": f"{seg}:SegmentLabel=liver", "spleen_path": f"{seg}:SegmentNumber=2"}
    classes = {"liver": "liver_path", "spleen": "spleen_path"}
    (found,), _ = truths(tmp_path, classes, row | cells)
    np.testing.assert_array_equal(found["spleen"], inside(tmp_path, row, SEGMENTS["Spleen"]))
    (found,), said = truths(tmp_path, {"liver": 1}, row | {"seg_path": cells["liver_path"]})
    np.testing.assert_array_equal(found["liver"], inside(tmp_path, row, SEGMENTS["Liver"]))
    _, problems = cases_of(tmp_path, {"liver": 1}, row | {"seg_path": f"{seg}:SegmentLabel=x"})
    assert "no segment SegmentLabel=x; it has 1 Liver, 2 Spleen" in problems[0].what


def test_other_segments_make_another_entry_of_the_cache(tmp_path):
    row, keys = write(tmp_path, "a", SEGMENTS), set()
    for classes in ({"a": "Liver", "b": "Spleen"}, {"a": "Spleen", "b": "Liver"}, {"a": 1}):
        cases, _ = cases_of(tmp_path, classes, row)
        keys.add(VolumeCache(tmp_path / "cache", StandardForm(None, "CT")).key(cases[0]))
    assert len(keys) == 3


def test_a_stage_without_classes_sees_all_segments_by_number(tmp_path):
    row = write(tmp_path, "a", SEGMENTS)
    cases, problems = cases_of(tmp_path, None, row)
    assert not problems and not cases[0].masks
    assert cached(tmp_path, cases).get(cases[0]).labels == [1, 2]


def test_same_coded_types_with_other_labels_are_noticed(tmp_path):
    rows = [write(tmp_path, n, {f"Nodule {n}": ball(-5, 4, 0)}) for n in "ab"]
    _, problems = cases_of(tmp_path, {"nodule": 1}, *rows)
    assert [p.kind for p in problems] == [NOTICE] and "of one coded type" in problems[0].what


def test_half_and_more_of_a_voxel_counts(tmp_path):
    series = a_series()
    scan = read_volume(save_series(series, tmp_path / "scan"))
    for fraction, share in ((128, True), (127, False)):
        ds = make_seg(series, SEGMENTS, "FRACTIONAL", fraction=fraction)
        mask = read_mask(save_seg(ds, tmp_path / f"{fraction}.dcm"), onto=Onto.of(scan))
        assert mask.voxels.any() == share
        assert "half and more is the segment" in mask.notices[0]


def test_it_must_be_of_the_scan_and_in_its_space(tmp_path):
    series, uid = a_series(), generate_uid()
    scan = read_volume(save_series(series, tmp_path / "scan"))

    def read(**header):
        return read_mask(
            save_seg(make_seg(series, SEGMENTS, **header), tmp_path / "s.dcm"), onto=Onto.of(scan)
        )

    other = {"ReferencedSeriesSequence": [item(SeriesInstanceUID=uid)]}
    (notice, *_) = read(**other).notices
    assert "another series than the scan, in the same frame of reference" in notice
    assert len(read(FrameOfReferenceUID=uid).notices) == 1  # its series says enough
    for header in (other | {"FrameOfReferenceUID": uid}, other | {"FrameOfReferenceUID": ""}):
        with pytest.raises(VolumeError, match="s.dcm: drawn on another series.* as NIfTI"):
            read(**header)
    with pytest.raises(VolumeError, match="another patient"):
        read(PatientID="phantom-2")


def test_one_drawn_on_another_grid_is_refused_or_resampled(tmp_path):
    series, finer = a_series(), make_series(slices=20, gap=1, columns=22, spacing=(1.5, 0.625))
    for ds in finer:
        ds.FrameOfReferenceUID, ds.PatientID = series[0].FrameOfReferenceUID, "p"
    for ds in series:
        ds.PatientID = "p"
    save_series(series, tmp_path / "scan")
    save_seg(make_seg(finer, {"Liver": SEGMENTS["Liver"]}), tmp_path / "s.dcm")
    cases, _ = cases_of(tmp_path, {"liver": 1}, {"path": "scan", "seg_path": "s.dcm"})
    cache = VolumeCache(tmp_path / "cache", StandardForm(None, crop_background=False))
    (problem,) = check_volumes(cases, cache, True, 0, "auto", progress=False)
    assert "data.mask_grid=resample" in problem.what
    form = StandardForm(None, crop_background=False, mask_grid="resample")
    cache = VolumeCache(tmp_path / "cache", form)
    assert not check_volumes(cases, cache, True, 0, "auto", progress=False)
    truth = read_truth(cases[0], cache.get(cases[0]), Classes.from_config({"liver": 1})) > 0
    surely, maybe = (  # the nearest voxel of the finer grid is at most 0.6 mm away
        inside(tmp_path, {"path": "scan"}, ball(-5, 4, 0, radius=r)) for r in (3.3, 4.5)
    )
    assert truth[surely].all() and surely.sum() > 20 and not truth[~maybe].any()


@pytest.mark.parametrize("orientation", [AXIAL, OBLIQUE])
@pytest.mark.parametrize("turned", [False, True])
def test_slices_that_were_interpolated_have_the_labels_of_the_nearest(
    orientation, turned, tmp_path
):
    places = np.array([0, 1, 2, 3, 5.5, 8.5, 9.6, 11])  # in 2.5 mm
    series = a_series(orientation)
    normal = np.cross(orientation[:3], orientation[3:])
    for k, ds in enumerate(series):
        shift = 2.5 * (places[k] - k) * normal
        move_to(ds, np.array(ds.ImagePositionPatient, float) + shift)
    save_series(series, tmp_path / "scan")
    if turned:  # rows from the last one, so that the slices' normal points the other way
        for ds in series:
            column = np.array(ds.ImageOrientationPatient[3:], float)
            last = np.array(ds.ImagePositionPatient, float) + column * 1.5 * (ds.Rows - 1)
            ds.ImageOrientationPatient = [*ds.ImageOrientationPatient[:3], *-column]
            ds.ImagePositionPatient = [f"{x:.6f}" for x in last]
    inside = ball(*(pixels(series[4]).mean((0, 1))), radius=13)
    save_seg(make_seg(series, {"Body": inside}), tmp_path / "s.dcm")

    scan = read_volume(tmp_path / "scan", uneven_slices="resample")
    drawn = places[np.abs(places - np.arange(12)[:, None]).argmin(1)]
    at = np.stack(np.meshgrid(*map(np.arange, (11, 10)), drawn, indexing="ij"), axis=-1)
    wanted = inside(at @ scan.affine[:3, :3].T + scan.affine[:3, 3])
    assert wanted[..., 4:8].any((0, 1)).all() and not wanted[..., 0].any()

    cases, _ = cases_of(tmp_path, {"body": 1}, {"path": "scan", "seg_path": "s.dcm"})
    form = StandardForm(None, crop_background=False, uneven_slices="resample")
    cache = VolumeCache(tmp_path / "cache", form)
    assert not check_volumes(cases, cache, True, 0, "auto", progress=False)
    classes = Classes.from_config({"body": 1})
    truth = read_truth(cases[0], cache.get(cases[0]), classes) > 0
    np.testing.assert_array_equal(truth, wanted)
    assert any("labels of the nearest" in n.what for n in volume_notices(cases, cache))


def _cut(ds):
    ds.PixelData = ds.PixelData[:20]


def _unknown_segment(ds):
    groups = ds.PerFrameFunctionalGroupsSequence
    groups[3].SegmentIdentificationSequence[0].ReferencedSegmentNumber = 9


def _unplaced(ds):
    del ds.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence


def _twice(ds):
    groups = ds.PerFrameFunctionalGroupsSequence
    groups[0].PlanePositionSequence = groups[-1].PlanePositionSequence
    groups[0].SegmentIdentificationSequence = groups[-1].SegmentIdentificationSequence


def _garbled(ds):
    ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [0, 0]


def _fewer_places(ds):
    del ds.PerFrameFunctionalGroupsSequence[-1]


def _no_segments(ds):
    del ds.SegmentSequence


def _turned(ds):
    turn = item(ImageOrientationPatient=[0, 1, 0, 1, 0, 0])
    ds.PerFrameFunctionalGroupsSequence[0].PlaneOrientationSequence = [turn]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_cut, "truncated"),
        (_unknown_segment, "segment 9, which it does not describe"),
        (_unplaced, "frames without ImagePositionPatient"),
        (_twice, "several frames of segment"),
        (_garbled, "impossible geometry"),
        (_fewer_places, "but positions for"),
        (_no_segments, "damaged SEG file"),
        (_turned, "different orientations"),
    ],
)
def test_damage_is_named(spoil, words, tmp_path):
    ds = make_seg(a_series(), SEGMENTS)
    spoil(ds)
    with pytest.raises(VolumeError, match=f"s.dcm: .*{words}"):
        read_mask(save_seg(ds, tmp_path / "s.dcm"))


def test_of_several_files_in_a_folder_one_must_be_named(tmp_path):
    ds = make_seg(a_series(), SEGMENTS)
    for name in ("a", "b"):
        save_seg(ds, tmp_path / "segs" / name)
    with pytest.raises(VolumeError, match="2 SEG files in one folder; name one: a, b"):
        read_mask(tmp_path / "segs")
    surfaces = make_seg(a_series(), SEGMENTS, SOPClassUID="1.2.840.10008.5.1.4.1.1.66.5")
    with pytest.raises(VolumeError, match="surfaces"):
        read_mask(save_seg(surfaces, tmp_path / "s.dcm"))
