"""A network over a whole volume: overlapping windows, their outputs averaged with Gaussian weights.

Windows, weights and therefore results are those of monai.inferers.sliding_window_inference with
mode="gaussian" and sigma_scale=0.125. Two things differ. Windows that hold a single value, such as
air, are evaluated only once for each value. And the volume is finished slab by slab, because 41
classes of 512 x 512 x 600 voxels would take 26 GB, and as much again when they are resampled. Here
only the sums of one window's thickness are in memory and, when a slab is finished, a copy of them:
up to 2 x 4 bytes x classes x window x the volume's two other edges (8.3 GB for that volume and
windows of 96; 2.3 GB for the same patient at 1.5 mm). It is main memory if the device lacks room.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations

import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map, dense_patch_slices
from torch import Tensor

from utils.memory import attempt

SIGMA = 0.125  # of the Gaussian, in windows
CPU = torch.device("cpu")
Predict = Callable[[Tensor], Tensor]  # (B, C, x, y, z) -> (B, K, x, y, z)
Box = tuple[slice, slice, slice]


def sliding_window(predict: Predict, image: Tensor, roi, overlap=0.5, batch=4, **options) -> Tensor:
    """Return the average output for a whole volume, (K, X, Y, Z) float32; see `window_slabs`."""
    ((_, whole),) = window_slabs(predict, image, roi, overlap, batch, axis=None, **options)
    return whole


@torch.no_grad()
def window_slabs(
    predict: Predict,
    image: Tensor,
    roi: Sequence[int],
    overlap: float,
    batch: int,
    axis: int | None,
    background: float | Sequence[float] = 0.0,
    device: torch.device | None = None,
    out_device: torch.device | None = None,
    log: Callable[[str], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield the average output for a volume in slabs, from the lower end of an axis to the upper.

    Args:
        predict: the network; its outputs, probabilities or logits, are averaged.
        image: (C, X, Y, Z).
        roi: (x, y, z) voxels of a window. A smaller volume is padded on both sides.
        overlap: of neighbouring windows, 0 <= overlap < 1.
        batch: windows in one call of predict; always one on a CPU, where more are slower.
        axis: 0, 1 or 2, the axis along which the volume is cut into slabs; the longest needs the
            least memory. None: the whole volume is one slab.
        background: value of the padding, or one for each channel.
        device: where predict is called; default: the device of the image.
        out_device: where outputs are summed up; default: `device`.
        log: function that is called with a message when memory runs out. The batch is then halved,
            down to one window; after that the sums move to the CPU.
    Yields:
        the first voxel of the slab along the axis, and the slab, (K, x, y, z) float32.
    Raises:
        torch.OutOfMemoryError: one window with sums on the CPU still does not fit.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}; expected 0 <= overlap < 1")
    say, device = log or (lambda text: None), torch.device(device or image.device)
    batch = 1 if device == CPU else batch
    padded, inside = _pad(image, roi, background)
    boxes = _boxes(padded.shape[1:], roi, overlap)
    if axis is not None:
        boxes.sort(key=lambda box: box[axis].start)
    values = _constants(padded, boxes)
    sums = _Sums(padded.shape[1:], axis, roi, torch.device(out_device or device), say)
    known: dict[tuple, Tensor] = {}  # {value: output of the windows that hold only it}
    first = 0
    while first < len(boxes):
        todo, end = _next_windows(values, known, first, batch)
        evaluate = partial(_evaluate, predict, padded, [boxes[i] for i in todo], device)
        smallest = batch == 1 and sums.device == CPU
        outputs = evaluate() if smallest else attempt(evaluate)
        if outputs is None:
            if batch > 1:
                batch //= 2
                say(f"out of memory: from here on {batch} windows at a time")
            else:
                sums.move_to_cpu()
            continue
        outputs = dict(zip(todo, outputs, strict=True))
        known |= {values[i]: out.clone() for i, out in outputs.items() if values[i] is not None}
        for i in range(first, end):
            sums.add(boxes[i], outputs[i] if i in outputs else known[values[i]])
        outputs, first = None, end
        if first == len(boxes):
            finished = padded.shape[1 + sums.axis]
        else:
            finished = 0 if axis is None else boxes[first][axis].start
        if finished > sums.start:
            # no name here keeps the slab while the caller has it; a padded axis is a single slab
            yield sums.take(finished, inside)


def averaged(predicts: Sequence[Predict]) -> Predict:
    """Return a function whose output is the mean of several networks' outputs."""

    def predict(x: Tensor) -> Tensor:
        total = predicts[0](x)
        for other in predicts[1:]:
            total = total + other(x)
        return total / len(predicts)

    return predict if len(predicts) > 1 else predicts[0]


def mirrored(
    predict: Predict, axes: Sequence[int], pairs: Sequence[tuple[int, int]] = ()
) -> Predict:
    """Return a function whose output is the mean over a window and its mirror images, turned back.

    Args:
        axes: some of 0, 1, 2 for x, y, z; n axes in all combinations take 2^n calls of predict.
        pairs: channels of left and right structures, which are swapped if x is mirrored.
    """

    def predict_mirrored(x: Tensor) -> Tensor:
        total = predict(x)
        order = list(range(total.shape[1]))
        for one, other in pairs:
            order[one], order[other] = other, one
        for flip in flips:
            out = predict(x.flip([2 + a for a in flip])).flip([2 + a for a in flip])
            total = total + (out[:, order] if 0 in flip else out)
        return total / (1 + len(flips))

    flips = [f for n in range(1, len(axes) + 1) for f in combinations(axes, n)]
    return predict_mirrored if flips else predict


class _Sums:
    """Sums of the weighted outputs and of the weights, in the unfinished part of the volume."""

    def __init__(self, shape: Sequence[int], axis: int | None, roi, device, say: Callable):
        self.shape, self.axis, self.device, self.say = tuple(shape), axis or 0, device, say
        self.at_least = shape[0] if axis is None else 0
        self.weight = compute_importance_map(
            tuple(roi), mode="gaussian", sigma_scale=SIGMA, device=device
        )
        self.start = 0  # where the tensors begin along the axis
        self.total = self.norm = None

    def add(self, box: Box, output: Tensor) -> None:
        """Add the output of a window, (K, *roi) on any device."""
        self._either(self._reserve, len(output), max(box[self.axis].stop, self.at_least))
        box = list(box)
        along = box[self.axis]
        box[self.axis] = slice(along.start - self.start, along.stop - self.start)
        self._either(lambda: torch.mul(output.to(self.device), self.weight, out=self.product))
        self.total[(slice(None), *box)].add_(self.product)
        self.norm[tuple(box)].add_(self.weight)

    def take(self, stop: int, inside: Box) -> tuple[int, Tensor]:
        """Remove and return the finished means, from the start of the sums to `stop`."""
        start, count, dim = self.start, stop - self.start, 1 + self.axis
        self.start = stop
        if count == self.total.shape[dim]:
            mean, self.total = self.total.div_(self.norm), None
            return start, mean[(slice(None), *inside)]

        def split() -> tuple[Tensor, ...]:
            total, rest = self.total.split([count, self.total.shape[dim] - count], dim)
            norm, other = self.norm.split([count, self.norm.shape[self.axis] - count], self.axis)
            return total / norm, rest.clone(), other.clone()

        mean, self.total, self.norm = self._either(split)
        return start, mean[(slice(None), *inside)]

    def _reserve(self, channels: int, stop: int) -> bool:
        """Extend the tensors to `stop`; if that fails, they stay as they were."""
        if self.total is None:
            size = list(self.shape)
            size[self.axis] = stop - self.start
            product = torch.empty(channels, *self.weight.shape, device=self.device)
            norm = torch.zeros(size, device=self.device)
            total = torch.zeros(channels, *size, device=self.device)
            self.product, self.norm, self.total = product, norm, total
        more = stop - self.start - self.norm.shape[self.axis]
        if more > 0:
            widths = [0] * (2 * (2 - self.axis)) + [0, more]
            self.total, self.norm = F.pad(self.total, widths), F.pad(self.norm, widths)
        return True

    def _either(self, function: Callable, *args):
        """The function's result; if the device has no memory for it, after a move to the CPU."""
        if self.device != CPU:
            result = attempt(function, *args)
            if result is not None:
                return result
            self.move_to_cpu()
        return function(*args)

    def move_to_cpu(self) -> None:
        self.say("out of memory: from here on outputs are summed up on the CPU")
        self.device, self.weight = CPU, self.weight.to(CPU)
        if self.total is not None:
            self.total, self.norm = self.total.to(CPU), self.norm.to(CPU)
            self.product = torch.empty_like(self.product, device=CPU)


def _evaluate(predict: Predict, image: Tensor, boxes: list[Box], device) -> Tensor | list:
    """Outputs (B, K, x, y, z) of the windows in the boxes."""
    if not boxes:
        return []
    return predict(torch.stack([image[(slice(None), *box)] for box in boxes]).to(device))


def _pad(image: Tensor, roi, background: float | Sequence[float]) -> tuple[Tensor, Box]:
    """The image padded to at least the size of a window, and the box of the image in it."""
    gaps = [max(0, r - n) for r, n in zip(roi, image.shape[1:], strict=True)]
    widths = [w for gap in reversed(gaps) for w in (gap // 2, gap - gap // 2)]
    inside = tuple(
        slice(gap // 2, gap // 2 + n) for gap, n in zip(gaps, image.shape[1:], strict=True)
    )
    if not any(gaps):
        return image, inside
    air = [background] * len(image) if isinstance(background, float) else background
    pairs = zip(image, air, strict=True)
    return torch.stack([F.pad(x, widths, value=value) for x, value in pairs]), inside


def _boxes(shape: Sequence[int], roi: Sequence[int], overlap: float) -> list[Box]:
    """Boxes of the windows that cover a volume."""
    step = [
        r if r == n else max(1, int(r * (1 - overlap))) for r, n in zip(roi, shape, strict=True)
    ]
    return dense_patch_slices(tuple(shape), tuple(roi), step)


def _constants(image: Tensor, boxes: list[Box]) -> list[tuple | None]:
    """The value in each channel of each window that holds only one there, else None."""
    values: list[tuple | None] = [()] * len(boxes)
    for every in (8, 1):  # every eighth voxel rules out most windows
        chosen = [i for i, value in enumerate(values) if value is not None]
        parts = [image[(slice(None), *boxes[i])][:, ::every, ::every, ::every] for i in chosen]
        ends = [torch.stack(part.flatten(1).aminmax(dim=1)) for part in parts]  # (2, C)
        ends = torch.stack(ends).tolist() if ends else []  # waits only once for the device
        for i, (low, high) in zip(chosen, ends, strict=True):
            values[i] = tuple(low) if low == high else None
    return values


def _next_windows(values: list, known: dict, first: int, batch: int) -> tuple[list[int], int]:
    """Up to `batch` windows to evaluate, from the first on, and the end of those then done."""
    todo, new = [], set(known)
    for i in range(first, len(values)):
        if values[i] is not None and values[i] in new:
            continue
        if len(todo) == batch:
            return todo, i
        todo.append(i)
        new.add(values[i])
    return todo, len(values)
