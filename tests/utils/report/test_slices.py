"""The viewer of slices: what it is given, and in a browser that it moves, fetches nothing."""

import base64
import gzip
import json

import numpy as np
import pytest

from tests.browser import NEEDED, look
from utils.report import slices
from utils.report.page import Section, Slices, write_report
from utils.report.segmentation import worst_of_classes
from utils.report.slices import fits, pack, worst_first

SPACING = (1.0, 1.0, 2.0)
NAMES = ["organ", "lesion", "other"]
DICE = {"organ": 0.8, "lesion": 0.0, "other": 0.0}


def scene():
    """An organ that is found in part, a lesion of two voxels that is missed, one falsely found."""
    truth, prediction = np.zeros((2, 60, 50, 40), np.uint8)
    truth[20:40, 15:35, 10:30], prediction[22:40, 15:35, 10:30] = 1, 1
    truth[30, 20, 12:14], prediction[10:12, 40:42, 20:22] = 2, 3
    image = 100.0 * (truth > 0) + np.random.default_rng(0).normal(0, 5, truth.shape)
    return image, prediction, truth


def packed(**options):
    image, prediction, truth = scene()
    parts = (image, prediction, truth, SPACING, NAMES, "line 2", DICE)
    return pack(*parts, **options)


def volumes(case):
    data = gzip.decompress(base64.b64decode(case["voxels"]))
    return np.frombuffer(data, np.uint8).reshape(-1, *case["size"])


def test_voxels_are_those_around_what_is_outlined(monkeypatch):
    monkeypatch.setattr("utils.report.plots_segmentation.MARGIN_MM", 4.0)
    image, prediction, truth = scene()
    case = packed()
    box = np.s_[6:44, 11:46, 8:32]
    gray, found, true = volumes(case)
    assert np.array_equal(found, prediction[box]) and np.array_equal(true, truth[box])
    assert np.corrcoef(gray.ravel(), image[box].ravel())[0, 1] > 0.95
    assert len(np.unique(gray)) <= slices.GRAYS and case["mm"] == [1, 1, 2]
    assert json.loads(json.dumps(case)) == case


def test_the_worst_class_comes_first_and_is_shown_where_it_is():
    case = packed()
    texts = [one["text"] for one in case["classes"]]
    assert texts == ["lesion 0.000 missed", "other 0.000 falsely found", "organ 0.800"]
    _, found, true = volumes(case)
    for one, mask in zip(case["classes"], (true, found, true), strict=True):
        for axis in range(3):
            assert (np.take(mask, one["at"][axis], axis) == one["indices"][0]).any()


def test_the_case_with_the_worst_class_comes_first():
    scores = ([0.9, 0.3], [0.5, 0.4], [None, 0.0], [None, None])
    parts = [*scene(), SPACING, ["a", "b"]]
    cases = [
        pack(*parts, str(n), dict(zip("ab", dice, strict=True))) for n, dice in enumerate(scores)
    ]
    assert [case["title"] for case in worst_first(cases)] == ["2", "0", "1", "3"]


def test_a_large_case_is_made_coarser_and_no_class_is_lost(monkeypatch):
    monkeypatch.setattr(slices, "MAX_VOXELS", 6000)
    case = packed()
    gray, found, true = volumes(case)
    assert gray.size <= 6000 and "voxels each" in case["note"]
    assert set(np.unique(true)) == {0, 1, 2} and set(np.unique(found)) == {0, 1, 3}
    ratio = (true == 1).sum() * np.prod(case["mm"]) / (20 * 20 * 20 * 2)
    assert 0.8 < ratio < 1.2


def test_regions_that_overlap():
    """Index 2 lies in both classes: the second class is within the first."""
    image, prediction, truth = scene()
    prediction[prediction == 3] = 0
    parts = (image, prediction, truth, SPACING, ["whole", "core"], "x", {"whole": 0.5})
    case = pack(*parts, indices=[[1, 2], [2]])
    assert [one["text"] for one in case["classes"]] == ["whole 0.500", "core"]
    whole, core = (one["color"] for one in case["classes"])
    assert case["colors"] == [[0, 0, 0], whole, core]


@pytest.mark.parametrize("shape", [(8, 9, 1), (1, 1, 1)])
@pytest.mark.parametrize("truth", [None, 0, 1, 255])
def test_odd_cases(shape, truth):
    truth = None if truth is None else np.full(shape, truth, np.uint8)
    empty = np.zeros(shape, np.uint8)
    case = pack(np.zeros(shape, np.int16), empty, truth, SPACING, ["a"], "x", {"a": None})
    assert len(volumes(case)) == 2 + (truth is not None)


def test_the_page_has_a_largest_size(monkeypatch):
    case = packed()
    monkeypatch.setattr(slices, "MAX_MB", 2.5 * len(case["voxels"]) / 1e6)
    assert fits([case] * 2) and not fits([case] * 3)
    monkeypatch.setattr(slices, "MAX_MB", 0)
    assert fits([case])


def test_each_class_at_its_worst():
    """The worst class first, then the others', then the rest."""
    scores = {2: (0.9, 0.1), 5: (0.2, 0.5), 7: (0.8, 0.0), 9: (None, None)}
    cases = {
        line: [{"class": n, "dice": d} for n, d in zip("ab", dice, strict=True)]
        for line, dice in scores.items()
    }
    assert worst_of_classes(cases) == [7, 5]


# ---- in a browser

ACTIONS = """
  const canvas = document.querySelector("canvas");
  const slider = document.querySelector("[type=range]");
  const shown = () => `${slider.nextElementSibling.value} ${canvas.toDataURL().length}`;
  told.slices = [];
  const note = () => told.slices.push(shown());
  note();
  canvas.dispatchEvent(new WheelEvent("wheel", { deltaY: -1, cancelable: true })); note();
  canvas.dispatchEvent(new KeyboardEvent("keydown", { key: "PageUp" })); note();
  slider.value = 3; slider.dispatchEvent(new Event("input")); note();
  document.querySelectorAll(".classes button")[2].click(); note();
  document.querySelector(".truth").click(); note();
  const list = document.querySelector(".case");
  told.cases = list.options.length;
  list.selectedIndex = 1; list.dispatchEvent(new Event("change")); await wait(); note();
"""


@NEEDED
def test_in_a_browser(tmp_path):
    """On a phone's width, in both themes: nothing is clipped."""
    path = tmp_path / "report.html"
    other = packed() | {"title": "line 3 </script><b>"}
    write_report(path, "A test", [Section("Slices", ["Look.", Slices([packed(), other])])])
    told = look(path, tmp_path, ACTIONS)
    assert told["cases"] == 2 and 360 < told["width"] <= 390
    dark = look(path, tmp_path, dark=True)["back"]
    assert (told["back"], dark) == ("rgb(255, 255, 255)", "rgb(22, 24, 28)")
    places = [text.rpartition(" ")[0] for text in told["slices"]]
    first = int(places[0].split()[0])
    size = places[0].split()[-1]
    expected = [first, first + 1, first + 11, 4]
    assert places[:4] == [f"{n} of {size}" for n in expected]
    assert places[4] == places[5] != places[3] and places[6] == places[0]
    assert told["slices"][4] != told["slices"][5]  # without the truth, it looks different


@NEEDED
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("<p style='width: 500px'>wide</p>", "'overflow': 1"),
        ("<script>nothing.there();</script>", "nothing is not defined"),
        ("<script>console.error('seen')</script>", "seen"),
    ],
)
def test_what_is_wrong_with_a_page_is_found(wrong, said, tmp_path):
    (tmp_path / "x.html").write_text(f"<!doctype html><h1>x</h1>{wrong}")
    with pytest.raises(AssertionError, match=said):
        look(tmp_path / "x.html", tmp_path)
