import json

import pytest

from utils.training.loop import Averages, Stopwatch


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
