"""Predictions on the user's own voxels: resampling, axes, headers, types."""

import gzip
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import affine_transform

from data.cache import VolumeCache
from data.cases import Case
from data.inference import restore
from data.inference.restore import (
    decision_of,
    predict_case,
    read_picture,
    read_truth,
    to_file_grid,
    write_prediction,
)
from data.readers import VolumeError, read_volume
from data.standard import StandardForm
from tests.places import SHARED
from utils.classes import IGNORE, Classes

DATA = SHARED / "data"
DICOM = DATA / "dicom"
needs_shared = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}")
CLASSES = Classes(("ball", "rod"), ((3, 4), (7,)), ignore=(9,))
CPU = torch.device("cpu")
TURN = np.array(
    [
        [0.96, -0.28, 0.0, 0.0],
        [0.28 * 0.8, 0.96 * 0.8, -0.6, 0.0],
        [0.28 * 0.6, 0.96 * 0.6, 0.8, 0.0],
        [0.0, 0.0, 0.0, 1.0],
    ]
)  # a rotation
AFFINES = {
    "ras": np.diag([0.9, 1.1, 2.5, 1]),
    "lps": np.array([[-0.7, 0, 0, 20.0], [0, -0.9, 0, 12], [0, 0, 2.0, -8], [0, 0, 0, 1]]),
    "coronal": np.array([[0.0, 0.8, 0, 7], [0, 0, -2.2, 11], [-1.1, 0, 0, 5], [0, 0, 0, 1]]),
    "oblique": TURN @ np.diag([-0.7, -0.8, 2.0, 1]),
}


def slabs_of(volume, axis, cuts):
    """A volume (K, X, Y, Z) in slabs."""
    ends = [0, *cuts, volume.shape[1 + axis]]
    return [(a, volume.narrow(1 + axis, a, b - a)) for a, b in zip(ends, ends[1:], strict=False)]


def world(affine, shape):
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def phantom(shape=(34, 30, 26)):
    """Image (HU: a body in air) and mask (3, 4, 7, 9 and 12) in it."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    body = x**2 + y**2 < 0.6
    mask = np.zeros(shape, np.uint8)
    mask[(x**2 + y**2 + z**2 < 0.3)] = 3
    mask[(x**2 + y**2 + z**2 < 0.1)] = 4
    mask[(abs(x - 0.5) < 0.1) & (abs(y) < 0.1)] = 7
    mask[(abs(x + 0.5) < 0.1) & (abs(y) < 0.1)] = 12  # of no class
    mask[:, :, -1][mask[:, :, -1] > 0] = 9
    image = np.where(body, 0, -1000) + 100 * (mask % 9).astype(int)
    return image.astype(np.int16), mask


def save(path, voxels, affine, **header):
    nii = nib.Nifti1Image(voxels, affine)
    nii.set_sform(affine, code=2)
    nii.set_qform(affine, code=0)
    for name, value in header.items():
        nii.header[name] = value
    nib.save(nii, path)
    return str(path)


@pytest.fixture
def case(tmp_path):
    """A function: name of an affine -> a case with its mask on disk."""

    def make(name="lps", image_name="image.nii.gz", row=2) -> Case:
        image, mask = phantom()
        path = save(tmp_path / image_name, image, AFFINES[name])
        seg = save(tmp_path / f"mask_of_{image_name}", mask, AFFINES[name])
        return Case("p", path, "0", row, modality="CT", seg_path=seg)

    return make


def entry_of(case, tmp_path, spacing=None, crop=True):
    return VolumeCache(tmp_path / "cache", StandardForm(spacing, crop_background=crop)).get(case)


def one_hot(entry):
    index = CLASSES.to_index(entry.read_seg((0, 0, 0), entry.shape))
    index = torch.from_numpy(np.where(index == IGNORE, 0, index)).long()
    return F.one_hot(index, CLASSES.num_outputs).permute(3, 0, 1, 2).float()


# ---- the grid


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("name", AFFINES)
def test_a_plane_stays_where_it_is(name, axis, monkeypatch):
    """Probabilities linear in space are restored exactly, whatever the slabs and the grids."""
    monkeypatch.setattr(restore, "CHUNK", 2000)
    monkeypatch.setattr(restore, "CHUNK_VALUES", 900)
    fine = np.linalg.inv(AFFINES["oblique"])
    standard, shape = np.diag([1.3, 1.2, 1.4, 1.0]), (30, 31, 32)
    if name == "oblique":  # the standard form keeps a volume's own directions
        standard = AFFINES[name] @ np.diag([1.6, 1.3, 0.8, 1])
        assert np.allclose(fine @ standard, np.diag([1.6, 1.3, 0.8, 1]))
    else:
        standard[:3, 3] = (-5, -12, -9)
    normal = np.array([0.6, -0.5, 0.4])
    heights = world(standard, shape) @ normal
    middle = np.median(heights)
    scores = torch.from_numpy(np.stack([0 * heights, heights - middle, 0 * heights - 40])).float()
    wanted = (21, 26, 15)
    at = world(AFFINES[name], wanted)
    position = (at - standard[:3, 3]) @ np.linalg.inv(standard[:3, :3]).T
    inside = ((position >= 0) & (position <= np.array(shape) - 1)).all(-1)
    assert inside.mean() > 0.2
    expected = at @ normal > middle
    sure = abs(at @ normal - middle) > 1e-3
    for cuts in ([], [1, 2, 3, 11, 12, 29], [17]):
        slabs = slabs_of(scores, axis, cuts)
        found = to_file_grid(slabs, axis, standard, shape, AFFINES[name], wanted)
        assert found.dtype == np.uint8 and 0.1 < found[inside].mean() < 0.9
        assert np.array_equal(found[inside & sure], expected[inside & sure])
        beyond = ((position < -0.6) | (position > np.array(shape) - 0.4)).any(-1)
        assert not found[beyond].any()


def test_interpolation_between_all_classes():
    """On a turned grid, whose planes lie across many slabs: scipy's interpolation of each class."""
    rng = np.random.default_rng(0)
    scores = rng.random((5, 9, 40, 7))
    affine, wanted = TURN @ np.diag([0.4, 0.5, 0.3, 1]), (25, 60, 20)
    affine[:3, 3] = (6, 1, -6)
    expected = [affine_transform(s, affine, output_shape=wanted, order=1) for s in scores]
    reach = affine_transform(np.ones(scores.shape[1:]), affine, output_shape=wanted, order=1)
    gap = np.diff(np.sort(expected, axis=0)[-2:], axis=0)[0]
    sure = (reach > 1 - 1e-9) & (gap > 1e-4)
    assert sure.sum() > 3000
    for cuts in ([3, 4, 11, 12, 13, 20, 30], list(range(1, 40)), [20]):
        slabs = slabs_of(torch.from_numpy(scores).float(), 1, cuts)
        found = to_file_grid(slabs, 1, np.eye(4), scores.shape[1:], affine, wanted)
        assert np.array_equal(found[sure], np.argmax(expected, axis=0)[sure])


def test_interpolation_of_regions_that_overlap():
    """Each region's probability by scipy, those above 0.5, and the index that stands for them."""
    rng, classes = np.random.default_rng(0), Classes.from_config({"a": [1, 2], "b": [2, 3]})
    scores = rng.random((2, 9, 40, 7))
    affine, wanted = TURN @ np.diag([0.4, 0.5, 0.3, 1]), (25, 60, 20)
    affine[:3, 3] = (6, 1, -6)
    p = np.stack([affine_transform(s, affine, output_shape=wanted, order=1) for s in scores])
    reach = affine_transform(np.ones(scores.shape[1:]), affine, output_shape=wanted, order=1)
    sure = (reach > 1 - 1e-9) & (np.abs(p - 0.5) > 1e-4).all(0)
    values = np.select([(p > 0.5).all(0), p[0] > 0.5, p[1] > 0.5], [2, 1, 3], 0)
    slabs = slabs_of(torch.from_numpy(scores).float(), 1, [3, 4, 20])
    grids = (np.eye(4), scores.shape[1:], affine, wanted)
    found = classes.to_labels(to_file_grid(slabs, 1, *grids, decision_of(classes)))
    assert sure.sum() > 3000 and np.array_equal(found[sure], values[sure])


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("crop", [True, False])
def test_round_trip_at_native_spacing(case, tmp_path, name, crop):
    """mask -> standard form -> back is the mask, voxel for voxel."""
    this = case(name)
    entry = entry_of(this, tmp_path, crop=crop)
    truth = read_truth(this, entry, CLASSES)
    assert set(np.unique(truth)) == {0, 1, 2, IGNORE}
    for axis in range(3):
        slabs = slabs_of(one_hot(entry), axis, [5, 9])
        grids = (entry.affine, entry.shape, entry.original_affine, entry.original_shape)
        found = to_file_grid(slabs, axis, *grids)
        assert np.array_equal(found, np.where(truth == IGNORE, 0, truth))


@pytest.mark.parametrize("spacing", [(0.5, 0.5, 0.5), (1.0, 1.0, 1.0)])
def test_round_trip_through_another_spacing(case, tmp_path, spacing):
    this = case("coronal")
    entry = entry_of(this, tmp_path, spacing)
    truth = read_truth(this, entry, CLASSES)
    grids = (entry.affine, entry.shape, entry.original_affine, entry.original_shape)
    found = to_file_grid([(0, one_hot(entry))], 2, *grids)
    for k in (1, 2):
        both = ((found == k) & (truth == k)).sum()
        total = (found == k).sum() + (truth == k).sum()
        assert 2 * both / total > 0.9


def test_on_the_cpu_when_the_device_is_full(monkeypatch):
    """Running out of memory anywhere changes nothing in the answer."""
    scores = torch.from_numpy(np.random.default_rng(0).random((3, 12, 10, 9))).float()
    wanted, turn = (20, 15, 12), TURN @ np.diag([0.5, 0.6, 0.5, 1])
    grids = (np.eye(4), scores.shape[1:], turn, wanted)
    expected = to_file_grid(slabs_of(scores, 0, [5]), 0, *grids)
    calls = []
    for owner, name in ((torch, "cat"), (restore, "_interpolated"), (restore, "_agreed")):
        real, failed = getattr(owner, name), []

        def full(*args, real=real, failed=failed, **options):
            calls.append(failed)
            if not failed:
                failed.append(True)
                raise torch.OutOfMemoryError
            return real(*args, **options)

        monkeypatch.setattr(owner, name, full)
        assert np.array_equal(to_file_grid(slabs_of(scores, 0, [5]), 0, *grids), expected)
        monkeypatch.undo()
    assert len(calls) > 5


# ---- a case


def threshold(hu):
    """Probabilities (background, ball, rod) of an image in 0..1 with a window of 0 to 1000 HU."""

    def predict(x):
        ball = ((x - hu / 1000) * 50).sigmoid()
        return torch.cat([1 - ball, ball, 0 * x], 1)

    return predict


@pytest.mark.parametrize("name", AFFINES)
def test_predict_case(case, tmp_path, name):
    this = case(name)
    entry = entry_of(this, tmp_path)
    found = predict_case(threshold(250), entry, (16, 16, 16), 0.5, 4, (0, 1000), CPU)
    assert found.shape == tuple(entry.original_shape) and found.dtype == np.uint8
    assert np.array_equal(found == 1, read_volume(this.path).voxels > 250) and found.max() == 1
    resampled = entry_of(this, tmp_path, (1.0, 1.0, 1.5))
    again = predict_case(threshold(250), resampled, (16, 16, 16), 0.5, 4, (0, 1000), CPU)
    assert 2 * (found & again).sum() / (found.sum() + again.sum()) > 0.85


def test_air_around_small_volumes_and_the_longest_axis(case, tmp_path, monkeypatch):
    """Padding has the value of air; slabs are cut along the axis that leaves the least in them."""
    asked, real = [], restore.window_slabs
    monkeypatch.setattr(restore, "window_slabs", lambda *a: asked.append(a) or real(*a))
    entry = entry_of(case("coronal"), tmp_path)
    predict_case(threshold(250), entry, (64, 64, 64), 0.5, 4, (-2000, 0), CPU)
    axis, background = asked[0][5:7]
    assert axis == np.argmax(entry.shape) > 0
    assert background == [pytest.approx(0.5)]  # -1000 HU


def test_the_mask_does_not_say_where_to_look(case, tmp_path):
    """Labels far from the body widen what is cached, not what the network is shown."""
    this, shown = case("coronal"), {}
    mask = nib.load(this.seg_path)
    labels = np.zeros(mask.shape, np.uint8)
    labels[tuple(n - 1 for n in mask.shape)] = labels[0, 0, 0] = 1
    path = save(tmp_path / "far.nii.gz", labels, mask.affine)
    for seg_path in (None, path):
        seen = shown[seg_path] = []

        def predict(x, seen=seen):
            seen.append(x.clone())
            return threshold(250)(x)

        entry = entry_of(replace(this, seg_path=seg_path), tmp_path)
        found = predict_case(predict, entry, (16, 16, 16), 0.5, 1, (0, 1000), CPU)
        seen.append(torch.from_numpy(found))
    assert sorted(entry.shape) == sorted(entry.original_shape)  # nothing is cropped
    assert [x.shape for x in shown[None]] == [x.shape for x in shown[path]]
    assert all(torch.equal(a, b) for a, b in zip(*shown.values(), strict=True))


def test_what_is_not_finite_is_an_error(case, tmp_path):
    entry = entry_of(case(), tmp_path)
    with pytest.raises(RuntimeError, match="not finite"):
        bad = threshold(float("nan"))
        predict_case(bad, entry, (16, 16, 16), 0.5, 4, (0, 1000), CPU)


def test_mask_stored_in_another_orientation(case, tmp_path):
    this = case("lps")
    truth = read_truth(this, entry_of(this, tmp_path), CLASSES)
    mask = nib.load(this.seg_path)
    turned = mask.as_reoriented(nib.orientations.axcodes2ornt("SPR"))
    nib.save(turned, tmp_path / "turned.nii.gz")
    other = Case("p", this.path, "0", 2, modality="CT", seg_path=str(tmp_path / "turned.nii.gz"))
    assert turned.shape != mask.shape
    assert np.array_equal(read_truth(other, entry_of(other, tmp_path), CLASSES), truth)
    small = save(tmp_path / "small.nii.gz", np.zeros((5, 5, 5), np.uint8), AFFINES["lps"])
    wrong = Case("p", this.path, "0", 2, modality="CT", seg_path=small)
    with pytest.raises(VolumeError, match="small.nii.gz"):
        read_truth(wrong, entry_of(this, tmp_path), CLASSES)


# ---- the file


@pytest.mark.parametrize("name", AFFINES)
def test_written_on_the_images_grid(case, tmp_path, name):
    this = case(name)
    entry, out = entry_of(this, tmp_path), tmp_path / "prediction.nii.gz"
    truth = read_truth(this, entry, CLASSES)
    write_prediction(out, np.where(truth == IGNORE, 0, truth), CLASSES, this, entry)
    image, mask, found = (nib.load(p) for p in (this.path, this.seg_path, out))
    assert found.shape == image.shape and np.array_equal(found.affine, image.affine)
    for name in ("sform_code", "qform_code", "srow_x", "pixdim", "qoffset_x", "xyzt_units"):
        assert np.array_equal(found.header[name], image.header[name]), name
    labels = np.asarray(mask.dataobj)
    expected = np.select([(labels == 3) | (labels == 4), labels == 7], [3, 7], 0)
    assert found.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(found.dataobj), expected)
    assert [p.name for p in tmp_path.glob("*tmp*")] == []


def test_qform_alone_and_other_units(tmp_path, case):
    this = case()
    nii = nib.load(this.path)
    nii.set_qform(AFFINES["oblique"] / 1000 + np.diag([0, 0, 0, 0.999]), code=1)
    nii.set_sform(None, code=0)
    nii.header.set_xyzt_units("meter")
    path = str(tmp_path / "metres.nii")
    nib.save(nii, path)
    this = Case("p", path, "0", 2, modality="CT")
    entry = entry_of(this, tmp_path)
    write_prediction(tmp_path / "p.nii.gz", np.zeros(nii.shape, np.uint8), CLASSES, this, entry)
    found = nib.load(tmp_path / "p.nii.gz")
    assert np.array_equal(found.affine, nib.load(path).affine)
    assert found.header.get_xyzt_units()[0] == "meter" and int(found.header["qform_code"]) == 1
    assert np.allclose(read_volume(tmp_path / "p.nii.gz").affine, entry.original_affine)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("endianness", "<>")
def test_kind_and_byte_order_of_the_image(tmp_path, kind, endianness):
    image, _ = phantom()
    header = kind.header_class(endianness=endianness)
    nib.save(kind(image, AFFINES["lps"], header), tmp_path / "image.nii.gz")
    this = Case("p", str(tmp_path / "image.nii.gz"), "0", 2, modality="CT")
    index = (image > 250).astype(np.uint8)
    write_prediction(tmp_path / "p.nii.gz", index, CLASSES, this, entry_of(this, tmp_path))
    found = nib.load(tmp_path / "p.nii.gz")
    assert type(found) is kind and np.allclose(found.affine, AFFINES["lps"], atol=1e-6)
    assert np.array_equal(np.asarray(found.dataobj), 3 * index)


@pytest.mark.parametrize(
    "mask_type, image_type, highest, expected",
    [
        ("uint8", "int16", 7, "uint8"),
        ("int32", "int16", 7, "int32"),
        ("float32", "int16", 7, "uint8"),  # whole numbers, but not stored as such
        ("uint8", "int16", 300, "int16"),  # class values that the mask's type does not hold
        (None, "int16", 7, "int16"),
        (None, "uint8", 300, "int16"),
        (None, "float32", 7, "uint8"),
        (None, "float32", 300, "int16"),
    ],
)
def test_type(tmp_path, mask_type, image_type, highest, expected):
    image, mask = phantom()
    image = np.clip(image, 0, 200).astype(image_type)
    path = save(tmp_path / "image.nii.gz", image, AFFINES["lps"])
    seg = mask_type and save(tmp_path / "mask.nii.gz", mask.astype(mask_type), AFFINES["lps"])
    this = Case("p", path, "0", 2, modality="MR", seg_path=seg)
    classes = Classes(("a", "b"), ((1,), (highest,)))
    index = np.full(image.shape, 2, np.uint8)
    write_prediction(tmp_path / "p.nii.gz", index, classes, this, entry_of(this, tmp_path))
    found = nib.load(tmp_path / "p.nii.gz")
    assert found.get_data_dtype() == np.dtype(expected)
    assert np.unique(np.asarray(found.dataobj)).tolist() == [highest]


def test_nothing_else_of_the_header_is_copied(tmp_path, case):
    image, _ = phantom()
    texts = {"descrip": b"DOE^JANE", "aux_file": b"DOE^JANE", "db_name": b"DOE^JANE"}
    path = save(tmp_path / "named.nii.gz", image, AFFINES["lps"], **texts)
    nii = nib.load(path)
    nii.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"DOE^JANE"))
    nib.save(nii, path)
    this = Case("p", path, "0", 2, modality="CT")
    index = np.zeros(image.shape, np.uint8)
    write_prediction(tmp_path / "p.nii.gz", index, CLASSES, this, entry_of(this, tmp_path))
    assert b"DOE" in gzip.open(path).read()
    assert b"DOE" not in gzip.open(tmp_path / "p.nii.gz").read()


def test_a_failure_leaves_nothing(tmp_path, case, monkeypatch):
    this, folder = case(), tmp_path / "predictions"
    entry = entry_of(this, tmp_path)
    folder.mkdir()
    (folder / "p.nii.gz").write_text("earlier")
    real = nib.save

    def full(image, path):
        real(image, path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib, "save", full)
    with pytest.raises(OSError, match="No space"):
        index = np.zeros(entry.original_shape, np.uint8)
        write_prediction(folder / "p.nii.gz", index, CLASSES, this, entry)
    assert [p.name for p in folder.iterdir()] == ["p.nii.gz"]
    assert (folder / "p.nii.gz").read_text() == "earlier"


@pytest.mark.parametrize("name", ["ras", "coronal"])
def test_picture_is_read_back_in_ras(tmp_path, case, name):
    this = case(name)
    entry, out = entry_of(this, tmp_path), tmp_path / "p.nii.gz"
    truth = read_truth(this, entry, CLASSES)
    write_prediction(out, np.where(truth == IGNORE, 0, truth), CLASSES, this, entry)
    picture = read_picture(this, entry, CLASSES, out)
    canonical = nib.as_closest_canonical(nib.load(this.path))
    assert np.array_equal(picture["image"], np.asarray(canonical.dataobj))
    assert np.allclose(picture["spacing_mm"], canonical.header.get_zooms())
    shown = picture["truth"]
    assert np.array_equal(picture["prediction"], np.where(shown == IGNORE, 0, shown))
    assert (shown == 2).sum() == (truth == 2).sum() > 0
    alone = Case("p", this.path, "0", 2, modality="CT")
    assert read_picture(alone, entry, CLASSES, out)["truth"] is None


# ---- DICOM


@needs_shared
@pytest.mark.parametrize(
    "name", ["ct_jpeg2000", "mr_oblique_t1", "mr_oblique_flair", "mr_hippocampus_crop"]
)
def test_dicom_predictions_lie_on_dcm2niix_voxel_for_voxel(tmp_path, name):
    """What is found in the series lies where dcm2niix's file has the same values."""
    this = Case("p", str(DICOM / name), "0", 2)
    entry = entry_of(this, tmp_path, crop=False)
    reference = nib.load(DICOM / "dcm2niix" / f"{name}.nii.gz")
    bright = np.percentile(np.asarray(reference.dataobj), 90)
    index = (read_volume(this.path).voxels > bright).astype(np.uint8)
    write_prediction(tmp_path / "p.nii.gz", index, CLASSES, this, entry)
    found = nib.load(tmp_path / "p.nii.gz")
    assert found.shape == reference.shape
    assert np.abs(found.affine - reference.affine).max() < 1e-3
    assert np.allclose(found.get_qform(), reference.get_qform(), atol=1e-3)
    assert np.array_equal(np.asarray(found.dataobj) == 3, np.asarray(reference.dataobj) > bright)
    assert int(found.header["sform_code"]) == int(found.header["qform_code"]) == 1


@needs_shared
def test_dicom_with_32_labels_and_back(tmp_path):
    """The mask of the JPEG 2000 CT is stored on dcm2niix's grid: it comes back as its own file."""
    this = Case(
        "p", str(DICOM / "ct_jpeg2000"), "0", 2, seg_path=f"{DICOM}/ct_jpeg2000_labels.nii.gz"
    )
    mask = nib.load(this.seg_path)
    values = [int(v) for v in np.unique(np.asarray(mask.dataobj)) if v > 0]
    classes = Classes(tuple(map(str, values)), tuple((v,) for v in values))
    entry = entry_of(this, tmp_path)
    index = classes.to_index(entry.read_seg((0, 0, 0), entry.shape))
    scores = F.one_hot(torch.from_numpy(index).long(), classes.num_outputs).permute(3, 0, 1, 2)
    slabs = slabs_of(scores.float(), 0, [96, 300])
    grids = (entry.affine, entry.shape, entry.original_affine, entry.original_shape)
    found = to_file_grid(slabs, 0, *grids)
    assert np.array_equal(found, read_truth(this, entry, classes))
    write_prediction(tmp_path / "p.nii.gz", found, classes, this, entry)
    written = nib.load(tmp_path / "p.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), np.asarray(mask.dataobj))
    assert np.allclose(written.affine, mask.affine, atol=1e-3)
