"""Files of weights, whole and broken: every fault has its own message, nothing is executed."""

import argparse
import io
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from utils.tensor_files import WeightsError, read

STATE = {"net.weight": torch.arange(6000.0).reshape(60, 100), "net.bias": torch.ones(3)}
LFS = b"""version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 251000000
"""


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def write(path, kind="torch", state=STATE):
    """The state as a file; returns its bytes."""
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "torch")
    return path.read_bytes()


KINDS = ("torch", "torch legacy", "safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files(tmp_path, kind):
    write(tmp_path / "any.name", kind)  # the content decides, not the name
    file = read(tmp_path / "any.name")
    assert equal(file.content, STATE)
    assert file.kind == kind
    assert file.recent is {"torch": True, "torch legacy": False, "safetensors": None}[kind]


def test_files_from_before_torch_2_7_are_told(tmp_path):
    """They lack a record that later versions write."""
    write(tmp_path / "new.pt")
    with (
        zipfile.ZipFile(tmp_path / "new.pt") as new,
        zipfile.ZipFile(tmp_path / "old.pt", "w") as old,
    ):
        for name in new.namelist():
            if not name.endswith("/.format_version"):
                old.writestr(name, new.read(name))
    assert read(tmp_path / "old.pt").recent is False


def zipped(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/"), content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "empty \\(0 bytes\\)"),
        (LFS, "Git LFS pointer.*251,000,000 bytes.*git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html><title>Sign in</title>", "a web page \\(HTML\\)"),
        (b"\xef\xbb\xbf<HTML><body>quota", "a web page \\(HTML\\)"),
        (b"Entry not found", "text, not weights; it begins with 'Entry not found'"),
        (b'{"error": "Repository not found"}', "text, not weights"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5 \\(Keras\\)"),
        (b"\x1f\x8b\x08" + bytes(100), "gzip"),
        (bytes(257) + b"ustar" + bytes(1000), "a tar archive"),
        (bytes(1000), "neither a PyTorch nor a safetensors file"),
        (zipped(**{"model.pth": b"x", "readme.txt": b"y"}), "unpack it first. It holds model.pth"),
        (zipped(m__data__pkl=b"", m__constants__pkl=b""), "did not write"),
        (zipped(**{"m__data.pkl": b"", "m__constants.pkl": b""}), "a TorchScript archive"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_not_weights(tmp_path, content, message):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"weights.pth: .*{message}"):
        read(path)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(WeightsError, match="absent.pt: no such file"):
        read(tmp_path / "absent.pt")
    with pytest.raises(WeightsError, match="a folder"):
        read(tmp_path)


def test_compressed_archive(tmp_path):
    """Checksums would be read from gigabytes that a few bytes unpack to."""
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(1000))
    with pytest.raises(WeightsError, match="a compressed zip archive"):
        read(tmp_path / "x.pt")


@pytest.mark.parametrize("kind", KINDS)
def test_cut_short_anywhere(tmp_path, kind):
    path = tmp_path / "weights.pt"
    content = write(path, kind)
    for length in [*range(1, 400, 23), *range(400, len(content), 1009), len(content) - 1]:
        path.write_bytes(content[:length])
        # "refused": a file without checksum, cut within the name of a class
        with pytest.raises(WeightsError, match="cut short|damaged|text|neither|refused"):
            read(path)


def test_one_flipped_bit_anywhere(tmp_path):
    """Noticed, or without effect (in the padding)."""
    path = tmp_path / "weights.pt"
    content = write(path)
    noticed = 0
    for position in range(0, len(content), 97):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            assert equal(read(path).content, STATE)
        except WeightsError:
            noticed += 1
    assert noticed > 200


def test_flipped_bit_names_the_record(tmp_path):
    path = tmp_path / "weights.pt"
    content = bytearray(write(path))
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="the checksum of weights/data/0 does not match"):
        read(path)


@pytest.mark.parametrize("kind", ["torch legacy", "safetensors"])
def test_damaged_headers(tmp_path, kind):
    """These formats have no checksum, but nothing other than our error may come of damage."""
    path = tmp_path / "weights.pt"
    content = write(path, kind)
    for position in range(0, 600, 3):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            read(path)
        except WeightsError:
            pass


@pytest.mark.parametrize("legacy", [False, True])
def test_offending_globals_are_named(tmp_path, legacy):
    path = tmp_path / "w.pt"
    torch.save({"model": torch.nn.Conv3d(1, 2, 3)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError, match="a whole pickled module, .*conv.Conv3d.*state_dict"):
        read(path)
    content = {"path": tmp_path, "parts": slice(3)}  # types of no library of ours
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError, match="pathlib.*PosixPath"):
        read(path)


def test_all_offending_globals_of_a_zip_are_named(tmp_path):
    torch.save({"path": tmp_path, "parts": slice(3)}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="slice") as caught:
        read(tmp_path / "w.pt")
    assert "PosixPath" in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_what_training_loops_save_beside_tensors(tmp_path, legacy):
    content = {
        "args": argparse.Namespace(lr=0.1, names=["a"]),
        "best": np.float64(0.5),
        "epoch": np.int64(3),
        "done": np.bool_(True),
        "state_dict": STATE,
    }
    path = tmp_path / "w.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    found = read(path).content
    assert found["best"] == 0.5 and found["epoch"] == 3 and found["done"]
    assert found["args"].lr == 0.1 and equal(found["state_dict"], STATE)


def test_numpy_scalars_under_their_old_name(tmp_path):
    """numpy before 2 kept them in numpy.core."""
    torch.save({"best": np.float64(0.5)}, tmp_path / "new.pt")
    with (
        zipfile.ZipFile(tmp_path / "new.pt") as new,
        zipfile.ZipFile(tmp_path / "old.pt", "w") as old,
    ):
        for name in new.namelist():
            old.writestr(name, new.read(name).replace(b"numpy._core.", b"numpy.core."))
    assert read(tmp_path / "old.pt").content == {"best": 0.5}


def test_nothing_stays_allowed_afterwards(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    torch.save({"args": argparse.Namespace()}, tmp_path / "w.pt")
    read(tmp_path / "w.pt")
    assert set(torch.serialization.get_safe_globals()) == before
