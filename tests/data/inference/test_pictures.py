"""Nearest neighbours of val scans: which they are, and what is drawn of them."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from data.cases import Case
from data.inference import pictures
from tests.data.inference.test_probing import RUN, Cache, Labelled, Network, NoStop


def test_the_nearest_are_those_of_the_smallest_angle_between_standardised_features():
    train = np.array([[9.0, 1], [1, 1], [5, 2], [4, 0]]) + [100, 0]  # an offset that all share
    order, cosines = pictures.nearest(train, np.array([108.0, 1.1]), 3)
    z = (train - train.mean(0)) / train.std(0)
    q = ([108.0, 1.1] - train.mean(0)) / train.std(0)
    expected = [x @ q / np.linalg.norm(x) / np.linalg.norm(q) for x in z]
    assert order.tolist() == np.argsort(expected)[::-1][:3].tolist() and order[0] == 0
    assert cosines == pytest.approx(sorted(expected)[::-1][:3])


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """A function: stop, entries -> the texts on the picture, a list for each query, or None."""
    (tmp_path / "plots").mkdir()
    cfg = SimpleNamespace(**vars(RUN.cfg) | {"results_dir": tmp_path, "experiment": ""})
    told = []

    def draw(stop=None, val=1, spoil=1.0):
        boxes = [np.s_[2 : 4 + i, 3:9, 4:8] for i in (0, 9, 1, 8)]
        entries = [Labelled((28, 20, 18), {1: box}) for box in boxes]
        sizes = {"labels": {"size": "large"}}
        cases = [Case(f"DOE{i}", "", "0", i, **sizes) for i in range(len(boxes))]
        network = Network()
        network.pool = lambda x: spoil * x.mean(dim=(2, 3, 4))
        log = SimpleNamespace(image=lambda name, picture, step: told.append(picture.shape))
        run = replace(RUN, cfg=cfg, log=log, stop=stop or NoStop())
        parts = {"val": cases[:val], "train": cases[val:]}
        monkeypatch.setattr(pictures, "plot_neighbours", remember)
        pictures.draw_neighbours(run, network, Cache(dict(enumerate(entries))), parts, 3)
        return texts.pop() if texts else None

    plot, texts = pictures.plot_neighbours, []

    def remember(path, rows):
        texts.append([[text for text, *_ in row] for row in rows])
        return plot(path, rows)

    draw.told, draw.path = told, tmp_path / "plots" / "neighbours.png"
    return draw


def test_a_query_and_its_nearest_are_drawn_by_their_lines(drawn):
    (row,) = drawn()
    assert row[0] == "size large\nval, line 0"
    lines = [text.split("line ")[1].split(",")[0] for text in row[1:]]
    assert lines[0] == "2" and sorted(lines) == ["1", "2", "3"]
    assert drawn.path.exists() and len(drawn.told) == 1 and "DOE" not in str(row)


def test_nothing_is_drawn_without_val_cases_or_after_a_signal_or_of_nan(drawn):
    class Stop(NoStop):
        def __bool__(self):
            return True

    assert drawn(val=0) is drawn(stop=Stop()) is drawn(spoil=float("nan")) is None
    assert not drawn.path.exists() and not drawn.told
