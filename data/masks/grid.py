"""How a mask lies on its scan where their headers disagree, as data.mask_grid wants it."""

from collections.abc import Sequence
from dataclasses import replace

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor

from data.readers import Volume, VolumeError, format_of
from data.volume import grid_difference, resample


def fitted(
    mask: Volume, affine: np.ndarray, shape: Sequence[int], how: str, files: Sequence[str]
) -> Volume:
    """Return a mask on the grid of its scan, with a notice where its header puts it elsewhere.

    Args:
        mask: as read. Stored in another order of axes but on the scan's voxels, it stays as it is.
        affine, shape: of the scan as read.
        how: "header": as it is; the caller refuses another grid. "voxels": a mask of the scan's
            shape gets the scan's affine, unless one of the files is DICOM. "resample": the nearest
            label at each of the scan's voxels, by both affines.
        files: paths of the scan and of the mask, for messages.
    Raises:
        VolumeError: after resampling no label is left.
    """
    different = how != "header" and difference(mask, affine, shape)
    if not different:
        return mask
    if how == "voxels":
        if mask.voxels.shape != tuple(shape) or not all(map(format_of, files)):
            return mask
        what = f"mask {files[1]}: taken voxel by voxel (data.mask_grid: voxels); its header differs"
        return replace(mask, affine=affine, notices=(*mask.notices, f"{what}: {different}"))
    found, covered = resample(mask.voxels, np.linalg.solve(mask.affine, affine), shape, 0, 0)
    volumes = [
        np.count_nonzero(voxels) * abs(np.linalg.det(grid[:3, :3])) / 1000
        for voxels, grid in ((mask.voxels, mask.affine), (found, affine))
    ]
    if volumes[0] and not volumes[1]:
        raise VolumeError(f"mask {files[1]} of {files[0]}: none of its labels lies in the scan")
    what = (
        f"mask {files[1]}: resampled to the scan's voxels (data.mask_grid: resample), of which it "
        f"covers {covered:.0%}; {volumes[1]:.3g} of {volumes[0]:.3g} ml are labelled; its grid: "
    )
    notices = (*mask.notices, what + different)
    return replace(mask, voxels=found.astype(np.int16), affine=affine, notices=notices)


def difference(mask: Volume, affine: np.ndarray, shape: Sequence[int]) -> str:
    """Say how the grid of a mask differs from its scan's, both as read, or ''."""
    return grid_difference(_in_ras(mask.affine, mask.voxels.shape), _in_ras(affine, shape))


def _in_ras(affine: np.ndarray, shape: Sequence[int]) -> MetaTensor:
    """Return an empty image (1, X, Y, Z) on a grid, its axes in RAS+ order; it takes no memory."""
    turn = nib.io_orientation(affine)
    affine = affine @ nib.orientations.inv_ornt_aff(turn, shape)
    shape = np.array(shape)[np.argsort(turn[:, 0])].tolist()
    return MetaTensor(torch.zeros(1).expand(1, *shape), affine=torch.as_tensor(affine))
