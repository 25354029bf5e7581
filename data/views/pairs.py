"""Pairs: other scans of the same patient on the same grid, in which the same anatomy is seen."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import nibabel as nib
import numpy as np

from data.volume import GRID_TOL, corner_gap, spacing_of


def on_one_grid(cases: Sequence[Any], cache: Any) -> list[list[int]]:
    """Return, for each case, the indices of the other scans of its patient that lie on its grid.

    Sequences of one examination often do, and visits that have been registered. Grids agree as
    those of image and mask do (`data.volume.grid_difference`): equal shapes, and no corner further
    away than GRID_TOL of the smallest voxel edge.
    """
    of_patient = defaultdict(list)
    for index, case in enumerate(cases):
        of_patient[case.patient].append(index)
    partners = [[] for _ in cases]
    for indices in of_patient.values():
        if len(indices) > 1:
            grids = {index: _grid(cache.get(cases[index])) for index in indices}
            for i in indices:
                partners[i] = [j for j in indices if j != i and _agree(grids[i], grids[j])]
    return partners


def _grid(entry: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return affine (4, 4) and shape (3,) of the file's grid, its axes in RAS+ order."""
    affine, shape = entry.original_affine, np.array(entry.original_shape)
    order = nib.io_orientation(affine)
    affine = affine @ nib.orientations.inv_ornt_aff(order, shape)
    return affine, shape[np.argsort(order[:, 0])]


def _agree(one: tuple, other: tuple) -> bool:
    (affine, shape), (affine2, shape2) = one, other
    tolerance = GRID_TOL * spacing_of(affine).min()
    return np.array_equal(shape, shape2) and corner_gap(affine, affine2, shape) <= tolerance


def same_place(entry: Any, other: Any, start: np.ndarray) -> np.ndarray:
    """Return where a voxel of a cached volume is in that of another scan on one grid, (3,) int.

    Both are on one lattice, but begin where the air around the body was cut away.
    """
    at = np.linalg.solve(other.affine, entry.affine @ [*start, 1])[:3]
    return np.rint(at).astype(int)
