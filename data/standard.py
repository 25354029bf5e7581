"""The standard form of a volume: RAS+ axes, one voxel spacing, standard intensities, air cut away.

`standard_transform` is a MONAI `Compose` of dictionary transforms, MONAI's own where possible. It
is deterministic, and `data.cache` stores its result. The body is found on blocks of 4^3 voxels,
whose mean is nearly free of noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform, Orientationd, Spacingd, SpatialCrop, Transform
from scipy import ndimage

from data.channels import CT_AIR, CT_RANGE, air_of, read_channels
from data.masks.grid import fitted
from data.readers import Onto, VolumeError, format_of, read_mask
from data.values import values_of
from data.volume import MAX_SHEAR, grid_difference, resample, shear_of, spacing_of

BLOCK = 4  # voxels along the edge of the blocks on which the body is found
MARGIN = 1  # blocks of air left around the body
CT_BODY = -900  # HU, for block means: lung is -850 and above, air and foam are below
# Modalities other than CT:
DARK = 0.06  # air is darker than this fraction of bright tissue, CSF is not
STEPS = 4096  # stored steps between the two percentiles (12 bits)
LOWEST = -2  # int16 holds values from here to 14, if the percentiles are 0 and 1
MAX_SAMPLES = 2_000_000  # voxels from which the percentiles are computed


@dataclass(frozen=True)
class StandardForm:
    """Settings that define the cached voxels.

    spacing: mm per voxel along x, y, z; None keeps each volume's own.
    modality: "auto" (CSV, else DICOM header), one for all volumes, or one for each channel.
    percentiles: of the body's intensities, mapped to 0 and 1 (not for CT).
    crop_background: cut away the air around the body.
    size: voxels along x, y, z to which the whole (cropped) volume is resized, at any resulting
        spacing; None keeps each volume's own.
    uneven_slices: "resample" interpolates DICOM slices at uneven distances; "refuse".
    mask_grid: how a mask lies on its scan where their headers disagree, see `data.masks.grid`.
    nan_voxels: "background" takes voxels that are NaN for air; "refuse".
    """

    spacing: tuple[float, float, float] | None
    modality: str | tuple[str, ...] = "auto"
    percentiles: tuple[float, float] = (0.5, 99.5)
    crop_background: bool = True
    size: tuple[int, int, int] | None = None
    uneven_slices: str = "refuse"
    mask_grid: str = "header"
    nan_voxels: str = "refuse"

    @classmethod
    def from_config(cls, data) -> "StandardForm":
        """Build the form from a config's section `data`."""
        spacing = None if data.spacing == "native" else data.spacing
        fixed = (spacing, data.modality, data.percentiles, data.crop_background)
        reading = ("uneven_slices", "mask_grid", "nan_voxels")
        return cls(*fixed, **{name: getattr(data, name) for name in reading})

    def to_dict(self) -> dict:
        fields = asdict(self)
        if self.size is None:  # left out, so that the keys of existing cache files stay the same
            del fields["size"]
        return fields


def standard_transform(form: StandardForm) -> Compose:
    """Return the transform from {"path", "series_uid"?, "modality"?, "seg_path"?, "masks"?,
    "channels"?} to the form.

    Its result holds `image` (C, X, Y, Z) int16 and, with a mask, `seg` (1, X, Y, Z) int16, both
    MetaTensors whose affine is RAS+ mm; `series_uid`; and, as described in
    `data.entry.CacheEntry`: body, body_box, notices, values, original_shape, original_affine,
    slice_spacing, and kind, modality, scale, offset, background, lists if there are `channels`
    (see `data.cases.Case`). It raises VolumeError (inside MONAI's RuntimeError).
    """
    keys = ("image", "seg")
    steps = [
        ReadVolumed(form),
        # labels=None: the affine alone defines the axes
        Orientationd(keys, axcodes="RAS", labels=None, allow_missing_keys=True),
        CheckMaskd(),
        ClipCTd("image"),
    ]
    steps.append(ToRightAnglesd(form.spacing))
    if form.spacing is not None:
        steps.append(Resampled(keys, form.spacing))
    steps += [FindBodyd(), CropToBodyd(keys, form.crop_background)]
    if form.size is not None:  # find the body again, on the new grid
        steps += [ToGridd(keys, form.size), FindBodyd(), CropToBodyd(keys, crop=False)]
    return Compose([*steps, Storedd(form)])


class ReadVolumed(Transform):
    """Read `path` or the `channels`, and `seg_path` or `masks`; determine the modalities."""

    def __init__(self, form: StandardForm):
        self.form = form

    def __call__(self, data: dict) -> dict:
        paths = data.get("channels") or {"": data["path"]}
        form = self.form
        how = (form.modality, data.get("modality"), data.get("series_uid"), form.uneven_slices)
        volume, channels, notices = read_channels(paths, *how, form.nan_voxels)
        voxels, out = [channel.voxels for channel in channels], dict(data)
        out["image"] = _meta_tensor(voxels, volume.affine)
        out["kinds"] = [channel.kind for channel in channels]
        out["modalities"] = [channel.modality for channel in channels]
        out["sources"] = [channel.source for channel in channels]
        out["series_uid"] = volume.series_uid
        out["original_shape"] = tuple(volume.voxels.shape)
        out["original_affine"] = np.asarray(volume.affine, np.float64)
        out["notices"] = notices
        there = [channel for channel in channels if channel.source]
        out["values"] = [values_of(channel.voxels, channel.kind) for channel in there]
        out |= {name: getattr(form, name) for name in ("uneven_slices", "mask_grid", "nan_voxels")}
        if data.get("seg_path"):
            mask = read_mask(data["seg_path"], data.get("masks"), Onto.of(volume))
            files = [data["path"], *(data.get("masks") or [data["seg_path"]])]
            mask = fitted(mask, volume.affine, volume.voxels.shape, form.mask_grid, files)
            out["seg"] = _meta_tensor([mask.voxels], mask.affine)
            out["notices"] += mask.notices
        return out


class CheckMaskd(Transform):
    """Refuse a mask that is not on the image's grid; add the file's spacing along x, y, z."""

    def __call__(self, data: dict) -> dict:
        image, seg = data["image"], data.get("seg")
        if seg is not None:
            different = grid_difference(seg, image)
            if different:
                hint = "; if it lies rightly in space, set data.mask_grid=resample"
                if seg.shape[1:] == image.shape[1:] and format_of(data["path"]):
                    hint = "; if it was drawn on these voxels, set data.mask_grid=voxels" + hint
                what = f"mask {data['seg_path']} of {data['path']}: {different}{hint}"
                raise VolumeError(what)
            seg.affine = image.affine  # so that both go through exactly the same geometry
        return data | {"slice_spacing": spacing_of(image.affine)}


class ClipCTd(MapTransform):
    """Clip CT to CT_RANGE before resampling mixes padding values of -3024 into the skin."""

    def __call__(self, data: dict) -> dict:
        out, kinds = dict(data), data["kinds"]
        for key in self.keys:
            pairs = zip(data[key].split(1), kinds, strict=True)
            clipped = [torch.clamp(x, *CT_RANGE) if kind == "CT" else x for x, kind in pairs]
            out[key] = _joined(clipped)
        return out


class Resampled(MapTransform):
    """Apply MONAI's Spacingd unless the spacing is already within 1 % of the wanted one."""

    def __init__(self, keys, spacing):
        super().__init__(keys, allow_missing_keys=True)
        self.spacing = spacing
        self.resample = Spacingd(
            keys,
            pixdim=spacing,
            mode=("bilinear", "nearest"),
            padding_mode="border",
            dtype=np.float32,
            allow_missing_keys=True,
        )

    def __call__(self, data: dict) -> dict:
        if np.allclose(spacing_of(data["image"].affine), self.spacing, rtol=0.01, atol=0):
            return data
        return self.resample(data)


class ToRightAnglesd(Transform):
    """Resample a sheared volume, as of CT with a tilted gantry, to right angles and the spacing.

    The new grid keeps the directions of the slices' rows and columns and spans all their voxels;
    what no slice covers is air, and background in the mask.
    """

    def __init__(self, spacing: tuple[float, float, float] | None):
        self.spacing = spacing

    def __call__(self, data: dict) -> dict:
        old = np.asarray(data["image"].affine, np.float64)
        axis, shear = shear_of(old)
        if shear <= MAX_SHEAR:
            return data
        new, shape = _right_angles(old, data["image"].shape[1:], axis, self.spacing)
        index = np.linalg.solve(old, new)  # voxel of the new grid -> of the old one
        images, out = data["image"].numpy(), dict(data)
        pairs = zip(images, data["kinds"], strict=True)
        found = [resample(x, index, shape, 1, air_of(x, kind))[0] for x, kind in pairs]
        out["image"] = _meta_tensor(found, new)
        if "seg" in out:
            found = resample(out["seg"][0].numpy(), index, shape, 0, 0)[0]
            out["seg"] = _meta_tensor([found], new)
        return out


def _right_angles(affine, shape, axis: int, spacing) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return affine and shape of the grid at right angles that spans all voxels of a sheared one.

    axis: from slice to slice. spacing: mm, or None for that of pixels and slices.
    """
    axes = affine[:3, :3] / spacing_of(affine)
    first, second = (axis + 1) % 3, (axis + 2) % 3
    axes[:, second] -= (axes[:, second] @ axes[:, first]) * axes[:, first]
    axes[:, second] /= np.linalg.norm(axes[:, second])
    normal = np.cross(axes[:, first], axes[:, second])
    axes[:, axis] = normal * np.sign(normal @ axes[:, axis])
    if spacing is None:
        spacing = spacing_of(affine)
        spacing[axis] = abs(affine[:3, axis] @ normal)
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in shape], [1])).reshape(4, -1)
    along = axes.T @ (affine @ corners)[:3]
    low, extent = along.min(1), np.ptp(along, axis=1)
    size = np.ceil(extent / spacing - 1e-6).astype(int) + 1
    low -= ((size - 1) * spacing - extent) / 2  # the same margin on both sides
    new = np.eye(4)
    new[:3, :3], new[:3, 3] = axes * spacing, axes @ low
    return new, tuple(map(int, size))


class ToGridd(MapTransform):
    """Resize to a fixed number of voxels. Fewer voxels are means with triangular weights, so that
    nothing aliases; MONAI's Resized would blur zeros into the border."""

    def __init__(self, keys, size: tuple[int, int, int]):
        super().__init__(keys, allow_missing_keys=True)
        self.size = size

    def __call__(self, data: dict) -> dict:
        out, (nx, ny, nz) = dict(data), self.size
        for key in self.key_iterator(out):
            x, old = data[key].as_tensor().float(), data[key].shape[1:]  # (C, X, Y, Z)
            if key == "seg":
                x = F.interpolate(x[None], self.size, mode="nearest-exact")[0]
            else:  # torch can do this in 2D only: along y and z, then along x
                x = F.interpolate(x, (ny, nz), mode="bilinear", antialias=True)
                x = F.interpolate(x.transpose(1, 2), (nx, nz), mode="bilinear", antialias=True)
                x = x.transpose(1, 2)
            step = np.divide(old, self.size)
            grid = np.diag([*step, 1.0])  # voxels of the new grid -> of the old one
            grid[:3, 3] = (step - 1) / 2  # both grids fill the same box; voxel i covers i -+ 1/2
            out[key] = MetaTensor(x, affine=data[key].affine @ torch.as_tensor(grid))
        return out


class FindBodyd(Transform):
    """Add `bodies`: of each channel bool, one value per block of 4^3 voxels (see `find_body`); None
    of a missing one."""

    def __call__(self, data: dict) -> dict:
        channels = zip(data["image"].as_tensor().split(1), data["kinds"], strict=True)
        bodies = [None if kind == "missing" else find_body(x, kind) for x, kind in channels]
        return data | {"bodies": bodies}


class CropToBodyd(MapTransform):
    """Crop to the body and all labels, plus a margin; add `body`, fractions of 8^3 blocks.

    The body is that of any channel. The box starts at multiples of 4 voxels, so that the map stays
    aligned with the voxels. `body_box` is the part that would remain without a mask.
    """

    def __init__(self, keys, crop: bool):
        super().__init__(keys, allow_missing_keys=True)
        self.crop = crop

    def __call__(self, data: dict) -> dict:
        out, bodies = dict(data), data["bodies"]
        body = np.logical_or.reduce([found for found in bodies if found is not None])
        pairs = zip(data["image"], bodies, strict=True)
        out["body_samples"] = [b is not None and sample_body(x, b) for x, b in pairs]
        if self.crop:
            keep = body
            if "seg" in data:
                labels = data["seg"].as_tensor().abs().float()  # blocks that hold a label stay
                keep = keep | (_pooled(F.max_pool3d, labels, BLOCK)[0] > 0).numpy()
            box, inner = _box_around(keep), _box_around(body)
            body = body[tuple(slice(*b) for b in box)]
            crop = SpatialCrop(roi_slices=[slice(a * BLOCK, b * BLOCK) for a, b in box])
            for key in self.key_iterator(out):
                out[key] = crop(out[key])
            inner = [(low - a, high - a) for (low, high), (a, _) in zip(inner, box, strict=True)]
        else:
            inner = [(0, n) for n in body.shape]
        out["body_box"] = [
            (low * BLOCK, min(high * BLOCK, n))
            for (low, high), n in zip(inner, out["image"].shape[1:], strict=True)
        ]
        fraction = _pooled(
            F.avg_pool3d, torch.as_tensor(body)[None].float(), 2, count_include_pad=False
        )
        out["body"] = np.rint(fraction[0].numpy() * 255).astype(np.uint8)
        return out


def body_of(image: torch.Tensor, kinds: Sequence[str]) -> tuple[np.ndarray, list]:
    """Return where any channel of an image (C, X, Y, Z) shows body, in blocks of 4^3 voxels, and
    the box around it, (start, stop) in voxels along each axis."""
    channels = zip(image.as_tensor().split(1), kinds, strict=True)
    found = [find_body(x, kind) for x, kind in channels if kind != "missing"]
    body = np.logical_or.reduce(found)
    pairs = zip(_box_around(body), image.shape[1:], strict=True)
    return body, [(low * BLOCK, min(high * BLOCK, n)) for (low, high), n in pairs]


def _pooled(pool: Callable, x: torch.Tensor, size: int, **options) -> torch.Tensor:
    """Pool (1, X, Y, Z) over blocks; the last ones, or the only one of few voxels, are smaller."""
    kernel = [min(size, n) for n in x.shape[1:]]
    return pool(x, kernel, size, ceil_mode=True, **options)


def _box_around(keep: np.ndarray) -> list[tuple[int, int]]:
    """Return (start, stop) of the blocks that are set, with the margin, along each axis."""
    box = []
    for axis in range(3):
        hit = np.flatnonzero(keep.any(axis=tuple({0, 1, 2} - {axis})))
        box.append((int(max(0, hit[0] - MARGIN)), int(hit[-1] + 1 + MARGIN)))
    return box


class Storedd(Transform):
    """Turn intensities into int16; add `scale`, `offset` and the `background` value of air.

    Modalities other than CT get `STEPS` steps between the percentiles. int16 then reaches two such
    ranges below and 13 above; only values outside are clipped.
    """

    def __init__(self, form: StandardForm):
        self.percentiles = form.percentiles

    def __call__(self, data: dict) -> dict:
        out = dict(data)
        names = ("kinds", "sources", "body_samples")
        parts = zip(data["image"].split(1), *(data[name] for name in names), strict=True)
        channels, *numbers = zip(*(self._stored(*part) for part in parts), strict=True)
        out["image"] = _joined(channels)
        names = ("kind", "modality", "scale", "offset", "background")
        for name, values in zip(names, (data["kinds"], data["modalities"], *numbers), strict=True):
            # the cache's files of a case without `channels` hold no lists
            out[name] = list(values) if data.get("channels") else values[0]
        if "seg" in out:
            out["seg"] = out["seg"].to(torch.int16)
        return out

    def _stored(self, image: torch.Tensor, kind: str, source: str, sample) -> tuple:
        """Return a channel (1, X, Y, Z) int16 and its scale, offset and background."""
        numbers = {"CT": (1.0, 0.0, CT_AIR), "missing": (0.0, 0.0, 0)}.get(kind)
        if numbers is None:
            body, air = sample
            low, high = np.percentile(body, self.percentiles)
            if not high > low:
                raise VolumeError(
                    f"{source}: percentiles {self.percentiles} of its intensities are both "
                    f"{low:g}; nothing to see"
                )
            scale, offset = 1 / STEPS, LOWEST + 32768 / STEPS
            # stored = ((value - low) / (high - low) - offset) / scale
            slope = STEPS / (high - low)
            shift = -low * slope - offset * STEPS
            image = image.float() * slope + shift
            background = float(np.median(air)) if len(air) else low
            background = int(np.clip(round(background * slope + shift), -32768, 32767))
            numbers = (scale, offset, background)
        if image.is_floating_point():
            image = image.round().clamp(-32768, 32767)
        return image.to(torch.int16), *numbers


def find_body(image: torch.Tensor, kind: str) -> np.ndarray:
    """Separate body from air; lungs and cavities count as body.

    Args:
        image: (1, X, Y, Z), HU for CT, otherwise any unit; axes in RAS+ order.
        kind: "CT" or "other".
    Returns:
        bool (ceil(X/4), ceil(Y/4), ceil(Z/4)); all true if no air is visible, as in a crop from
        inside the body.
    """
    mean = _pooled(F.avg_pool3d, image.float(), BLOCK, count_include_pad=False)[0].numpy()
    if kind == "CT":
        body = mean > CT_BODY
    else:
        low, high = np.percentile(mean, (1, 95))
        if low > DARK * high:
            return np.ones(mean.shape, bool)
        body = mean > low + 0.1 * (high - low)
    # slice by slice, as lungs are open at the ends of the volume
    cross = ndimage.generate_binary_structure(2, 1)[..., None]
    body = ndimage.binary_fill_holes(body, cross)
    # an opening removes the table, cables and noise, which are thin
    square = np.ones((3, 3, 1), bool)
    solid = ndimage.binary_opening(np.pad(body, 1, "edge"), square)[1:-1, 1:-1, 1:-1]
    parts, count = ndimage.label(solid)
    if count == 0:
        return np.ones(mean.shape, bool)
    sizes = np.bincount(parts.ravel())[1:]
    large = 1 + np.flatnonzero(sizes >= 0.01 * sizes.max())  # arms and legs may be separate
    # restore the outline, which the opening has rounded off by up to a block
    near = ndimage.binary_dilation(np.isin(parts, large), square)
    return body & near


def sample_body(image: torch.Tensor, body: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return intensities in the body and in the air, from at most about MAX_SAMPLES voxels."""
    step = max(1, round((image.numel() / MAX_SAMPLES) ** (1 / 3)))
    values = image.as_tensor()[::step, ::step, ::step].numpy()
    inside = body[np.ix_(*[np.arange(0, n, step) // BLOCK for n in image.shape])]
    return values[inside], values[~inside]


def _joined(channels: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return (C, X, Y, Z) of C tensors (1, X, Y, Z)."""
    return channels[0] if len(channels) == 1 else torch.cat(channels)


def _meta_tensor(channels: Sequence[np.ndarray], affine: np.ndarray) -> MetaTensor:
    """Return C arrays (X, Y, Z) as a (C, X, Y, Z) MetaTensor, int16 if all are."""
    voxels = np.stack(channels) if len(channels) > 1 else channels[0][None]
    if min(voxels.strides) < 0:  # torch cannot wrap negative strides
        voxels = voxels.copy()
    return MetaTensor(torch.as_tensor(voxels), affine=torch.as_tensor(affine).double())
