"""What a run says after its first steps."""

from pathlib import Path
from types import SimpleNamespace as Space

import pytest
import torch

from utils.training.forecast import Forecast
from utils.training.loop import Stopwatch


def said_by(seconds, steps_per_epoch=100, n_epochs=10, folder=Path("none")):
    """What is said, after which step, by a run whose steps take so long."""
    found = []
    run = Space(cfg=Space(n_epochs=n_epochs, backbone="unet"), device=torch.device("cpu"))
    run.checkpoints, run.forecast = folder, Forecast()
    state = Space(step=0, steps_per_epoch=steps_per_epoch)
    run.say = lambda text: found.append((state.step + 1, text))
    for taken in seconds:
        if state.step % steps_per_epoch == 0:  # as in each `Epoch`
            watch = Stopwatch()
            watch.seconds = {"data": 0.0, "compute": 0.0}
        watch.seconds["data"] += 0.25 * taken
        watch.seconds["compute"] += 0.75 * taken
        if run.forecast:
            run.forecast.note(run, state, watch)
        state.step += 1
    return found


def test_it_is_said_once_and_the_first_step_does_not_count(tmp_path):
    (tmp_path / "last.pt").write_bytes(bytes(5_000_000))
    [(step, text)] = said_by([30] + [2] * 20, folder=tmp_path)
    assert step == 10
    assert text.startswith(
        "a step takes 2 s (25% of it waiting for data), an epoch 3.3 min, the rest of the run "
        "33.0 min, validation apart; at most "
    )
    assert text.endswith("checkpoints take 3 x 0.005 GB of the disk")


@pytest.mark.parametrize(
    ("seconds", "steps_per_epoch", "step"),
    [([30, 70, 70], 100, 2), ([1, 1, 1, 1, 1, 1], 4, 4), ([1, 1, 1], 1, 2)],
    ids=["slow steps", "a short epoch", "epochs of a step"],
)
def test_it_does_not_wait_for_long(seconds, steps_per_epoch, step):
    [(said, text)] = said_by(seconds, steps_per_epoch)
    assert said == step and text.startswith(f"a step takes {seconds[1]} s (25% of it waiting")


def test_days_on_a_cpu_are_warned_of():
    (_, text), (_, warning) = said_by([100] * 3, 1000, 10)
    assert "the rest of the run 11.6 days" in text and warning.startswith("WARNING: ")
    assert len(said_by([1] * 20, 100, 10)) == 1
