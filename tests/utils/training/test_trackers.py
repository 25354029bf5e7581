"""wandb and mlflow get the numbers and pictures of TensorBoard, and nothing of what is printed."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from pydantic import BaseModel

from tests.conftest import CANARY
from utils.config.schema import impossible_run
from utils.errors import InputError
from utils.training.runlog import RunLog
from utils.training.trackers import open_tracker


class Settings(BaseModel):
    experiment: str = "x"
    tracker: str | None = None
    data: dict = {"spacing": [1, 1, 1]}


class Recorder:
    """What a package is called with: [(name, arguments)]. Its attributes are functions."""

    def __init__(self, **returned):
        self.calls, self.returned = [], returned

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self.returned.get(name)

        return call


@pytest.fixture
def package(monkeypatch):
    """A function: name -> a recorder in the place of that package."""

    def put(name):
        recorder = Recorder(start_run=SimpleNamespace(info=SimpleNamespace(run_id="id1")))
        recorder.returned["init"] = SimpleNamespace(
            id="id1",
            **{n: getattr(recorder, n) for n in ("define_metric", "log", "finish")},
        )
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__getattr__ = recorder.__getattr__
        monkeypatch.setitem(sys.modules, name, module)
        return recorder

    return put


def a_run(folder, tracker, goes_on=False):
    """What RunLog does in a run of one epoch."""
    cfg = Settings(tracker=tracker)
    log = RunLog(folder, 4 * goes_on, goes_on, track=lambda: open_tracker(cfg, folder, goes_on))
    log.message(f"left out {CANARY}1")
    log.step(5, {"loss": 0.5, "odd": float("nan")})
    log.epoch({"epoch": 2, "step": 8, "loss": 0.4, "val_a (b)_dice": None}, 8)
    log.image("val_1", np.zeros((2, 2, 3), np.uint8), 8)
    log.close()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_gets_what_tensorboard_gets(name, package, tmp_path):
    recorder = package(name)
    a_run(tmp_path, name)
    told = [call for call in recorder.calls if call[0] in ("log", "log_metrics")]
    numbers = [call[1][0] for call in told]
    assert {"step/loss": 0.5}.items() <= numbers[0].items() and "step/odd" not in numbers[0]
    assert {"epoch/loss": 0.4}.items() <= numbers[1].items() and "epoch/val_a" not in str(
        numbers[1]
    )
    names = [call[0] for call in recorder.calls]
    assert names[-1] == {"wandb": "finish", "mlflow": "end_run"}[name]
    assert ("Image" if name == "wandb" else "log_image") in names
    assert CANARY not in repr(recorder.calls)
    if name == "wandb":
        assert recorder.calls[0][2] == {"console": "off", "save_code": False, "disable_git": True}
    else:
        settings = next(call[1][0] for call in recorder.calls if call[0] == "log_params")
        assert settings["data.spacing"] == "[1, 1, 1]"


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_the_package_itself_writes_without_a_network_and_names_nobody(name, tmp_path, monkeypatch):
    pytest.importorskip(name, reason=f"{name} is not installed: nobody but its users needs it")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path, name)
    a_run(tmp_path, name, goes_on=True)
    assert list(tmp_path.glob({"wandb": "wandb/offline-run-*", "mlflow": "mlflow.db"}[name]))
    files = {path for path in tmp_path.rglob("*") if path.is_file()} - {tmp_path / "log.txt"}
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]


@pytest.mark.parametrize(("name", "start"), [("wandb", "init"), ("mlflow", "start_run")])
def test_a_resumed_run_goes_on_under_its_id(name, start, package, tmp_path):
    recorder = package(name)
    for goes_on in (False, True, False):
        a_run(tmp_path, name, goes_on)
    starts = [(args, kwargs) for called, args, kwargs in recorder.calls if called == start]
    assert ["id1" in repr(given) for given in starts] == [False, True, False]
    assert json.loads((tmp_path / "tracker.json").read_text()) == {name: "id1"}


def test_a_tracker_that_is_absent_or_out_of_reach_is_said(package, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = dict(impossible_run({"tracker": "wandb"}))
    assert found["tracker"] == "wandb is not installed: pip install wandb"
    recorder = package("wandb")

    def fail(**options):
        raise ConnectionError("no network")

    sys.modules["wandb"].init = fail
    with pytest.raises(InputError, match="no network; log in .* WANDB_MODE=offline"):
        open_tracker(Settings(tracker="wandb"), tmp_path, False)
    assert not recorder.calls or recorder.calls[0][0] == "Settings"
    assert open_tracker(Settings(), tmp_path, False) is None
