"""Trackers that show the numbers and pictures of runs elsewhere: wandb, mlflow.

They get what TensorBoard gets, and the config: no PatientID, and nothing of what is printed.
"""

import importlib
import json
import re
from pathlib import Path

from pydantic import BaseModel

from utils.errors import InputError
from utils.report.page import flat

ID_FILE = "tracker.json"  # in the folder of a run, which goes on under the same id


class Wandb:
    """Weights & Biases: to the account that is logged in or, with WANDB_MODE=offline, to files in
    the folder of the run, for `wandb sync`."""

    def __init__(self, cfg: BaseModel, folder: Path, known: str | None):
        """known: the id of the run that goes on, or None."""
        self.wandb = importlib.import_module("wandb")
        # the console's output names patients
        options = {"console": "off", "save_code": False, "disable_git": True}
        self.run = self.wandb.init(
            name=cfg.experiment,
            dir=folder,
            id=known,
            resume="allow" if known else None,
            config=cfg.model_dump(mode="json"),
            settings=self.wandb.Settings(**options),
        )
        self.id = self.run.id
        self.run.define_metric("*", step_metric="step")

    def numbers(self, values: dict[str, float], step: int) -> None:
        self.run.log({**values, "step": step})

    def image(self, name: str, rgb, step: int) -> None:
        self.run.log({name: self.wandb.Image(rgb), "step": step})

    def close(self) -> None:
        self.run.finish()


class Mlflow:
    """MLflow: to the server or file that MLFLOW_TRACKING_URI names, without it to MLflow's default
    in the current folder."""

    def __init__(self, cfg: BaseModel, folder: Path, known: str | None):
        """known: the id of the run that goes on, or None."""
        self.mlflow = importlib.import_module("mlflow")
        self.id = self.mlflow.start_run(known, run_name=cfg.experiment).info.run_id
        if not known:
            settings = {key: str(value)[:500] for key, value in flat(cfg.model_dump(mode="json"))}
            self.mlflow.log_params(settings)

    def numbers(self, values: dict[str, float], step: int) -> None:
        named = {re.sub(r"[^\w\-. /]", "_", name): value for name, value in values.items()}
        self.mlflow.log_metrics(named, step)

    def image(self, name: str, rgb, step: int) -> None:
        self.mlflow.log_image(rgb, artifact_file=f"{name}/{step:08}.png")

    def close(self) -> None:
        self.mlflow.end_run()


Tracker = Wandb | Mlflow
TRACKERS = {"wandb": Wandb, "mlflow": Mlflow}
HELP = {
    "wandb": "log in with `wandb login`, or set WANDB_MODE=offline in the environment",
    "mlflow": "set MLFLOW_TRACKING_URI in the environment, such as sqlite:///mlflow.db",
}


def open_tracker(cfg: BaseModel, folder: Path, goes_on: bool) -> Tracker | None:
    """Return the tracker that the config names, if any.

    goes_on: whether the run in this folder goes on, under the id that it has.

    Raises InputError if the tracker cannot be reached.
    """
    if cfg.tracker is None:
        return None
    path = folder / ID_FILE
    ids = json.loads(path.read_text()) if goes_on and path.exists() else {}
    try:
        tracker = TRACKERS[cfg.tracker](cfg, folder, ids.get(cfg.tracker))
    except Exception as e:  # of many kinds, by their packages
        what = f"tracker: {cfg.tracker} cannot be used: {e}; {HELP[cfg.tracker]}, or tracker=null"
        raise InputError(what) from e
    path.write_text(json.dumps({cfg.tracker: tracker.id}))
    return tracker
