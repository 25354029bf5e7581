"""The standard form: geometry against an analytic phantom, intensities, body box, masks."""

import nibabel as nib
import numpy as np
import pytest
import torch

from data.readers import VolumeError
from data.standard import STEPS, StandardForm, find_body, standard_transform
from data.volume import spacing_of
from tests.places import SHARED

DATA = SHARED / "data"
needs_shared = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}")


def save(path, voxels, affine=None):
    nib.save(nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return str(path)


def run(form, **item):
    return standard_transform(form)(item)


def values(out):
    return out["image"][0].numpy() * out["scale"] + out["offset"]


def refused(form, **item):
    with pytest.raises(RuntimeError) as caught:
        run(form, **item)
    assert isinstance(caught.value.__cause__, VolumeError)
    return str(caught.value.__cause__)


def ellipsoid(shape, radius=0.4):
    grid = np.stack(np.meshgrid(*[np.linspace(-0.5, 0.5, n) for n in shape], indexing="ij"))
    return (grid**2).sum(0) < radius**2


def ct_phantom(shape=(96, 96, 40), seed=0):
    """Air with noise, an elliptic body with lungs, a thin table below it. HU."""
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    hu = np.full(shape, -1000.0)
    body = ((x - 48) / 36) ** 2 + ((y - 50) / 26) ** 2 < 1
    hu[body] = 40
    lungs = ((abs(x - 48) - 16) / 9) ** 2 + ((y - 50) / 14) ** 2 < 1
    hu[lungs] = -860
    hu[:, 14:17] = -300
    return np.rint(hu + rng.normal(0, 20, shape)).astype(np.int16), body


AFFINES = {
    "ras": np.diag([0.7, 0.9, 2.5, 1]),
    "lps": np.diag([-0.7, -0.9, 2.5, 1]),
    "coronal": np.array([[0.0, 0.8, 0, 7], [0, 0, -2.2, 11], [-1.1, 0, 0, 5], [0, 0, 0, 1]]),
    "oblique": np.array(
        [
            [-0.7 * np.cos(0.2), 0.9 * np.sin(0.2), 0, 40],
            [-0.7 * np.sin(0.2), -0.9 * np.cos(0.2), 0, -20],
            [0, 0, 2.5, -100],
            [0, 0, 0, 1],
        ]
    ),
}


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("spacing", [None, (1.5, 1.5, 1.5), (1.0, 1.3, 3.1)])
def test_values_linear_in_world_position_stay_so(tmp_path, name, spacing):
    """Image value = a . world position: exact under (tri)linear interpolation, wherever inside."""
    affine, shape = AFFINES[name], (40, 30, 24)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    slope = np.array([3.0, -2.0, 1.5])

    def expected(affine, index):
        world = np.einsum("ij,jxyz->ixyz", affine[:3, :3], index) + affine[:3, 3, None, None, None]
        return np.einsum("i,ixyz->xyz", slope, world)

    path = save(tmp_path / "a.nii", expected(affine, index).astype(np.float32), affine)
    out = run(StandardForm(spacing, crop_background=False), path=path, modality="CT")
    image = out["image"]
    assert nib.aff2axcodes(image.affine.numpy()) == ("R", "A", "S")
    if spacing is not None:
        assert np.allclose(spacing_of(image.affine), spacing)
    grid = np.stack(np.meshgrid(*map(np.arange, image.shape[1:]), indexing="ij"))
    # beyond the last sample the border is repeated: look where the input has samples on all sides
    source = np.linalg.inv(affine) @ image.affine.numpy()
    at = np.einsum("ij,jxyz->ixyz", source[:3, :3], grid) + source[:3, 3, None, None, None]
    limit = np.array(shape)[:, None, None, None] - 1
    inside = ((at >= -1e-4) & (at <= limit + 1e-4)).all(0)
    assert inside.mean() > 0.8
    error = np.abs(values(out) - expected(image.affine.numpy(), grid))[inside]
    assert error.max() < 0.52  # HU: rounding to whole numbers
    assert np.array_equal(out["original_affine"], affine.astype(np.float32).astype(float))
    assert out["original_shape"] == shape
    order = np.abs(affine[:3, :3]).argmax(1)
    assert np.allclose(out["slice_spacing"], spacing_of(affine)[order], atol=1e-5)


def test_crop_moves_the_affine_with_the_voxels(tmp_path):
    voxels, _ = ct_phantom()
    path = save(tmp_path / "a.nii", voxels, AFFINES["lps"])
    whole = run(StandardForm(None, crop_background=False), path=path, modality="CT")
    cut = run(StandardForm(None), path=path, modality="CT")
    shift = np.linalg.inv(whole["image"].affine.numpy()) @ cut["image"].affine.numpy()
    start = np.rint(shift[:3, 3]).astype(int)
    assert np.allclose(shift[:3, 3], start) and start.max() > 0
    box = tuple(slice(a, a + n) for a, n in zip(start, cut["image"].shape[1:], strict=True))
    assert np.array_equal(whole["image"][0].numpy()[box], cut["image"][0].numpy())


def test_spacing_within_one_percent_is_left_alone(tmp_path):
    voxels = np.random.default_rng(0).integers(-50, 50, (20, 21, 22)).astype(np.int16)
    path = save(tmp_path / "a.nii", voxels, np.diag([1.505, 1.495, 1.5, 1]))
    out = run(StandardForm((1.5, 1.5, 1.5)), path=path, modality="CT")
    assert np.array_equal(out["image"][0].numpy(), voxels)


def test_ct_keeps_hu_and_metal_and_clips_padding(tmp_path):
    voxels, _ = ct_phantom()
    voxels[0, 0, 0], voxels[48, 50, 20] = -3024, 9000
    path = save(tmp_path / "a.nii", voxels)
    out = run(StandardForm(None, crop_background=False), path=path, modality="ct")
    assert (out["kind"], out["scale"], out["offset"], out["background"]) == ("CT", 1, 0, -1000)
    assert out["image"].dtype == torch.int16
    assert np.array_equal(out["image"][0].numpy(), np.maximum(voxels, -1024))


def test_other_modalities_keep_12_bits_and_the_tails(tmp_path):
    rng = np.random.default_rng(0)
    voxels = rng.normal(500, 100, (40, 40, 40)).astype(np.float32)
    voxels[3, 3, 3], voxels[5, 5, 5] = 3000, -500  # 4 times the range beyond; 1.2 times below
    path = save(tmp_path / "a.nii", voxels)
    out = run(StandardForm(None), path=path, modality="MR")
    low, high = np.percentile(voxels, (0.5, 99.5))
    expected = (voxels - low) / (high - low)
    assert out["kind"] == "other" and expected.max() > 4.9 and expected.min() < -1.4
    assert np.abs(values(out) - expected).max() <= 0.51 / STEPS
    assert out["scale"] <= 1 / 4096


def test_body_sets_the_percentiles_and_the_background(tmp_path):
    rng = np.random.default_rng(0)
    body = ellipsoid((64, 64, 64))
    clean = np.where(body, 400 + 200 * rng.random(body.shape), 0)
    noise = rng.normal(0, 15, (2, *body.shape))
    path = save(tmp_path / "a.nii", np.hypot(clean + noise[0], noise[1]).astype(np.float32))
    out = run(
        StandardForm(None, crop_background=False, percentiles=(5, 95)), path=path, modality="MR"
    )
    v = values(out)
    air = out["background"] * out["scale"] + out["offset"]
    assert abs(np.median(v[~body]) - air) < 0.02
    # some air lies in the blocks at the body's surface, which shifts the lower percentile
    assert abs((v[body] > 1).mean() - 0.06) < 0.02 and np.median(v[body]) > 0.5


def test_ct_box_leaves_out_air_and_table_not_lungs(tmp_path):
    voxels, body = ct_phantom()
    out = run(StandardForm(None), path=save(tmp_path / "a.nii", voxels), modality="CT")
    start = np.rint(out["image"].affine.numpy()[:3, 3]).astype(int)  # the file's affine is 1
    stop = start + out["image"].shape[1:]
    for axis in (0, 1):
        at = np.flatnonzero(body.any(axis=tuple({0, 1, 2} - {axis})))
        assert 0 <= at[0] - start[axis] <= 12 and 0 <= stop[axis] - 1 - at[-1] <= 12
    assert start[1] > 14  # the table is at 14..16
    # blocks wholly within the outline count as body, lungs included; corners do not
    box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    inside = body[box]
    blocks = inside[: inside.shape[0] // 8 * 8, : inside.shape[1] // 8 * 8]
    blocks = blocks.reshape(blocks.shape[0] // 8, 8, blocks.shape[1] // 8, 8, -1)
    full = blocks.all(axis=(1, 3, 4))
    assert (out["body"][: full.shape[0], : full.shape[1]][full] == 255).all() and full.sum() > 20
    assert out["body"][0, 0].max() == 0


def test_mr_noise_is_cropped_and_crops_of_tissue_are_not(tmp_path):
    rng = np.random.default_rng(1)
    body = ellipsoid((80, 72, 40), 0.3)
    noise = rng.normal(0, 20, (2, *body.shape))
    mr = np.hypot(np.where(body, 400, 0) + noise[0], noise[1]).astype(np.float32)
    out = run(StandardForm(None), path=save(tmp_path / "a.nii", mr), modality="MR")
    assert all(
        n <= 0.6 * m + 16 for n, m in zip(out["image"].shape[1:3], body.shape[:2], strict=True)
    )
    tissue = torch.as_tensor(rng.normal(100, 25, (1, 35, 51, 35)).clip(1))
    assert find_body(tissue, "other").all()
    assert find_body(tissue - 900, "CT").all()  # lung and nothing else


def test_box_holds_every_label(tmp_path):
    voxels, _ = ct_phantom()
    labels = np.zeros(voxels.shape, np.uint8)
    labels[95, 1, 39] = 7
    paths = save(tmp_path / "a.nii", voxels), save(tmp_path / "b.nii", labels)
    out = run(StandardForm(None), path=paths[0], seg_path=paths[1], modality="CT")
    assert out["seg"].shape == out["image"].shape and out["seg"].dtype == torch.int16
    at = np.argwhere(out["seg"][0].numpy() == 7)
    assert len(at) == 1
    assert np.allclose((out["image"].affine.numpy() @ [*at[0], 1])[:3], (95, 1, 39))


@pytest.mark.parametrize("stored", ["LAS", "SPR"])
def test_mask_may_be_stored_in_another_orientation(tmp_path, stored):
    voxels, _ = ct_phantom()
    image = nib.Nifti1Image(voxels, AFFINES["ras"])
    labels = nib.Nifti1Image((voxels > 0).astype(np.uint8), AFFINES["ras"])
    turn = nib.orientations.axcodes2ornt(stored)
    nib.save(image, tmp_path / "a.nii")
    nib.save(labels.as_reoriented(turn), tmp_path / "b.nii")
    form = StandardForm(None, crop_background=False)
    out = run(form, path=f"{tmp_path}/a.nii", seg_path=f"{tmp_path}/b.nii", modality="CT")
    assert np.array_equal(out["seg"] == 1, out["image"] > 0)
    resampled = StandardForm((1.5, 1.5, 1.5))
    out = run(resampled, path=f"{tmp_path}/a.nii", seg_path=f"{tmp_path}/b.nii", modality="CT")
    assert out["seg"].shape == out["image"].shape
    assert set(np.unique(out["seg"])) == {0, 1}
    assert ((out["seg"] == 1) == (out["image"] > 0)).float().mean() > 0.95


def test_wrong_masks_are_refused(tmp_path):
    voxels, _ = ct_phantom()
    path = save(tmp_path / "a.nii", voxels)
    form = StandardForm(None)

    def message(voxels, affine=None):
        seg = save(tmp_path / "bad.nii", voxels, affine)
        text = refused(form, path=path, seg_path=seg, modality="CT")
        assert "bad.nii" in text
        return text

    assert "whole numbers" in message(np.full(voxels.shape, 0.5, np.float32))
    assert "96 x 96 x 39" in message(np.ones((96, 96, 39), np.uint8))
    shifted = np.eye(4)
    shifted[0, 3] = 0.5
    assert "0.50 mm" in message(np.ones(voxels.shape, np.uint8), shifted)
    shifted[0, 3] = 0.01  # as rounding in a header does
    seg = save(tmp_path / "good.nii", np.ones(voxels.shape, np.uint8), shifted)
    out = run(form, path=path, seg_path=seg, modality="CT")
    assert np.array_equal(out["seg"].affine, out["image"].affine)


def test_modality_from_config_then_csv(tmp_path):
    path = save(tmp_path / "a.nii", ct_phantom()[0])
    assert run(StandardForm(None, "CT"), path=path, modality="MR")["kind"] == "CT"
    assert run(StandardForm(None), path=path, modality="MR")["kind"] == "other"
    assert "data.modality" in refused(StandardForm(None), path=path)


def test_constant_image_is_refused(tmp_path):
    path = save(tmp_path / "a.nii", np.full((20, 20, 20), 3, np.int16))
    assert "a.nii" in refused(StandardForm(None), path=path, modality="MR")


def test_deterministic(tmp_path):
    path = save(tmp_path / "a.nii", ct_phantom()[0], AFFINES["oblique"])
    a, b = (run(StandardForm((1.5, 1.5, 2)), path=path, modality="MR") for _ in range(2))
    assert torch.equal(a["image"], b["image"]) and np.array_equal(a["body"], b["body"])


@needs_shared
def test_hippocampus_crops_stay_whole():
    for path in sorted((DATA / "hippocampus" / "images").glob("*.nii.gz"))[:10]:
        out = run(StandardForm(None), path=str(path), modality="MR")
        assert out["image"].shape[1:] == nib.load(path).shape
        assert out["body"].min() == 255


@needs_shared
def test_dicom_series_takes_the_modality_from_its_header():
    path = DATA / "dicom" / "ct_jpeg2000"
    out = run(StandardForm(None), path=str(path), seg_path=f"{path}_labels.nii.gz")
    assert out["kind"] == "CT" and len(np.unique(out["seg"])) == 32
    assert out["image"].shape[2] < 400  # of 512 rows: table and air are gone
    liver = out["image"][out["seg"] == 5].float().mean()
    assert 30 < liver < 200  # HU
