"""`make demo`: its commands are valid, and where it has been run, its results are worth showing."""

import json
import re
import shlex
import shutil
import subprocess
from functools import partial

import pytest

from models.backbones import facts_of
from tests.places import ROOT
from utils.config.classification import ClassificationConfig, impossible_classification
from utils.config.command_line import parse_command_line
from utils.config.dino import DinoConfig, impossible_dino
from utils.config.segmentation import SegmentationConfig, impossible_segmentation
from utils.training.runlog import read_metrics

SCHEMAS = {
    "dino": (DinoConfig, impossible_dino),
    "classification": (ClassificationConfig, impossible_classification),
    "segmentation": (SegmentationConfig, impossible_segmentation),
}
RESULTS = {stage: ROOT / "results" / f"demo_{stage}" for stage in SCHEMAS}
DONE = RESULTS["segmentation"] / "test" / "report.html"
needs_demo = pytest.mark.skipif(
    not DONE.exists() or DONE.stat().st_mtime < (ROOT / "Makefile").stat().st_mtime,
    reason="make demo has not been run with this Makefile",
)


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_its_commands_are_valid():
    shown = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True).stdout
    lines = shown.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines if re.search(r"python \w+\.py ", line)]
    stages = [command[1].removesuffix(".py") for command in commands]
    assert stages == ["dino", "classification", "classification", "segmentation", "segmentation"]
    for stage, command in zip(stages, commands, strict=True):
        schema, impossible = SCHEMAS[stage]
        impossible = partial(impossible, facts_of=facts_of)
        default = ROOT / f"{stage}_config.yaml"
        cfg, check = parse_command_line(command[2:], default, schema, impossible)
        assert cfg.experiment == f"demo_{stage}" and not check


@needs_demo
def test_its_pre_training_learns():
    rows = read_metrics(RESULTS["dino"] / "metrics.csv")
    trained = [row for row in rows if row["epoch"] > 0]
    losses = [row["dino_loss"] for row in trained]
    apart = [row["dino_loss"] - row["teacher_entropy"] for row in trained]
    assert losses[-1] < losses[0] and apart[-1] < 0.8 * apart[0]  # by how much: also the processor
    probes = [row for row in rows if row["probe_dense_dice"] is not None]
    for name in ("probe_dense_dice", "probe_lesion_linear_auc"):
        assert probes[-1][name] > probes[0][name]


@needs_demo
def test_its_tests_convince():
    scores = json.loads((RESULTS["segmentation"] / "test" / "summary.json").read_text())
    for name, entries in scores["classes"].items():
        assert entries["missed"] == 0 and entries["dice"]["mean"] > 0.5, name
    scores = json.loads((RESULTS["classification"] / "test" / "metrics.json").read_text())
    assert scores["lesion"]["auc"] >= 0.9


@needs_demo
def test_no_warning_stands_at_its_end():
    for folder in RESULTS.values():
        for page in folder.rglob("report.html"):
            assert 'class="warning"' not in page.read_text(), page
        assert "WARNING" not in (folder / "log.txt").read_text()
