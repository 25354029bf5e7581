"""An interrupted run of classification.py, resumed, is the uninterrupted run bit for bit."""

import os
import signal

import pytest

import classification
from tests.conftest import equal, read_cases, without_times
from tests.stages import small_classification as small
from utils import checkpoint
from utils.training import loop

# the backbone is frozen in the first epoch; dropout draws from the global random state
SETTINGS = ("experiment=x", "head.dropout=0.3", "finetune.freeze_epochs=1", "n_epochs=3")
SETTINGS += ("finetune.balance=bright", "finetune.early_stopping=9")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return small.make_scans(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def uninterrupted(labelled, tmp_path_factory):
    """What a run of 12 steps, 4 per epoch, leaves behind."""
    results = tmp_path_factory.mktemp("uninterrupted")
    assert small.run(labelled, results, *SETTINGS) == 0
    return result(results / "x")


def result(folder) -> dict:
    """All of a run that must not depend on when and how it ran."""
    last = checkpoint.load(folder / "checkpoints" / "last.pt")
    best = checkpoint.load(folder / "checkpoints" / "best.pt")
    kept = {name: last[name] for name in ("modules", "optimizer", "rng", "progress", "control")}
    kept |= {"best": best["modules"], "seen": last["seen_patients"]}
    rows = [without_times(row) for row in read_cases(folder / "metrics.csv")]
    return kept | {"log": (folder / "log.jsonl").read_text(), "metrics": rows}


def stop_at(monkeypatch, name: str, call: int) -> None:
    """Send this process SIGTERM in that call (0 the first) of a function of classification.py."""
    calls, function = [], getattr(classification, name)

    def wrapped(*args):
        calls.append(1)
        if len(calls) == call + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args)

    monkeypatch.setattr(classification, name, wrapped)


@pytest.mark.parametrize(
    ("name", "call", "n_workers", "step"),
    [
        pytest.param("train_step", 1, 0, 2, id="in mid-epoch, frozen"),
        pytest.param("train_step", 5, 2, 6, id="in mid-epoch, with workers"),
        pytest.param("train_step", 3, 0, 4, id="in the last step of an epoch"),
        pytest.param("validate", 0, 0, 0, id="before training"),
        pytest.param("validate", 2, 0, 8, id="in the validation"),
    ],
)
def test_interrupted_is_uninterrupted(
    name, call, n_workers, step, labelled, monkeypatch, tmp_path, uninterrupted
):
    overrides = (*SETTINGS, "resume_training_from=auto", f"n_workers={n_workers}")
    with monkeypatch.context() as patch:
        stop_at(patch, name, call)
        assert small.run(labelled, tmp_path, *overrides) == loop.EXIT_STOPPED
    assert checkpoint.load(tmp_path / "x" / "checkpoints" / "last.pt")["step"] == step
    assert small.run(labelled, tmp_path, *overrides) == 0
    assert equal(result(tmp_path / "x"), uninterrupted)
