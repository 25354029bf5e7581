"""What only segmentation.py does: masks and classes, predictions on the files' own grids."""

import io
import json
import os
import re
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from torch import nn

import segmentation
from data.views.patches import PatchDataset
from models.backbones import facts_of
from tests.conftest import CANARY, equal, read_cases, write_cases
from tests.places import SHARED
from tests.stages import small
from utils import checkpoint
from utils.checkpoint import CheckpointError, hash_patients
from utils.classes import Classes
from utils.config.command_line import parse_command_line
from utils.config.segmentation import SegmentationConfig, impossible_segmentation
from utils.report.plots import color_of

LABELS = {0, small.BALL, small.SHELL}
DATA = SHARED / "data"
SERIES = {"ct_jpeg2000": "CT", "mr_oblique_t1": "MR", "mr_oblique_flair": "MR"}
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"no real scans in {DATA}")


@pytest.fixture(scope="session")
def stage():
    return "segmentation"


def prediction(folder, row):
    return nib.load(folder / "predictions" / row["prediction"])


def test_it_learns_and_keeps_the_best_epoch(trained):
    rows = small.epochs(trained)
    assert rows["epoch"].tolist() == [1, 2, 3, 4] and rows["step"].iloc[-1] == 16
    assert rows["val_dice"].max() > 0.6 and rows["loss"].iloc[-1] < rows["loss"].iloc[0]
    mean = rows[["val_ball_dice", "val_shell_dice"]].mean(axis=1)
    np.testing.assert_allclose(rows["val_dice"], mean)
    np.testing.assert_allclose(rows["loss"], rows["dice_loss"] + rows["ce_loss"], rtol=1e-5)
    best = small.load(trained, "best")
    assert best["progress"]["best_epoch"] == rows["val_dice"].idxmax() + 1
    assert best["step"] == 4 * best["progress"]["best_epoch"]


def test_what_is_odd_about_the_masks_is_said(trained):
    log = small.log_of(trained)
    assert f"{CANARY}0 " in log and f"background: {small.UNMAPPED}" in log


def test_the_first_answers_are_near_the_shares_of_the_classes(run, folder, monkeypatch):
    calls = small.observe(monkeypatch, "segmentation")
    assert run("val_folds=[] n_epochs=1 loss.deep_supervision=true patches.foreground=0") == 0
    first, step = calls[0]["before"]["modules"]["segmenter"], small.steps(folder)[0]
    biases = [first[f"outputs.{level}.bias"].softmax(dim=0) for level in range(2)]
    # a ball of 110 voxels and a shell of 790, nearly whole in patches of 16 x 16 x 16
    assert equal(*biases) and 0.02 < biases[0][1] < 0.04 and 0.15 < biases[0][2] < 0.25
    entropy = -(biases[0] * biases[0].log()).sum().item()
    assert step["ce_loss"] == pytest.approx(entropy, abs=0.15) and entropy < 0.7  # not log(3)


@pytest.mark.parametrize("more", ["", f"{small.DS} precision=bf16"])
def test_outputs_are_fitted_before_the_first_step_and_change_no_backbone(more, run, folder):
    """DS has running statistics, which the fit must not move either."""
    settings = f"val_folds=[] n_epochs=1 learning_rate=1e-12 min_learning_rate=0 {more}"
    states, losses = [], []
    for fit in ("false", "true"):
        assert run(f"{settings} finetune.fit_outputs={fit} experiment=x-{fit}") == 0
        states.append(small.load(folder.parent / f"x-{fit}")["modules"]["segmenter"])
        losses.append(small.steps(folder.parent / f"x-{fit}")[0]["loss"])
    for name, value in states[0].items():
        if not name.startswith("outputs."):
            torch.testing.assert_close(value, states[1][name])
    said = re.search(
        r"all else as it was: loss (.*) -> (.*)", small.log_of(folder.parent / "x-true")
    )
    before, after = map(float, said.groups())
    assert after < before and losses[1] < losses[0]


def test_the_first_patches_show_their_targets_in_colours(run, monkeypatch):
    drawn = []
    monkeypatch.setattr(segmentation, "draw_progress", lambda *args: None)
    monkeypatch.setattr(
        segmentation, "plot_crops", lambda path, views, legend: drawn.append((views, legend))
    )
    monkeypatch.setattr("utils.training.runlog.RunLog.image", lambda *args: None)
    assert run("n_epochs=1 val_folds=[]", pictures=True) == 0
    ((views, legend),) = drawn
    assert legend == {"ball": color_of(1), "shell": color_of(2)}
    image, target = views["image"], views["target"]
    assert target.shape == (*image.shape, 3)
    bright = [image[(target == to_rgb(color)).all(-1)].mean() for color in legend.values()]
    assert bright[0] > bright[1] > image[(target == 0).all(-1)].mean()  # as they were made


def test_a_resumed_run_keeps_its_biases(run, monkeypatch):
    def never(self):
        raise AssertionError

    small.stop_at(monkeypatch, "segmentation", "train_step", 1)
    assert run("n_epochs=1 val_folds=[]") == small.STOPPED
    monkeypatch.undo()
    monkeypatch.setattr(PatchDataset, "class_shares", never)
    assert run("n_epochs=1 val_folds=[] resume_training_from=auto") == 0


def test_one_train_case_and_no_val_case(run, table, folder):
    one = table(lambda rows: rows[:1])
    folds = "train_folds=[0] val_folds=[] test_folds=[]"
    assert run(one, folds, "patches.foreground=1 batch_size=3") == 0
    metrics = read_cases(folder / "metrics.csv")
    assert "val_dice" not in metrics[0] and metrics[-1]["step"] == "2"


def test_it_starts_from_a_pre_trained_encoder_and_decoder(trained_of, run, folder):
    weights = trained_of("dino") / "checkpoints" / "backbone.pt"
    still = "val_folds=[] learning_rate=1e-12 min_learning_rate=0 n_epochs=1"
    assert run(f"dino_weights={weights} train_folds=[0]", still) == 0
    teacher, last = checkpoint.load(weights), small.load(folder)
    for name, value in teacher["backbone"].items():
        found = last["modules"]["segmenter"][f"backbone.{name}"]
        torch.testing.assert_close(found, value, atol=1e-6, rtol=1e-4)
    log = small.log_of(folder)
    assert "this repository: dino run 'whole'" in log
    report = json.loads((folder / "weights.json").read_text())
    for part in ("encoder", "decoder"):
        assert report[part][0] == report[part][1] > 0
    # whom the weights have seen counts as seen
    assert len(last["seen_patients"]) == 8 and last["seen_patients"] == teacher["seen_patients"]


def test_it_starts_from_an_earlier_segmenter_with_its_decoder(best, run, folder):
    assert run(f"suprem_weights={best} classes={{shell: [7, 9]}} n_epochs=1 val_folds=[]") == 0
    report = json.loads((folder / "weights.json").read_text())
    assert report["encoder"][0] == report["encoder"][1] > 0
    assert report["decoder"][0] == report["decoder"][1] > 0


def test_predictions_hold_the_files_own_labels_on_the_files_own_grid(tested, scans):
    for i, row in zip((11, 12, 13), read_cases(tested / "cases.csv")[::2], strict=True):
        found, image = prediction(tested, row), nib.load(scans / f"image{i}.nii.gz")
        assert row["PatientID"] == f"{CANARY}{i}" and row["csv_line"] == str(i + 2)
        assert found.shape == image.shape
        np.testing.assert_array_equal(found.affine, image.affine)
        # the type of the mask, without one that of the image
        assert found.get_data_dtype() == (np.int16 if i == 13 else np.uint16)
        values = set(np.unique(np.asarray(found.dataobj)).tolist())
        assert values <= LABELS and small.BALL in values


def test_scores_are_those_of_the_files(tested, scans):
    for row in read_cases(tested / "cases.csv"):
        i = int(row["csv_line"]) - 2
        if i == 13:
            assert (row["dice"], row["note"]) == ("", "no mask: predicted only")
            continue
        found = np.asarray(prediction(tested, row).dataobj)
        truth = np.asarray(nib.load(scans / f"mask{i}.nii.gz").dataobj)
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
    predictions = {row["prediction"] for row in read_cases(tested / "cases.csv")}
    assert {p.name for p in (tested / "predictions").iterdir()} == predictions
    assert "trained without augment.flip" in (tested / "report.html").read_text()


def test_validation_and_test_agree(trained, best, run, folder):
    """One code path: the val Dice of the best epoch is what a test of best.pt on val_folds says."""
    assert run(f"test_ckpt={best} train_folds=[] val_folds=[] test_folds=[3]") == 0
    summary = json.loads((folder / "test" / "summary.json").read_text())
    val = small.epochs(trained)["val_dice"].max()
    assert summary["overall"]["dice"]["mean"] == pytest.approx(val)


def test_an_ensemble_is_the_mean_of_its_members(best, run, tmp_path):
    air, tables = checkpoint.load(best), {}
    for key, value in air["modules"]["segmenter"].items():
        if key.startswith("outputs.0"):
            value.mul_(0).add_(torch.tensor([9.0, 0, 0]) if "bias" in key else 0)  # all background
    checkpoint.save(tmp_path / "air.pt", air)
    members = {"one": best, "twice": f"[{best},{best}]", "both": f"[{best},{tmp_path / 'air.pt'}]"}
    for name, paths in members.items():
        assert run(f"experiment={name} test_ckpt={paths}") == 0
        tables[name] = read_cases(tmp_path / name / "test" / "cases.csv")
    assert tables["one"] == tables["twice"]
    one, both = (sum(float(row["volume_ml"]) for row in tables[name]) for name in ("one", "both"))
    assert both < one


def test_an_ensemble_of_other_classes_or_volumes_is_refused(best, run, tmp_path):
    other = checkpoint.load(best)
    other["config"]["data"]["spacing"] = [2, 2, 2]
    other["classes"]["values"] = [[4], [7, 9]]
    checkpoint.save(tmp_path / "other.pt", other)
    with pytest.raises(CheckpointError, match="differs from .* in classes, data"):
        run(f"test_ckpt=[{best},{tmp_path / 'other.pt'}]")


def test_a_test_on_the_fold_that_chose_the_epoch_is_named(best, run, folder, capsys):
    assert run(f"test_ckpt={best} train_folds=[] val_folds=[] test_folds=[3,4]") == 0
    page = (folder / "test" / "report.html").read_text()
    assert "No fair test: 3 of 6 test rows are of patients by whose val scores" in page
    assert "No fair test" in capsys.readouterr().out


# ---- cross-validation


@pytest.fixture(scope="module")
def cross(scans_of, tmp_path_factory):
    """The folder of a cross-validation over three folds of the cases with masks; of one of fold 2
    only the ball is labelled."""
    scans, results = scans_of("segmentation"), tmp_path_factory.mktemp("crossed")
    rows = read_cases(scans / "cases.csv")
    for i, row in enumerate(rows):
        paths = {name: scans / row[name] for name in ("img_path", "seg_path") if row[name]}
        rows[i] = row | paths | {"labelled_classes": "ball" * (i == 2)}
    write_cases(results / "cases.csv", rows)
    folds = f"train_folds=[0] val_folds=[1] test_folds=[2] csv_path={results / 'cases.csv'}"
    settings = f"--cv experiment=cv n_epochs=3 val_every=3 {folds}"
    with redirect_stdout(io.StringIO()) as out:
        assert small.run("segmentation", scans, results, settings) == 0
    (results / "said.txt").write_text(out.getvalue())
    return results / "cv"


def test_each_fold_is_tested_once_by_a_segmenter_that_has_not_seen_it(cross, scans):
    assert {p.name for p in cross.iterdir()} == {"fold_0", "fold_1", "fold_2", "test"}
    rows = read_cases(cross / "test" / "cases.csv")
    assert {(row["csv_line"], row["fold"]) for row in rows} == {
        (str(i + 2), str(fold)) for i, fold in enumerate(small.FOLDS_OF_MASKS) if fold < 3
    }
    for fold in range(3):
        seen = small.load(cross / f"fold_{fold}")["seen_patients"]
        train = [i for i, other in enumerate(small.FOLDS_OF_MASKS) if other == (fold + 2) % 3]
        assert seen == hash_patients(f"{CANARY}{i}" for i in train)
        own = read_cases(cross / f"fold_{fold}" / "test" / "cases.csv")
        same = [row for row in rows if row["fold"] == str(fold)]
        assert [row["dice"] for row in own] == [row["dice"] for row in same]
        where = cross / "test" / "predictions"  # they lie where the fold was tested
        assert Path(os.path.normpath(where / same[0]["prediction"])).is_file()
    summary = json.loads((cross / "test" / "summary.json").read_text())
    dice = [summary["folds"][fold]["dice"] for fold in "012"]
    assert summary["over_folds"]["dice"]["mean"] == pytest.approx(np.mean(dice))


def test_each_fold_and_the_mean_over_them_are_said(cross):
    said = (cross.parent / "said.txt").read_text()
    assert [f"fold {n} of 3: {cross / f'fold_{n - 1}'}\n" in said for n in (1, 2, 3)] == [True] * 3
    scores = re.findall(r"^dice 0\.\d{3}, surface_dice ", said, re.M)
    assert len(scores) == 4 and "mean and sd over the folds: dice 0." in said


def test_masks_are_counted_by_fold(cross):
    said = ["test_folds", "val_folds", "train_folds"]  # what fold 2 is in each run, the last first
    for fold, part in zip((2, 1, 0), said, strict=True):
        what = f"classes.shell: labelled in 1 of 2 masks of {part}"
        log = small.log_of(cross / f"fold_{fold}")
        assert what in log and log.count("labelled in") == 1


def test_a_folder_stands_for_all_folds_as_an_ensemble(cross, run, folder, capsys):
    assert run(f"test_ckpt={cross} train_folds=[] val_folds=[] test_folds=[4]") == 0
    paths = [cross / f"fold_{i}" / "checkpoints" / "best.pt" for i in range(3)]
    together = read_cases(folder / "test" / "cases.csv")
    listed = f"[{','.join(map(str, paths))}]"
    test = f"experiment=y test_ckpt={listed} train_folds=[] val_folds=[] test_folds=[4]"
    assert run(test) == 0
    assert read_cases(folder.parent / "y" / "test" / "cases.csv") == together
    with pytest.raises(CheckpointError, match="no such checkpoint; a folder stands for"):
        run(f"test_ckpt={cross.parent}")


def test_what_keeps_a_fold_from_being_run_is_said_before_all(script, table, capsys, tmp_path):
    def spoil(rows):
        rows[3]["PatientID"] = rows[1]["PatientID"]  # folds 0 and 1
        rows[2]["seg_path"] = ""

    folds = "train_folds=[0] val_folds=[1] test_folds=[2]"
    assert script("--cv", table(spoil), folds) == 2
    shown = capsys.readouterr().err
    assert "is in folds 1 and 0" in shown and "a case of train_folds needs a mask" in shown
    assert small.files_in(tmp_path) == {"cases.csv"}


# ---- real scans: the grid of dcm2niix, masks of many labels


class BrightIsTwo(nn.Module):
    """No network: the second class where the image is brighter than 0.3, else the background."""

    def forward(self, x):
        bright = torch.where(x > 0.3, 50.0, -50.0)
        return torch.cat([torch.zeros_like(x), torch.full_like(x, -99.0), bright], dim=1)

    def load_state_dict(self, _):
        pass


@needs_data
def test_predictions_of_dicom_lie_on_dcm2niix_voxel_for_voxel(folder, tmp_path, monkeypatch):
    run = partial(small.run, "segmentation", tmp_path, tmp_path, "experiment=x")
    rows = [
        {"PatientID": m, "img_path": DATA / "dicom" / name, "fold": "t", "modality": m}
        for name, m in SERIES.items()
    ]
    write_cases(tmp_path / "cases.csv", rows)
    overrides = "classes={dark: 4, bright: 200} data.crop_background=false patches.size=[64,64,16]"
    arguments = small.command_line("segmentation", tmp_path, tmp_path, overrides)
    impossible = partial(impossible_segmentation, facts_of=facts_of)
    schema = (segmentation.CONFIG, SegmentationConfig, impossible)
    config = parse_command_line(arguments, *schema)[0]
    saved = {"settings": {"stage": "segmentation"}, "config": config.model_dump(mode="json")}
    saved |= {"modules": {"segmenter": {}}, "seen_patients": [], "progress": {"epoch": 1}}
    saved["classes"] = Classes.from_config(config.classes).to_dict()
    checkpoint.save(tmp_path / "best.pt", saved)
    monkeypatch.setattr(segmentation, "build", lambda *args: BrightIsTwo())
    test = "train_folds=[] val_folds=[] test_folds=[t] inference.overlap=0"
    assert run(f"test_ckpt={tmp_path / 'best.pt'}", test) == 0
    found = read_cases(folder / "test" / "cases.csv")[::2]
    for name, row in zip(SERIES, found, strict=True):
        prediction = nib.load(folder / "test" / "predictions" / row["prediction"])
        reference = nib.load(DATA / "dicom" / "dcm2niix" / f"{name}.nii.gz")
        assert prediction.shape == reference.shape
        np.testing.assert_allclose(prediction.affine, reference.affine, atol=1e-4)
        bright = np.asarray(prediction.dataobj)
        assert set(np.unique(bright)) == {0, 200}
        # one threshold of the reference's own voxels, but for the rounding of MR in the cache
        values = np.asarray(reference.dataobj, np.float64)
        assert values[bright == 200].min() >= values[bright == 0].max() - 1


@needs_data
@pytest.mark.parametrize(("name", "num_labels"), [("ct", 41), ("mr", 24)])
def test_masks_of_many_labels_train_and_test_through_every_output(
    name, num_labels, run, folder, tmp_path
):
    run = partial(small.run, "segmentation", tmp_path, tmp_path, "experiment=x")
    mask = DATA / name / "abdomen_3mm_labels.nii.gz"
    labels = np.unique(np.asarray(nib.load(mask).dataobj)).astype(int)
    assert len(labels) == num_labels and labels[0] == 0
    row = {"PatientID": "P", "img_path": DATA / name / "abdomen_3mm.nii.gz", "seg_path": mask}
    write_cases(tmp_path / "cases.csv", [row | {"fold": "a", "modality": name.upper()}])
    classes = "classes={" + ", ".join(f"label {n}: {n}" for n in labels[1:]) + "}"
    few = "n_epochs=1 patches.size=[32,32,16] patches.per_case=4"
    assert run(classes, "train_folds=[a] val_folds=[] test_folds=[]", few) == 0
    best, test = f"test_ckpt={folder / 'checkpoints' / 'best.pt'}", folder / "test"
    assert run(best, "test_folds=[a] allow_seen_patients=true", pictures=True) == 0
    summary = json.loads((test / "summary.json").read_text())
    assert len(summary["classes"]) == len(read_cases(test / "cases.csv")) == num_labels - 1
    assert summary["overall"]["dice"]["counted"] == num_labels - 1
    (path,) = (test / "predictions").iterdir()
    assert nib.load(path).shape == nib.load(mask).shape
    (overlay,) = (test / "plots").glob("overlay_*.png")
    assert overlay.stat().st_size > 10_000
