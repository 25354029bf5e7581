"""Two sequences per case, some of them missing, through all three stages."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from tests.conftest import CANARY, read_cases, write_cases
from tests.stages import small
from utils import checkpoint
from utils.checkpoint import CheckpointError

CHANNELS = ["t1_path", "flair_path"]
SEVERAL = f"data.channels=[{','.join(CHANNELS)}] data.missing_channels=zero"
OF_STAGE = {
    "dino": "probe.dense_cases=1 dino.recon_weight=1",
    "classification": "cls_targets=[lesion] reg_targets=[] report_by=[]",
    "segmentation": "classes={ball: 1}",
}
LACKING = {"flair_path": (0, 8, 13), "t1_path": (15,)}  # cases


@pytest.fixture(scope="session")
def sequences(scans_of, tmp_path_factory):
    """A folder of cases.csv, of which t1_path is the scan and flair_path another one of it, stored
    from the other side on a coarser grid."""
    folder, source = tmp_path_factory.mktemp("channels"), scans_of("dino")
    rows = []
    for i, row in enumerate(read_cases(source / "cases.csv")):
        image = nib.load(source / row.pop("path"))
        values = 100 - np.asarray(image.dataobj)[::-2]
        affine = image.affine @ np.diag([-2.0, 1, 1, 1])
        affine[:3, 3] += image.affine[:3, 0] * (image.shape[0] - 1)
        nib.save(nib.Nifti1Image(values, affine), folder / f"flair{i}.nii")
        row |= {"t1_path": image.get_filename(), "flair_path": f"flair{i}.nii", "modality": "MR"}
        row |= {name: "" for name, cases in LACKING.items() if i in cases}
        rows.append(row | {"seg_path": "" if i in LACKING["t1_path"] else source / row["seg_path"]})
    write_cases(folder / "cases.csv", rows)
    return folder


@pytest.fixture(scope="session")
def trained(sequences, tmp_path_factory):
    """A function: stage -> the folder of a run of one epoch, and of its test."""
    results, done = tmp_path_factory.mktemp("trained-channels"), {}

    def run(stage):
        if stage not in done:
            more = (SEVERAL, OF_STAGE[stage], "augment.drop_channel=0.3 n_epochs=1")
            overrides = (f"experiment={stage}", *more)
            assert small.run(stage, sequences, results, *overrides, pictures=True) == 0
            done[stage] = results / stage
        return done[stage]

    return run


@pytest.mark.parametrize("stage", OF_STAGE)
def test_a_run_learns_from_all_channels_and_says_what_is_missing(stage, trained):
    folder = trained(stage)
    saved = small.load(folder)
    network = saved["modules"][small.STAGES[stage].network]
    assert saved["settings"]["data"]["channels"] == CHANNELS
    assert network["backbone.encoder.stem.convs.0.conv.weight"].shape[1] == 2
    if stage == "dino":
        assert network["output.weight"].shape[0] == 2
    assert "flair_path: missing; zeros" in small.log_of(folder)
    assert "interpolated to the grid of t1_path" in small.log_of(folder)
    report = (folder / "report.html").read_text()
    assert "flair_path: missing; zeros" in report and "data.channels" in report


@pytest.mark.parametrize("stage", ["classification", "segmentation"])
def test_a_test_takes_the_channels_of_the_checkpoint(stage, trained, sequences, tmp_path):
    best = f"test_ckpt={trained(stage) / 'checkpoints' / 'best.pt'}"
    assert small.run(stage, sequences, tmp_path, "experiment=x", OF_STAGE[stage], best) == 0
    test = tmp_path / "x" / "test"
    if stage == "classification":
        assert len(read_cases(test / "predictions.csv")) == 4
        return
    rows = read_cases(test / "cases.csv")
    for row in rows:  # on the grid of the first channel that is there
        found, i = nib.load(test / "predictions" / row["prediction"]), int(row["csv_line"]) - 2
        case = read_cases(sequences / "cases.csv")[i]
        image = nib.load(sequences / (case["t1_path"] or case["flair_path"]))
        assert found.shape == image.shape and row["PatientID"] == f"{CANARY}{i}"
        np.testing.assert_array_equal(found.affine, image.affine)
    assert "drawn on flair_path" in (test / "report.html").read_text()
    assert "drawn on t1_path" in (test / "report.html").read_text()


@pytest.mark.parametrize("stage", ["classification", "segmentation"])
def test_files_named_after_the_channels_are_predicted(stage, trained, sequences, tmp_path, capsys):
    """As those of a table that names the same files; also one that lacks some, as in training."""
    rows = read_cases(sequences / "cases.csv")
    (tmp_path / "new").mkdir()
    for i in (14, 16):
        for name in CHANNELS:
            copy = tmp_path / "new" / f"case{i}_{name.removesuffix('_path')}.nii"
            shutil.copy(sequences / rows[i][name], copy)
    shutil.copy(copy, tmp_path / "new" / "alone_flair.nii")
    best = f"test_ckpt={trained(stage) / 'checkpoints' / 'best.pt'} experiment=x"
    predict = f"--predict={tmp_path / 'new'}"
    assert small.run(stage, sequences, tmp_path, OF_STAGE[stage], best, predict) == 0
    said = capsys.readouterr().out
    assert "3 scans" in said and "left out" not in said
    assert "alone   t1_path: missing; zeros for the network" in said
    assert small.run(stage, sequences, tmp_path, OF_STAGE[stage], best) == 0
    place, test = tmp_path / "x" / "predictions" / "new", tmp_path / "x" / "test"
    lines = {f"case{i}": str(i + 2) for i in (14, 16)}
    if stage == "segmentation":
        names = {row["csv_line"]: row["prediction"] for row in read_cases(test / "cases.csv")}
        for case, line in lines.items():
            found = [
                nib.load(place / f"{case}.nii.gz"),
                nib.load(test / "predictions" / names[line]),
            ]
            np.testing.assert_array_equal(*(image.get_fdata() for image in found))
        return
    tested = {row["PatientID"]: row["p_1"] for row in read_cases(test / "predictions.csv")}
    for row in read_cases(place / "predictions.csv"):
        if row["name"] == "alone":
            continue
        patient = rows[int(lines[row["name"]]) - 2]["PatientID"]
        assert float(row["p_1"]) == pytest.approx(float(tested[patient]), abs=1e-4)


@pytest.mark.parametrize("stage", ["classification", "segmentation"])
@pytest.mark.parametrize("others", ["[flair_path,t1_path]", "[t1_path]"])
def test_other_channels_than_those_of_the_checkpoint_are_refused(
    stage, others, trained, sequences, tmp_path
):
    best = trained(stage) / "checkpoints" / "best.pt"
    overrides = (OF_STAGE[stage], f"data.channels={others}", f"test_ckpt={best}")
    with pytest.raises(CheckpointError, match="t1_path, flair_path], here"):
        small.run(stage, sequences, tmp_path, *overrides)


def test_weights_of_one_channel_start_a_network_of_two_and_the_reverse(
    trained, trained_of, sequences, scans_of, tmp_path
):
    still = "n_epochs=1 learning_rate=1e-12 min_learning_rate=0 val_folds=[] train_folds=[2]"
    kernels, name = {}, "backbone.encoder.stem.convs.0.conv.weight"
    one, two = (run("dino") / "checkpoints" / "backbone.pt" for run in (trained_of, trained))
    runs = {
        "to_two": (sequences, SEVERAL, OF_STAGE["segmentation"], f"dino_weights={one}"),
        "to_one": (scans_of("dino"), OF_STAGE["segmentation"], f"dino_weights={two}"),
    }
    for experiment, (scans, *overrides) in runs.items():
        settings = (f"experiment={experiment}", still, *overrides)
        assert small.run("segmentation", scans, tmp_path, *settings) == 0
        kernels[experiment] = small.load(tmp_path / experiment)["modules"]["segmenter"][name]
    given = {p: checkpoint.load(p)["backbone"][name.removeprefix("backbone.")] for p in (one, two)}
    torch.testing.assert_close(kernels["to_two"], given[one].expand(-1, 2, -1, -1, -1) / 2)
    torch.testing.assert_close(kernels["to_one"], given[two].sum(1, keepdim=True))
    log = small.log_of(tmp_path / "to_two")
    assert "1 in the file, 2 here: repeated, and divided by the number of repeats" in log
    log = small.log_of(tmp_path / "to_one")
    assert "2 in the file, 1 here: added up" in log
    report = json.loads((tmp_path / "to_one" / "weights.json").read_text())
    assert any("set data.channels=[t1_path,flair_path]" in x for x in report["warnings"])
