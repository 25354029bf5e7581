"""The cache: regions equal the standard form; keys; damage, concurrency, full disks."""

import errno
import os
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import data.cache
import data.entry
from data import sources
from data.cache import VolumeCache
from data.cases import Case
from data.entry import Channel
from data.prepare.check import volume_notices
from data.readers import VolumeError
from data.sources import Contents, fingerprint
from data.standard import StandardForm, standard_transform
from utils.errors import InputError

FORM = StandardForm(None, modality="MR")


def make_case(folder: Path, name="a", shape=(90, 70, 40), seg=True, seed=0, **fields) -> Case:
    """A bright body in noise, in a NIfTI file, with a mask of labels 1 (small) and 3 (large)."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    radius = (grid**2).sum(0) ** 0.5
    voxels = (np.where(radius < 0.8, 500, 0) + rng.normal(0, 10, shape)).astype(np.int16)
    affine = np.diag([-1.0, 1.2, 3.0, 1])
    nib.save(nib.Nifti1Image(voxels, affine), folder / f"{name}.nii")
    if seg:
        labels = np.where(radius < 0.2, 1, np.where(radius < 0.7, 3, 0)).astype(np.uint8)
        nib.save(nib.Nifti1Image(labels, affine), folder / f"{name}_seg.nii")
        fields["seg_path"] = str(folder / f"{name}_seg.nii")
    return Case(
        patient=f"Patient-{name}", path=str(folder / f"{name}.nii"), fold="0", row=2, **fields
    )


def standard(case: Case, form=FORM) -> dict:
    return standard_transform(form)({"path": case.path, "seg_path": case.seg_path})


def whole(entry) -> np.ndarray:
    return entry.read_region((0, 0, 0), entry.shape)


def test_regions_and_facts_are_those_of_the_standard_form(tmp_path):
    case = make_case(tmp_path)
    entry, wanted = VolumeCache(tmp_path / "cache", FORM).get(case), standard(case)
    image, seg = wanted["image"].numpy(), wanted["seg"][0].numpy()
    assert entry.shape == image.shape[1:] and np.array_equal(whole(entry), image)
    rng = np.random.default_rng(0)
    for _ in range(20):
        start = rng.integers(-20, entry.shape)  # starts before the volume, ends after it
        size = rng.integers(1, 80, 3)
        box = tuple(slice(max(0, a), max(0, a + n)) for a, n in zip(start, size, strict=True))
        region = entry.read_region(start, size)
        assert region.dtype == np.int16 and np.array_equal(region, image[(slice(None), *box)])
        assert np.array_equal(entry.read_seg(start, size), seg[box])
    assert entry.read_region((500, 0, 0), (8, 8, 8)).shape == (1, 0, 8, 8)
    assert np.array_equal(entry.affine, wanted["image"].affine.numpy())
    assert np.array_equal(entry.body, wanted["body"])
    assert entry.body.shape == tuple(-(-n // 8) for n in entry.shape)
    assert entry.channels == [Channel(*(wanted[name] for name in Channel._fields))]
    assert entry.original_shape == wanted["original_shape"]
    assert np.array_equal(entry.original_affine, wanted["original_affine"])
    assert np.allclose(entry.slice_spacing, (1, 1.2, 3)) and entry.through_plane == 2
    assert np.allclose(entry.spacing, (1, 1.2, 3)) and entry.series_hash is None
    assert entry.has_seg and set(entry.class_coords) == {1, 3}
    for label, coords in entry.class_coords.items():
        assert coords.dtype == np.int32 and len(np.unique(coords, axis=0)) == len(coords)
        assert (seg[tuple(coords.T)] == label).all()
    assert len(entry.class_coords[3]) == 10_000
    assert len(entry.class_coords[1]) == (seg == 1).sum()


def test_no_mask(tmp_path):
    entry = VolumeCache(tmp_path / "cache", FORM).get(make_case(tmp_path, seg=False))
    assert not entry.has_seg and entry.class_coords == {}
    with pytest.raises(ValueError, match="no mask"):
        entry.read_seg((0, 0, 0), (8, 8, 8))


def test_chunks_of_one_value(tmp_path, caplog):
    """blosc2 does not store these."""
    voxels = np.full((140, 70, 10), -1000, np.int16)
    voxels[:20] = np.random.default_rng(0).integers(-900, 900, (20, 70, 10))
    voxels[129:] = 0
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "a.nii")
    for labels in (np.zeros(voxels.shape, np.uint8), (voxels == 0).astype(np.uint8)):
        nib.save(nib.Nifti1Image(labels, np.eye(4)), tmp_path / "b.nii")
        case = Case("p", f"{tmp_path}/a.nii", "0", 2, seg_path=f"{tmp_path}/b.nii")
        form = StandardForm(None, "CT", crop_background=False)
        VolumeCache(tmp_path / "cache", form).get(case)
        entry = VolumeCache(tmp_path / "cache", form).get(case)
        assert np.array_equal(whole(entry)[0], voxels)
        assert np.array_equal(entry.read_seg((0, 0, 0), entry.shape), labels)
    assert not caplog.text


def test_thick_slices_of_a_sagittal_scan(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 99, (40, 50, 12)).astype(np.int16)
    affine = np.array([[0, 0, 4.0, 0], [1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "a.nii")
    case = Case("p", str(tmp_path / "a.nii"), "0", 2)
    entry = VolumeCache(tmp_path / "cache", StandardForm((1, 1, 1), "MR")).get(case)
    assert entry.through_plane == 0 and np.allclose(entry.slice_spacing, (4, 1, 1))
    assert entry.shape[0] > 40 and entry.original_shape == (40, 50, 12)


def test_key_depends_on_all_that_matters(tmp_path):
    case, folder = make_case(tmp_path), tmp_path / "cache"
    keys = [VolumeCache(folder, FORM).key(case)]
    assert VolumeCache(folder, FORM).key(case) == keys[0]  # and on nothing else
    assert VolumeCache(tmp_path / "b", FORM).key(case) == keys[0]
    for form in (
        StandardForm((1, 1, 1), "MR"),
        StandardForm(None, "CT"),
        StandardForm(None, "MR", percentiles=(1, 99)),
        StandardForm(None, "MR", crop_background=False),
    ):
        keys.append(VolumeCache(folder, form).key(case))
    keys.append(VolumeCache(folder, FORM).key(make_case(tmp_path, seg=False)))
    keys.append(VolumeCache(folder, FORM).key(make_case(tmp_path, modality="CT")))
    keys.append(VolumeCache(folder, FORM).key(make_case(tmp_path, series_uid="1.2")))
    assert len(set(keys)) == len(keys)
    other = np.array(nib.load(case.seg_path).get_fdata())
    other[0] = 1
    nib.save(nib.Nifti1Image(other, nib.load(case.seg_path).affine), case.seg_path)
    keys.append(VolumeCache(folder, FORM).key(case))
    (tmp_path / "more").mkdir()
    for i in range(2):  # a folder: one file more
        (tmp_path / "more" / f"{i}.dcm").write_bytes(b"x")
        keys.append(VolumeCache(folder, FORM).key(Case("p", str(tmp_path / "more"), "0", 2)))
    assert len(set(keys)) == len(keys)


def test_built_once_and_files_name_nobody(tmp_path, monkeypatch):
    case = make_case(tmp_path)
    cache = VolumeCache(tmp_path / "cache", FORM)
    assert not cache.has(case)
    first = whole(cache.get(case))
    assert cache.has(case)
    monkeypatch.setattr(data.cache, "standard_transform", None)
    again = VolumeCache(tmp_path / "cache", FORM).get(case)
    assert np.array_equal(whole(again), first)
    files = sorted((tmp_path / "cache").iterdir())
    assert files == sorted([cache.path(case), tmp_path / "cache" / "contents.jsonl"])
    assert len(cache.path(case).stem) == 32
    content = b"".join(file.read_bytes() for file in files)
    assert b"Patient" not in content and str(tmp_path).encode() not in content


def test_errors_name_the_patient_and_the_file(tmp_path):
    cache = VolumeCache(tmp_path / "cache", FORM)
    with pytest.raises(VolumeError, match=r"patient p:.*gone\.nii: No such file"):
        cache.get(Case("p", str(tmp_path / "gone.nii"), "0", 2))
    (tmp_path / "bad.nii").write_bytes(b"nonsense")
    with pytest.raises(VolumeError, match=r"patient p:.*bad\.nii"):
        cache.get(Case("p", str(tmp_path / "bad.nii"), "0", 2))
    case = make_case(tmp_path)
    cache.key(case)
    os.utime(case.path, ns=(1, 1))
    with pytest.raises(VolumeError, match="changed since this run began"):
        cache.get(case)
    assert not list((tmp_path / "cache").glob("*.b2nd"))


def test_any_damage_is_noticed_and_healed(tmp_path):
    """Flip a bit or cut anywhere: the voxels and facts that come back are right all the same."""
    case = make_case(tmp_path, shape=(80, 40, 24))
    cache = VolumeCache(tmp_path / "cache", FORM)
    path = cache.path(case)
    entry = cache.get(case)
    good, voxels, coords = path.read_bytes(), whole(entry), entry.class_coords
    assert voxels.shape[1] > 64  # several chunks
    labels = entry.read_seg((0, 0, 0), entry.shape)
    rng = np.random.default_rng(0)
    head, end = data.entry.FOOTER.unpack(good[-data.entry.FOOTER.size :])[1:3]
    assert 100 < head < end < len(good)
    rest = [*range(0, head, 7), *range(len(good) - data.entry.FOOTER.size, len(good), 5)]
    flips = [*rng.integers(head, end, 15), *rng.integers(end, len(good), 15), *rest]
    cuts = [0, 1, 100, head, end, len(good) // 2, len(good) - 1]
    damaged = [good[:i] + bytes([good[i] ^ 64]) + good[i + 1 :] for i in map(int, flips)]
    damaged += [good[:n] for n in cuts] + [good + b"x", bytes(len(good))]
    for content in damaged:
        path.write_bytes(content)
        entry = VolumeCache(tmp_path / "cache", FORM).get(case)
        assert np.array_equal(whole(entry), voxels)
        assert np.array_equal(entry.read_seg((0, 0, 0), entry.shape), labels)
        assert np.array_equal(entry.class_coords[3], coords[3])
        assert path.read_bytes() == good  # building is deterministic


def test_damage_during_a_run_is_healed_in_place(tmp_path, caplog):
    case = make_case(tmp_path)
    cache = VolumeCache(tmp_path / "cache", FORM)
    entry, path = cache.get(case), cache.path(case)
    handle = pickle.loads(pickle.dumps(entry))
    good = path.read_bytes()
    voxels = whole(entry)
    path.write_bytes(good[:2000] + b"damage" + good[2006:])
    assert np.array_equal(whole(handle), voxels) and "building it anew" in caplog.text
    path.unlink()
    assert np.array_equal(whole(entry), voxels)
    # also where every chunk had been checked before, and another file has taken its place since
    (tmp_path / "other").write_bytes(good[:2000] + b"damage" + good[2006:])
    os.replace(tmp_path / "other", path)
    assert np.array_equal(whole(entry), voxels) and path.read_bytes() == good


def test_entries_pickle_small_and_load_when_asked(tmp_path):
    entry = VolumeCache(tmp_path / "cache", FORM).get(make_case(tmp_path))
    content = pickle.dumps(entry)
    assert len(content) < 2000
    copy = pickle.loads(content)
    assert copy.shape == entry.shape and np.array_equal(whole(copy), whole(entry))
    with pytest.raises(AttributeError):
        _ = copy.nothing


def test_several_may_build_at_once(tmp_path):
    case = make_case(tmp_path)
    caches = [VolumeCache(tmp_path / "cache", FORM) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        entries = list(threads.map(lambda cache: cache.get(case), caches))
    wanted = standard(case)["image"].numpy()
    assert all(np.array_equal(whole(entry), wanted) for entry in entries)
    assert [f.name for f in (tmp_path / "cache").glob("*.b2nd")] == [caches[0].path(case).name]


@pytest.mark.parametrize("n_workers", [1, 2])
def test_build_all(tmp_path, processes_at_once, n_workers):
    cases = [make_case(tmp_path, f"c{i}", (20, 24, 16), seed=i) for i in range(3)]
    (tmp_path / "bad.nii").write_bytes(b"nonsense")
    bad = [Case("b", str(tmp_path / n), "0", 3) for n in ("bad.nii", "bad.nii", "gone.nii")]
    cache = VolumeCache(tmp_path / "cache", FORM)
    errors = []
    cache.build_all([*cases, *bad], n_workers, lambda *e: errors.append(e), progress=False)
    assert all(cache.has(case) for case in cases)
    assert sorted(case.path for case, _ in errors) == [case.path for case in bad]
    assert all(isinstance(e, VolumeError) and "patient b" in str(e) for _, e in errors)
    with pytest.raises(VolumeError, match="patient b"):
        cache.build_all(bad, n_workers, progress=False)
    assert not list((tmp_path / "cache").glob(".*"))


def test_disk_that_is_too_small_is_refused_before_building(tmp_path, monkeypatch):
    cases = [make_case(tmp_path, f"c{i}", (60, 60, 60), seed=i) for i in range(4)]
    cache = VolumeCache(tmp_path / "cache", FORM)
    usage = shutil.disk_usage(tmp_path)._replace(free=400_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="make room, or set cache_dir"):
        cache.build_all(cases, 1, progress=False)
    assert not any(cache.has(case) for case in cases)


def test_estimate_is_of_the_right_order(tmp_path):
    cases = [make_case(tmp_path, f"c{i}", (60, 60, 60), seed=i) for i in range(3)]
    for spacing in (None, (1.5, 1.5, 1.5)):
        cache = VolumeCache(tmp_path / "cache", StandardForm(spacing, "MR", crop_background=False))
        cache.build_all(cases, 1, progress=False)
        real = sum(cache.path(case).stat().st_size for case in cases)
        assert real / 3 < cache.estimate_bytes(cases) < real * 3


def test_disk_that_fills_up_leaves_nothing_behind(tmp_path, monkeypatch):
    case = make_case(tmp_path)
    cache = VolumeCache(tmp_path / "cache", FORM)
    (tmp_path / "cache").mkdir()

    def open_full(path, mode):
        if mode != "wb":
            return open(path, mode)
        file = open("/dev/full", mode, buffering=0)  # every write: no space left on device
        Path(path).touch()
        return file

    monkeypatch.setattr(data.entry, "open", open_full, raising=False)
    with pytest.raises(OSError, match="no space left for the cache") as caught:
        cache.get(case)
    assert caught.value.errno == errno.ENOSPC and not isinstance(caught.value, VolumeError)
    assert not list((tmp_path / "cache").glob("*b2nd*"))
    monkeypatch.undo()
    assert cache.get(case).has_seg


def test_old_temporary_files_are_removed(tmp_path):
    case = make_case(tmp_path, shape=(20, 20, 20))
    (tmp_path / "cache").mkdir()
    old, new = (tmp_path / "cache" / f".{n}.tmp" for n in ("old", "new"))
    old.touch(), new.touch()
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    VolumeCache(tmp_path / "cache", FORM).build_all([case], 1, progress=False)
    assert not old.exists() and new.exists()


def test_moved_data_are_known_and_notices_name_the_new_place(tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    case = make_case(tmp_path / "old")
    mask = nib.load(case.seg_path)
    nearly = mask.get_fdata(dtype=np.float32) + np.float32(0.001)
    nib.save(nib.Nifti1Image(nearly, mask.affine), case.seg_path)
    cache = VolumeCache(tmp_path / "cache", FORM)
    cache.get(case)
    (tmp_path / "old").rename(tmp_path / "new")
    moved = {name: getattr(case, name).replace("old", "new") for name in ("path", "seg_path")}
    case = replace(case, **moved)
    for file in moved.values():
        os.utime(file, ns=(1, 1))
    monkeypatch.setattr(data.cache, "standard_transform", None)
    again = VolumeCache(tmp_path / "cache", FORM)
    (notice,) = volume_notices([case], again)
    assert notice.what.startswith(f"{case.seg_path}: labels are up to 0.001 away")
    digests = []
    monkeypatch.setattr(sources, "_digest", digests.append)
    assert VolumeCache(tmp_path / "cache", FORM).has(case) and not digests  # not read once more


def test_a_folder_that_may_not_be_written_serves_what_it_has(tmp_path, monkeypatch):
    cache, case = VolumeCache(tmp_path / "cache", FORM), make_case(tmp_path)
    cache.get(case)
    os.utime(case.path, ns=(1, 1))
    (tmp_path / "cache" / "contents.jsonl").unlink()
    (tmp_path / "cache" / "contents.jsonl").mkdir()  # root may write everywhere, but not to this
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    again = VolumeCache(tmp_path / "cache", FORM)
    again.build_all([case], 0, progress=False)
    assert again.get(case).labels == cache.get(case).labels
    other = replace(case, modality="CT")
    with pytest.raises(InputError, match="cache: may not be written, and lacks 1 of the volumes"):
        again.build_all([case, other], 0, progress=False)


def test_fingerprint_lists_every_file_below_a_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b", "a", "sub/c"):
        (tmp_path / name).write_bytes(b"123")
    found = fingerprint(tmp_path)
    assert [Path(p).name for p, *_ in found] == ["a", "b", "c"]
    assert all(size == 3 and min(times) > 0 for _, size, *times in found)


def test_another_file_of_the_same_size_and_time_is_another(tmp_path):
    """As files have that come out of two versions of an archive."""
    contents, path = Contents(tmp_path / "known"), tmp_path / "scan.nii"
    digests = []
    for content in (b"123", b"456"):
        (tmp_path / "new").write_bytes(content)
        os.utime(tmp_path / "new", ns=(1, 1))
        os.replace(tmp_path / "new", path)
        digests.append(contents.of(str(path)))
    assert digests[0] != digests[1]
