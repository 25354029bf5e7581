"""An interrupted run of dino.py, resumed, is the uninterrupted run bit for bit."""

import os
import signal

import pytest

import dino
from tests.conftest import equal, result
from utils import checkpoint
from utils.training import loop

SETTINGS = ("probe.every=5",)  # probes before and after training


@pytest.fixture(scope="module")
def uninterrupted(arguments, tmp_path_factory):
    """What a run of 8 steps, 4 per epoch, leaves behind."""
    results = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_crops", "draw_progress"):
            patch.setattr(dino, name, lambda *args: None)
        assert dino.main(arguments(results, "experiment=x", *SETTINGS)) == 0
    return result(results / "x")


def stop_at(monkeypatch, name: str, call: int) -> None:
    """Send this process SIGTERM in that call (0 the first) of a function of dino.py."""
    calls, function = [], getattr(dino, name)

    def wrapped(*args):
        calls.append(1)
        if len(calls) == call + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args)

    monkeypatch.setattr(dino, name, wrapped)


@pytest.mark.parametrize(
    ("name", "call", "n_workers", "step"),
    [
        pytest.param("train_step", 1, 0, 2, id="in mid-epoch"),
        pytest.param("train_step", 5, 2, 6, id="in mid-epoch, with workers"),
        pytest.param("train_step", 3, 2, 4, id="in the last step of an epoch"),
        pytest.param("validate", 0, 0, 0, id="before training"),
        pytest.param("validate", 1, 2, 4, id="in the validation"),
        pytest.param("probe", 1, 0, 8, id="in the last probes"),
    ],
)
def test_interrupted_is_uninterrupted(
    name, call, n_workers, step, train, monkeypatch, tmp_path, uninterrupted
):
    overrides = ("experiment=x", "resume_training_from=auto", f"n_workers={n_workers}", *SETTINGS)
    with monkeypatch.context() as patch:
        stop_at(patch, name, call)
        assert train(*overrides) == loop.EXIT_STOPPED
    assert checkpoint.load(tmp_path / "x" / "checkpoints" / "last.pt")["step"] == step
    assert train(*overrides) == 0
    assert equal(result(tmp_path / "x"), uninterrupted)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(train, tmp_path, capsys, uninterrupted):
    overrides = ("experiment=x", *SETTINGS)
    assert train(*overrides) == 0
    last = tmp_path / "x" / "checkpoints" / "last.pt"
    content = last.read_bytes()
    half = len(content) // 2
    last.write_bytes(content[:half] + bytes(len(content) - half - 5000) + content[-5000:])
    assert train(*overrides, "resume_training_from=auto") == 0
    shown = capsys.readouterr().out
    assert f"{last}: " in shown and "previous.pt, step 4" in shown
    assert equal(result(tmp_path / "x"), uninterrupted)
