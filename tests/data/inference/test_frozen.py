"""Frozen probes: what they find, what they choose by, and what they must not see."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from data.cases import Case
from data.entry import Channel
from data.inference import frozen
from data.prepare.targets import Targets
from utils.classes import IGNORE, Classes
from utils.errors import NotFinite

SIZE = (8, 8, 8)
CLASSES = Classes(("one", "two"), ((3,), (5, 6)), (9,))


class Entry:
    """A volume of 12 x 8 x 8 voxels whose mask is a function of its intensity."""

    channels = [Channel(1.0, 0.0, 0, "CT", "CT")]

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        coarse = rng.integers(0, 100, (6, 4, 4))
        self.image = coarse.repeat(2, 0).repeat(2, 1).repeat(2, 2).astype(np.int16)
        self.labels = np.select([self.image > 75, self.image > 50], [3, 6], 0).astype(np.int16)
        self.labels[0] = 9
        self.shape = self.image.shape

    def _box(self, start, size):
        return tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))

    def read_region(self, start, size):
        return self.image[self._box(start, size)][None]

    def read_seg(self, start, size):
        return self.labels[self._box(start, size)]


class Backbone(nn.Module):
    """Maps of which one says where the intensity is high and one is noise."""

    def encode(self, x):
        noise = torch.rand(len(x), 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        return [torch.cat([x > 0.5, x > 0.75, x], dim=1).float(), noise]


@pytest.fixture
def run():
    data = SimpleNamespace(hu_window=(0, 100))
    cfg = SimpleNamespace(precision="fp32", seed=0, data=data, batch_size=2)
    cfg.patches = SimpleNamespace(size=SIZE)
    stop = SimpleNamespace(raise_if_received=lambda: None)
    lines = []
    device = torch.device("cpu")
    return SimpleNamespace(cfg=cfg, device=device, stop=stop, say=lines.append, lines=lines)


def cases(number):
    return [Case(f"P{i}", "", "0", i) for i in range(number)]


class Cache:
    def __init__(self):
        self.asked = set()

    def get(self, case):
        self.asked.add(case.patient)
        return Entry(case.row)


@pytest.mark.parametrize("number", [1, 3])
def test_a_dense_probe_finds_classes_that_maps_show(run, number):
    cache = Cache()
    predict = frozen.dense_probe(run, Backbone(), cache, cases(number), CLASSES)
    assert cache.asked == {case.patient for case in cases(number)}
    entry = Entry(99)
    x = torch.from_numpy(entry.image[None, None, 4:].astype(np.float32)) / 100
    margins = predict(torch.cat([x, x.flip(2)]))
    assert margins.shape == (2, 3, *SIZE) and (margins[:, 0] == 0).all()
    truth = torch.from_numpy(CLASSES.to_index(entry.labels[4:]))
    for found, true in zip(margins.argmax(1), (truth, truth.flip(0)), strict=True):
        assert (found == true).float().mean() > 0.97


def test_the_penalty_is_chosen_on_left_out_patients(run, monkeypatch):
    fits = []
    fit = frozen.Ridge.fit

    def noted(self, penalty=1e-2, without=None):
        fits.append((penalty, without))
        return fit(self, penalty, without)

    monkeypatch.setattr(frozen.Ridge, "fit", noted)
    frozen.dense_probe(run, Backbone(), Cache(), cases(3), CLASSES)
    assert {without for _, without in fits[:-1]} == {0, 1, 2} and fits[-1][1] is None
    assert {penalty for penalty, _ in fits} == set(frozen.PENALTIES)


def test_rows_of_a_patient_are_left_out_together():
    rows = [Case(p, "", "0", i) for i, p in enumerate("abacb")]
    assert frozen.groups_of(rows) == [0, 1, 0, 2, 1]


def test_ignored_voxels_are_neither_fitted_nor_counted(run, monkeypatch):
    seen = []
    counts = frozen.DenseProbe.counts

    def noted(self, scores, labels):
        seen.append(labels)
        return counts(self, scores, labels)

    monkeypatch.setattr(frozen.DenseProbe, "counts", noted)
    frozen.dense_probe(run, Backbone(), Cache(), cases(2), CLASSES)
    assert all((labels != IGNORE).all() for labels in seen)


def test_outputs_that_are_not_finite_name_the_patient(run):
    class Broken(Backbone):
        def encode(self, x):
            return [m / 0 for m in super().encode(x)]

    with pytest.raises(NotFinite, match="P0"):
        frozen.dense_probe(run, Broken(), Cache(), cases(2), CLASSES)


def test_a_label_probe_finds_what_features_show():
    rng = np.random.default_rng(0)
    labels = [{"side": "ab"[i % 2], "age": str(10 + 3 * i), "rare": "" if i < 9 else "xy"[i % 2]}
              for i in range(12)]  # fmt: skip
    rows = [Case(f"P{i}", "", "0", i, labels=found) for i, found in enumerate(labels)]
    targets, problems = Targets.fit(rows, ["side", "rare"], ["age"])
    assert not problems
    x = torch.from_numpy(rng.normal(size=(12, 30))).float()
    x[:, 0] = torch.tensor([float(i % 2) for i in range(12)])
    x[:, 1] = torch.arange(12.0)
    found = frozen.label_probe(targets, rows, 100 * x, 100 * x)
    assert found["side"].shape == (12, 2) and np.allclose(found["side"].sum(1), 1)
    assert ((found["side"][:, 1] > found["side"][:, 0]) == np.arange(12) % 2).all()
    assert np.corrcoef(found["age"], 10 + 3 * np.arange(12))[0, 1] > 0.9
    assert found["rare"].shape == (12, 2)
