"""Windows, features and scores of a frozen network, on volumes and networks with known answers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.cases import Case
from data.inference import probing
from data.inference.windows import fixed_view
from tests.data.views.test_crops import FakeEntry
from utils.signals import Stopped
from utils.training.run import Run

SIZE = (16, 16, 16)
HU_WINDOW = (-1000.0, 1000.0)
CPU = torch.device("cpu")
CFG = SimpleNamespace(
    precision="fp32",
    batch_size=2,
    crops=SimpleNamespace(global_size=SIZE),
    data=SimpleNamespace(hu_window=HU_WINDOW),
    probe=SimpleNamespace(dense_cases=2, max_cases=4),
    probe_targets=["size"],
)


class Labelled(FakeEntry):
    """Air with boxes of brighter voxels, one per label value: label 1 at 300 HU, 2 at 600 HU."""

    def __init__(self, shape, boxes):
        self.seg = np.zeros(shape, np.int16)
        for label, box in boxes.items():
            self.seg[box] = label
        noise = np.random.default_rng(0).normal(0, 10, shape)
        super().__init__(np.int16(300 * self.seg + noise))
        self.class_coords = {label: np.argwhere(self.seg == label) for label in boxes}

    def read_seg(self, start, size):
        return self.seg[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]


class Cache:
    def __init__(self, entries):
        self.entries = entries

    def get(self, case):
        return self.entries[case.row]


class Network(torch.nn.Module):
    """Its one map is the input and where it is above 150 and 450 HU, or nothing."""

    def __init__(self, blind=False):
        super().__init__()
        self.blind = blind
        self.backbone = SimpleNamespace(encode=self.encode)

    def encode(self, x):
        return [torch.cat([x, x > 0.575, x > 0.725], dim=1) * (not self.blind)]

    def pool(self, x):
        return x.mean(dim=(2, 3, 4))


class NoStop:
    def __bool__(self):
        return False

    def raise_if_received(self):
        pass


class Stop(NoStop):
    def __bool__(self):
        return True

    def raise_if_received(self):
        raise Stopped("SIGTERM")


RUN = Run(CFG, CPU, NoStop())


def make_cases(*entries):
    cases = [Case(f"p{i}", "", "0", i, seg_path="mask") for i in range(len(entries))]
    return cases, Cache(dict(enumerate(entries)))


@pytest.fixture
def labelled():
    """Four cases of two sizes, one thinner than a window; masks at different places."""
    boxes = [np.s_[2:7, 3:9, 4:8], np.s_[10:20, 2:6, 3:9], np.s_[12:18, 8:14, 1:5]]
    boxes += [np.s_[4:9, 4:9, 2:8]]
    other = np.s_[20:24, 10:16, 2:9]
    shapes = [(28, 20, 18), (28, 20, 18), (26, 18, 12), (26, 18, 12)]
    return [Labelled(s, {1: b, 2: other}) for s, b in zip(shapes, boxes, strict=True)]


def test_windows_tile_a_volume_or_are_the_fullest():
    entry = FakeEntry(np.full((40, 16, 10), -1000, np.int16))
    entry.body[-1] = 255
    assert probing.windows(entry, SIZE, 9) == [(0, 0, 0), (16, 0, 0), (24, 0, 0)]
    assert probing.windows(entry, SIZE, 1) == [(24, 0, 0)]
    coords = np.array([[20, 3, 3], [17, 3, 3], [3, 3, 3]])
    assert probing.windows(entry, SIZE, 2, coords) == [(16, 0, 0), (0, 0, 0)]


def test_embeddings_are_means_over_windows(labelled):
    cases, cache = make_cases(*labelled)
    found = probing.embed(RUN, Network(), cache, cases)
    assert found.shape == (4, 3)
    for value, entry in zip(found[:, 0], labelled, strict=True):
        starts = [
            (x, y, z)
            for x in (0, entry.shape[0] - 16)
            for y in (0, entry.shape[1] - 16)
            for z in {0, max(0, entry.shape[2] - 16)}
        ]
        views = [fixed_view(entry, start, SIZE, HU_WINDOW).mean().item() for start in starts]
        assert value == pytest.approx(np.mean(views), rel=1e-5)


def test_embeddings_stop_when_asked(labelled):
    cases, cache = make_cases(*labelled)
    with pytest.raises(Stopped):
        probing.embed(Run(CFG, CPU, Stop()), Network(), cache, cases)


def test_dense_score_is_high_where_the_map_knows_the_labels(labelled):
    cases, cache = make_cases(*labelled)
    settings = (cache, cases[:2], cases[2:])
    assert probing.dense_score(RUN, Network(), *settings) == 1
    assert probing.dense_score(RUN, Network(blind=True), *settings) < 0.3


def test_dense_score_finds_one_small_label(labelled):
    """All its few voxels are drawn, far fewer than of the background."""
    entries = [Labelled((28, 20, 18), {2: np.s_[5:8, a : a + 3, 6:9]}) for a in (3, 9, 6, 12)]
    cases, cache = make_cases(*entries)
    score = probing.dense_score(RUN, Network(), cache, cases[:2], cases[2:])
    assert score == 1


def test_dense_score_without_masks(labelled):
    cases, cache = make_cases(*labelled)
    bare = [Case(c.patient, "", "0", c.row) for c in cases]
    for train, val in ((bare[:2], cases[2:]), (cases[:2], bare[2:])):
        assert probing.dense_score(RUN, Network(), cache, train, val) is None


def test_probe_scores_labels_and_masks(labelled):
    bright = [Labelled((28, 20, 18), {2: np.s_[4:20, 4:16, 4:14]}) for _ in range(4)]
    cases, cache = make_cases(*labelled, *bright)
    for i, case in enumerate(cases):
        case.labels["size"] = "large" if i >= 4 else "small"
    split = {"train": cases[::2], "val": cases[1::2]}
    network = Network()
    row = probing.probe(RUN, network, cache, split)
    assert row["probe_size_linear_auc"] == row["probe_size_knn_accuracy"] == 1
    assert 0 < row["probe_dense_dice"] <= 1
    assert network.training
    assert probing.probe(RUN, network, cache, {"train": cases, "val": []}) == {}


def test_spread_takes_items_evenly():
    assert probing.spread(list(range(3)), 5) == [0, 1, 2]
    assert probing.spread(list(range(11)), 3) == [0, 5, 10]
    assert probing.spread(list(range(11)), 0) == []
