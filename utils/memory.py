"""When a device's memory runs out: the same in smaller parts, or an error that says what helps."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from utils.errors import RunError


def attempt(function: Callable, *args):
    """The function's result, which is never None, or None where the device's memory ran out."""
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
    """function(batch) of each batch; where memory runs out, of halves from there on, down to one.

    Args:
        function: never returns None.
        batches: tensors (B, ...), or dicts of tensors and lists of B, and dicts of such, with an
            "index" (B,).
        say: told when memory runs out.
    Yields:
        the batch, or a part of it; the function's result.
    Raises:
        torch.OutOfMemoryError: not even one fits.
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
    """What runs out of memory in this context says in which phase, with which shapes, what helps.

    Args:
        phase: "a training step", "the validation", ...
        cfg: any of the config files' models.
    Raises:
        RunError: instead of torch.OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError as e:
        training = phase == "a training step"
        shapes, changes = (_training if training else _inference)(cfg)
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


def _training(cfg) -> tuple[str, list[str]]:
    """What was computed, and what to change."""
    changes = []
    if cfg.batch_size > 1:
        half = cfg.batch_size // 2
        changes.append(
            f"batch_size={half} with accumulate={cfg.accumulate * cfg.batch_size // half}"
        )
    if not cfg.grad_checkpointing:
        changes.append("grad_checkpointing=true")
    return _shapes(cfg, changes), changes


def _inference(cfg) -> tuple[str, list[str]]:
    """As `_training`; fewer at a time have been tried."""
    if hasattr(cfg, "inference"):
        return f"1 window of {_size(cfg.patches.size)} voxels", ["a smaller patches.size"]
    changes: list[str] = []
    return _shapes(cfg.model_copy(update={"batch_size": 1}), changes), changes


def _shapes(cfg, changes: list[str]) -> str:
    """Of a batch; adds what makes them smaller to the changes."""
    count = cfg.batch_size
    if hasattr(cfg, "crops"):
        crops = cfg.crops
        changes += ["a smaller crops.global_size"]
        text = f"{2 * count} global crops of {_size(crops.global_size)} voxels"
        if crops.num_local:
            changes += ["a smaller crops.num_local"]
            text += f" and {crops.num_local * count} local ones of {_size(crops.local_size)}"
        return f"{text} (batch_size={count})"
    name, size = ("image", cfg.image.size) if hasattr(cfg, "image") else ("patch", cfg.patches.size)
    key = "image.size" if name == "image" else "patches.size"
    changes += [f"a smaller {key}"]
    return f"a batch of {count} x {_size(size)} voxels (batch_size={count})"
