"""Scans and runs of the `stage` that a test names, as a parameter or a fixture of its file."""

import functools
import runpy
import sys

import pytest
import torch

from tests.conftest import read_cases, write_cases
from tests.places import ROOT
from tests.stages import small
from tests.stages.small import STAGES


@pytest.fixture(scope="session")
def scans_of(tmp_path_factory):
    """A function: stage -> the folder of cases.csv and its volumes."""
    folder = tmp_path_factory.mktemp
    return functools.cache(lambda stage: STAGES[stage].make_scans(folder(f"scans-{stage}")))


@pytest.fixture(scope="session")
def trained_of(scans_of, tmp_path_factory):
    """A function: stage -> the folder of a finished run of the shipped config, made small."""

    @functools.cache
    def trained(stage):
        results = tmp_path_factory.mktemp(f"trained-{stage}")
        overrides = ("experiment=whole", STAGES[stage].whole)
        assert small.run(stage, scans_of(stage), results, *overrides, pictures=True) == 0
        return results / "whole"

    return trained


@pytest.fixture(scope="session")
def tested_of(scans_of, trained_of):
    """A function: stage -> test/ of that run. The command for a classifier names no more than the
    checkpoint, CSV and folds; the segmenter is tested with flips."""

    @functools.cache
    def tested(stage):
        scans, trained = scans_of(stage), trained_of(stage)
        settings = f"experiment=whole test_ckpt={trained / 'checkpoints' / 'best.pt'}"
        if stage == "classification":
            torch.set_num_threads(1)
            settings += " report_by=[site] precision=fp32 n_workers=0"
            bare = small.settings(settings) | small.places(scans, trained.parent)
            assert STAGES[stage].script.main([f"{k}={value}" for k, value in bare.items()]) == 0
        else:
            flips = "inference.mirror=[true,false,false]" if stage == "segmentation" else ""
            run = functools.partial(small.run, stage, scans, trained.parent, pictures=True)
            assert run(settings, flips) == 0
        return trained / "test"

    return tested


@pytest.fixture
def scans(stage, scans_of):
    return scans_of(stage)


@pytest.fixture
def trained(stage, trained_of):
    return trained_of(stage)


@pytest.fixture
def tested(stage, tested_of):
    return tested_of(stage)


@pytest.fixture
def best(trained):
    return trained / "checkpoints" / "best.pt"


@pytest.fixture
def run(stage, scans, tmp_path):
    """A function: overrides -> exit code of a small run in <tmp_path>/<experiment>, or `folder`."""
    return functools.partial(small.run, stage, scans, tmp_path, "experiment=x")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "x"


@pytest.fixture
def script(stage, scans, tmp_path, monkeypatch):
    """A function: overrides and options -> exit code of the script as a program."""

    def program(*overrides):
        command = small.command_line(stage, scans, tmp_path, *overrides)
        monkeypatch.setattr(sys, "argv", [f"{stage}.py", *command])
        with pytest.raises(SystemExit) as exited:
            runpy.run_path(str(ROOT / f"{stage}.py"), run_name="__main__")
        return exited.value.code

    return program


@pytest.fixture
def table(scans, tmp_path):
    """A function: what changes the rows of the CSV -> the override that names the new one."""

    def write(change):
        rows = read_cases(scans / "cases.csv")
        for row in rows:
            paths = {"path", "img_path", "seg_path"} & row.keys()
            row |= {name: scans / row[name] for name in paths if row[name]}
        write_cases(tmp_path / "cases.csv", change(rows) or rows)
        return f"csv_path={tmp_path / 'cases.csv'}"

    return write
