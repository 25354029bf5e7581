"""classification.py as a user meets it: its files, its refusals, what comes out of a test."""

import json
import runpy
import sys

import numpy as np
import pandas as pd
import pytest
import torch

import classification
from data.cases import CasesError
from models.backbones import build_backbone
from tests.conftest import CANARY, ROOT, equal, read_cases, without_times, write_cases
from tests.stages import small_classification as small
from utils import checkpoint
from utils.checkpoint import CheckpointError, hash_patients


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return small.make_scans(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def trained(labelled, tmp_path_factory):
    """The folder of a finished run of the shipped config, made small."""
    results = tmp_path_factory.mktemp("results")
    overrides = ("experiment=whole", "n_epochs=10")
    assert small.run(labelled, results, *overrides, pictures=True) == 0
    return results / "whole"


@pytest.fixture(scope="module")
def tested(labelled, trained):
    """test/ of that run, from a command that names no more than the checkpoint, CSV and folds."""
    values = small.places(labelled, trained.parent) | {
        "experiment": "whole",
        "test_ckpt": trained / "checkpoints" / "best.pt",
        "report_by": "[site]",
        "precision": "fp32",
        "n_workers": "0",
    }
    torch.set_num_threads(1)
    assert classification.main([f"{key}={value}" for key, value in values.items()]) == 0
    return trained / "test"


@pytest.fixture
def run(labelled, tmp_path):
    """A function: overrides -> exit code of a small run in <tmp_path>/<experiment>."""
    return lambda *overrides: small.run(labelled, tmp_path, *overrides)


@pytest.fixture
def script(labelled, tmp_path, monkeypatch):
    """A function: overrides and options -> exit code of classification.py as a program."""

    def program(*overrides):
        command = small.command_line(labelled, tmp_path, *overrides)
        monkeypatch.setattr(sys, "argv", ["classification.py", *command])
        with pytest.raises(SystemExit) as exited:
            runpy.run_path(str(ROOT / "classification.py"), run_name="__main__")
        return exited.value.code

    return program


@pytest.fixture
def table(labelled, tmp_path):
    """A function: what changes the rows of the CSV -> the override that names the new one."""

    def write(change):
        rows = read_cases(labelled / "cases.csv")
        for row in rows:
            row["path"] = labelled / row["path"]
        write_cases(tmp_path / "cases.csv", change(rows) or rows)
        return f"csv_path={tmp_path / 'cases.csv'}"

    return write


def last(folder):
    return checkpoint.load(folder / "checkpoints" / "last.pt")


def files_naming_patients(folder):
    found = {p for p in folder.rglob("*") if p.is_file() and CANARY.encode() in p.read_bytes()}
    return {str(p.relative_to(folder)) for p in found}


def predictions(folder, target):
    rows = pd.read_csv(folder / "predictions.csv", dtype=str, keep_default_na=False)
    return rows[rows["target"] == target].reset_index(drop=True)


# ---- what a run leaves behind


def test_a_run_writes_all_its_files(trained, tested):
    written = {str(p.relative_to(trained)) for p in trained.rglob("*") if p.is_file()}
    written = {name for name in written if not name.startswith("test/")}
    boards = {name for name in written if name.startswith("tensorboard/")}
    checkpoints = {f"checkpoints/{n}.pt" for n in ("last", "previous", "best")}
    plots = {f"plots/{name}.png" for name in ("curves", "inputs")}
    texts = {"config.yaml", "metrics.csv", "log.jsonl", "log.txt", "report.html"}
    assert len(boards) == 1
    assert written == boards | checkpoints | plots | texts
    assert (trained / "report.html").read_text().count("data:image/png") == 2
    assert len(list(trained.parent.iterdir())) == 1  # nothing outside the experiment


def test_metrics_begin_before_training(trained):
    rows = pd.read_csv(trained / "metrics.csv")
    assert rows["epoch"].tolist() == list(range(11)) and rows["step"].tolist() == [
        4 * n for n in range(11)
    ]
    columns = ["val_loss", "val_auc", "val_bright_auc", "val_size_balanced_accuracy", "val_hu_mae"]
    assert rows[columns].notna().all(axis=None)
    losses = ["loss", "train_bright_loss", "train_size_loss", "train_hu_loss", "grad_norm", "lr"]
    assert rows[losses][1:].notna().all(axis=None)
    parts = rows[["train_bright_loss", "train_size_loss", "train_hu_loss"]]
    assert rows["loss"][1] == pytest.approx(parts.mean(axis=1)[1], rel=0.1)
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(40))


def test_it_learns(trained):
    rows = pd.read_csv(trained / "metrics.csv")
    assert rows["val_bright_auc"].max() == 1 and rows["val_hu_r2"].max() > 0.1
    best = checkpoint.load(trained / "checkpoints" / "best.pt")["progress"]
    score = rows["val_auc"].tolist()
    assert score[best["best_epoch"]] == max(score[1:]) == best["best"][0]
    ties = [i for i in range(1, 11) if score[i] == max(score[1:])]
    assert rows["val_loss"][ties].idxmin() == best["best_epoch"] == best["epoch"]


def test_patients_are_named_in_the_predictions_only(trained, tested, labelled):
    assert files_naming_patients(trained) == {"test/predictions.csv", "test/control.csv"}
    assert files_naming_patients(labelled / "cache") == set()


def test_the_seed_decides_everything(run, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        run(f"experiment={name}", f"seed={seed}")
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    rows = [
        [without_times(row) for row in read_cases(folder / "metrics.csv")] for folder in (one, two)
    ]
    assert equal(last(one)["modules"], last(two)["modules"]) and rows[0] == rows[1]
    assert not equal(last(one)["modules"], last(other)["modules"])


@pytest.mark.parametrize(
    "backbone, options",
    [
        ("swinunetr", {"feature_size": 12}),
        ("unet", {"feature_size": 4}),
        ("segresnet", {"feature_size": 8, "blocks": [1, 1]}),
        ("segresnet", {"variant": "ds", "feature_size": 8, "blocks": [1, 1]}),
    ],
)
def test_other_backbones_train_and_are_tested(backbone, options, run, tmp_path):
    network = [f"{backbone}.{key}={json.dumps(value)}" for key, value in options.items()]
    few = (
        "experiment=x",
        "n_epochs=1",
        "cls_targets=[bright]",
        "image.fit=resize",
        "precision=bf16",
    )
    few += ("finetune.layer_decay=0.5", "grad_checkpointing=true", "image.size=[18,16,16]")
    assert run(f"backbone={backbone}", *network, *few) == 0
    ckpt = f"test_ckpt={tmp_path / 'x' / 'checkpoints' / 'best.pt'}"
    assert run("experiment=x", ckpt) == 0
    assert len(predictions(tmp_path / "x" / "test", "bright")) == 4


# ---- what a test leaves behind


def test_a_test_writes_all_its_files(tested):
    written = {str(p.relative_to(tested)) for p in tested.rglob("*") if p.is_file()}
    assert {"predictions.csv", "control.csv", "metrics.json", "report.html"} <= written
    assert {f"plots/{name}.png" for name in ("roc", "confusion", "calibration")} <= written
    assert {"config.yaml", "plots/numbers.png", "plots/precision_recall.png"} <= written


def test_rows_without_labels_are_predicted_and_not_scored(tested):
    rows = predictions(tested, "bright")
    assert rows["PatientID"].tolist() == [f"{CANARY}{i}" for i in (13, 14, 15, 16)]
    assert rows["truth"].tolist() == ["yes", "no", "yes", ""]
    p = rows[["p_no", "p_yes"]].astype(float)
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-5)
    assert rows["prediction"].tolist() == [("no", "yes")[i] for i in p.to_numpy().argmax(axis=1)]
    metrics = json.loads((tested / "metrics.json").read_text())
    assert metrics["bright"]["n"] == 3
    assert metrics["bright"]["auc"] == 1 and metrics["size"]["n"] == 4
    assert set(metrics["hu"]["by"]["site"]) == {"B"}
    assert 0 <= metrics["bright"]["control"]["auc"] <= 1 and "mae" in metrics["hu"]["control"]
    numbers = predictions(tested, "hu")["prediction"].astype(float)
    assert numbers.between(-200, 900).all() and numbers.std() > 20  # in HU, not standardised


def test_a_csv_without_the_target_columns_will_do(trained, run, table, tmp_path):
    def without_labels(rows):
        kept = ("PatientID", "path", "fold", "modality")
        rows = [{name: row[name] for name in kept} for row in rows if row["fold"] == "4"]
        return [row | {"fold": "new"} for row in rows]

    ckpt = f"test_ckpt={trained / 'checkpoints' / 'best.pt'}"
    folds = ("train_folds=[]", "val_folds=[]", "test_folds=[new]", "report_by=[]")
    assert run("experiment=x", ckpt, table(without_labels), *folds) == 0
    rows = predictions(tmp_path / "x" / "test", "bright")
    assert len(rows) == 4 and set(rows["truth"]) == {""}
    metrics = json.loads((tmp_path / "x" / "test" / "metrics.json").read_text())
    assert metrics["bright"]["auc"] is None and metrics["bright"]["reasons"]["auc"]
    assert "no column" in (tmp_path / "x" / "test" / "report.html").read_text()


def test_an_ensemble_is_the_mean_of_its_members(trained, tested, run, tmp_path):
    ckpts = [trained / "checkpoints" / "best.pt", tmp_path / "other.pt"]
    other = checkpoint.load(ckpts[0])
    for head in [key for key in other["modules"]["classifier"] if key.startswith("heads.")]:
        other["modules"]["classifier"][head] *= 0.5
    checkpoint.save(ckpts[1], other)
    assert run("experiment=one", f"test_ckpt={ckpts[1]}") == 0
    assert run("experiment=both", f"test_ckpt=[{ckpts[0]},{ckpts[1]}]") == 0
    folders = [tested, tmp_path / "one" / "test", tmp_path / "both" / "test"]
    for target, columns in (("bright", ["p_yes"]), ("size", ["p_large"]), ("hu", ["prediction"])):
        found = [predictions(f, target)[columns].astype(float).to_numpy() for f in folders]
        assert not np.allclose(found[0], found[1])
        np.testing.assert_allclose(found[2], (found[0] + found[1]) / 2, rtol=1e-5)


def test_flips_and_shifts_are_averaged(trained, tested, run, tmp_path):
    ckpt = f"test_ckpt={trained / 'checkpoints' / 'best.pt'}"
    views = ("test.flip=[true,false,true]", "test.shift=0.1", "batch_size=5")
    assert run("experiment=x", ckpt, *views) == 0
    plain, mean = (
        predictions(f, "hu")["prediction"].astype(float) for f in (tested, tmp_path / "x" / "test")
    )
    assert not np.allclose(plain, mean, rtol=1e-4) and np.allclose(plain, mean, atol=150)


def test_the_size_of_a_batch_changes_no_prediction(tested, trained, run, tmp_path):
    ckpt = f"test_ckpt={trained / 'checkpoints' / 'best.pt'}"
    assert run("experiment=x", ckpt, "batch_size=3") == 0  # the last one is shorter
    for target, column in (("bright", "p_yes"), ("hu", "prediction")):
        found = [
            predictions(f, target)[column].astype(float) for f in (tested, tmp_path / "x" / "test")
        ]
        np.testing.assert_allclose(*found, rtol=1e-4)


# ---- whom it must not be tested on


def test_patients_that_were_trained_on_are_refused(trained, run, script, capsys, tmp_path):
    ckpt = f"test_ckpt={trained / 'checkpoints' / 'best.pt'}"
    assert script(ckpt, "test_folds=[0,4]", "train_folds=[1]") == 2
    shown = capsys.readouterr().err
    assert "3 of 7 test rows" in shown and "allow_seen_patients" in shown
    assert all(f"{CANARY}{i} " in shown for i in (0, 3, 6)) and f"{CANARY}13" not in shown
    folds = ("test_folds=[0,4]", "train_folds=[1]", "allow_seen_patients=true")
    assert run("experiment=x", ckpt, *folds) == 0
    assert "3 of 7 test rows" in (tmp_path / "x" / "test" / "report.html").read_text()


@pytest.fixture
def pretrained(tmp_path):
    """backbone.pt of a DINO run that has seen patient 14, and its tensors."""
    torch.manual_seed(3)
    backbone = build_backbone("resunet", decoder=False, features=(4, 8, 8), blocks=(1, 1, 1))
    about = {"settings": {"stage": "dino"}, "seen_patients": hash_patients([f"{CANARY}14"])}
    about |= {"config": {"experiment": "d", "data": {"hu_window": [-100, 300]}}, "step": 7}
    checkpoint.save(tmp_path / "backbone.pt", about | {"backbone": backbone.state_dict()})
    return tmp_path / "backbone.pt"


def test_patients_of_the_pre_training_are_refused_too(pretrained, run, script, tmp_path, capsys):
    for option in ("n_epochs=1", "--cv"):  # before training
        assert script("experiment=x", f"dino_weights={pretrained}", option) == 2
        shown = capsys.readouterr().err
        assert f"{CANARY}14 " in shown and shown.count("dino_weights has seen") == 1
    assert not (tmp_path / "x").exists()
    assert run("experiment=x", f"dino_weights={pretrained}", "n_epochs=1", "test_folds=[]") == 0
    assert run("experiment=x", "resume_training_from=auto") == 0  # goes on remembering
    with pytest.raises(CasesError, match=f"1 of 4 test rows[^$]*{CANARY}14 "):
        run("experiment=x", f"test_ckpt={tmp_path / 'x' / 'checkpoints' / 'last.pt'}")


# ---- training modes


def test_a_linear_probe_of_dino_weights_leaves_them_as_they_are(pretrained, run, tmp_path, capsys):
    overrides = (f"dino_weights={pretrained}", "finetune.freeze_epochs=all", "experiment=x")
    assert run(*overrides, "allow_seen_patients=true") == 0
    weights = checkpoint.load(pretrained)["backbone"]
    found = last(tmp_path / "x")["modules"]["classifier"]
    assert equal(
        {f"backbone.{k}": v for k, v in weights.items()},
        {k: v for k, v in found.items() if k.startswith("backbone.")},
    )
    assert all(found[f"heads.{i}.weight"].abs().sum() > 0 for i in range(3))
    shown = capsys.readouterr().out
    assert "data.hu_window is [-1000, 1000], but these weights" in shown
    report = json.loads((tmp_path / "x" / "weights.json").read_text())
    assert report["encoder"][0] == report["encoder"][1] == len(weights)


def test_the_backbone_is_freed_after_the_first_epochs(run, tmp_path, monkeypatch):
    seen, train_step = [], classification.train_step

    def observed(state, *args):
        before = {k: v.clone() for k, v in state.bare("classifier").backbone.state_dict().items()}
        numbers = train_step(state, *args)
        seen.append(equal(before, dict(state.bare("classifier").backbone.state_dict())))
        return numbers

    monkeypatch.setattr(classification, "train_step", observed)
    assert run("experiment=x", "n_epochs=3", "finetune.freeze_epochs=2") == 0
    assert seen == [True] * 8 + [False] * 4


def test_learning_rates_by_depth(run, tmp_path):
    assert run("experiment=x", "finetune.layer_decay=0.5", "finetune.backbone_lr=0.1") == 0
    groups = last(tmp_path / "x")["optimizer"]["param_groups"]
    assert {g["lr"] for g in groups} == {1e-6 * s for s in (1, 0.1, 0.05, 0.025)}
    assert {g["weight_decay"] for g in groups} == {0, 0.05}


def test_weights_and_balance_and_smoothing(run, tmp_path):
    assert run("experiment=x", "finetune.class_weights=true") == 0
    assert run("experiment=y", "finetune.balance=size", "finetune.label_smoothing=0.1") == 0
    one, two = (last(tmp_path / name)["modules"] for name in "xy")
    assert not equal(one, two)


def test_a_run_ends_when_it_no_longer_gets_better(run, tmp_path):
    overrides = ("experiment=x", "n_epochs=50", "finetune.early_stopping=2", "learning_rate=1e-9")
    overrides += ("min_learning_rate=0",)
    assert run(*overrides) == 0
    progress = last(tmp_path / "x")["progress"]
    assert progress["epoch"] == progress["best_epoch"] + 2 < 50
    assert run(*overrides, "resume_training_from=auto") == 0
    assert last(tmp_path / "x")["progress"] == progress
    assert "no better val_auc for 2 epochs" in (tmp_path / "x" / "log.txt").read_text()


def test_a_flip_that_swaps_sides_is_warned_of(run, table, tmp_path):
    def sides(rows):
        for row in rows:
            row["side"] = {"yes": "left", "no": "right"}.get(row["bright"], "")

    few = ("cls_targets=[side]", "reg_targets=[]", "n_epochs=1")
    assert run("experiment=x", table(sides), *few, "augment.flip=[true,false,false]") == 0
    assert "swaps left and right" in (tmp_path / "x" / "log.txt").read_text()
    assert run("experiment=y", table(sides), *few, "augment.flip=[false,true,true]") == 0
    assert "swaps left and right" not in (tmp_path / "y" / "log.txt").read_text()


# ---- small and odd data


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_any_batch_size(batch_size, run, tmp_path):
    assert run("experiment=x", f"batch_size={batch_size}", "accumulate=2", "n_epochs=1") == 0
    rows = pd.read_csv(tmp_path / "x" / "metrics.csv")
    assert rows["step"].tolist() == [0, {1: 4, 3: 1, 20: 1}[batch_size]]
    assert np.isfinite(rows["loss"][1]) and np.isfinite(rows["val_loss"]).all()


def test_one_val_and_one_test_case(run, table, tmp_path):
    def few(rows):
        return [row for i, row in enumerate(rows) if i < 8 or i in (8, 13)]

    csv = table(few)
    assert run("experiment=x", csv) == 0
    rows = pd.read_csv(tmp_path / "x" / "metrics.csv")
    assert rows["val_auc"].isna().all() and rows["val_loss"].notna().all()
    progress = checkpoint.load(tmp_path / "x" / "checkpoints" / "best.pt")["progress"]
    assert progress["select_by"] == "val_loss" and progress["best"] == [-rows["val_loss"][1:].min()]
    assert run("experiment=x", csv, f"test_ckpt={tmp_path / 'x' / 'checkpoints' / 'best.pt'}") == 0
    metrics = json.loads((tmp_path / "x" / "test" / "metrics.json").read_text())
    assert metrics["bright"]["auc"] is None and metrics["bright"]["n"] == 1


def test_a_class_absent_from_val(run, table, tmp_path):
    def change(rows):
        for row in rows[8:13]:
            row |= {"bright": "yes", "size": "large" if row["size"] == "small" else row["size"]}

    assert run("experiment=x", table(change), "reg_targets=[]") == 0
    rows = pd.read_csv(tmp_path / "x" / "metrics.csv")
    assert rows["val_bright_auc"].isna().all() and rows["val_size_auc"].notna().all()
    assert (rows["val_auc"] == rows["val_size_auc"]).all()


def test_val_without_any_label_and_no_val(run, table, tmp_path):
    def change(rows):
        for row in rows[8:13]:
            row |= {"bright": "", "size": "nan", "hu": "NA"}

    assert run("experiment=x", table(change)) == 0
    assert run("experiment=y", "val_folds=[]") == 0
    for name in "xy":
        progress = checkpoint.load(tmp_path / name / "checkpoints" / "best.pt")["progress"]
        assert progress["select_by"] == "loss" and progress["best"] is not None


def test_batches_without_a_label_of_a_target(run, table, tmp_path):
    def change(rows):
        for row in rows[2:8]:
            row["hu"] = ""

    assert run("experiment=x", table(change), "batch_size=1") == 0
    lines = [json.loads(line) for line in (tmp_path / "x" / "log.jsonl").read_text().splitlines()]
    assert sum(line["train_hu_loss"] is None for line in lines) == 12  # of 16 steps
    assert all(line["loss"] is not None for line in lines)
    assert pd.read_csv(tmp_path / "x" / "metrics.csv")["train_hu_loss"][1:].notna().all()


# ---- what is not finite


def test_a_step_that_is_not_finite_leaves_no_trace(run, tmp_path, monkeypatch):
    calls, steps, losses, train_step = (
        [],
        [],
        classification.label_losses,
        classification.train_step,
    )

    def spoilt(outputs, truth, smoothing):
        calls.append(1)
        found = losses(outputs, truth, smoothing)
        bad = len(steps) == 1 and torch.is_grad_enabled()
        return {name: loss * (float("nan") if bad else 1) for name, loss in found.items()}

    def observed(state, *args):
        before = {k: v.clone() for k, v in state.modules["classifier"].state_dict().items()}
        numbers = train_step(state, *args)
        steps.append(equal(before, dict(state.modules["classifier"].state_dict())))
        return numbers

    monkeypatch.setattr(classification, "label_losses", spoilt)
    monkeypatch.setattr(classification, "train_step", observed)
    assert run("experiment=x", "n_epochs=1") == 0
    assert steps == [False, True, False, False]
    log = (tmp_path / "x" / "log.txt").read_text()
    assert "step 1 skipped" in log and log.count(CANARY) == 2


# ---- what is refused


def test_all_mistakes_are_listed_at_once(script, table, capsys, tmp_path):
    def spoil(rows):
        for i, row in enumerate(rows):
            row |= {"id": f"k{i}", "constant": "same", "late": "a" if i < 10 else "bc"[i % 2]}
            row["late"] = "b" if i == 0 else row["late"]
        rows[1]["path"], rows[2]["hu"] = "absent.nii", "12,5"

    columns = "cls_targets=[bright, sise, id, constant, late]"
    assert script(table(spoil), columns) == 2
    shown = capsys.readouterr().err
    assert "no column 'sise'; nearest: 'size'" in shown and "absent.nii" in shown
    assert "constant: all 7 train rows" in shown and "id: " in shown and "ID?" in shown
    assert "'12,5' is not a number" in shown
    assert f"{CANARY}11 " in shown and "late: 'c' is in no train row" in shown
    assert {p.name for p in tmp_path.iterdir()} == {"cases.csv"}


def test_check_lists_problems_and_trains_nothing(script, labelled, capsys, tmp_path):
    assert script("--check", f"cache_dir={tmp_path / 'cache'}") == 0
    assert "8 train, 5 val, 4 test cases, 0 problems" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_help_tells_of_every_option(script, capsys):
    assert script("--help") == 0
    shown = capsys.readouterr().out
    assert "--cv" in shown and "--check" in shown and "finetune.layer_decay=" in shown


def test_a_run_is_not_overwritten(trained, script, capsys):
    assert script(f"results_dir={trained.parent}", "experiment=whole") == 2
    assert "already holds a run" in capsys.readouterr().err


def test_other_classes_or_network_are_refused(trained, run):
    whole = trained / "checkpoints" / "last.pt"
    with pytest.raises(CheckpointError, match="resunet.features: .4, 8, 8. in the checkpoint"):
        run(f"resume_training_from={whole}", "resunet.features=[4,8,16]")
    with pytest.raises(CheckpointError, match="classes.size: .* in the checkpoint, absent here"):
        run(f"resume_training_from={whole}", "cls_targets=[bright]")


def test_files_of_other_stages_are_refused(pretrained, trained, run, tmp_path):
    with pytest.raises(CheckpointError, match="of stage dino; test_ckpt takes best.pt or last.pt"):
        run(f"test_ckpt={pretrained}")
    run("experiment=x", "cls_targets=[bright]", "n_epochs=1")
    both = [folder / "checkpoints" / "best.pt" for folder in (trained, tmp_path / "x")]
    with pytest.raises(CheckpointError, match="in classes: they cannot be averaged"):
        run(f"test_ckpt=[{both[0]},{both[1]}]")


# ---- cross-validation


@pytest.fixture(scope="module")
def crossed(labelled, tmp_path_factory):
    results = tmp_path_factory.mktemp("crossed")
    overrides = ("--cv", "experiment=cv", "n_epochs=1", "cls_targets=[bright]", "reg_targets=[]")
    assert small.run(labelled, results, *overrides) == 0
    return results / "cv", overrides


def test_each_fold_is_tested_once_by_a_run_that_has_not_seen_it(crossed, labelled):
    folder, _ = crossed
    assert {p.name for p in folder.iterdir()} == {*(f"fold_{i}" for i in range(5)), "test"}
    seen = [set(last(folder / f"fold_{i}")["seen_patients"]) for i in range(5)]
    rows = read_cases(labelled / "cases.csv")
    for i in range(5):
        config = last(folder / f"fold_{i}")["config"]
        assert (config["test_folds"], config["val_folds"]) == ([str(i)], [str((i + 1) % 5)])
        train = [r["PatientID"] for r in rows if r["fold"] not in (str(i), str((i + 1) % 5))]
        assert seen[i] == set(hash_patients(train))
    pooled = predictions(folder / "test", "bright")
    assert sorted(pooled["PatientID"]) == sorted(r["PatientID"] for r in rows)
    parts = pd.concat([predictions(folder / f"fold_{i}" / "test", "bright") for i in range(5)])
    assert pooled.equals(parts.reset_index(drop=True))


def test_the_pooled_table_has_intervals_control_and_folds(crossed):
    metrics = json.loads((crossed[0] / "test" / "metrics.json").read_text())["bright"]
    assert metrics["n"] == 15 and len(metrics["auc_interval"]) == 2
    assert set(metrics["folds"]) == set("01234") and "auc" in metrics["control"]


def test_a_cross_validation_goes_on_where_it_stopped(crossed, labelled):
    folder, overrides = crossed
    before = (folder / "test" / "metrics.json").read_text()
    with pytest.raises(CheckpointError, match="already holds a run"):
        small.run(labelled, folder.parent, *overrides)
    for path in (folder / "fold_4").rglob("*.pt"):
        path.unlink()
    assert small.run(labelled, folder.parent, *overrides, "resume_training_from=auto") == 0
    assert (folder / "test" / "metrics.json").read_text() == before


def test_what_keeps_a_fold_from_being_run_is_said_before_all(script, table, capsys, tmp_path):
    def spoil(rows):
        rows[3]["size"] = "huge"  # in fold 0 only
        rows[9]["PatientID"] = rows[2]["PatientID"]  # folds 2 and 3

    assert script("--cv", table(spoil)) == 2
    shown = capsys.readouterr().err
    assert "'huge' is in no train row" in shown and "is in folds 2 and 3" in shown
    assert {p.name for p in tmp_path.iterdir()} == {"cases.csv"}
    assert script("--cv", "train_folds=[0]", "test_folds=[]", "test_ckpt=[a.pt]") == 2
    shown = capsys.readouterr().err
    assert "2 folds with val_folds" in shown and "not together with --cv" in shown
