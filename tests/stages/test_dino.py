"""What only dino.py does: probes, a teacher, prototypes, embeddings, weights in and out."""

import html
import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch

import dino
from data.cases import CasesError
from models.backbones import build_backbone
from tests.conftest import CANARY, equal
from tests.stages import small
from utils.checkpoint import hash_patients
from utils.config.command_line import ConfigError
from utils.errors import InputError
from utils.weights import load_backbone


@pytest.fixture(scope="session")
def stage():
    return "dino"


@pytest.fixture
def calls(monkeypatch):
    """See `small.observe`."""
    return small.observe(monkeypatch, "dino")


def test_metrics_begin_before_training_and_hold_the_probes(trained):
    rows = small.epochs(trained)
    assert rows["epoch"].tolist() == [0, 1, 2] and rows["step"].tolist() == [0, 4, 8]
    probes = rows[["probe_lesion_knn_auc", "probe_lesion_linear_auc", "probe_dense_dice"]]
    assert probes.notna().all(axis=1).tolist() == [True, False, True]
    means = rows[["loss", "dino_loss", "patch_loss", "grad_norm", "images_per_s"]]
    assert means.notna().all(axis=1).tolist() == [False, True, True]
    always = rows[["val_loss", "val_teacher_entropy", "val_feature_std", "rankme"]]
    assert always.notna().all(axis=None)
    assert [line["step"] for line in small.steps(trained)] == list(range(8))


def test_the_report_shows_the_nearest_cases_and_what_was_trained_on(trained):
    page = (trained / "report.html").read_text()
    assert (trained / "plots" / "neighbours.png").exists() and dino.PICTURES[
        "neighbours.png"
    ] in page
    assert "<h2>Train cases" in page and "size of the body" in page and CANARY not in page


def test_the_backbone_file_is_the_last_teachers(trained):
    last, backbone = small.load(trained, "last"), small.load(trained, "backbone")
    assert equal(backbone["backbone"], small.backbone(last["modules"]["teacher"]))
    assert backbone["settings"]["backbone"] == "resunet" and backbone["step"] == last["step"] == 8
    assert equal(small.load(trained, "best")["modules"], last["modules"])
    assert "chosen_by" not in backbone


def test_probes_choose_only_if_asked_and_the_file_says_which_labels(run, folder, monkeypatch):
    scores = iter([0.5, 0.9, 0.7])  # before training, then two epochs
    monkeypatch.setattr(dino, "probe", lambda *args: {"probe_dense_dice": next(scores)})
    assert run("probe.choose=true probe.every=1") == 0
    backbone, last = small.load(folder, "backbone"), small.load(folder)
    assert backbone["step"] == 4 and last["step"] == 8
    assert backbone["chosen_by"] == ["lesion", "seg_path"]
    report = load_backbone(
        build_backbone("resunet", features=(4, 8, 8), blocks=(1, 1, 1)),
        folder / "checkpoints" / "backbone.pt",
    )
    assert "chosen by the labels lesion, seg_path" in report.origin


def test_masks_that_were_not_probed_have_not_chosen(run, folder):
    assert run("probe.choose=true probe.dense_cases=0 n_epochs=1") == 0
    assert small.load(folder, "backbone")["chosen_by"] == ["lesion"]


def test_probes_cannot_choose_without_labels(run):
    with pytest.raises(InputError, match="probe.choose"):
        run("probe.choose=true probe_targets=[] probe.dense_cases=0")


def test_a_masked_autoencoder_alone(run, folder):
    """No head, no prototype; what it learned, decoder and all, goes on."""
    alone = "dino.dino_weight=0 dino.patch_weight=0 dino.koleo_weight=0 dino.mask_prob=1"
    assert run(alone, "n_epochs=3 train_folds=[0,1]", pictures=True) == 0
    rows, last = small.epochs(folder), small.load(folder)
    assert "dino_loss" not in rows and rows["val_recon_loss"].iloc[-1] < rows["val_recon_loss"][0]
    assert not [name for name in last["modules"]["student"] if "head" in name]
    assert (folder / "plots" / "reconstruction.png").exists()
    backbone = build_backbone("resunet", features=(4, 8, 8), blocks=(1, 1, 1))
    report = load_backbone(backbone, folder / "checkpoints" / "backbone.pt")
    assert report.decoder[0] == report.decoder[1] > 0


@pytest.mark.parametrize(
    "backbone, size, options",
    [
        ("swinunetr", 32, {"feature_size": 12, "use_v2": False}),
        ("unet", 16, {"feature_size": 4}),
        ("segresnet", 8, {"variant": "standard", "feature_size": 8, "blocks": [1, 1]}),
        ("segresnet", 8, {"variant": "ds", "feature_size": 8, "blocks": [1, 1, 1]}),
    ],
)
def test_other_backbones_train(backbone, size, options, run, folder):
    network = [f"{backbone}.{key}={json.dumps(value)}" for key, value in options.items()]
    crops = "crops.region_size=[32,32,32] crops.global_size=[32,32,32] crops.num_local=1 "
    crops += f"crops.local_size=[{size},{size},{size}]"
    few = "train_folds=[2] val_folds=[] n_epochs=1 grad_checkpointing=true "
    few += "dino.recon_weight=0" if backbone == "swinunetr" else ""  # its decoder needs 64 voxels
    assert run(f"backbone={backbone}", *network, crops, few) == 0
    saved = small.load(folder, "backbone")
    assert saved["settings"][backbone] == options
    decoder = backbone != "swinunetr"
    build_backbone(backbone, decoder=decoder, **options).load_state_dict(saved["backbone"])


def test_without_val_folds_labels_masks_and_local_crops(run, folder):
    nothing = "val_folds=[] probe_targets=[] crops.num_local=0 dino.patch_weight=0"
    assert run("precision=bf16", nothing) == 0
    assert (folder / "checkpoints" / "backbone.pt").exists()


def test_two_scans_of_a_patient_are_the_two_views(run, folder, table):
    def in_twos(rows):
        for row, other in zip(rows[3:8], rows, strict=False):  # all of train folds
            row["PatientID"] = other["PatientID"]

    pairs, together = "crops.pairs=same_patient", table(in_twos)
    assert run(together, pairs, "n_epochs=1") == 0
    assert "crops.pairs: 8 of 8 train scans have another" in (folder / "log.txt").read_text()
    assert small.epochs(folder)["val_loss"].notna().all()
    with pytest.raises(InputError, match="no patient of the train folds has two scans"):
        run(pairs, "experiment=y")
    with pytest.raises(ConfigError, match="crops.num_local .* nearest: 2"):
        run(pairs, "experiment=z crops.num_local=1")


# ---- what a step changes


def test_teacher_follows_the_student_without_gradient(run, calls, folder):
    assert run("n_epochs=1") == 0
    for call, numbers in zip(calls, small.steps(folder), strict=True):
        student, teacher = (call["state"].modules[name] for name in ("student", "teacher"))
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
        own = {t.untyped_storage().data_ptr() for t in teacher.state_dict().values()}
        assert own.isdisjoint(t.untyped_storage().data_ptr() for t in student.state_dict().values())
        old, new = (call[when]["modules"] for when in ("before", "after"))
        for name, _ in teacher.named_parameters():
            m = numbers["momentum"]
            expected = m * old["teacher"][name] + (1 - m) * new["student"][name]
            torch.testing.assert_close(new["teacher"][name], expected)


def test_prototypes_do_not_move_in_the_first_epochs(run, calls):
    assert run("dino.freeze_prototypes_epochs=1 dino.norm_last_layer=false") == 0
    for head, part in itertools.product(("head", "patch_head"), ("direction", "length")):
        key = f"{head}.prototypes.{part}"
        states = [[call[n]["modules"]["student"] for n in ("before", "after")] for call in calls]
        assert [equal(one[key], other[key]) for one, other in states] == [True] * 4 + [False] * 4


def test_many_in_a_row_end_the_run(run, monkeypatch, folder):
    small.spoil_loss(monkeypatch, "dino", {3, 5, 6, 7})
    with pytest.raises(RuntimeError, match="3 steps in a row were not finite"):
        run("max_bad_steps=3")
    assert small.load(folder)["step"] == 4


def test_an_epoch_of_nothing_but_bad_steps_is_survived(run, monkeypatch):
    small.spoil_loss(monkeypatch, "dino", {0, 1, 2, 3})
    assert run() == 0


def test_a_step_without_masked_crops_spoils_no_mean(run, folder):
    assert run("n_epochs=1 dino.mask_prob=0.2 batch_size=1") == 0
    assert np.isfinite(small.epochs(folder)["patch_teacher_entropy"][1])
    entropies = [step["patch_teacher_entropy"] for step in small.steps(folder)]
    assert None in entropies  # or nothing was tested


def test_a_bad_case_may_be_left_out_and_is_named(run, table, folder, monkeypatch):
    def damage(rows):
        content, rows[1]["path"] = rows[1]["path"].read_bytes(), folder.parent / "damaged1.nii"
        rows[1]["path"].write_bytes(content[:5000])

    monkeypatch.setattr(dino, "plot_curves", lambda *args, **kwargs: None)
    csv = table(damage)
    with pytest.raises(CasesError, match=f"line 3  {CANARY}1 "):
        run(csv)
    assert run(csv, "n_epochs=1 data.max_bad_cases=1", pictures=True) == 0
    assert small.files_naming_patients(folder) == {"log.txt", "report.html"}
    for name in ("log.txt", "report.html"):
        text = (folder / name).read_text()
        assert f"{CANARY}1" in text and "damaged1.nii" in text and f"{CANARY}2" not in text


def test_embeddings_of_the_test_cases(tested, scans):
    assert small.files_in(tested) == {"features.npz", "features.csv", "metrics.json"}
    rows, saved = pd.read_csv(tested / "features.csv", dtype=str), np.load(tested / "features.npz")
    assert rows["csv_line"].tolist() == [str(n) for n in saved["csv_line"]]
    source = pd.read_csv(scans / "cases.csv", dtype=str)[-4:]
    for column in ("PatientID", "fold", "lesion"):
        assert rows[column].tolist() == source[column].tolist()
    assert len(saved["features"]) == len(np.unique(saved["features"], axis=0)) == 4
    scores = json.loads((tested / "metrics.json").read_text())
    assert 0 <= scores["lesion"]["linear_auc"] <= 1 and 0 <= scores["lesion"]["knn_accuracy"] <= 1
    assert 0 <= scores["dense"]["dice"] <= 1


# ---- weights


@pytest.fixture(scope="module")
def first(scans_of, tmp_path_factory):
    """The folder of a run on fold 0."""
    results = tmp_path_factory.mktemp("first")
    assert small.run("dino", scans_of("dino"), results, "experiment=a train_folds=[0]") == 0
    return results / "a"


@pytest.fixture
def weights(first):
    return first / "checkpoints" / "backbone.pt"


@pytest.mark.parametrize("name", ["backbone", "best", "last"])
def test_the_teacher_is_handed_over_bit_for_bit(name, first):
    backbone = build_backbone("resunet", features=(4, 8, 8), blocks=(1, 1, 1))
    report = load_backbone(backbone, first / "checkpoints" / f"{name}.pt")
    whole = small.load(first)
    teacher = small.backbone(whole["modules"]["teacher"])
    assert equal({k: backbone.state_dict()[k] for k in teacher}, teacher)
    assert not equal(small.backbone(whole["modules"]["student"]), teacher)
    assert report.encoder[0] == report.encoder[1] and report.decoder[0] == report.decoder[1]
    assert report.encoder[0] + report.decoder[0] == len(teacher)
    assert report.origin.startswith("this repository: dino run 'a'")
    assert report.seen_patients == whole["seen_patients"]
    assert report.expected_input["hu_window"] == [-1000, 1000]


def test_a_run_starts_from_weights_and_says_so(first, weights, run, tmp_path):
    """Steps too small to change a weight: what the student ends with is what it began with."""
    still = "learning_rate=1e-30 min_learning_rate=0 n_epochs=1 train_folds=[1] seed=5"
    overrides = f"experiment=b suprem_weights={weights} data.hu_window=[-900,900]"
    assert run(overrides, still, pictures=True) == 0
    given, last = small.load(first, "backbone"), small.load(tmp_path / "b")
    assert equal(small.backbone(last["modules"]["student"]), given["backbone"])
    for name, x in small.backbone(last["modules"]["teacher"]).items():  # averaged with itself
        torch.testing.assert_close(x, given["backbone"][name])

    own = hash_patients(f"{CANARY}{i}" for i in (1, 4, 7))  # fold 1
    assert not set(own) & set(given["seen_patients"])
    assert set(last["seen_patients"]) == {*own, *given["seen_patients"]}
    backbone = small.load(tmp_path / "b", "backbone")
    assert backbone["seen_patients"] == last["seen_patients"]

    saved = json.loads((tmp_path / "b" / "weights.json").read_text())
    assert saved == last["weights"] == backbone["weights"]
    assert saved["encoder"][0] + saved["decoder"][0] == len(given["backbone"])
    for file in ("log.txt", "report.html"):
        text = html.unescape((tmp_path / "b" / file).read_text())
        assert "dino run 'a'" in text
        assert "set data.hu_window=[-1000,1000]" in text


def test_a_resumed_run_remembers_its_weights(weights, run, tmp_path):
    overrides = f"experiment=c suprem_weights={weights} resume_training_from=auto"
    assert run(overrides, "n_epochs=1") == 0  # nothing there: from weights
    once = small.load(tmp_path / "c")
    assert once["weights"]["file"] == str(weights)
    (tmp_path / "c" / "weights.json").unlink()
    assert run(overrides) == 0  # from last.pt
    twice = small.load(tmp_path / "c")
    assert twice["step"] == 2 * once["step"]
    assert twice["weights"] == once["weights"]
    assert twice["seen_patients"] == once["seen_patients"]
    assert json.loads((tmp_path / "c" / "weights.json").read_text()) == once["weights"]


def test_the_order_of_patch_merging_survives_a_run(run, tmp_path):
    """Published weights, pre-training, its files, and back."""
    torch.manual_seed(3)
    suprem = build_backbone("swinunetr", feature_size=12).state_dict()
    suprem = {f"module.backbone.{name}": x for name, x in suprem.items()}
    suprem["module.organ_embedding"] = torch.ones(32, 512)
    torch.save({"net": suprem}, tmp_path / "suprem.pth")
    few = "n_epochs=1 train_folds=[0] val_folds=[] probe_targets=[] probe.dense_cases=0"
    swin = "backbone=swinunetr swinunetr.feature_size=12 dino.patch_level=2 crops.num_local=0 "
    swin += "crops.global_size=[32,32,32] crops.region_size=[32,32,32] dino.recon_weight=0"
    assert run(f"experiment=swin suprem_weights={tmp_path / 'suprem.pth'}", few, swin) == 0
    for file in ("backbone.pt", "last.pt"):
        backbone = build_backbone("swinunetr", feature_size=12)
        assert backbone.merge_order == "monai1.5"
        report = load_backbone(backbone, tmp_path / "swin" / "checkpoints" / file)
        assert backbone.merge_order == report.merge_order == "published"


def test_folders_that_are_files_are_named(script, first, tmp_path, capsys):
    """As are those that may not be written to, which a test as root cannot show, and their keys."""
    (tmp_path / "file").touch()
    assert script(f"cache_dir={tmp_path / 'file'}") == 2
    (tmp_path / "a").touch()
    tested = f"experiment=a test_ckpt={first / 'checkpoints' / 'last.pt'} test_folds=[4]"
    assert script(tested) == 2
    said = capsys.readouterr().err
    assert f"cache_dir: {tmp_path / 'file'} is a file" in said
    assert f"results_dir: {tmp_path / 'a'} is a file" in said


def test_bad_weights_stop_the_script_with_2_before_the_scans_are_read(
    script, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("data.prepare.load.load_cases", None)
    torch.save({"net": {"module.x": torch.ones(3)}}, tmp_path / "other.pth")
    assert script(f"suprem_weights={tmp_path / 'other.pth'}") == 2
    assert "other.pth: does not fit this resunet" in capsys.readouterr().err
