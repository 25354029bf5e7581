"""If a device's memory runs out: smaller parts, or an error that says what would help."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from utils.errors import RunError


def attempt(function: Callable, *args):
    """Return function(*args), which must not be None, or None if the device's memory ran out."""
    try:
        return function(*args)
    except torch.OutOfMemoryError:
        pass  # its traceback holds tensors and must be gone before the memory is free
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def in_parts(
    function: Callable[[Any], Any], batches: Iterable, say: Callable[[str], None] = print
) -> Iterator[tuple[Any, Any]]:
    """Yield (batch, function(batch)) for each batch, or for its parts once memory has run out.

    The parts have half the size that did not fit, and become smaller if need be, down to one item.

    Args:
        function: must not return None.
        batches: tensors (B, ...), or dicts with an "index" (B,) and otherwise tensors or lists of
            length B, or dicts of such.
        say: function that is called with a message when memory runs out.
    Raises:
        torch.OutOfMemoryError: not even a single item fits.
    """
    most = None
    for batch in batches:
        parts = _pieces(batch, most)
        while parts:
            part, *parts = parts
            count = _count(part)
            found = attempt(function, part) if count > 1 else function(part)
            if found is not None:
                yield part, found
                continue
            most = count // 2
            say(f"out of memory: from here on at most {most} at a time")
            parts = [piece for whole in (part, *parts) for piece in _pieces(whole, most)]


def _count(batch) -> int:
    return len(batch["index"] if isinstance(batch, dict) else batch)


def _pieces(batch, most: int | None) -> list:
    if most is None or _count(batch) <= most:
        return [batch]
    return [_cut(batch, slice(i, i + most)) for i in range(0, _count(batch), most)]


def _cut(batch, part: slice):
    if isinstance(batch, dict):
        return {name: _cut(values, part) for name, values in batch.items()}
    return batch[part]


@contextmanager
def explained(phase: str, cfg):
    """Turn an out-of-memory error into a RunError that names the phase, the shapes and what helps.

    phase: "a training step", "the validation", ... cfg: the config of any stage.
    """
    try:
        yield
    except torch.OutOfMemoryError as e:
        shapes, changes = _shapes_and_changes(cfg, training=phase == "a training step")
        if cfg.precision == "fp32":
            changes.append("precision=bf16")
        changes.append(f"a smaller network ({cfg.backbone})")
        why = (str(e).splitlines() or ["no more is known"])[0]
        again = " Then resume_training_from=auto goes on from the last checkpoint."
        again = "" if phase == "the test" else again
        raise RunError(
            f"{phase} ran out of memory: {shapes}, precision {cfg.precision}. What helps, easiest "
            f"first: {', '.join(changes)}.{again} {why}"
        ) from e


def _size(size) -> str:
    return " x ".join(map(str, size))


def _shapes_and_changes(cfg, training: bool) -> tuple[str, list[str]]:
    """The shapes of a batch, and the settings that would need less memory, easiest first."""
    count, changes = cfg.batch_size, []
    if training:
        if count > 1:
            accumulate = cfg.accumulate * count // (count // 2)
            changes.append(f"batch_size={count // 2} with accumulate={accumulate}")
        if not cfg.grad_checkpointing:
            changes.append("grad_checkpointing=true")
    elif hasattr(cfg, "inference"):
        return f"1 window of {_size(cfg.patches.size)} voxels", ["a smaller patches.size"]
    else:
        count = 1  # fewer at a time have been tried
    if hasattr(cfg, "crops"):
        crops = cfg.crops
        changes.append("a smaller crops.global_size")
        text = f"{2 * count} global crops of {_size(crops.global_size)} voxels"
        if crops.num_local:
            changes.append("a smaller crops.num_local")
            text += f" and {crops.num_local * count} local ones of {_size(crops.local_size)}"
        return f"{text} (batch_size={count})", changes
    part = "image" if hasattr(cfg, "image") else "patches"
    changes.append(f"a smaller {part}.size")
    size = _size(getattr(cfg, part).size)
    return f"a batch of {count} x {size} voxels (batch_size={count})", changes
