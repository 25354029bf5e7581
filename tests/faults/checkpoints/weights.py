"""Files of weights and checkpoints from anywhere: no code in them runs, none is read wrongly."""

import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from models.backbones import build_backbone
from tests.faults.files.bombs import MOST_BYTES, HighWater
from tests.faults.frame import NAMED, RIGHT, WRONG, Fault, Group, Outcome, judge
from utils.tensor_files import read
from utils.weights import load_backbone

STATE = {"net.weight": torch.arange(6000.0).reshape(60, 100), "net.bias": torch.ones(3)}


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return (__import__("os").mkdir, (str(self.folder / "canary"),))


def ours(path: Path) -> dict:
    return read(path).content


def of_torch(path: Path) -> dict:
    """Broken: as torch.load did before it refused code."""
    return torch.load(path, weights_only=False)


def _load(make: Callable[[Path, Path], None], folder: Path, reader, word: str = "") -> Outcome:
    path = folder / "weights.pt"
    make(path, folder)
    with HighWater() as water:
        outcome = judge(
            lambda: reader(path),
            lambda state: all(torch.equal(state[name], STATE[name]) for name in STATE),
            names=[str(path)],
            words=[word],
        )
    if (folder / "canary").exists():
        return Outcome(WRONG, "code from the file was run")
    if water.bytes > MOST_BYTES:
        return Outcome(WRONG, f"took {water.bytes / 1e6:.0f} MB")
    return outcome


def saved(path: Path, folder: Path, state=None, legacy: bool = False, protocol: int = 2) -> None:
    kind = {"_use_new_zipfile_serialization": not legacy, "pickle_protocol": protocol}
    torch.save(state or STATE, path, **kind)


def evil(path: Path, folder: Path, legacy: bool = False, protocol: int = 2) -> None:
    saved(path, folder, STATE | {"epoch": Evil(folder)}, legacy, protocol)


def evil_pickle(path: Path, folder: Path) -> None:
    path.write_bytes(pickle.dumps(STATE | {"epoch": Evil(folder)}))


def evil_old_pickle(path: Path, folder: Path) -> None:
    path.write_bytes(pickle.dumps(Evil(folder), protocol=0))


def evil_numpy(path: Path, folder: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, np.array([Evil(folder)], dtype=object), allow_pickle=True)


def evil_npz(path: Path, folder: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, weight=np.array([Evil(folder)], dtype=object))


def evil_tar(path: Path, folder: Path) -> None:
    """As PyTorch wrote before 0.2."""
    content = pickle.dumps(Evil(folder))
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def module(path: Path, folder: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), path)


def script(path: Path, folder: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)


def repacked(path: Path, folder: Path, change: Callable[[str, bytes], bytes], packed=False) -> None:
    """A file of torch.save whose records are changed and written again."""
    saved(path, folder)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(name, change(name, data))


def grown(name: str, data: bytes) -> bytes:
    return bytes(1 << 28) if name.endswith("data/0") else data


def shrunk(name: str, data: bytes) -> bytes:
    return data[:100] if name.endswith("data/0") else data


def legacy_claim(path: Path, folder: Path) -> None:
    """A storage of 2^31 numbers in a file of 24 kB."""
    saved(path, folder, legacy=True)
    data = path.read_bytes()
    count = b"M" + (6000).to_bytes(2, "little")
    assert count in data
    path.write_bytes(data.replace(count, b"J\xff\xff\xff\x7f"))


def safe(path: Path, folder: Path, head: int | None = None, cut: int | None = None) -> None:
    safetensors.torch.save_file(STATE, path)
    data = path.read_bytes()
    if head is not None:
        data = head.to_bytes(8, "little") + data[8:]
    path.write_bytes(data[:cut])


def cut(path: Path, folder: Path, keep: float, legacy: bool) -> None:
    saved(path, folder, legacy=legacy)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def flipped(path: Path, folder: Path, seed: int) -> None:
    saved(path, folder)
    data = bytearray(path.read_bytes())
    bit = np.random.default_rng(seed).integers(8 * len(data))
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)


def _of_nnunet(axes, folder: Path, reader) -> Outcome:
    """A whole checkpoint of nnU-Net, which is known by its mirroring axes, a tuple or None."""
    path, net = folder / "weights.pt", build_backbone("resunet", features=(4, 8), blocks=(1, 1))
    content = {"network_weights": net.state_dict(), "_best_ema": np.float64(0.5), "logging": {}}
    torch.save(content | {"inference_allowed_mirroring_axes": axes}, path)
    return judge(
        lambda: load_backbone(net, path), lambda report: report.origin == "nnU-Net", [str(path)]
    )


FAULTS = [
    Fault("whole", partial(_load, saved), RIGHT),
    Fault("whole, legacy", partial(_load, partial(saved, legacy=True)), RIGHT),
    Fault("whole, safetensors", partial(_load, safe), RIGHT),
    *(
        Fault(
            f"code{', legacy' * legacy}, protocol {protocol}",
            partial(_load, partial(evil, legacy=legacy, protocol=protocol), word=word),
            NAMED,
        )
        for legacy in (False, True)
        for protocol, word in ((2, "posix.mkdir"), (4, "pickle_protocol"))
    ),
    *(
        Fault(f"of nnU-Net, axes {axes}", partial(_of_nnunet, axes), RIGHT)
        for axes in ((0, 1, 2), None)
    ),
    Fault("code in a pickle", partial(_load, evil_pickle), NAMED),
    Fault("code in an old pickle", partial(_load, evil_old_pickle), NAMED),
    Fault("code in a NumPy array", partial(_load, evil_numpy), NAMED),
    Fault("code in an npz", partial(_load, evil_npz), NAMED),
    Fault("code in a tar archive", partial(_load, evil_tar), NAMED),
    Fault("a pickled module", partial(_load, module), NAMED),
    Fault("TorchScript", partial(_load, script), NAMED),
    Fault("zip bomb", partial(_load, partial(repacked, change=grown, packed=True)), NAMED),
    Fault("storage cut", partial(_load, partial(repacked, change=shrunk)), NAMED),
    Fault("legacy storage of 8 GB", partial(_load, legacy_claim), NAMED),
    Fault("safetensors, header of 1 TB", partial(_load, partial(safe, head=1 << 40)), NAMED),
    Fault("safetensors, header too short", partial(_load, partial(safe, head=20)), NAMED),
    Fault("safetensors, cut", partial(_load, partial(safe, cut=-100)), NAMED),
    *(
        Fault(f"{keep:.0%} kept{', legacy' * legacy}", partial(_load, make), NAMED)
        for legacy in (False, True)
        for keep in (0.0, 0.1, 0.5, 0.9, 0.99)
        for make in [partial(cut, keep=keep, legacy=legacy)]
    ),
    *(
        Fault(f"bit flip {seed}", partial(_load, partial(flipped, seed=seed)), long=seed >= 30)
        for seed in range(300)
    ),
]
WEIGHTS = Group("files of weights", ours, FAULTS, {"torch.load as it was": of_torch})
