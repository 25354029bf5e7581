"""What every optimizer step ends with, beside the same by plain PyTorch."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from utils.training import step
from utils.training.run import Run
from utils.training.step import seed_everything


def test_the_seed_fixes_all_generators():
    draws = []
    for _ in range(2):
        seed_everything(2**32 - 1)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]


def trained(how: str, largest: float = 0.0):
    """Weights, running mean and answer after a step on a batch of `how`."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    state = SimpleNamespace(optimizer=optimizer, scaler=torch.amp.GradScaler("cpu", enabled=False))
    buffers = step.remember_buffers(network)
    x = torch.full((5, 3), float("nan")) if how == "nan" else torch.randn(5, 3)
    loss = (network(x) ** 2).mean()
    loss.backward()
    if how == "plain":  # what it is compared with
        norm = nn.utils.clip_grad_norm_(network.parameters(), largest or float("inf"))
        optimizer.step()
        return network.state_dict(), float(norm), True
    norm = step.clip_gradients(state, network, largest)
    numbers = step.mean_over_ranks({"loss": loss.detach(), "grad_norm": norm})
    return network.state_dict(), numbers["grad_norm"], step.update(state, numbers, buffers)


@pytest.mark.parametrize("largest", [0.0, 0.01])
def test_a_step_is_that_of_plain_pytorch(largest):
    one, norm, ok = trained("ours", largest)
    other, expected, _ = trained("plain", largest)
    assert ok and norm == expected
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_step_that_is_not_finite_leaves_no_trace():
    after, _, ok = trained("nan")
    torch.manual_seed(0)
    before = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).state_dict()
    assert not ok
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_cpu_that_can_only_emulate_bf16_is_told_so(monkeypatch, tmp_path, capsys):
    cfg = SimpleNamespace(precision="bf16", resume_training_from=None)
    cfg.results_dir, cfg.cache_dir, cfg.experiment = str(tmp_path), str(tmp_path), "x"
    for supported in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda s=supported: s)
        for precision, device in (("bf16", "cpu"), ("fp32", "cpu"), ("bf16", "cuda")):
            cfg.precision = precision
            Run.begin(cfg, torch.device(device), stop=None)
            warned = "set precision=fp32" in capsys.readouterr().out
            assert warned == ((precision, device) == ("bf16", "cpu") and not supported)
