import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from utils.report.page import Section, number, text_of, write_report
from utils.report.plots import plot_curves

NAN = float("nan")
NASTY = "<script>alert('x & \"y\"')</script>"


class Page(HTMLParser):
    """Tags, attributes and text of a page; every element must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def page(tmp_path):
    plot_curves(tmp_path / "curves & more.png", [{"epoch": 0, "loss": 1.0}])
    sections = [
        Section("Warnings", [[f"teacher entropy at ln K {NASTY}"]], warning=True),
        Section(
            f"Config {NASTY}", [{"csv_path": NASTY, "data": {"spacing": [1, 1, 1], NASTY: None}}]
        ),
        Section(
            "Metrics",
            [
                [
                    {"epoch": 0, "loss": 1.23456, "none": None, "no words": "", "zeros": 0},
                    {"epoch": 1, "none": NAN, "no words": "", "zeros": 0},
                ]
            ],
        ),
        Section("No metrics", [[{"epoch": 0, "loss": None}], [], {}]),
        Section("Table", [pd.DataFrame({"a": [1], NASTY: ["µ ± é 肝"]})]),
        Section(
            "Pictures", [tmp_path / "curves & more.png", (tmp_path / "curves & more.png", NASTY)]
        ),
        Section("Nothing skipped", []),
        Section("Nothing skipped either", [[]]),
    ]
    write_report(tmp_path / "report.html", f"Run {NASTY}", sections)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_text_is_escaped(page):
    assert "<script" not in page
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert sum(NASTY in t for t in parsed.texts) >= 7
    assert ("alt", NASTY) in parsed.attributes


def test_page_is_self_contained(page):
    assert not re.search(r"https?://|@import|url\(", page)
    references = [v for k, v in Page(page).attributes if k in ("src", "href")]
    assert all(v.startswith(("data:image/png;base64,", "#")) for v in references)
    assert sum(v.startswith("data:") for v in references) == 2


def test_wide_pictures_are_told_from_small_ones(tmp_path):
    """On a phone they scroll; small ones, which would be blown up, stay whole."""
    for name, width in (("small", 400), ("wide", 1200)):
        Image.fromarray(np.zeros((9, width, 3), np.uint8)).save(tmp_path / f"{name}.png")
    items = [tmp_path / "small.png", (tmp_path / "wide.png", "a caption")]
    write_report(tmp_path / "r.html", "run", [Section("a", items)])
    text = (tmp_path / "r.html").read_text()
    assert re.findall(r"<figure(.*?)><img alt", text) == ["", ' class="wide"']


def test_tables_and_empty_sections(page):
    texts = [t.strip() for t in Page(page).texts if t.strip()]
    assert "data.spacing" in texts and "[1, 1, 1]" in texts
    assert "1.235" in texts and texts.count("–") == 2  # None in a dict, and the absent cell
    assert "µ ± é 肝" in texts
    left_out = ("Nothing skipped", "No metrics", "none", "no words")
    assert not any(t.startswith(left_out) for t in texts) and "zeros" in texts


def test_digits():
    values = [0.0, 0.86812, -0.0312, 9.9999, 12.345, 1234.5, 0.00123, 3.14e-5, float("inf")]
    texts = "0.000 0.868 -0.031 10.0 12.3 1234 0.0012 3.1e-05 inf".split()
    assert [number(x) for x in values] == texts
    assert text_of(np.float32(0.5)) == "0.500" and text_of(3) == "3" and text_of(NAN) == "–"


def test_the_headline_stands_above_all_else(tmp_path):
    headline = {"network": NASTY, "mean Dice": 0.86812, "absent": None}
    write_report(tmp_path / "r.html", "run", [Section("a", ["b"])], headline)
    texts = [t.strip() for t in Page((tmp_path / "r.html").read_text()).texts if t.strip()]
    assert texts[texts.index("network") :][:4] == ["network", NASTY, "mean Dice", "0.868"]
    assert texts.index("network") < texts.index("a") and "absent" not in texts


def test_unknown_items_and_missing_pictures_are_errors(tmp_path):
    with pytest.raises(ValueError, match="ndarray"):
        write_report(tmp_path / "r.html", "run", [Section("a", [np.zeros(3)])])
    with pytest.raises(OSError, match="absent.png"):
        write_report(tmp_path / "r.html", "run", [Section("a", [tmp_path / "absent.png"])])
    assert not list(tmp_path.iterdir())
