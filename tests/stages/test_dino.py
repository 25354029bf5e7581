"""dino.py as a user meets it: its files, its refusals, what a step changes and what it must not."""

import copy
import json
import runpy
import sys

import numpy as np
import pandas as pd
import pytest
import torch

import dino
from data.cases import CasesError
from models.backbones import build_backbone
from tests.conftest import CANARY, ROOT, equal, read_cases, write_cases
from utils import checkpoint
from utils.checkpoint import CheckpointError


@pytest.fixture(scope="module")
def trained(arguments, tmp_path_factory):
    """The folder of a finished run of the shipped config, made small."""
    results = tmp_path_factory.mktemp("results")
    assert dino.main(arguments(results, "experiment=whole", "probe.every=2")) == 0
    return results / "whole"


@pytest.fixture
def script(arguments, tmp_path, no_pictures, monkeypatch):
    """A function: (overrides, options) -> exit code of dino.py as a program."""

    def run(*overrides, options=()):
        command = ["dino.py", *arguments(tmp_path, *overrides), *options]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as exited:
            runpy.run_path(str(ROOT / "dino.py"), run_name="__main__")
        return exited.value.code

    return run


def files_naming_patients(folder):
    found = {p for p in folder.rglob("*") if p.is_file() and CANARY.encode() in p.read_bytes()}
    return {str(p.relative_to(folder)) for p in found}


@pytest.fixture
def observed_steps(monkeypatch):
    """Calls of train_step: what was trained, before and after, and what was returned."""
    calls, train_step = [], dino.train_step

    def snapshot(state):
        modules = {name: module.state_dict() for name, module in state.modules.items()}
        moments = state.optimizer.state_dict()["state"]
        return copy.deepcopy({"modules": modules, "optimizer": moments})

    def observed(state, batches, values, cfg, device):
        before = snapshot(state)
        numbers = train_step(state, batches, values, cfg, device)
        call = {"before": before, "after": snapshot(state), "state": state, "values": values}
        calls.append(call | {"numbers": dict(numbers)})
        return numbers

    monkeypatch.setattr(dino, "train_step", observed)
    return calls


# ---- what a run leaves behind


def test_a_run_writes_all_its_files(trained):
    written = {str(p.relative_to(trained)) for p in trained.rglob("*") if p.is_file()}
    boards = {name for name in written if name.startswith("tensorboard/")}
    checkpoints = {f"checkpoints/{n}.pt" for n in ("last", "previous", "best", "backbone")}
    plots = {f"plots/{name}.png" for name in ("curves", "crops", "features")}
    texts = {"config.yaml", "metrics.csv", "log.jsonl", "log.txt", "report.html"}
    assert len(boards) == 1
    assert written == boards | checkpoints | plots | texts
    page = (trained / "report.html").read_text()
    assert page.count("data:image/png") == 3 and "val_loss" in page
    assert len(list(trained.parent.iterdir())) == 1  # nothing outside the experiment


def test_metrics_begin_before_training_and_hold_the_probes(trained):
    rows = pd.read_csv(trained / "metrics.csv")
    assert rows["epoch"].tolist() == [0, 1, 2] and rows["step"].tolist() == [0, 4, 8]
    probes = rows[["probe_lesion_knn_auc", "probe_lesion_linear_auc", "probe_dense_dice"]]
    assert probes.notna().all(axis=1).tolist() == [True, False, True]
    means = rows[["loss", "dino_loss", "patch_loss", "grad_norm", "images_per_s"]]
    assert means.notna().all(axis=1).tolist() == [False, True, True]
    always = rows[["val_loss", "val_teacher_entropy", "val_feature_std", "rankme"]]
    assert always.notna().all(axis=None)
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(8))


def test_patients_are_named_nowhere(trained, scans):
    assert files_naming_patients(trained) == set()
    assert files_naming_patients(scans / "cache") == set()


def test_the_backbone_file_is_the_best_teachers_encoder(trained):
    best = checkpoint.load(trained / "checkpoints" / "best.pt")
    backbone = checkpoint.load(trained / "checkpoints" / "backbone.pt")
    teacher = best["modules"]["teacher"]
    encoder = {
        k.removeprefix("backbone."): v for k, v in teacher.items() if k.startswith("backbone.")
    }
    assert equal(backbone["backbone"], encoder)
    assert backbone["settings"]["backbone"] == "resunet" and backbone["step"] == best["step"]


@pytest.mark.parametrize(
    "backbone, size, options",
    [
        ("swinunetr", 32, {"feature_size": 12, "use_v2": False}),
        ("unet", 16, {"feature_size": 4}),
        ("segresnet", 8, {"variant": "standard", "feature_size": 8, "blocks": [1, 1]}),
        ("segresnet", 8, {"variant": "ds", "feature_size": 8, "blocks": [1, 1, 1]}),
    ],
)
def test_other_backbones_train(backbone, size, options, train, tmp_path):
    crops = ["crops.region_size=[32,32,32]", "crops.global_size=[32,32,32]"]
    crops += [f"crops.local_size=[{size},{size},{size}]", "crops.num_local=1"]
    network = [f"{backbone}.{key}={json.dumps(value)}" for key, value in options.items()]
    few = ["train_folds=[2]", "val_folds=[]", "n_epochs=1", "grad_checkpointing=true"]
    assert train(f"backbone={backbone}", *network, *crops, *few, "experiment=x") == 0
    saved = checkpoint.load(tmp_path / "x" / "checkpoints" / "backbone.pt")
    assert saved["settings"][backbone] == options
    build_backbone(backbone, decoder=False, **options).load_state_dict(saved["backbone"])


def test_without_val_folds_labels_masks_and_local_crops(train, tmp_path):
    nothing = ("val_folds=[]", "probe_targets=[]", "crops.num_local=0", "dino.patch_weight=0")
    assert train("experiment=x", "precision=bf16", *nothing) == 0
    assert (tmp_path / "x" / "checkpoints" / "backbone.pt").exists()


def test_the_seed_decides_everything(train, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        train(f"experiment={name}", f"seed={seed}", "n_epochs=1")
    one, two, other = (
        checkpoint.load(tmp_path / name / "checkpoints" / "last.pt")["modules"]
        for name in ("one", "two", "other")
    )
    assert equal(one, two) and not equal(one, other)


# ---- what a step changes


def test_teacher_follows_the_student_without_gradient(train, observed_steps):
    train("experiment=x", "n_epochs=1")
    for call in observed_steps:
        student, teacher = (call["state"].modules[name] for name in ("student", "teacher"))
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
        own = {t.untyped_storage().data_ptr() for t in teacher.state_dict().values()}
        assert own.isdisjoint(t.untyped_storage().data_ptr() for t in student.state_dict().values())
        old, new = (call[when]["modules"] for when in ("before", "after"))
        for name, _ in teacher.named_parameters():
            m = call["values"]["momentum"]
            expected = m * old["teacher"][name] + (1 - m) * new["student"][name]
            torch.testing.assert_close(new["teacher"][name], expected)


def test_prototypes_do_not_move_in_the_first_epochs(train, observed_steps):
    train("experiment=x", "dino.freeze_prototypes_epochs=1", "dino.norm_last_layer=false")
    for name in ("head", "patch_head"):
        for part in ("direction", "length"):
            key = f"{name}.prototypes.{part}"
            moved = [
                not equal(*(call[when]["modules"]["student"][key] for when in ("before", "after")))
                for call in observed_steps
            ]
            assert moved == [False] * 4 + [True] * 4


# ---- what is not finite


@pytest.fixture
def spoil(monkeypatch):
    """A function: at these steps (8 = 4 per epoch) make the batch's input or loss not finite."""

    def patch(steps, where="loss", value=float("nan")):
        done, forward, cut_views = [], dino.forward, dino.cut_views

        def bad_views(batch, cfg, device):
            global_crops, local_crops = cut_views(batch, cfg, device)
            if len(done) in steps and where == "input":
                global_crops[0] = value
            return global_crops, local_crops

        def bad_forward(student, *args):
            out, features = forward(student, *args)
            if student.training:
                if len(done) in steps and where == "loss":
                    out["loss"] = out["loss"] * value
                done.append(1)
            return out, features

        monkeypatch.setattr(dino, "cut_views", bad_views)
        monkeypatch.setattr(dino, "forward", bad_forward)

    return patch


@pytest.mark.parametrize(
    ("where", "value"), [("loss", float("nan")), ("loss", float("inf")), ("input", float("nan"))]
)
def test_a_step_that_is_not_finite_leaves_no_trace(
    where, value, train, spoil, observed_steps, tmp_path
):
    spoil({1}, where, value)
    assert train("experiment=x", "n_epochs=1") == 0
    assert [call["numbers"].get("ok") for call in observed_steps] == [True, False, True, True]
    for i, call in enumerate(observed_steps):
        unchanged = [equal(call["before"][k], call["after"][k]) for k in ("modules", "optimizer")]
        assert unchanged == [i == 1] * 2
    log = (tmp_path / "x" / "log.txt").read_text()
    assert "step 1 skipped" in log and log.count(CANARY) == 2
    assert files_naming_patients(tmp_path / "x") == {"log.txt"}
    assert np.isfinite(pd.read_csv(tmp_path / "x" / "metrics.csv")["loss"][1])
    lines = [json.loads(line) for line in (tmp_path / "x" / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] is None for line in lines] == [False, True, False, False]


def test_many_in_a_row_end_the_run(train, spoil, tmp_path):
    spoil({3, 5, 6, 7})
    with pytest.raises(RuntimeError, match="3 steps in a row were not finite"):
        train("experiment=x", "max_bad_steps=3")
    assert checkpoint.load(tmp_path / "x" / "checkpoints" / "last.pt")["step"] == 4


def test_an_epoch_of_nothing_but_bad_steps_is_survived(train, spoil):
    spoil({0, 1, 2, 3})
    assert train("experiment=x") == 0


def test_a_step_without_masked_crops_spoils_no_mean(train, tmp_path):
    train("experiment=x", "n_epochs=1", "dino.mask_prob=0.2", "batch_size=1")
    entropy = pd.read_csv(tmp_path / "x" / "metrics.csv")["patch_teacher_entropy"]
    assert np.isfinite(entropy[1])
    lines = [json.loads(line) for line in (tmp_path / "x" / "log.jsonl").read_text().splitlines()]
    assert any(line["patch_teacher_entropy"] is None for line in lines)  # or nothing was tested


# ---- what is refused


def test_all_mistakes_in_the_config_are_listed_at_once(script, capsys, tmp_path):
    wrong = (
        "bacth_size=4",
        "crops.global_size=[18,16,16]",
        "precision=fp8",
        "csv_path=nowhere.csv",
    )
    assert script(*wrong) == 2
    shown = capsys.readouterr().err
    assert all(key in shown for key in ("bacth_size", "crops.global_size", "precision"))
    assert list(tmp_path.iterdir()) == []


def test_all_mistakes_in_the_csv_are_listed_at_once(script, capsys, scans, tmp_path):
    rows = read_cases(scans / "cases.csv")
    for row in rows:
        row["path"] = scans / row["path"]
        row["seg_path"] = scans / row["seg_path"]
    rows[0]["path"], rows[1]["fold"] = "absent.nii", ""
    rows[2]["PatientID"] = rows[8]["PatientID"]
    write_cases(tmp_path / "bad.csv", rows)
    assert script(f"csv_path={tmp_path / 'bad.csv'}", "val_folds=[3,9]") == 2
    shown = capsys.readouterr().err
    assert "line 2" in shown and "absent.nii" in shown
    assert "empty fold" in shown and "'9'" in shown and f"{CANARY}8" in shown
    assert {p.name for p in tmp_path.iterdir()} == {"bad.csv"}


def test_check_reads_everything_and_writes_no_results(script, capsys, tmp_path):
    cache = tmp_path / "cache"
    assert script(f"cache_dir={cache}", options=["--check"]) == 0
    assert "8 train, 5 val, 4 test cases, 0 problems" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
    assert [p.name for p in cache.iterdir()] == ["checked.jsonl"]


def test_a_run_is_not_overwritten(trained, script, capsys):
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}
    assert script(f"results_dir={trained.parent}", "experiment=whole") == 2
    assert "already holds a run" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}


@pytest.mark.parametrize("key", ["test_ckpt", "resume_training_from"])
def test_a_checkpoint_of_another_network_is_refused(key, trained, script, capsys):
    sizes = [f"crops.{name}_size=[32,32,32]" for name in ("region", "global", "local")]
    network = ["backbone=swinunetr", "swinunetr.feature_size=12", *sizes]
    assert script(f"{key}={trained / 'checkpoints' / 'best.pt'}", *network) == 2
    shown = capsys.readouterr().err
    assert "backbone: resunet in the checkpoint, swinunetr here" in shown
    assert "swinunetr.feature_size: absent in the checkpoint, 12 here" in shown


def test_a_missing_checkpoint_is_refused(train):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        train("test_ckpt=nowhere.pt")


@pytest.fixture
def corrupt(scans, tmp_path):
    """A function: which cases' volumes are damaged -> a CSV."""

    def make(*lines):
        rows = read_cases(scans / "cases.csv")
        for i, row in enumerate(rows):
            row |= {name: scans / row[name] for name in ("path", "seg_path")}
            if i in lines:
                damaged = tmp_path / f"damaged{i}.nii"
                damaged.write_bytes(row["path"].read_bytes()[:5000])
                row["path"] = damaged
        write_cases(tmp_path / "cases.csv", rows)
        return f"csv_path={tmp_path / 'cases.csv'}"

    return make


def test_a_bad_case_may_be_left_out_and_is_named(corrupt, arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(dino, "plot_curves", lambda *args: None)
    csv = corrupt(1)
    with pytest.raises(CasesError, match=f"line 3  {CANARY}1 "):
        dino.main(arguments(tmp_path, csv, "experiment=x"))
    overrides = (csv, "experiment=x", "n_epochs=1", "data.max_bad_cases=1")
    assert dino.main(arguments(tmp_path, *overrides)) == 0
    assert files_naming_patients(tmp_path / "x") == {"log.txt", "report.html"}
    for name in ("log.txt", "report.html"):
        text = (tmp_path / "x" / name).read_text()
        assert f"{CANARY}1" in text and "damaged1.nii" in text and f"{CANARY}2" not in text


def test_no_train_case_left_is_an_error(corrupt, train):
    csv = corrupt(2, 5)
    with pytest.raises(CasesError, match="train_folds: no case is left"):
        train(csv, "train_folds=[2]", "data.max_bad_cases=2")


# ---- test_ckpt


def test_embeddings_of_the_test_cases(trained, train, tmp_path, scans):
    assert train(f"test_ckpt={trained / 'checkpoints' / 'best.pt'}", "experiment=x") == 0
    folder = tmp_path / "x" / "test"
    assert {p.name for p in folder.iterdir()} == {"features.npz", "features.csv", "metrics.json"}
    rows, saved = pd.read_csv(folder / "features.csv", dtype=str), np.load(folder / "features.npz")
    assert rows["csv_line"].tolist() == [str(n) for n in saved["csv_line"]]
    source = pd.read_csv(scans / "cases.csv", dtype=str)[-4:]
    for column in ("PatientID", "fold", "lesion"):
        assert rows[column].tolist() == source[column].tolist()
    assert len(saved["features"]) == len(np.unique(saved["features"], axis=0)) == 4
    scores = json.loads((folder / "metrics.json").read_text())
    assert 0 <= scores["lesion"]["linear_auc"] <= 1 and 0 <= scores["lesion"]["knn_accuracy"] <= 1
    assert 0 <= scores["dense"]["dice"] <= 1
