"""segmentation.py as a user meets it: its files, its refusals, what comes out of a test."""

import csv
import json
import runpy
import sys
from functools import partial

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

import dino
import segmentation
from data.cases import CasesError
from models.backbones import facts_of
from tests.conftest import CANARY, ROOT, equal, read_cases, write_cases
from tests.stages import small_segmentation as small
from utils import checkpoint
from utils.checkpoint import CheckpointError
from utils.config.command_line import ConfigError, read_yaml, schema_keys, validate
from utils.config.segmentation import SegmentationConfig, impossible_segmentation

LABELS = {0, small.BALL, small.SHELL}
IMPOSSIBLE = partial(impossible_segmentation, facts_of=facts_of)


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return small.make_scans(tmp_path_factory.mktemp("masked"))


@pytest.fixture(scope="module")
def trained(masked, tmp_path_factory):
    """The folder of a finished run of the shipped config, made small."""
    results = tmp_path_factory.mktemp("results")
    assert small.run(masked, results, "experiment=whole", "n_epochs=4", pictures=True) == 0
    return results / "whole"


@pytest.fixture(scope="module")
def tested(masked, trained):
    """test/ of that run."""
    best = trained / "checkpoints" / "best.pt"
    overrides = ("experiment=whole", f"test_ckpt={best}", "inference.mirror=[true,false,false]")
    assert small.run(masked, trained.parent, *overrides) == 0
    return trained / "test"


@pytest.fixture
def run(masked, tmp_path):
    """A function: overrides -> exit code of a small run in <tmp_path>/<experiment>."""
    return lambda *overrides: small.run(masked, tmp_path, *overrides)


@pytest.fixture
def script(masked, tmp_path, monkeypatch):
    """A function: (overrides, options) -> exit code of segmentation.py as a program."""

    def program(*overrides, options=()):
        command = small.command_line(masked, tmp_path, *overrides)
        monkeypatch.setattr(sys, "argv", ["segmentation.py", *command, *options])
        with pytest.raises(SystemExit) as exited:
            runpy.run_path(str(ROOT / "segmentation.py"), run_name="__main__")
        return exited.value.code

    return program


def files_naming_patients(folder):
    found = {p for p in folder.rglob("*") if p.is_file() and CANARY.encode() in p.read_bytes()}
    return {str(p.relative_to(folder)) for p in found}


def cases_csv(folder):
    with open(folder / "cases.csv", newline="") as file:
        return list(csv.DictReader(file))


def prediction(folder, row):
    return nib.load(folder / "predictions" / row["prediction"])


# ---- the config


def test_the_shipped_config_is_valid_and_holds_exactly_the_schemas_keys():
    _, lines, _ = read_yaml(segmentation.CONFIG)
    keys = set(schema_keys(SegmentationConfig))
    sections = {key.split(".")[0] for key in keys if "." in key}
    assert keys == {key for key in lines if not key.startswith("classes.")} - sections
    values = read_yaml(segmentation.CONFIG)[0]
    config, problems = validate(
        values, SegmentationConfig, partial(impossible_segmentation, facts_of=facts_of)
    )
    assert problems == [] and config.classes["kidneys"] == [2]


@pytest.mark.parametrize(
    ("overrides", "key", "what"),
    [
        (["classes={}"], "classes", "empty"),
        (["classes={a: 1, b: [1, 2]}"], "classes.b", "1 is in classes.a too"),
        (["classes={a: one}"], "classes.a[0]", "integer"),
        (["classes={a: true}"], "classes.a[0]", "integer"),
        (["ignore_labels=[300]"], "ignore_labels", "300 is in classes.ball too"),
        (["augment.mirror_pairs=[[ball, shel]]"], "augment.mirror_pairs", "nearest: shell"),
        (["patches.size=[16,18,16]"], "patches.size", "divisible by 4"),
        (["patches.size=[4,4,4]"], "patches.size", "nearest: [8, 8, 8]"),
        (["loss.dice=0", "loss.ce=0"], "loss.ce", "nothing to learn"),
        (
            ["resunet.features=[4,8]", "resunet.blocks=[1,1]", "loss.deep_supervision=true"],
            "loss.deep_supervision",
            "one map",
        ),
        (["finetune.freeze_epochs=3"], "finetune.freeze_epochs", "more than n_epochs 2"),
        (["test_ckpt=[]"], "test_ckpt", "at least 1"),
        (["dino_weights=a.pt", "suprem_weights=b.pt"], "dino_weights", "at most one"),
        (["inference.overlap=1.0"], "inference.overlap", "0.9"),
    ],
)
def test_impossible_settings_are_named(run, overrides, key, what):
    with pytest.raises(ConfigError) as e:
        run(*overrides)
    found = {problem.key: problem.what for problem in e.value.problems}
    assert what in found[key]


# ---- what a run leaves behind


def test_a_run_writes_all_its_files(trained):
    written = {str(p.relative_to(trained)) for p in trained.rglob("*") if p.is_file()}
    written = {name for name in written if not name.startswith(("tensorboard/", "test/"))}
    checkpoints = {f"checkpoints/{n}.pt" for n in ("last", "previous", "best")}
    plots = {f"plots/{name}.png" for name in ("curves", "patches", "val_1", "val_2", "val_3")}
    texts = {"config.yaml", "metrics.csv", "log.jsonl", "log.txt", "report.html"}
    assert written == checkpoints | plots | texts
    page = (trained / "report.html").read_text()
    assert page.count("data:image/png") == 5 and "val_dice" in page


def test_it_learns_and_keeps_the_best_epoch(trained):
    rows = pd.read_csv(trained / "metrics.csv")
    assert rows["epoch"].tolist() == [1, 2, 3, 4] and rows["step"].iloc[-1] == 16
    assert rows["val_dice"].max() > 0.6 and rows["loss"].iloc[-1] < rows["loss"].iloc[0]
    mean = rows[["val_ball_dice", "val_shell_dice"]].mean(axis=1)
    np.testing.assert_allclose(rows["val_dice"], mean)
    np.testing.assert_allclose(rows["loss"], rows["dice_loss"] + rows["ce_loss"], rtol=1e-5)
    best = checkpoint.load(trained / "checkpoints" / "best.pt")
    assert best["progress"]["best_epoch"] == rows["val_dice"].idxmax() + 1
    assert best["step"] == 4 * best["progress"]["best_epoch"]


def test_patients_are_named_in_the_log_of_the_masks_and_in_the_test_table_only(
    trained, tested, masked
):
    predictions = {f"test/predictions/{row['prediction']}" for row in cases_csv(tested)}
    assert files_naming_patients(trained) - predictions == {"log.txt", "test/cases.csv"}
    assert files_naming_patients(masked / "cache") == set()


def test_what_is_odd_about_the_masks_is_said(trained):
    log = (trained / "log.txt").read_text()
    assert f"{CANARY}0 " in log and f"background: {small.UNMAPPED}" in log


def test_the_seed_decides_everything(run, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        run(f"experiment={name}", f"seed={seed}", "n_epochs=1", "val_folds=[]")
    one, two, other = (
        checkpoint.load(tmp_path / name / "checkpoints" / "last.pt")["modules"]
        for name in ("one", "two", "other")
    )
    assert equal(one, two) and not equal(one, other)


# ---- other networks and settings


@pytest.mark.parametrize(
    "overrides",
    [
        ["backbone=unet", "unet.feature_size=4", "optimizer=sgd", "learning_rate=0.01"],
        ["backbone=segresnet", "segresnet.feature_size=8", "patches.size=[8,8,8]"],
        ["backbone=segresnet", "segresnet.variant=ds", "segresnet.feature_size=8"]
        + ["segresnet.blocks=[1,1,1]", "precision=bf16", "grad_checkpointing=true"],
        ["backbone=swinunetr", "swinunetr.feature_size=12", "patches.size=[64,32,32]"]
        + ["train_folds=[2]", "test_folds=[4]", "inference.overlap=0"],
    ],
    ids=["unet", "segresnet", "segresnet ds", "swinunetr"],
)
def test_other_backbones_train_and_test(overrides, run, tmp_path):
    deep = [] if "backbone=swinunetr" in overrides else ["loss.deep_supervision=true"]
    overrides = ["experiment=x", "n_epochs=1", *deep, *overrides]
    assert run(*overrides, "val_folds=[]") == 0
    # the network of the test is that of the checkpoint, whatever the config says
    assert run("experiment=x", f"test_ckpt={tmp_path / 'x' / 'checkpoints' / 'best.pt'}") == 0
    assert len(cases_csv(tmp_path / "x" / "test")) == 6


def test_one_train_case_and_no_val_case(run, tmp_path, masked):
    rows = [row for row in read_cases(masked / "cases.csv") if row["fold"] == "0"][:1]
    rows[0] |= {name: masked / rows[0][name] for name in ("img_path", "seg_path")}
    write_cases(tmp_path / "one.csv", rows)
    one = (f"csv_path={tmp_path / 'one.csv'}", "train_folds=[0]", "val_folds=[]", "test_folds=[]")
    assert run("experiment=x", *one, "patches.foreground=1", "batch_size=3") == 0
    metrics = read_cases(tmp_path / "x" / "metrics.csv")
    assert "val_dice" not in metrics[0] and metrics[-1]["step"] == "2"


def test_a_frozen_encoder_starts_to_move_when_its_epochs_are_over(run, tmp_path, monkeypatch):
    taken, train_step = [], segmentation.train_step

    def observed(state, *args):
        numbers = train_step(state, *args)
        weights = state.bare("segmenter").state_dict()
        taken.append({k: v.clone() for k, v in weights.items()})
        return numbers

    monkeypatch.setattr(segmentation, "train_step", observed)
    run("experiment=x", "val_folds=[]", "finetune.freeze_epochs=1", "finetune.encoder_lr=0.1")
    encoder = "backbone.encoder.stem.convs.0.conv.weight"
    same = [torch.equal(taken[0][encoder], weights[encoder]) for weights in taken]
    assert same == [True] * 4 + [False] * 4
    assert not torch.equal(taken[0]["outputs.0.weight"], taken[3]["outputs.0.weight"])


# ---- weights


def test_it_starts_from_a_pre_trained_encoder(arguments, run, tmp_path, no_pictures):
    pretrain = arguments(tmp_path, "experiment=dino", "n_epochs=1", "probe_targets=[]")
    assert dino.main([*pretrain, "val_folds=[]"]) == 0
    weights = tmp_path / "dino" / "checkpoints" / "backbone.pt"
    still = ("val_folds=[]", "learning_rate=1e-12", "min_learning_rate=0", "n_epochs=1")
    assert run("experiment=x", f"dino_weights={weights}", "train_folds=[0]", *still) == 0
    teacher = checkpoint.load(weights)
    last = checkpoint.load(tmp_path / "x" / "checkpoints" / "last.pt")
    for name, value in teacher["backbone"].items():
        found = last["modules"]["segmenter"][f"backbone.{name}"]
        torch.testing.assert_close(found, value, atol=1e-6, rtol=1e-4)
    log = (tmp_path / "x" / "log.txt").read_text()
    assert "this repository: dino run 'dino'" in log and "left random" in log
    report = json.loads((tmp_path / "x" / "weights.json").read_text())
    assert report["encoder"][0] == report["encoder"][1] and report["decoder"][0] == 0
    # whom the weights have seen counts as seen
    assert len(last["seen_patients"]) == 8 and last["seen_patients"] == teacher["seen_patients"]


def test_it_starts_from_an_earlier_segmenter_with_its_decoder(trained, run, tmp_path):
    best = trained / "checkpoints" / "best.pt"
    other_classes = ("classes={shell: [7, 9]}", "n_epochs=1", "val_folds=[]")
    assert run("experiment=x", f"suprem_weights={best}", *other_classes) == 0
    report = json.loads((tmp_path / "x" / "weights.json").read_text())
    assert report["encoder"][0] == report["encoder"][1] > 0
    assert report["decoder"][0] == report["decoder"][1] > 0


# ---- the test of a checkpoint


def test_predictions_hold_the_files_own_labels_on_the_files_own_grid(tested, masked):
    for i, row in zip((11, 12, 13), cases_csv(tested)[::2], strict=True):
        found, image = prediction(tested, row), nib.load(masked / f"image{i}.nii.gz")
        assert row["PatientID"] == f"{CANARY}{i}" and row["csv_line"] == str(i + 2)
        assert found.shape == image.shape
        np.testing.assert_array_equal(found.affine, image.affine)
        # the type of the mask, without one that of the image
        assert found.get_data_dtype() == (np.int16 if i == 13 else np.uint16)
        values = set(np.unique(np.asarray(found.dataobj)).tolist())
        assert values <= LABELS and small.BALL in values


def test_scores_are_those_of_the_files(tested, masked):
    for row in cases_csv(tested):
        i = int(row["csv_line"]) - 2
        if i == 13:
            assert (row["dice"], row["note"]) == ("", "no mask: predicted only")
            continue
        found = np.asarray(prediction(tested, row).dataobj)
        truth = np.asarray(nib.load(masked / f"mask{i}.nii.gz").dataobj)
        ball = row["class"] == "ball"
        found = found == (small.BALL if ball else small.SHELL)
        truth = np.isin(truth, [small.BALL] if ball else [small.SHELL, small.OTHER_SHELL])
        dice = 2 * (found & truth).sum() / max(found.sum() + truth.sum(), 1)
        assert float(row["dice"]) == pytest.approx(dice)
        assert float(row["volume_ml"]) == pytest.approx(found.sum() * 0.01)
    summary = json.loads((tested / "summary.json").read_text())
    assert (summary["cases"], summary["predicted_only"]) == (2, 1)
    assert 0.5 < summary["classes"]["ball"]["dice"]["mean"] <= 1


def test_a_test_writes_its_files(tested):
    names = {p.name for p in tested.iterdir()}
    folders = {"plots", "predictions"}
    assert names == folders | {"cases.csv", "summary.json", "report.html", "config.yaml"}
    overlays = sorted(p.name for p in (tested / "plots").glob("overlay_*"))
    assert len(overlays) == 3 and overlays[-1].endswith("line15.png")  # without a mask: last
    page = (tested / "report.html").read_text()
    assert "trained without augment.flip" in page


def test_validation_and_test_agree(trained, masked, tmp_path):
    """One code path: the val Dice of the best epoch is what a test of best.pt on val_folds says."""
    best = trained / "checkpoints" / "best.pt"
    swapped = ("train_folds=[]", "val_folds=[]", "test_folds=[3]", "experiment=x")
    assert small.run(masked, tmp_path, f"test_ckpt={best}", *swapped) == 0
    summary = json.loads((tmp_path / "x" / "test" / "summary.json").read_text())
    val = pd.read_csv(trained / "metrics.csv")["val_dice"].max()
    assert summary["overall"]["dice"]["mean"] == pytest.approx(val)


def test_an_ensemble_is_the_mean_of_its_members(trained, tested, run, tmp_path):
    best = trained / "checkpoints" / "best.pt"
    for name, members in (("one", f"{best}"), ("twice", f"[{best}, {best}]")):
        assert run(f"experiment={name}", f"test_ckpt={members}") == 0
    assert read_cases(tmp_path / "one/test/cases.csv") == read_cases(
        tmp_path / "twice/test/cases.csv"
    )
    last = checkpoint.load(best)
    for key, value in last["modules"]["segmenter"].items():
        if key.startswith("outputs.0"):
            value.mul_(0).add_(torch.tensor([9.0, 0, 0]) if "bias" in key else 0)  # all background
    checkpoint.save(tmp_path / "air.pt", last)
    assert run("experiment=both", f"test_ckpt=[{best}, {tmp_path / 'air.pt'}]") == 0
    volumes = [sum(float(r["volume_ml"]) for r in cases_csv(tmp_path / name / "test"))
               for name in ("one", "both")]  # fmt: skip
    assert volumes[1] < volumes[0]


def test_an_ensemble_of_other_classes_or_volumes_is_refused(trained, tmp_path, run):
    best = trained / "checkpoints" / "best.pt"
    other = checkpoint.load(best)
    other["config"]["data"]["spacing"] = [2, 2, 2]
    other["classes"]["values"] = [[4], [7, 9]]
    checkpoint.save(tmp_path / "other.pt", other)
    with pytest.raises(CheckpointError, match="differs from .* in classes, data"):
        run(f"test_ckpt=[{best}, {tmp_path / 'other.pt'}]")


def test_patients_it_was_trained_on_are_refused(trained, run, tmp_path):
    best = f"test_ckpt={trained / 'checkpoints' / 'best.pt'}"
    folds = ("train_folds=[]", "val_folds=[]", "test_folds=[2, 4]")
    with pytest.raises(CasesError, match=f"(?s)2 of 5 test rows.*{CANARY}2 .*{CANARY}5 "):
        run(best, *folds)
    assert run(best, *folds, "allow_seen_patients=true", "experiment=x") == 0
    page = (tmp_path / "x" / "test" / "report.html").read_text()
    assert "No fair test" in page


@pytest.mark.parametrize("key", ["test_ckpt", "resume_training_from"])
def test_a_checkpoint_of_another_stage_is_refused(key, arguments, run, tmp_path, no_pictures):
    overrides = ("experiment=dino", "n_epochs=1", "probe_targets=[]", "val_folds=[]")
    assert dino.main(arguments(tmp_path, *overrides)) == 0
    with pytest.raises(CheckpointError, match="stage"):
        run(f"{key}={tmp_path / 'dino' / 'checkpoints' / 'last.pt'}")


# ---- what is refused, skipped, left out


def test_a_run_is_not_overwritten(trained, masked):
    before = {p: p.read_bytes() for p in trained.glob("checkpoints/*")}
    with pytest.raises(CheckpointError, match="already holds a run"):
        small.run(masked, trained.parent, "experiment=whole")
    assert before == {p: p.read_bytes() for p in trained.glob("checkpoints/*")}


def test_all_that_is_wrong_with_the_masks_is_listed_at_once(masked, script, tmp_path, capsys):
    rows = read_cases(masked / "cases.csv")
    for i, row in enumerate(rows):
        row |= {name: masked / row[name] for name in ("img_path", "seg_path") if row[name]}
        row["seg_path"] = "" if i == 0 else row["seg_path"]
    rows[1]["seg_path"] = rows[3]["seg_path"]  # of the thin volume
    write_cases(tmp_path / "bad.csv", rows)
    assert script(f"csv_path={tmp_path / 'bad.csv'}", "classes={ball: 300, none: 4}") == 2
    shown = capsys.readouterr().err
    assert "no seg_path; a case of train_folds needs a mask" in shown
    assert "22 x 20 x 10 voxels" in shown or "20 x 22 x 10 voxels" in shown
    assert "classes.none: 4 is in no train mask" in shown
    assert {p.name for p in tmp_path.iterdir()} == {"bad.csv"}


def test_check_reads_everything_and_says_what_is_odd(script, capsys, tmp_path):
    cache = tmp_path / "cache"
    assert script(f"cache_dir={cache}", options=["--check"]) == 0
    shown = capsys.readouterr().out
    assert "8 train, 3 val, 3 test cases, 0 problems" in shown
    assert f"background: {small.UNMAPPED}" in shown and "predicted only" in shown
    assert [p.name for p in cache.iterdir()] == ["checked.jsonl"]


def test_a_step_that_is_not_finite_leaves_no_trace(run, monkeypatch, tmp_path):
    calls, supervised = [], segmentation.supervised
    before, train_step = [], segmentation.train_step

    def spoiled(*args):
        calls.append(1)
        return supervised(*args) * (float("nan") if len(calls) == 2 else 1)

    def observed(state, *args):
        kept = [{k: v.clone() for k, v in state.bare("segmenter").state_dict().items()}]
        numbers = train_step(state, *args)
        before.append(equal(kept[0], state.bare("segmenter").state_dict()))
        return numbers

    monkeypatch.setattr(segmentation, "supervised", spoiled)
    monkeypatch.setattr(segmentation, "train_step", observed)
    ds = ("backbone=segresnet", "segresnet.variant=ds", "segresnet.feature_size=8")
    blocks = "segresnet.blocks=[1,1,1]"  # BatchNorm, whose statistics move
    assert run("experiment=x", *ds, blocks, "n_epochs=1", "val_folds=[]") == 0
    assert before == [False, True, False, False]
    log = (tmp_path / "x" / "log.txt").read_text()
    step = next(line for line in log.splitlines() if "step 1 skipped" in line)
    assert step.count(CANARY) == 2
