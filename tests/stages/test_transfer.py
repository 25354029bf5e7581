"""A whole study on phantoms, in this process: stopped, resumed, with a run that fails."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import classification
import segmentation
import utils.config.transfer
import utils.transfer.__main__ as program
import utils.transfer.running
from data.demo.make import make_demo
from data.probe.__main__ import main as probe
from models.backbones import build_backbone
from tests.conftest import read_cases
from tests.places import ROOT
from utils import checkpoint
from utils.errors import InputError

SCRIPTS = {"segmentation": segmentation.main, "classification": classification.main, "probe": probe}
NETWORK = {"features": [4, 8], "blocks": [1, 1]}
COMMON = {"precision": "fp32", "n_workers": 0, "batch_size": 2, "data.spacing": [16, 16, 16]}
COMMON |= {"data.hu_window": [-200, 800], "log_every": 100}
COMMON |= {f"resunet.{key}": value for key, value in NETWORK.items()}
STAGES = {
    "segmentation": {"patches.size": [16, 16, 16], "inference.overlap": 0.0},
    "classification": {"image.size": [16, 16, 16], "accumulate": 1},
}


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """The phantoms, and a file of weights that has seen one train patient."""
    folder = tmp_path_factory.mktemp("study")
    make_demo(folder / "demo", n_patients=10)
    torch.manual_seed(5)
    backbone = build_backbone("resunet", decoder=False, **NETWORK)
    rows = read_cases(folder / "demo" / "segmentation.csv")
    for fold, name in (("0", "backbone"), ("4", "leaky")):
        seen = checkpoint.hash_patients(r["PatientID"] for r in rows if r["fold"] == fold)
        about = {"settings": {"stage": "dino"}, "config": {}, "step": 1, "seen_patients": seen}
        checkpoint.save(folder / f"{name}.pt", about | {"backbone": backbone.state_dict()})
    return folder


def command(scans, out, stage="segmentation", weights="backbone", more=(), **changes) -> list[str]:
    """The command line of a study. more: settings of the stage."""
    table = {"segmentation": "segmentation.csv", "classification": "demo.csv"}[stage]
    settings = COMMON | STAGES[stage] | dict(more) | {"cache_dir": str(scans / f"cache-{stage}")}
    settings |= {"csv_path": str(scans / "demo" / table)}
    tuning = {"tuning.learning_rates": [1e-3, 1e-2], "tuning.draws": 1}
    values = {"out": str(out), "stage": stage, "settings": settings, "permuted": []}
    values |= {"config": str(Path(program.CONFIG).parents[2] / f"{stage}_config.yaml")}
    values |= {"arms": {"scratch": None, "dino": str(scans / f"{weights}.pt")}, "draws": 2}
    values |= {"label_counts": [2, 3], "steps": 2 * program.EPOCHS} | tuning
    values |= {"convergence.steps": [program.EPOCHS, 2 * program.EPOCHS]}
    return [f"{key}={json.dumps(value)}" for key, value in (values | changes).items()]


class InProcess:
    """Starts the scripts as functions. stop_at: of these starts (1 the first) one stops the study;
    fail: experiments that fail."""

    def __init__(self, stop_at=0, fail=()):
        self.started, self.stop_at, self.fail = [], stop_at, fail

    def __call__(self, name, argv, device, output, stop):
        experiment = next(a for a in argv if a.startswith("experiment=")).partition("=")[2]
        self.started.append(json.loads(experiment))
        if len(self.started) == self.stop_at:
            stop.received = "SIGTERM"
            return 75
        if self.started[-1] in self.fail:
            output.write_text("broken on purpose\n")
            return 1
        return SCRIPTS[name](argv)


@pytest.fixture
def quick(monkeypatch):
    """Runs of 2 epochs in place of 10; nothing is drawn but by the study itself."""
    torch.set_num_threads(1)
    for module in (program, utils.config.transfer, utils.transfer.running):
        monkeypatch.setattr(module, "EPOCHS", 2)
    for name in ("draw_patches", "draw_progress"):
        monkeypatch.setattr(segmentation, name, lambda *args: None)
    for name in ("draw_inputs", "draw_progress"):
        monkeypatch.setattr(classification, name, lambda *args: None)
    for name in ("plot_overlay", "plot_scores"):
        monkeypatch.setattr(f"utils.report.segmentation.{name}", lambda *args, **kwargs: None)
    for name in ("_draw_curves", "_draw_worst"):
        monkeypatch.setattr(f"utils.report.classification.{name}", lambda *args: [])
    monkeypatch.setattr("utils.report.segmentation.write_report", lambda *args: None)


def first_steps(monkeypatch) -> dict:
    """{experiment: network and patches at the first step}, filled as runs go."""
    found, step = {}, segmentation.train_step

    def noted(run, state, batches, values):
        network = {k: x.clone() for k, x in state.bare("segmenter").state_dict().items()}
        found.setdefault(run.cfg.experiment, (network, batches[0]["matrix"].clone()))
        return step(run, state, batches, values)

    monkeypatch.setattr(segmentation, "train_step", noted)
    return found


def patients(folder: Path, fold: str) -> list[str]:
    return [r["PatientID"] for r in read_cases(folder / "cases.csv") if r["fold"] == fold]


def test_a_study_of_segmentation(scans, tmp_path, quick, monkeypatch, capsys):
    argv, out = command(scans, tmp_path / "out"), tmp_path / "out"
    seen = first_steps(monkeypatch)
    assert program.main([*argv, "--check"], InProcess()) == 0
    assert "4 runs to tune learning rates, 12 to compare, 8 probes" in capsys.readouterr().out
    assert not (out / "study.yaml").exists()

    # ---- stopped while it tunes; then a run fails; then that one is run again
    assert program.main(argv, InProcess(stop_at=3)) == 75
    second = InProcess(fail={"dino_n3_d1_s0_t4"})
    assert program.main(argv, second) == 1
    assert "dino_n3_d1_s0_t4: FAILED: exit code 1: broken on purpose" in capsys.readouterr().out
    assert "1 runs failed" in (out / "report.html").read_text()
    tuned = [name for name in second.started if "_lr" in name]
    assert len(set(tuned)) == 3 and "scratch_n2_d0_s0_t4_lr0.001" not in tuned
    third = InProcess()
    assert program.main(argv, third) == 0
    assert third.started == ["dino_n3_d1_s0_t4"] * 2

    # ---- the same patients, patches and decoder in both arms
    for draw in (0, 1):
        few, many = (out / "runs" / f"dino_n{n}_d{draw}_s0_t4" for n in (2, 3))
        assert patients(few, "train") == patients(many, "train")[:2]
        other = out / "runs" / f"scratch_n3_d{draw}_s0_t4"
        assert read_cases(many / "cases.csv") == read_cases(other / "cases.csv")
        (scratch, one), (dino, two) = seen[other.name], seen[many.name]
        assert torch.equal(one, two)
        same = {name for name in scratch if torch.equal(scratch[name], dino[name])}
        own = ("backbone.encoder", "backbone.stem", "outputs.")  # fitted to the maps of each
        decoder = {n for n in scratch if not n.startswith(own)}
        assert decoder <= same and same != set(scratch)

    # ---- who was tuned on, who was tested
    fold = {r["PatientID"]: r["fold"] for r in read_cases(scans / "demo" / "demo.csv")}
    for folder in [*out.glob("tuning/*"), *out.glob("runs/*"), *out.glob("probes/*")]:
        assert {fold[p] for p in patients(folder, "train")} <= {"0", "1", "2"}
        tested = {fold[p] for p in patients(folder, "test")}
        assert tested == ({"3"} if folder.parent.name == "tuning" else {"4"})

    # ---- as many steps as were asked for, whatever the number of labels
    for folder in out.glob("runs/*"):
        steps = read_cases(folder / "metrics.csv")[-1]["step"]
        assert folder.name.endswith(f"_t{steps}")

    # ---- what comes out
    rows = read_cases(out / "results.csv")
    assert len(rows) == 4 + 12 + 8 and all(0 <= float(row["score"]) <= 1 for row in rows)
    assert all(row["liver"] for row in rows)
    (found,) = (
        row
        for row in read_cases(out / "comparisons.csv")
        if (row["method"], row["labels"]) == ("fine_tune", "3")
    )
    score = {
        (row["arm"], row["draw"]): float(row["score"])
        for row in rows
        if (row["part"], row["labels"], row["steps"]) == ("runs", "3", "4")
    }
    expected = np.mean([score["dino", d] - score["scratch", d] for d in "01"])
    assert float(found["difference"]) == pytest.approx(expected)
    for name in ("label_curve.png", "convergence.png", "report.html"):
        assert (out / name).stat().st_size > 1000
    assert not list(out.rglob("runs/**/*.pt")) and not list(out.rglob("*.nii.gz"))
    assert "DEMO-" not in (out / "report.html").read_text()  # names are in CSVs alone

    # ---- how many run at a time may change, but another plan would test the same patients again
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    fourth = InProcess()
    more = {"n_workers": 1}
    assert program.main(command(scans, out, more=more, at_once=2), fourth) == 0
    assert not fourth.started
    with pytest.raises(InputError, match="another study, with other draws"):
        program.main(command(scans, out, draws=3), InProcess())


def test_a_study_of_classification(scans, tmp_path, quick, capsys):
    """Without val folds, from a permuted control too; frozen probes and one learning rate."""
    stage, out = "classification", tmp_path / "out"
    changes = {"tuning.learning_rates": [1e-3], "convergence.steps": [], "label_counts": [4]}
    argv = command(scans, out, stage, more={"val_folds": []}, permuted=["dino"], **changes)
    assert program.main(argv, InProcess()) == 0
    drawn = {r["PatientID"] for r in read_cases(out / "draws.csv")}
    assert len(drawn) == 4  # of 6 patients in the train folds, as 2 are kept to tune on
    rows = read_cases(out / "results.csv")
    assert {(row["arm"], row["method"]) for row in rows} == {
        (arm, method)
        for arm in ("scratch", "dino", "dino-permuted")
        for method in ("fine_tune", "probe")
    }
    assert len(rows) == 12 and all(0 <= float(row["lesion"]) <= 1 for row in rows)
    printed = capsys.readouterr().out
    assert "test AUC" in printed and "| dino-permuted" in printed


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_study_of_frozen_probes_alone_has_no_learning_rates(scans, tmp_path, quick, capsys):
    argv = command(scans, tmp_path / "out", label_counts=[2], methods=["probe"])
    start = InProcess()
    assert program.main(argv, start) == 0 and len(start.started) == 2 * 2
    assert "Learning rates" not in capsys.readouterr().out
    assert {row["part"] for row in read_cases(tmp_path / "out" / "results.csv")} == {"probes"}


def test_weights_that_saw_test_patients_are_refused_before_anything_runs(scans, tmp_path, quick):
    start = InProcess()
    with pytest.raises(InputError, match=r"dino .*leaky.pt.* has seen this patient"):
        program.main(command(scans, tmp_path / "out", weights="leaky"), start)
    assert not start.started
    with pytest.raises(InputError, match="has no decoder"):
        program.main(command(scans, tmp_path / "other", with_decoder=["dino"]), start)


def test_a_study_that_runs_is_not_started_twice(scans, tmp_path, quick):
    """The runs of the second would find their folders taken, and count as failed."""
    out = tmp_path / "out"
    out.mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1)"
    argv = [sys.executable, "-c", hold + "; sys.stdout.flush(); input()", out / ".study.lock"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(InputError, match=r"another run is writing to it.*another folder"):
            program.main(command(scans, out), InProcess())
        other.communicate(b"\n")
    assert [path.name for path in out.iterdir()] == [".study.lock"]


def test_all_that_is_wrong_with_the_config_is_listed(scans, tmp_path):
    changes = {"steps": 25, "arms": {"a": None, "b": None}, "tuning.label_count": 5}
    changes |= {"settings": {"seed": 3}, "draws": 1, "with_decoder": ["a"]}
    changes |= {"arm_settings": {"c": {}, "a": {"n_epochs": 3, "val_folds": [1]}}}
    with pytest.raises(InputError) as error:
        program.main(command(scans, tmp_path / "out", **changes), InProcess())
    wrong = ("multiple of 10", "one arm with null", "not among", "the study sets it", "draws")
    wrong += ("c: not an arm", "arm_settings.a      n_epochs: the study sets it")
    wrong += ("val_folds: the same for all arms",)
    for text in (*wrong, "a: not an arm with a file"):
        assert text in str(error.value)
    with pytest.raises(InputError, match="min_learning_rate"):
        changes = {"tuning.learning_rates": [1e-9]}
        program.main(command(scans, tmp_path / "out", **changes), InProcess())
    with pytest.raises(InputError, match="no_such_key"):
        changes = {"arm_settings": {"dino": {"no_such_key": 1}}}
        program.main(command(scans, tmp_path / "out", **changes), InProcess())


def test_the_shipped_study_is_valid():
    """Its weights are those that dino.py writes."""
    rules = (program.TransferConfig, program.impossible_transfer)
    cfg, _ = program.parse_command_line([], program.CONFIG, *rules)
    assert cfg.arms["dino"] == "results/dino/checkpoints/backbone.pt"
    assert program.stage_config(cfg).csv_path == "demo_data/segmentation.csv"


@pytest.mark.parametrize("name", ["hippocampus", "nodules"])
def test_the_studies_of_the_benchmarks_are_valid(name):
    rules = (program.TransferConfig, program.impossible_transfer)
    config = ["--config", str(ROOT / "tests" / "benchmarks" / f"{name}.yaml")]
    cfg, _ = program.parse_command_line(config, program.CONFIG, *rules)
    assert program.stage_config(cfg).csv_path == f"../shared/data/{name}/segmentation.csv"


def test_the_probe_says_that_it_has_no_check(tmp_path):
    with pytest.raises(InputError, match="no --check"):
        probe(["classification", "--check", f"results_dir={tmp_path}", "cls_targets=[lesion]"])
    assert not list(tmp_path.iterdir())
