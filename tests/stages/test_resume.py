"""An interrupted run, resumed, is the uninterrupted run bit for bit."""

import functools
import os
import signal

import pytest

import segmentation
from tests.conftest import equal
from tests.stages import small

WAYS = {
    "dino": {"plain": "probe.every=5"},  # probes before and after training
    # the backbone is frozen in the first epoch; dropout draws from the global random state
    "classification": {
        "plain": "n_epochs=3 head.dropout=0.3 finetune.freeze_epochs=1 finetune.balance=bright "
        "finetune.early_stopping=9"
    },
    "segmentation": {
        "plain": "",
        "all else": f"{small.DS} optimizer=sgd accumulate=2 steps_per_epoch=4 "
        "loss.deep_supervision=true finetune.freeze_epochs=1 augment.flip=[true,true,true] "
        "augment.mirror_pairs=[[ball,shell]] augment.hu_window=0.5",
    },
}
POINTS = {  # way, function, its call (0 the first), n_workers, step that is saved; 4 per epoch
    "dino": {
        "in mid-epoch": ("plain", "train_step", 1, 0, 2),
        "in mid-epoch, with workers": ("plain", "train_step", 5, 2, 6),
        "in the last step of an epoch": ("plain", "train_step", 3, 2, 4),
        "before training": ("plain", "validate", 0, 0, 0),
        "in the validation": ("plain", "validate", 1, 2, 4),
        "in the last probes": ("plain", "probe", 1, 0, 8),
    },
    "classification": {
        "in mid-epoch, frozen": ("plain", "train_step", 1, 0, 2),
        "in mid-epoch, with workers": ("plain", "train_step", 5, 2, 6),
        "in the last step of an epoch": ("plain", "train_step", 3, 0, 4),
        "before training": ("plain", "validate", 0, 0, 0),
        "in the validation": ("plain", "validate", 2, 0, 8),
    },
    "segmentation": {
        "in mid-epoch": ("plain", "train_step", 1, 0, 2),
        "in mid-epoch, with workers": ("plain", "train_step", 5, 2, 6),
        "in the last step of an epoch": ("plain", "train_step", 3, 0, 4),
        "in the validation": ("plain", "segment", 1, 0, 4),
        "while frozen": ("all else", "train_step", 2, 0, 3),
        "after that": ("all else", "train_step", 6, 0, 7),
    },
}


@pytest.fixture(scope="module")
def uninterrupted(scans_of, tmp_path_factory):
    """A function: stage, way -> what a run leaves behind."""

    @functools.cache
    def whole(stage, way):
        results = tmp_path_factory.mktemp("uninterrupted")
        assert small.run(stage, scans_of(stage), results, "experiment=x", WAYS[stage][way]) == 0
        return small.result(results / "x")

    return whole


@pytest.mark.parametrize(
    ("stage", "way", "name", "call", "n_workers", "step"),
    [
        pytest.param(stage, *point, id=f"{stage}, {where}")
        for stage, points in POINTS.items()
        for where, point in points.items()
    ],
)
def test_interrupted_is_uninterrupted(
    stage, way, name, call, n_workers, step, run, monkeypatch, folder, uninterrupted
):
    overrides = f"resume_training_from=auto n_workers={n_workers} {WAYS[stage][way]}"
    with monkeypatch.context() as patch:
        small.stop_at(patch, stage, name, call)
        assert run(overrides) == small.STOPPED
    assert small.load(folder)["step"] == step
    assert run(overrides) == 0
    assert equal(small.result(folder), uninterrupted(stage, way))


@pytest.mark.parametrize("stage", ["dino"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    stage, run, folder, capsys, uninterrupted
):
    overrides = WAYS[stage]["plain"]
    assert run(overrides) == 0
    last = folder / "checkpoints" / "last.pt"
    content = last.read_bytes()
    half = len(content) // 2
    last.write_bytes(content[:half] + bytes(len(content) - half - 5000) + content[-5000:])
    assert run(overrides, "resume_training_from=auto") == 0
    shown = capsys.readouterr().out
    assert f"{last}: " in shown and "previous.pt, step 4" in shown
    assert equal(small.result(folder), uninterrupted(stage, "plain"))


@pytest.mark.parametrize("stage", ["classification"])
def test_a_run_killed_while_its_last_checkpoint_got_its_name_ends_with_one(run, folder, capsys):
    assert run("n_epochs=1") == 0
    checkpoints = folder / "checkpoints"
    (checkpoints / "last.pt").rename(checkpoints / "next.pt")
    assert run("n_epochs=1 resume_training_from=auto") == 0
    assert "using" in capsys.readouterr().out
    assert small.load(folder)["step"] == 4 and not (checkpoints / "next.pt").exists()


@pytest.mark.parametrize("stage", ["segmentation"])
def test_a_signal_ends_a_validation_between_two_windows(run, monkeypatch, folder):
    """A large volume takes minutes on a CPU, and schedulers do not wait that long."""
    windows, whole = [], segmentation.probabilities

    def signalled(*args, **kwargs):
        predict = whole(*args, **kwargs)

        def at_first(x):
            windows.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
            return predict(x)

        return at_first

    monkeypatch.setattr(segmentation, "probabilities", signalled)
    assert run() == small.STOPPED
    assert len(windows) == 1
    assert small.load(folder)["step"] == 4
