"""Where the voxels of a crop lie in a volume: boxes, matrices, rotations, splines, sampling grids.

Axes are (X, Y, Z) of the region. Voxel i is centred at i, so a region of n voxels reaches from
-1/2 to n - 1/2 and its physical extent is n x spacing.
"""

from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BODY_BLOCK = 8  # voxels along each side of a block of the cache's body map
THICK_SLICES = 3.0  # slices thicker than this many pixels are turned only in their own plane
CELLS = 4  # cells of the elastic deformation's control grid along each axis of a patch
EXACT = 1e-5  # voxels; a matrix that differs less from whole numbers copies voxels

Size = tuple[int, int, int]


def sample_rotation(rng, entry, limits) -> np.ndarray:
    """Draw angles about x, y, z in degrees; thick slices turn only about their normal."""
    degrees = rng.uniform(-1, 1, 3) * limits
    in_plane = np.delete(entry.slice_spacing, entry.through_plane).mean()
    if entry.slice_spacing[entry.through_plane] > THICK_SLICES * in_plane:
        degrees[np.arange(3) != entry.through_plane] = 0
    return degrees


def view_matrix(size, fov, centre, flips, degrees, spacing) -> np.ndarray:
    """Return the matrix (3, 4) from output voxels to region voxels: the box of `fov` voxels about
    `centre`, flipped, then turned in mm by Rz Ry Rx."""
    turn = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        one, two = (axis + 1) % 3, (axis + 2) % 3
        about_axis = np.eye(3)
        about_axis[[one, two], [one, two]] = np.cos(angle)
        about_axis[one, two], about_axis[two, one] = -np.sin(angle), np.sin(angle)
        turn = about_axis @ turn
    spacing, size = np.asarray(spacing, float), np.asarray(size, float)
    linear = turn * (np.asarray(flips) * spacing * fov / size) / spacing[:, None]
    return np.column_stack([linear, centre - linear @ ((size - 1) / 2)])


def body_fraction(body: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    """Return the fraction of body (0..1) in the box low..high (voxels from the volume's face), or
    in what of it is inside the volume, 0 if nothing is."""
    low, high = (np.clip(x, 0, np.multiply(body.shape, BODY_BLOCK)) for x in (low, high))
    if (high <= low).any():
        return 0.0
    first = np.floor(low / BODY_BLOCK).astype(int)
    last = np.minimum(np.ceil(high / BODY_BLOCK).astype(int), body.shape)
    blocks = body[tuple(slice(a, b) for a, b in zip(first, last, strict=True))] / 255.0
    for axis in (2, 1, 0):  # mean over the last axis, weighted by the part of each block inside
        edges = np.arange(first[axis], last[axis] + 1) * BODY_BLOCK
        overlap = np.diff(np.clip(edges, low[axis], high[axis]))
        blocks = blocks @ (overlap / overlap.sum())
    return float(blocks)


def sampling_grid(matrix: Tensor, size: Size, shape: Size) -> Tensor:
    """Return the grid (B, V * x, y, z, 3) that F.grid_sample needs for matrices (B, V, 3, 4).

    The grid is for align_corners=True. The views of a case follow each other along x, so that one
    call cuts them all without repeating the region.
    """
    # grid_sample needs -1..1 between the centres of the first and last voxel, and axes z, y, x
    steps = torch.tensor([max(n - 1, 1) for n in shape]).to(matrix.device, non_blocking=True)
    matrix = matrix * (2.0 / steps)[:, None]
    matrix[..., 3] -= 1
    matrix = matrix.flip(2)
    x, y, z = (torch.arange(n, device=matrix.device, dtype=matrix.dtype) for n in size)
    along_x = matrix[:, :, None, :, 0] * x[:, None] + matrix[:, :, None, :, 3]  # (B, V, x, 3)
    along_yz = (  # (B, V, y, z, 3)
        matrix[:, :, None, None, :, 1] * y[:, None, None]
        + matrix[:, :, None, None, :, 2] * z[:, None]
    )
    return (along_x[:, :, :, None, None] + along_yz[:, :, None]).flatten(1, 2)


def covered_box(matrix, displacement, size) -> tuple[np.ndarray, np.ndarray]:
    """Return first voxel and end (3,) of the box of all voxels the patch is interpolated from."""
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in size], [1])).reshape(4, -1)
    at = matrix @ corners
    # a B-spline stays between the least and the largest of its control points
    low = at.min(1) + displacement.min((1, 2, 3))
    high = at.max(1) + displacement.max((1, 2, 3))
    return np.floor(low + EXACT).astype(int), np.ceil(high - EXACT).astype(int) + 1


def interpolate_labels(labels: Tensor, grid: Tensor) -> Tensor:
    """Return the argmax of linearly interpolated one-hot labels, at a cost that does not grow with
    the number of labels. Balls of 10 voxels radius keep a Dice of 0.98, with nearest voxels 0.96.

    Args:
        labels: (X, Y, Z) uint8, two voxels or more along each axis.
        grid: (x, y, z, 3) of `F.grid_sample(align_corners=True)`; the border is repeated outside.
    """
    last = torch.tensor(labels.shape, device=grid.device, dtype=torch.int32) - 1
    at = (grid.flip(-1).flatten(0, 2) + 1) * (last / 2)
    at = torch.minimum(at.clamp_(min=0), last.float())
    first = torch.minimum(at.int(), last - 1)  # the lowest of the 8 voxels around each point
    steps = labels.shape[1] * labels.shape[2], labels.shape[2], 1
    corner = sum(first[:, axis] * step for axis, step in enumerate(steps))
    low = high = labels
    for axis, n in enumerate(labels.shape):
        low = torch.minimum(low.narrow(axis, 0, n - 1), low.narrow(axis, 1, n - 1))
        high = torch.maximum(high.narrow(axis, 0, n - 1), high.narrow(axis, 1, n - 1))
    mixed = F.pad(low != high, [0, 1] * 3).flatten()
    labels = labels.flatten()
    out = labels.index_select(0, corner)
    where = mixed.index_select(0, corner).nonzero().flatten()  # elsewhere all 8 agree
    corner = corner[where]
    x, y, z = ((1 - part, part) for part in (at[where] - first[where]).unbind(1))
    around, weights = [], []
    for i, j, k in product((0, 1), repeat=3):
        around.append(labels.index_select(0, corner + (i * steps[0] + j * steps[1] + k)))
        weights.append(x[i] * y[j] * z[k])
    best, most = around[0], torch.zeros_like(weights[0])
    for one in around:
        votes = sum((other == one) * w for other, w in zip(around, weights, strict=True))
        best = torch.where(votes > most, one, best)
        most = torch.maximum(votes, most)
    out[where] = best
    return out.view(grid.shape[:3])


def spline_field(control: Tensor, size: Size) -> Tensor:
    """Return (3, *size): the uniform cubic B-spline of control points (3, CELLS + 3, ...)."""
    for axis, spec in ((0, "xi,cijk->cxjk"), (1, "yj,cxjk->cxyk"), (2, "zk,cxyk->cxyz")):
        control = torch.einsum(spec, spline_weights(size[axis], control.device), control)
    return control


def spline_weights(n: int, device: torch.device) -> Tensor:
    """Return the weights (n, CELLS + 3) of the control points at the voxels of one axis."""
    at = (torch.arange(n, device=device) + 0.5) * (CELLS / n)  # cells from the patch's face
    distance = (at[:, None] - torch.arange(-1, CELLS + 2, device=device)).abs()
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = (2 - distance).clamp(min=0) ** 3 / 6
    return torch.where(distance < 1, near, far)
