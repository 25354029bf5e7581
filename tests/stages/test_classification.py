"""What only classification.py does: targets, linear probes, small and odd data, folds."""

import functools
import json
import math

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from data.cases import CasesError
from models.backbones import build_backbone
from tests.conftest import CANARY, equal, read_cases
from tests.stages import small
from utils import checkpoint
from utils.checkpoint import CheckpointError, hash_patients


@pytest.fixture(scope="session")
def stage():
    return "classification"


def predictions(folder, target):
    rows = pd.read_csv(folder / "predictions.csv", dtype=str, keep_default_na=False)
    return rows[rows["target"] == target].reset_index(drop=True)


def test_metrics_begin_before_training(trained):
    rows = small.epochs(trained)
    assert rows["epoch"].tolist() == list(range(11))
    assert rows["step"].tolist() == list(range(0, 41, 4))
    columns = ["val_loss", "val_auc", "val_bright_auc", "val_size_balanced_accuracy", "val_hu_mae"]
    assert rows[columns].notna().all(axis=None)
    losses = ["loss", "train_bright_loss", "train_size_loss", "train_hu_loss", "grad_norm", "lr"]
    assert rows[losses][1:].notna().all(axis=None)
    parts = rows[["train_bright_loss", "train_size_loss", "train_hu_loss"]]
    assert rows["loss"][1] == pytest.approx(parts.mean(axis=1)[1], rel=0.1)
    assert [line["step"] for line in small.steps(trained)] == list(range(40))


def test_the_first_answer_is_the_share_of_each_class(run, folder):
    def first_losses(way):
        assert run(f"experiment={way[:20]} n_epochs=1 {way}") == 0
        row = small.epochs(folder.parent / way[:20]).loc[0]
        return row["val_bright_loss"], row["val_size_loss"]

    # train rows: bright 4, 4; size 2 large, 2 medium, 3 small. val: size 2 large, 1 medium, 2 small
    share, even = {"large": 2 / 7, "medium": 2 / 7, "small": 3 / 7}, math.log(3)
    size = -np.mean([math.log(share[n]) for n in ("large", "large", "medium", "small", "small")])
    assert first_losses("seed=0") == pytest.approx((math.log(2), size))
    assert first_losses("finetune.class_weights=true")[1] == pytest.approx(even)
    assert first_losses("finetune.balance=size")[1] == pytest.approx(even)


def test_it_learns(trained):
    rows = small.epochs(trained)
    assert rows["val_bright_auc"].max() == 1 and rows["val_hu_r2"].max() > 0.1
    best = small.load(trained, "best")["progress"]
    score = rows["val_auc"].tolist()
    assert score[best["best_epoch"]] == max(score[1:]) == best["best"][0]
    ties = [i for i in range(1, 11) if score[i] == max(score[1:])]
    assert rows["val_loss"][ties].idxmin() == best["best_epoch"] == best["epoch"]


def test_a_test_writes_all_its_files(tested):
    written = {"predictions.csv", "control.csv", "metrics.json", "report.html", "config.yaml"}
    plots = ("roc", "confusion", "calibration", "numbers", "precision_recall")
    assert written | {f"plots/{name}.png" for name in plots} <= small.files_in(tested)


def test_rows_without_labels_are_predicted_and_not_scored(tested):
    rows = predictions(tested, "bright")
    assert rows["PatientID"].tolist() == [f"{CANARY}{i}" for i in (13, 14, 15, 16)]
    assert rows["truth"].tolist() == ["yes", "no", "yes", ""]
    p = rows[["p_no", "p_yes"]].astype(float)
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-5)
    assert rows["prediction"].tolist() == [("no", "yes")[i] for i in p.to_numpy().argmax(axis=1)]
    metrics = json.loads((tested / "metrics.json").read_text())
    assert metrics["bright"]["n"] == 3
    yes, no, other_yes = p["p_yes"][:3]  # AUC: the share of pairs in the right order
    pairs = np.sign([yes - no, other_yes - no])
    assert metrics["bright"]["auc"] == (1 + pairs.mean()) / 2 and metrics["size"]["n"] == 4
    assert set(metrics["hu"]["by"]["site"]) == {"B"}
    assert 0 <= metrics["bright"]["control"]["auc"] <= 1 and "mae" in metrics["hu"]["control"]
    numbers = predictions(tested, "hu")["prediction"].astype(float)
    # in HU: standardised they would lie around 0
    assert numbers.between(50, 900).all() and numbers.nunique() == 4


def test_a_csv_without_the_target_columns_will_do(best, run, table, folder):
    def without_labels(rows):
        kept = ("PatientID", "path", "fold", "modality")
        rows = [{name: row[name] for name in kept} for row in rows if row["fold"] == "4"]
        return [row | {"fold": "new"} for row in rows]

    folds = "train_folds=[] val_folds=[] test_folds=[new] report_by=[]"
    assert run(f"test_ckpt={best}", table(without_labels), folds) == 0
    rows = predictions(folder / "test", "bright")
    assert len(rows) == 4 and set(rows["truth"]) == {""}
    metrics = json.loads((folder / "test" / "metrics.json").read_text())
    assert metrics["bright"]["auc"] is None and metrics["bright"]["reasons"]["auc"]
    assert "no column" in (folder / "test" / "report.html").read_text()


def test_what_is_noticed_of_a_row_is_in_the_report(best, run, table, folder, scans, tmp_path):
    def thin(rows):
        row = next(row for row in rows if row["fold"] == "4")
        slices = nib.load(scans / row["path"]).slicer[..., 5:8]
        nib.save(slices, tmp_path / "thin.nii")
        row["path"] = tmp_path / "thin.nii"

    assert run(f"test_ckpt={best}", table(thin)) == 0
    report = (folder / "test" / "report.html").read_text()
    assert "of the CSV" in report and "few along an axis" in report


def test_an_ensemble_is_the_mean_of_its_members(best, tested, run, folder, tmp_path):
    other = checkpoint.load(best)
    for head in [key for key in other["modules"]["classifier"] if key.startswith("heads.")]:
        other["modules"]["classifier"][head] *= 0.5
    checkpoint.save(tmp_path / "other.pt", other)
    assert run(f"experiment=one test_ckpt={tmp_path / 'other.pt'}") == 0
    assert run(f"experiment=both test_ckpt=[{best},{tmp_path / 'other.pt'}]") == 0
    folders = [tested, tmp_path / "one" / "test", tmp_path / "both" / "test"]
    for target, columns in (("bright", ["p_yes"]), ("size", ["p_large"]), ("hu", ["prediction"])):
        found = [predictions(f, target)[columns].astype(float).to_numpy() for f in folders]
        assert not np.allclose(found[0], found[1])
        np.testing.assert_allclose(found[2], (found[0] + found[1]) / 2, rtol=1e-5)


def test_flips_and_shifts_are_averaged(best, tested, run, folder):
    views = "test.flip=[true,false,true] test.shift=0.1 batch_size=5"
    assert run(f"test_ckpt={best}", views) == 0
    plain, mean = (
        predictions(f, "hu")["prediction"].astype(float) for f in (tested, folder / "test")
    )
    assert not np.allclose(plain, mean, rtol=1e-4) and np.allclose(plain, mean, atol=150)


def test_the_size_of_a_batch_changes_no_prediction(best, tested, run, folder):
    assert run(f"test_ckpt={best} batch_size=3") == 0  # the last one is shorter
    for target, column in (("bright", "p_yes"), ("hu", "prediction")):
        one, other = (predictions(f, target)[column] for f in (tested, folder / "test"))
        np.testing.assert_allclose(one.astype(float), other.astype(float), rtol=1e-4)


@pytest.fixture
def pretrained(tmp_path):
    """backbone.pt of a DINO run that has seen patient 14, and its tensors."""
    torch.manual_seed(3)
    backbone = build_backbone("resunet", decoder=False, features=(4, 8, 8), blocks=(1, 1, 1))
    about = {"settings": {"stage": "dino"}, "seen_patients": hash_patients([f"{CANARY}14"])}
    about |= {"config": {"experiment": "d", "data": {"hu_window": [-100, 300]}}, "step": 7}
    checkpoint.save(tmp_path / "backbone.pt", about | {"backbone": backbone.state_dict()})
    return tmp_path / "backbone.pt"


def test_patients_of_the_pre_training_are_refused_too(pretrained, run, script, folder, capsys):
    for option in ("n_epochs=1", "--cv"):  # before training
        assert script(f"experiment=x dino_weights={pretrained}", option) == 2
        shown = capsys.readouterr().err
        assert f"{CANARY}14 " in shown and shown.count("dino_weights has seen") == 1
    assert not folder.exists()
    assert run(f"dino_weights={pretrained} n_epochs=1 test_folds=[]") == 0
    assert run("resume_training_from=auto") == 0  # goes on remembering
    with pytest.raises(CasesError, match=f"1 of 4 test rows[^$]*{CANARY}14 "):
        run(f"test_ckpt={folder / 'checkpoints' / 'last.pt'}")


def test_a_test_on_the_fold_that_chose_the_epoch_is_named(best, run, folder, capsys):
    assert run(f"test_ckpt={best} train_folds=[] val_folds=[] test_folds=[3,4]") == 0
    said = "No fair test: 5 of 9 test rows are of patients by whose val scores"
    assert said in (folder / "test" / "report.html").read_text()
    assert said in capsys.readouterr().out


def test_the_first_images_show_their_labels(run, scans, monkeypatch):
    drawn = []
    monkeypatch.setattr("classification.draw_progress", lambda *args: None)
    monkeypatch.setattr(
        "data.inference.predicting.plot_crops", lambda path, views, texts: drawn.append(texts)
    )
    monkeypatch.setattr("utils.training.runlog.RunLog.image", lambda *args: None)
    assert run("n_epochs=1", pictures=True) == 0
    (texts,) = drawn
    val = [row for row in read_cases(scans / "cases.csv") if row["fold"] == "3"]
    told = [f"bright: {r['bright'] or '–'}\nsize: {r['size']}\nhu: {r['hu']}" for r in val[:3]]
    assert texts["val"] == told and "–" in told[1] and len(texts["train"]) == 3


def test_a_linear_probe_of_dino_weights_leaves_them_as_they_are(pretrained, run, folder, capsys):
    frozen = "finetune.freeze_epochs=all allow_seen_patients=true"
    assert run(f"dino_weights={pretrained}", frozen) == 0
    weights = checkpoint.load(pretrained)["backbone"]
    found = small.load(folder)["modules"]["classifier"]
    assert equal(small.backbone(found), weights)
    assert all(found[f"heads.{i}.weight"].abs().sum() > 0 for i in range(3))
    shown = capsys.readouterr().out
    assert "data.hu_window is [-1000, 1000], but these weights" in shown
    report = json.loads((folder / "weights.json").read_text())
    assert report["encoder"][0] == report["encoder"][1] == len(weights)


def test_learning_rates_by_depth(run, folder):
    assert run("finetune.layer_decay=0.5 finetune.backbone_lr=0.1") == 0
    groups = small.load(folder)["optimizer"]["param_groups"]
    assert {g["lr"] for g in groups} == {1e-6 * s for s in (1, 0.1, 0.05, 0.025)}
    assert {g["weight_decay"] for g in groups} == {0, 0.05}


def test_weights_and_balance_and_smoothing(run, tmp_path):
    assert run("finetune.class_weights=true") == 0
    assert run("experiment=y finetune.balance=size finetune.label_smoothing=0.1") == 0
    one, two = (small.load(tmp_path / name)["modules"] for name in "xy")
    assert not equal(one, two)


def test_a_run_ends_when_it_no_longer_gets_better(run, folder):
    overrides = "n_epochs=50 finetune.early_stopping=2 learning_rate=1e-9 min_learning_rate=0"
    assert run(overrides) == 0
    progress = small.load(folder)["progress"]
    assert progress["epoch"] == progress["best_epoch"] + 2 < 50
    assert run(overrides, "resume_training_from=auto") == 0
    assert small.load(folder)["progress"] == progress
    assert "no better val_auc for 2 epochs" in small.log_of(folder)


def test_a_flip_that_swaps_sides_is_warned_of(run, table, folder, tmp_path):
    def sides(rows):
        for row in rows:
            row["side"] = {"yes": "left", "no": "right"}.get(row["bright"], "")

    few = f"{table(sides)} cls_targets=[side] reg_targets=[] n_epochs=1"
    assert run(few, "augment.flip=[true,false,false]") == 0
    assert "swaps left and right" in small.log_of(folder)
    assert run("experiment=y", few, "augment.flip=[false,true,true]") == 0
    assert "swaps left and right" not in small.log_of(tmp_path / "y")


# ---- small and odd data


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_any_batch_size(batch_size, run, folder):
    assert run(f"batch_size={batch_size} accumulate=2 n_epochs=1") == 0
    rows = small.epochs(folder)
    assert rows["step"].tolist() == [0, {1: 4, 3: 1, 20: 1}[batch_size]]
    assert np.isfinite(rows["loss"][1]) and np.isfinite(rows["val_loss"]).all()


def test_one_val_and_one_test_case(run, table, folder):
    def few(rows):
        return [row for i, row in enumerate(rows) if i < 8 or i in (8, 13)]

    csv = table(few)
    assert run(csv) == 0
    rows = small.epochs(folder)
    assert rows["val_auc"].isna().all() and rows["val_loss"].notna().all()
    progress = small.load(folder, "best")["progress"]
    assert progress["select_by"] == "val_loss" and progress["best"] == [-rows["val_loss"][1:].min()]
    assert run(csv, f"test_ckpt={folder / 'checkpoints' / 'best.pt'}") == 0
    metrics = json.loads((folder / "test" / "metrics.json").read_text())
    assert metrics["bright"]["auc"] is None and metrics["bright"]["n"] == 1


def test_a_class_absent_from_val(run, table, folder):
    def change(rows):
        for row in rows[8:13]:
            row |= {"bright": "yes", "size": "large" if row["size"] == "small" else row["size"]}

    assert run(table(change), "reg_targets=[]") == 0
    rows = small.epochs(folder)
    assert rows["val_bright_auc"].isna().all() and rows["val_size_auc"].notna().all()
    assert (rows["val_auc"] == rows["val_size_auc"]).all()


def test_val_without_any_label_and_no_val(run, table, tmp_path):
    def change(rows):
        for row in rows[8:13]:
            row |= {"bright": "", "size": "nan", "hu": "NA"}

    assert run(table(change)) == 0
    assert run("experiment=y", "val_folds=[]") == 0
    for name in "xy":
        progress = small.load(tmp_path / name, "best")["progress"]
        assert progress["select_by"] == "loss" and progress["best"] is not None


def test_batches_without_a_label_of_a_target(run, table, folder):
    def change(rows):
        for row in rows[2:8]:
            row["hu"] = ""

    assert run(table(change), "batch_size=1") == 0
    lines = small.steps(folder)
    assert sum(line["train_hu_loss"] is None for line in lines) == 12  # of 16 steps
    assert all(line["loss"] is not None for line in lines)
    assert small.epochs(folder)["train_hu_loss"][1:].notna().all()


def test_help_tells_of_every_option(script, capsys):
    assert script("--help") == 0
    shown = capsys.readouterr().out
    assert "--cv" in shown and "--check" in shown and "finetune.layer_decay=" in shown


def test_an_ensemble_of_other_classes_is_refused(best, run, folder):
    assert run("cls_targets=[bright] n_epochs=1") == 0
    with pytest.raises(CheckpointError, match="in classes: they cannot be averaged"):
        run(f"test_ckpt=[{best},{folder / 'checkpoints' / 'best.pt'}]")


# ---- cross-validation


@pytest.fixture(scope="module")
def cross(scans_of, tmp_path_factory):
    """A function: overrides -> exit code of a cross-validation; its `folder`."""
    settings = "--cv experiment=cv n_epochs=1 cls_targets=[bright] reg_targets=[]"
    scans, results = scans_of("classification"), tmp_path_factory.mktemp("crossed")
    run = functools.partial(small.run, "classification", scans, results, settings)
    assert run() == 0
    run.folder = results / "cv"
    return run


def test_each_fold_is_tested_once_by_a_run_that_has_not_seen_it(cross, scans):
    folder = cross.folder
    assert {p.name for p in folder.iterdir()} == {*(f"fold_{i}" for i in range(5)), "test"}
    seen = [set(small.load(folder / f"fold_{i}")["seen_patients"]) for i in range(5)]
    rows = read_cases(scans / "cases.csv")
    for i in range(5):
        config = small.load(folder / f"fold_{i}")["config"]
        assert (config["test_folds"], config["val_folds"]) == ([str(i)], [str((i + 1) % 5)])
        train = [r["PatientID"] for r in rows if r["fold"] not in (str(i), str((i + 1) % 5))]
        assert seen[i] == set(hash_patients(train))
    pooled = predictions(folder / "test", "bright")
    assert sorted(pooled["PatientID"]) == sorted(r["PatientID"] for r in rows)
    parts = pd.concat([predictions(folder / f"fold_{i}" / "test", "bright") for i in range(5)])
    assert pooled.equals(parts.reset_index(drop=True))


def test_the_pooled_table_has_intervals_control_and_folds(cross):
    metrics = json.loads((cross.folder / "test" / "metrics.json").read_text())["bright"]
    assert metrics["n"] == 15 and len(metrics["auc_interval"]) == 2
    assert set(metrics["folds"]) == set("01234") and "auc" in metrics["control"]
    page = (cross.folder / "test" / "report.html").read_text()
    assert page.index("mean over the folds") < page.index("<th>pooled</th>")
    assert "different networks have scored" in page


def test_a_cross_validation_goes_on_where_it_stopped(cross, capsys):
    before = (cross.folder / "test" / "metrics.json").read_text()
    with pytest.raises(CheckpointError, match="already holds a run"):
        cross()
    for path in (cross.folder / "fold_4").rglob("*.pt"):
        path.unlink()
    assert cross("resume_training_from=auto") == 0
    assert (cross.folder / "test" / "metrics.json").read_text() == before
    said = capsys.readouterr().out
    assert f"fold 5 of 5: {cross.folder / 'fold_4'}\n" in said and "epoch 1/1 loss " in said
    assert said.count("bright: AUC ") == 5  # each fold; of all of them the mean leads
    assert "bright: mean and sd over the folds: AUC " in said and "; pooled: AUC " in said


def test_what_keeps_a_fold_from_being_run_is_said_before_all(script, table, capsys, tmp_path):
    def spoil(rows):
        rows[3]["size"] = "huge"  # in fold 0 only
        rows[9]["PatientID"] = rows[2]["PatientID"]  # folds 2 and 3

    assert script("--cv", table(spoil)) == 2
    shown = capsys.readouterr().err
    assert "'huge' is in no train row" in shown and "is in folds 2 and 3" in shown
    assert small.files_in(tmp_path) == {"cases.csv"}
    assert script("--cv train_folds=[0] test_folds=[] test_ckpt=[a.pt]") == 2
    shown = capsys.readouterr().err
    assert "2 folds with val_folds" in shown and "not together with --cv" in shown
