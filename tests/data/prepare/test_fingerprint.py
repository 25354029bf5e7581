"""The fingerprint of a training, and what is unlike it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from data.entry import Channel
from data.prepare.fingerprint import look, summary, unlike_training

SHAPE = (16, 24, 32)


class Entry(SimpleNamespace):
    """A volume in the cache, all of it body, of one value but for noise."""

    def read_region(self, start, size):
        return self.stored

    @property
    def body(self):
        return np.full([n // 8 for n in SHAPE], 255, np.uint8)


def entry(value=40.0, spacing=(1, 1, 2), modality="CT", seed=0):
    kind = "CT" if modality == "CT" else "other"
    scale = 1.0 if kind == "CT" else 1 / 4096
    noise = np.random.default_rng(seed).normal(0, 10, (1, *SHAPE))
    return Entry(
        stored=(value / scale + noise).astype(np.int16),
        channels=[Channel(scale, 0.0, 0, kind, modality)],
        shape=SHAPE,
        spacing=np.array(spacing, float),
        slice_spacing=np.array(spacing, float),
        body_box=[(0, n) for n in SHAPE],
    )


def print_of(*entries):
    return summary([look(one) for one in entries])


def test_it_holds_a_few_numbers_of_all_cases():
    found = print_of(entry(), entry(60.0, (1, 1, 4)))
    assert found == json.loads(json.dumps(found))
    assert found["cases"] == 2 and found["modality"] == [["CT"]]
    assert found["spacing"]["low"] == [1, 1, 2] and found["spacing"]["high"] == [1, 1, 4]
    assert found["spacing"]["quartiles"][1] == [1, 1, 3]
    assert found["size"]["high"] == [16, 24, 128]
    p5, p50, p95 = found["intensity"][0]["low"]  # 40 HU, noise of 10
    assert (p5, p50, p95) == pytest.approx((40 - 16.4, 40, 40 + 16.4), abs=1)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (entry(45.0, (1.1, 0.9, 2.2), seed=1), []),
        (entry(400.0), ["HU (5, 50, 95 % of the body's are below), in training 23 to 33, 39 to "]),
        (entry(spacing=(1, 1, 6)), ["spacing 1, 1, 6 mm", "extent 16, 24, 192 mm"]),
        (entry(0.5, modality="MR"), ["modality MR, in training CT"]),
    ],
)
def test_what_is_unlike_is_named(other, said):
    found = unlike_training(look(other), print_of(entry(), entry(50.0)))
    assert len(found) == len(said) and all(s in f for s, f in zip(said, found, strict=True))


def test_train_cases_are_not_unlike_themselves():
    rng = np.random.default_rng(0)
    some = [entry(rng.normal(0, 300), rng.uniform(0.5, 5, 3), seed=i) for i in range(9)]
    training = print_of(*some)
    assert not any(unlike_training(look(one), training) for one in some)
    # beyond them, but not by more than they differ among themselves
    assert unlike_training(look(entry(400.0, (1, 1, 1))), training) == []
