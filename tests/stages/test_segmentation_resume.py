"""An interrupted run of segmentation.py, resumed, is the uninterrupted run bit for bit."""

import os
import signal

import pytest

import segmentation
from tests.conftest import equal, read_cases, without_times
from tests.stages import small_segmentation as small
from utils import checkpoint
from utils.training import loop

WAYS = {
    "adamw": (),
    "all else": (
        "optimizer=sgd",
        "accumulate=2",
        "patches.per_case=2",
        "loss.deep_supervision=true",
        "finetune.freeze_epochs=1",
        "augment.flip=[true,true,true]",
        "augment.mirror_pairs=[[ball, shell]]",
        "augment.hu_window=0.5",
        "backbone=segresnet",
        "segresnet.variant=ds",
        "segresnet.feature_size=8",
        "segresnet.blocks=[1, 1, 1]",
    ),
}


def result(experiment) -> dict:
    """All of a run that must not depend on when and how it ran."""
    last = checkpoint.load(experiment / "checkpoints" / "last.pt")
    kept = {name: last[name] for name in ("modules", "optimizer", "rng", "progress")}
    rows = [without_times(row) for row in read_cases(experiment / "metrics.csv")]
    return kept | {"log": (experiment / "log.jsonl").read_text(), "metrics": rows}


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return small.make_scans(tmp_path_factory.mktemp("masked"))


@pytest.fixture(scope="module")
def uninterrupted(masked, tmp_path_factory):
    """{name: what a run of 8 steps, 4 per epoch, leaves behind}"""
    results = tmp_path_factory.mktemp("uninterrupted")
    for name, way in WAYS.items():
        assert small.run(masked, results, f"experiment={name}", *way) == 0
    return {name: result(results / name) for name in WAYS}


def stop_at(monkeypatch, name: str, call: int) -> None:
    """Send this process SIGTERM in that call (0 the first) of a function of segmentation.py."""
    calls, function = [], getattr(segmentation, name)

    def wrapped(*args):
        calls.append(1)
        if len(calls) == call + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args)

    monkeypatch.setattr(segmentation, name, wrapped)


@pytest.mark.parametrize(
    ("way", "name", "call", "n_workers", "step"),
    [
        pytest.param("adamw", "train_step", 1, 0, 2, id="in mid-epoch"),
        pytest.param("adamw", "train_step", 5, 2, 6, id="in mid-epoch, with workers"),
        pytest.param("adamw", "train_step", 3, 0, 4, id="in the last step of an epoch"),
        pytest.param("adamw", "segment", 1, 0, 4, id="in the validation"),
        pytest.param("all else", "train_step", 2, 0, 3, id="while frozen"),
        pytest.param("all else", "train_step", 6, 0, 7, id="after that"),
    ],
)
def test_interrupted_is_uninterrupted(
    way, name, call, n_workers, step, masked, monkeypatch, tmp_path, uninterrupted
):
    overrides = ("experiment=x", "resume_training_from=auto", f"n_workers={n_workers}", *WAYS[way])
    with monkeypatch.context() as patch:
        stop_at(patch, name, call)
        assert small.run(masked, tmp_path, *overrides) == loop.EXIT_STOPPED
    assert checkpoint.load(tmp_path / "x" / "checkpoints" / "last.pt")["step"] == step
    assert small.run(masked, tmp_path, *overrides) == 0
    assert equal(result(tmp_path / "x"), uninterrupted[way])


def test_other_classes_cannot_be_resumed(masked, tmp_path):
    overrides = ("experiment=x", "val_folds=[]", "n_epochs=1")
    assert small.run(masked, tmp_path, *overrides) == 0
    with pytest.raises(checkpoint.CheckpointError, match=r"classes.names: .*'ball', 'shell'"):
        small.run(masked, tmp_path, *overrides, "resume_training_from=auto", "classes={ball: 300}")


def test_a_signal_ends_a_validation_between_two_windows(masked, monkeypatch, tmp_path):
    """A large volume takes minutes on a CPU, and schedulers do not wait that long."""
    windows, whole = [], segmentation.probabilities

    def signalled(*args):
        predict = whole(*args)

        def at_first(x):
            windows.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
            return predict(x)

        return at_first

    monkeypatch.setattr(segmentation, "probabilities", signalled)
    assert small.run(masked, tmp_path, "experiment=x") == loop.EXIT_STOPPED
    assert len(windows) == 1
    assert checkpoint.load(tmp_path / "x" / "checkpoints" / "last.pt")["step"] == 4
