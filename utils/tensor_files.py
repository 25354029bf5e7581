"""Read files of weights from any source; no code in them is run, and every fault has a message."""

import argparse
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.errors import InputError

NUMBERS = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64".split()
NOT_WEIGHTS = {  # {first bytes: what the file is, and what to do}
    b"\x89HDF": "an HDF5 (Keras) file; only PyTorch and safetensors files can be read",
    b"\x1f\x8b": "compressed (gzip): unpack it first",
    b"7z\xbc\xaf": "compressed (7z): unpack it first",
    b"Rar!": "compressed (rar): unpack it first",
    b"\x93NUMPY": "a NumPy array; only PyTorch and safetensors files can be read",
}


class WeightsError(InputError):
    """The weights of a file cannot be used; the message names the file and says why."""


@dataclass(frozen=True)
class WeightsFile:
    """The result of `read`."""

    content: Any  # the saved object: tensors, numbers, text, dicts and lists
    kind: str  # "torch", "torch legacy" (before 1.6) or "safetensors"
    recent: bool | None  # whether PyTorch 2.7 or later wrote it; None: not known


def read(path: str | Path, map_location="cpu", mmap: bool = False) -> WeightsFile:
    """Read a file that torch.save or safetensors wrote.

    mmap: read the tensors of a zip archive only when they are used; its checksums are compared all
    the same.

    Raises:
        WeightsError: the file is missing, empty, cut short, damaged or not weights at all, or it
            holds more than tensors, plain values, numpy scalars and argparse.Namespace; the message
            names what.
    """
    path = Path(path)
    if path.is_dir():
        raise WeightsError(f"{path}: a folder; name the file of weights in it")
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            start = file.read(1024)
    except OSError as e:
        raise WeightsError(f"{path}: cannot be opened ({e.strerror})") from e
    if not start:
        raise WeightsError(f"{path}: empty (0 bytes); copy or download it again")
    if start[8:9] == b"{":  # the 8 bytes before hold the length of the header
        return WeightsFile(_read_safetensors(path), "safetensors", None)
    _refuse_other_files(path, start)
    names = _check_zip(path) if start.startswith(b"PK") else None
    content = _torch_load(path, map_location, names is None, mmap)
    # .format_version came with PyTorch 2.7 (April 2025), https://github.com/pytorch/pytorch/pull/143879
    recent = names is not None and any(name.endswith("/.format_version") for name in names)
    return WeightsFile(content, "torch legacy" if names is None else "torch", recent)


def _refuse_other_files(path: Path, start: bytes) -> None:
    """Raise WeightsError if the first bytes show that a file is not weights."""
    if start.startswith(b"version https://git-lfs"):
        size = re.search(rb"size (\d+)", start)
        stands_for = f" of {int(size[1]):,} bytes" if size else ""
        raise WeightsError(
            f"{path}: a Git LFS pointer, the text that stands for a file{stands_for}; fetch the "
            "file itself with `git lfs pull` or download it"
        )
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        raise WeightsError(
            f"{path}: a web page (HTML), not weights; its address needs a login or leads to a page "
            "about the file. Download the file itself"
        )
    if all(byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in start):
        line = start.decode().strip().splitlines() or [""]
        raise WeightsError(f"{path}: text, not weights; it begins with {line[0][:80]!r}")
    for magic, what in NOT_WEIGHTS.items():
        if start.startswith(magic):
            raise WeightsError(f"{path}: {what}")
    if start[257:262] == b"ustar":
        raise WeightsError(
            f"{path}: a tar archive; unpack it, or, if PyTorch before 0.2 wrote it, save it again "
            "with a later one"
        )
    if not start.startswith((b"PK", b"\x80")):  # a zip archive, a pickle
        raise WeightsError(f"{path}: neither a PyTorch nor a safetensors file, or damaged")


def _check_zip(path: Path) -> list[str]:
    """Names in an archive of torch.save; compares every checksum, of which torch compares none."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            packed = any(member.compress_type for member in archive.infolist())  # torch packs none
            damaged = None if packed else archive.testzip()
    except Exception as e:  # zipfile raises many kinds; each means that the archive is not whole
        raise WeightsError(f"{path}: cut short or damaged, copy or download it again ({e})") from e
    if packed:
        raise WeightsError(f"{path}: a compressed zip archive; unpack it first")
    if damaged is not None:
        raise WeightsError(
            f"{path}: damaged, the checksum of {damaged} does not match; copy or download it again"
        )
    if any(name.endswith("/constants.pkl") for name in names):
        raise WeightsError(
            f"{path}: a TorchScript archive, which holds code; save the state_dict() of its module"
        )
    if not any(name.endswith("/data.pkl") for name in names):
        raise WeightsError(
            f"{path}: a zip archive that torch.save did not write; unpack it first. It holds "
            f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        )
    return names


def _torch_load(path: Path, map_location, legacy: bool, mmap: bool):
    with torch.serialization.safe_globals(_allowed_globals()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickles that are refused below
        try:
            options = {"map_location": map_location, "mmap": mmap and not legacy}
            return torch.load(path, weights_only=True, **options)
        except Exception as e:  # torch raises many kinds; each means that nothing was loaded
            refused = re.findall(r"GLOBAL (\w[\w.]+) ", str(e))[:1]
            if refused and not legacy:
                refused = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
            reason = str(e).partition("WeightsUnpickler error:")[2].strip() or str(e)
    if refused:
        whole = "a whole pickled module, " if any("torch.nn.modules" in x for x in refused) else ""
        raise WeightsError(
            f"{path}: refused, because loading it would run code that is not known to be safe: "
            f"{whole}{', '.join(refused)}. If you trust where it is from, load it where it was "
            "made and save the state_dict alone: torch.save(model.state_dict(), 'weights.pt')"
        )
    reason = (reason.splitlines() or ["no reason given"])[0]
    if reason.startswith("Unsupported operand"):
        reason += "; was it saved with a pickle_protocol of its own?"
    damage = "cut short, damaged or not a PyTorch file" if legacy else "cannot be read"
    raise WeightsError(f"{path}: {damage} ({reason})")


def _allowed_globals() -> list:
    """Objects that training loops save beside tensors; older files use older names of numpy's."""
    scalar = np.float64(0).__reduce__()[0]
    parts = [(scalar, f"{module}.multiarray.scalar") for module in ("numpy.core", "numpy._core")]
    dtypes = [type(np.dtype(name)) for name in NUMBERS]
    return [argparse.Namespace, *parts, (np.dtype, "numpy.dtype"), *dtypes]


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """{name: tensor}; the library checks the header, but the format has no checksum of values."""
    from safetensors import SafetensorError, safe_open  # needed for this kind of file only

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as e:
        raise WeightsError(
            f"{path}: a safetensors file that is cut short or damaged, copy or download it again "
            f"({str(e).splitlines()[0]})"
        ) from e
