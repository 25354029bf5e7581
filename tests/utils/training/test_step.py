import json
import os
import random
import signal

import numpy as np
import pytest
import torch
from torch import nn

from models.common import parameter_groups
from utils.checkpoint import hash_patients
from utils.signals import Stopped, StopSignal
from utils.training.loop import Averages, Stopwatch
from utils.training.state import rng_state, set_rng_state
from utils.training.step import seed_everything


def test_the_seed_fixes_all_generators():
    draws = []
    for _ in range(2):
        seed_everything(2**32 - 1)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]


def test_random_state_comes_back():
    state = rng_state()
    one = torch.rand(3)
    set_rng_state(state)
    assert torch.equal(torch.rand(3), one)


def test_hashes_tell_patients_apart_without_naming_them():
    hashes = hash_patients(["Ann", "Bob", "Ann"])
    assert len(hashes) == 2 and hashes == hash_patients(["Bob", "Ann"])
    assert not {"Ann", "Bob"} & set(hashes)


def test_vectors_get_no_weight_decay():
    model = nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2), nn.Linear(2, 2))
    model[2].requires_grad_(False)
    decayed, others = parameter_groups(model)
    assert [p.shape for p in decayed["params"]] == [model[0].weight.shape]
    assert len(others["params"]) == 3 and others["weight_decay"] == 0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_is_remembered(name):
    stop = StopSignal()
    stop.immediate = False
    assert not stop
    stop.raise_if_received()
    os.kill(os.getpid(), getattr(signal, name))
    assert stop
    with pytest.raises(Stopped, match=name):
        stop.raise_if_received()


def test_before_there_is_anything_to_save_a_signal_stops_at_once():
    StopSignal()
    with pytest.raises(Stopped, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)


def test_averages_go_on_from_saved_ones_and_leave_out_what_is_undefined():
    whole, first = Averages(), Averages()
    values = [{"loss": 0.1}, {"loss": 0.7, "extra": 2.0}, {"loss": 0.3, "extra": float("nan")}]
    for i, value in enumerate(values):
        whole.add(value)
        if i == 1:
            first = Averages(json.loads(json.dumps(first.state)))
        first.add(value)
    assert whole.means() == first.means() == {"loss": (0.1 + 0.7 + 0.3) / 3, "extra": 2.0}
    assert Averages().means() == {}


def test_stopwatch_books_every_second():
    watch = Stopwatch()
    assert watch.share("data") == 0
    watch.lap("data"), watch.lap("compute"), watch.lap("data")
    assert watch.total() == pytest.approx(watch.seconds["data"] + watch.seconds["compute"])
    assert watch.share("data") + watch.share("compute") == pytest.approx(1)
