"""Ways to damage a checkpoint, and files that are none."""

import io
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from utils.checkpoint import FORMAT

Damage = Callable[[bytearray, np.random.Generator], bytes]


def change(path: Path, damage: Damage, seed: int) -> None:
    content = damage(bytearray(path.read_bytes()), np.random.default_rng(seed))
    path.write_bytes(content)


def cut(keep: float | int, data: bytearray, rng) -> bytes:
    """keep: a fraction, or a number of bytes, from the end where negative."""
    return data[: int(keep * len(data)) if isinstance(keep, float) else keep]


def zeroed(start: float, share: float, data: bytearray, rng) -> bytes:
    first, size = int(start * len(data)), max(1, int(share * len(data)))
    data[first : first + size] = bytes(len(data[first : first + size]))
    return data


def flip_in(part: str, data: bytearray, rng) -> bytes:
    """One bit, in a part of the zip archive."""
    first, end = _spans(data)[part]
    bit = int(rng.integers(8 * first, 8 * end))
    data[bit // 8] ^= 1 << bit % 8
    return data


def _spans(data: bytearray) -> dict[str, tuple[int, int]]:
    """First byte and end of the parts of a file of torch.save, a zip archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        directory = archive.start_dir
        starts = sorted(member.header_offset for member in archive.infolist())
        # a bit between two tensors, in padding, would change nothing
        tensors = [member for member in archive.infolist() if "/data/" in member.filename]
        largest = max(tensors, key=lambda member: member.file_size)
    header = largest.header_offset
    name, extra = (int.from_bytes(data[header + n : header + n + 2], "little") for n in (26, 28))
    values = header + 30 + name + extra
    return {
        "first header": (0, 30),
        "second header": (starts[1], starts[1] + 30),
        "pickle": (64, starts[1]),  # with its name and padding
        "tensors": (values, values + largest.file_size),
        "directory": (directory, data.rindex(b"PK\x06\x06")),
        "end": (data.rindex(b"PK\x06\x06"), len(data)),
        "anything": (0, len(data)),
    }


# ---- other files in its place


def text(path: Path) -> None:
    path.write_text("see the wiki\n")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dead_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def a_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "x")


def a_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__)


def saved(content, path: Path) -> None:
    torch.save(content, path)


TENSOR = {"weight": torch.ones(3)}
FOREIGN = {
    "text": text,
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "a folder": a_folder,
    "a dead link": dead_link,
    "a zip archive": a_zip,
    "a tar archive": a_tar,
    "noise": lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
    "weights of SuPreM": partial(saved, {"net": TENSOR, "epoch": 2100, "optimizer": {}}),
    "a Lightning checkpoint": partial(
        saved, {"state_dict": TENSOR, "pytorch-lightning_version": "2.4.0", "global_step": 7}
    ),
    "a tensor": partial(saved, torch.ones(3)),
    "a list": partial(saved, [TENSOR]),
    "of another format": partial(saved, {"format": FORMAT + 1, "modules": {"student": TENSOR}}),
}
