"""The journey of a new user, in small: from a folder of scans to a table, the check, training, a
test, predictions and a comparison, each as docs and terminal say; then all pages in a browser."""

import io
import shlex
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import segmentation
from data.demo.make import write_mask, write_series
from data.demo.phantom import make_phantom
from data.table.__main__ import main as make_table
from tests.browser import NEEDED, look
from tests.conftest import CANARY, read_cases
from tests.places import SHARED
from tests.stages import small
from utils.compare.__main__ import main as compare

NUM_CASES = 9
REAL = SHARED / "data"
VIEWER = """
  const canvas = document.querySelector("canvas"), slider = document.querySelector("[type=range]");
  const shown = () => slider.nextElementSibling.value + canvas.toDataURL();
  const before = shown();
  canvas.dispatchEvent(new WheelEvent("wheel", { deltaY: -1, cancelable: true }));
  told.moves = shown() !== before;
  told.truth = !document.querySelector(".truth").parentElement.hidden;
  told.cases = document.querySelector(".case").options.length;
"""


def real_scans(folder: Path, new: Path) -> list[str]:
    """Hippocampi and their masks; new ones are another of them and a DICOM series. Return what
    data.table needs for them."""
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
        *known, unseen = sorted((REAL / "hippocampus" / part).iterdir())[: NUM_CASES + 1]
        for path in known:
            shutil.copy(path, folder / part / f"{CANARY}{path.name}")
        if part == "images":
            shutil.copytree(REAL / "dicom" / "mr_hippocampus_crop", new / "series")
            shutil.copy(unseen, new)
    return ["--modality", "MR"]


def phantoms(folder: Path, new: Path) -> list[str]:
    """The same of tiny DICOM series of phantoms."""
    (folder / "masks").mkdir(parents=True)
    spacing, origin = (12.0, 12.0, 20.0), np.array([-190.0, -190.0, -120.0])
    for i in range(NUM_CASES + 2):
        hu, labels = make_phantom(np.random.default_rng(i), True, True, (32, 32, 12), spacing)
        name, place = f"{CANARY}-{i}", folder / "dicom" if i < NUM_CASES else new
        write_series(place / name, hu, spacing, origin, name, "M", 0)
        if i < NUM_CASES:
            write_mask(folder / "masks" / f"{name}.nii.gz", labels, spacing, origin)
    return []


@pytest.fixture(scope="module")
def journey(tmp_path_factory):
    """All steps of it: `place`, its folder, and what the terminal said at each."""
    told, place = SimpleNamespace(), tmp_path_factory.mktemp("journey")
    scans, new, results = place / "scans", place / "new", place / "results"
    options = (real_scans if REAL.exists() else phantoms)(scans, new)
    table = [str(scans), "--out", str(place / "my.csv"), "--folds", "3", "--workers", "1"]
    told.table = said(make_table, [*table, *options])
    pasted = shlex.split(told.table.strip().splitlines()[-1])
    assert pasted[:3] == ["python", "segmentation.py", "--check"]
    values = small.SEGMENTATION | small.settings(*pasted[3:])
    values |= {
        "results_dir": results,
        "cache_dir": place / "cache",
        "n_epochs": "4",
        "val_every": "4",
    }
    values["patches.per_case"] = "8"

    def run(experiment: str, *more: str) -> str:
        own = values | {"experiment": experiment} | small.settings(*more[:1])
        return said(segmentation.main, [*(f"{k}={v}" for k, v in own.items()), *more[1:]])

    told.check = run("one", "seed=0", "--check")
    for seed, name in enumerate(("one", "two")):
        with pytest.MonkeyPatch.context() as patch:
            if name == "two":  # whose pages nobody looks at
                small.draw_nothing(patch, "segmentation")
            told.train = run(name, f"seed={seed}")
            told.test = run(name, f"test_ckpt={results / name}")
    told.predict = run("one", f"test_ckpt={results / 'one'}", f"--predict={new}")
    runs = [str(results / name) for name in ("one", "two")]
    told.compare = said(compare, [*runs, "--out", str(place / "comparison")])
    told.place, told.one = place, results / "one"
    return told


def said(function, arguments: list[str]) -> str:
    """What a command prints that must succeed."""
    with redirect_stdout(io.StringIO()) as out:
        assert function(arguments) == 0, out.getvalue()
    return out.getvalue()


def test_each_step_says_what_came_of_it(journey):
    assert f"{NUM_CASES} rows of {NUM_CASES} patients, {NUM_CASES} with a mask" in journey.table
    assert "fingerprint of the 3 train cases" in journey.check and "patches.size=" in journey.check
    assert "epoch 4/4 loss" in journey.train and "dice 0." in journey.test
    assert "2 scans" in journey.predict and "settings that differ" in journey.compare
    rows = read_cases(journey.one / "predictions" / "new" / "volumes.csv")
    assert len(rows) == 2 and all(Path(row["path"]).exists() for row in rows)


def test_no_page_names_a_patient(journey):
    pages = [p for p in journey.place.rglob("report.html") if "predictions" not in p.parts]
    assert len(pages) == 4 and not [p for p in pages if CANARY in p.read_text()]


@NEEDED
@pytest.mark.parametrize(
    "page, truth, cases",
    [
        ("results/one/report.html", True, 3),
        ("results/one/test/report.html", True, 3),
        ("results/one/predictions/new/report.html", False, 2),
        ("comparison/report.html", None, None),
    ],
)
def test_pages_in_a_browser(journey, page, truth, cases, tmp_path):
    told = look(journey.place / page, tmp_path, VIEWER if cases else "")
    if cases:
        assert (told["moves"], told["truth"], told["cases"]) == (True, truth, cases)


@NEEDED
@pytest.mark.parametrize("stage", ["dino", "classification"])
def test_pages_of_the_other_stages(stage, trained_of, tested_of, tmp_path):
    look(trained_of(stage) / "report.html", tmp_path)
    if stage == "classification":
        look(tested_of(stage) / "report.html", tmp_path)
