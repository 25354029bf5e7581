"""What training changes: random states, the optimizer's, and which epoch is the best."""

import math
from types import SimpleNamespace

import pytest
import torch

from utils.training.state import State, note_best, resume, rng_state, save, set_rng_state


def test_random_state_comes_back():
    state = rng_state()
    one = torch.rand(3)
    set_rng_state(state)
    assert torch.equal(torch.rand(3), one)


def test_a_run_whose_optimizer_was_not_fused_goes_on_with_one_that_is(tmp_path):
    def state(seed, fused):
        torch.manual_seed(seed)
        network = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu")  # that of precision=fp16 hands a fused step its scale
        return State({"network": network}, optimizer, scaler, 1, {"settings": {}})

    def step(state):
        state.optimizer.zero_grad()
        loss = state.modules["network"](torch.ones(1, 3)).square().sum()
        state.scaler.scale(loss).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        return state.modules["network"].weight.detach()

    old, new = state(0, None), state(1, True)
    step(old)
    save(old, tmp_path)
    resume(new, tmp_path / "last.pt")
    assert new.optimizer.param_groups[0]["fused"] is True
    torch.testing.assert_close(step(new), step(old))


@pytest.mark.parametrize(
    ("scores", "best", "epoch"),
    [
        pytest.param([0.2, 0.5, 0.4, 0.5], 0.5, 2, id="the first of equal ones"),
        pytest.param([None, None, 0.1, 0.0], 0.1, 3, id="none is known at first"),
        pytest.param([math.nan, -3.0, math.nan], -3.0, 2, id="never one that is not finite"),
        pytest.param([[0.8, -2.0], [0.8, -1.0], [0.7, 0.0]], [0.8, -1.0], 2, id="in order"),
    ],
)
def test_the_best_epoch_is_noted(scores, best, epoch):
    state, kept = SimpleNamespace(best=None, best_epoch=0), []
    for n, score in enumerate(scores, 1):
        kept += [n] if note_best(state, score, n) else []
    assert (state.best, state.best_epoch) == (best, epoch)
    unknown = [n for n in range(1, epoch) if scores[n - 1] is None]
    assert kept[-1] == epoch and set(unknown) <= set(kept)  # until there is one, the newest
