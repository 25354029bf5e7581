import os
import pickle
import zipfile

import pytest
import torch

from utils import checkpoint
from utils.checkpoint import CheckpointError
from utils.errors import RunError


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


def test_previous_is_kept_and_used_when_last_is_damaged(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save_last(tmp_path, state(step))
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 3
    assert checkpoint.load(tmp_path / "previous.pt")["step"] == 2
    content = (tmp_path / "last.pt").read_bytes()
    warnings = []
    (tmp_path / "last.pt").write_bytes(content[: len(content) // 2])
    assert checkpoint.load_last(tmp_path / "last.pt", warnings.append)["step"] == 2
    assert len(warnings) == 1 and "last.pt" in warnings[0]
    (tmp_path / "last.pt").unlink()  # killed between the two renames
    assert checkpoint.load_last(tmp_path / "last.pt", warnings.append)["step"] == 2


@pytest.mark.parametrize("position", [0.2, 0.5, 0.8])
def test_one_flipped_bit_is_noticed(tmp_path, position):
    path = tmp_path / "best.pt"
    checkpoint.save(path, state(1))
    content = bytearray(path.read_bytes())
    content[int(len(content) * position)] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="best.pt"):
        checkpoint.load(path)


def test_foreign_empty_and_missing_files_are_named(tmp_path):
    (tmp_path / "empty.pt").touch()
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    for name in ("empty.pt", "foreign.pt", "missing.pt"):
        with pytest.raises(CheckpointError, match=name):
            checkpoint.load(tmp_path / name)


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


def test_a_failed_save_leaves_the_good_file_and_no_rubbish(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "last.pt", state(1))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"last.pt: .*No space.* takes 40,000 bytes, \d+"):
        checkpoint.save(tmp_path / "last.pt", state(2))
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_hashes_tell_patients_apart_without_naming_them():
    hashes = checkpoint.hash_patients(["Ann", "Bob", "Ann"])
    assert len(hashes) == 2 and hashes == checkpoint.hash_patients(["Bob", "Ann"])
    assert not {"Ann", "Bob"} & set(hashes)
