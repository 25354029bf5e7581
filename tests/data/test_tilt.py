"""CT with a tilted gantry: read as it is, upright for the network, predicted on its own slices."""

import shutil
import subprocess

import nibabel as nib
import numpy as np
import pytest
import torch

from data.cache import VolumeCache
from data.cases import Case
from data.inference.restore import read_picture, read_truth, to_file_grid, write_prediction
from data.readers import read_volume
from data.standard import StandardForm, standard_transform
from data.volume import resample, voxel_sizes
from tests.data.dicom.factory import (
    AXIAL,
    CORONAL,
    SAGITTAL,
    make_series,
    move_to,
    save_series,
    value_at,
)
from utils.classes import Classes

CLASSES = Classes(("bright",), ((1,),))


def tilted(folder, degrees, orientation=AXIAL, slices=9, intercept=-4000.0, **options):
    """A series whose slices, 2.5 mm apart along their normal, are shifted along their columns."""
    options |= {"orientation": orientation, "intercept": intercept}
    series = make_series(slices, 20, 18, **options)
    shift = np.array(orientation[3:], float) * 2.5 * np.tan(np.radians(degrees))
    for k, ds in enumerate(series):
        move_to(ds, np.array(ds.ImagePositionPatient, float) + k * shift)
    return save_series(series, folder)


def at_voxels(affine, shape):
    """Positions of all voxels (X, Y, Z, 3), RAS+ mm."""
    return np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]


@pytest.mark.parametrize("spacing", [None, (1.3, 1.6, 2.2)])
@pytest.mark.parametrize("orientation", [AXIAL, CORONAL, SAGITTAL])
@pytest.mark.parametrize("degrees", [1.2, -15, 25])
def test_each_voxel_has_the_value_of_its_place(tmp_path, degrees, orientation, spacing):
    folder = tilted(tmp_path, degrees, orientation)
    volume = read_volume(folder)
    shown = at_voxels(volume.affine, volume.voxels.shape)
    np.testing.assert_allclose(volume.voxels, value_at(shown), atol=0.51)
    assert f"{abs(degrees):.1f} degrees" in volume.notices[0]
    np.testing.assert_allclose(np.prod(voxel_sizes(volume.affine)), 1.5 * 1.25 * 2.5, rtol=1e-6)

    form = StandardForm(spacing, crop_background=False)
    out = standard_transform(form)({"path": str(folder)})
    affine, image = np.asarray(out["image"].affine), out["image"][0].numpy()
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    if spacing:
        np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), spacing)
    places = at_voxels(affine, image.shape)
    index = (places - volume.affine[:3, 3]) @ np.linalg.inv(volume.affine[:3, :3]).T
    top = np.array(volume.voxels.shape) - 1
    inside = ((index >= 0) & (index <= top)).all(-1)
    outside = ((index < -0.51) | (index > top + 0.51)).any(-1)
    expected = np.clip(value_at(places), -1024, None)
    assert inside.mean() > 0.2 and (expected[inside] > -1000).mean() > 0.2
    clear = inside & (expected > -900)
    np.testing.assert_allclose(image[clear], expected[clear], atol=1.5)
    assert (image[outside] == out["background"]).all() and (outside.any() or degrees == 1.2)
    low, high = (f(at_voxels(affine, image.shape).reshape(-1, 3), 0) for f in (np.min, np.max))
    assert (shown.reshape(-1, 3).min(0) > low - 1.5).all()
    assert (shown.reshape(-1, 3).max(0) < high + 1.5).all()


def test_predictions_return_to_the_slices_as_they_are(tmp_path):
    folder = tilted(tmp_path / "ct", 15)
    volume = read_volume(folder)
    truth = (value_at(at_voxels(volume.affine, volume.voxels.shape)) > -200).astype(np.uint8)
    nib.save(nib.Nifti1Image(truth, volume.affine), tmp_path / "mask.nii.gz")
    case = Case("p", str(folder), "0", 2, seg_path=str(tmp_path / "mask.nii.gz"))
    entry = VolumeCache(tmp_path, StandardForm((1.0, 1.0, 1.0), crop_background=False)).get(case)
    (channel,) = entry.channels
    image = entry.read_region((0, 0, 0), entry.shape)[0] * channel.scale + channel.offset
    assert np.array_equal(read_truth(case, entry, CLASSES), truth)
    seg = entry.read_seg((0, 0, 0), entry.shape)
    clear = (np.abs(image + 200) > 60) & (image != channel.background)
    assert np.array_equal(seg[clear], image[clear] > -200) and seg.any()

    scores = torch.as_tensor(np.stack([-200 - image, image + 200]), dtype=torch.float32)
    grids = (entry.affine, entry.shape, entry.original_affine, entry.original_shape)
    found = to_file_grid([(0, scores)], 0, *grids)
    assert (found == truth).mean() > 0.985  # but for voxels at the boundary and the ends
    write_prediction(tmp_path / "out.nii.gz", found, CLASSES, case, entry)
    written = nib.load(tmp_path / "out.nii.gz")
    bright = value_at(at_voxels(written.affine, written.shape)) > -200
    assert (bright == (np.asarray(written.dataobj) == 1)).mean() > 0.985
    picture = read_picture(case, entry, CLASSES, tmp_path / "out.nii.gz")
    assert (picture["truth"] == picture["prediction"]).mean() > 0.985


@pytest.mark.skipif(not shutil.which("dcm2niix"), reason="dcm2niix is not installed")
@pytest.mark.parametrize("degrees", [16.699, -16.699])
def test_agrees_with_dcm2niix(degrees, tmp_path):
    """Its plain file holds the same voxels, with an affine that lacks the tilt; its corrected one
    is at right angles and shows the same at a place. It pads by whole pixels, whatever the tilt,
    and is off by the rest: here the stack is shifted by 4."""
    folder = tilted(tmp_path / "ct", degrees, signed=True, intercept=0.0)
    ours = read_volume(folder)
    command = ["dcm2niix", "-z", "n", "-f", "x", "-o", str(tmp_path), str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    plain = nib.load(tmp_path / "x.nii")
    turn = nib.io_orientation(np.linalg.solve(ours.affine, plain.affine))
    theirs = nib.apply_orientation(np.asarray(plain.dataobj), turn)
    np.testing.assert_array_equal(theirs, ours.voxels)

    upright = nib.load(tmp_path / "x_Tilt_1.nii")
    voxels = np.asarray(upright.dataobj)
    index = np.linalg.solve(ours.affine, upright.affine)
    found, _ = resample(ours.voxels, index, voxels.shape, 1, 0)
    both = (voxels > voxels.min()) & (found > 0)  # it fills up with the lowest value
    assert both.mean() > 0.5
    assert np.median(np.abs(found - voxels)[both]) < 0.1 * 17  # 0.1 mm along the columns
