import os
import pickle
import zipfile

import pytest
import torch

from utils import checkpoint
from utils.checkpoint import CheckpointError


def state(step):
    return {
        "step": step,
        "weights": {"a": torch.full((100, 100), float(step))},
        "names": ["x", None],
    }


def test_round_trip(tmp_path):
    checkpoint.save(tmp_path / "a" / "last.pt", state(3))
    loaded = checkpoint.load(tmp_path / "a" / "last.pt")
    assert loaded["step"] == 3 and loaded["names"] == ["x", None]
    assert torch.equal(loaded["weights"]["a"], torch.full((100, 100), 3.0))
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["last.pt"]


def test_a_pickle_with_code_runs_nothing(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    torch.save({"format": 1, "x": Attack()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path / "evil.pt")
    with zipfile.ZipFile(tmp_path / "evil.pt") as archive:  # the harness can fail: pickle runs it
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        pickle.loads(archive.read(name))
    assert (tmp_path / "attacked").exists()


def test_hashes_tell_patients_apart_without_naming_them():
    hashes = checkpoint.hash_patients(["Ann", "Bob", "Ann"])
    assert len(hashes) == 2 and hashes == checkpoint.hash_patients(["Bob", "Ann"])
    assert not {"Ann", "Bob"} & set(hashes)
