"""Runs of dino.py that start from weights, and what becomes of their own."""

import json
import runpy
import sys

import pytest
import torch

import dino
from models.backbones import build_backbone
from tests.conftest import ROOT, SMALL, equal
from utils import checkpoint
from utils.checkpoint import CheckpointError, hash_patients
from utils.tensor_files import WeightsError
from utils.weights import load_backbone

SIZES = {"features": (4, 8, 8), "blocks": (1, 1, 1)}  # as in SMALL
SWIN = ("backbone=swinunetr", "swinunetr.feature_size=12", "dino.patch_level=2")
SWIN += ("crops.global_size=[32,32,32]", "crops.region_size=[32,32,32]", "crops.num_local=0")


def part(modules, name):
    """A backbone's tensors in the state of a DINO network."""
    prefix = "backbone."
    return {k.removeprefix(prefix): v for k, v in modules[name].items() if k.startswith(prefix)}


@pytest.fixture(scope="module")
def first(arguments, tmp_path_factory):
    """The checkpoints of a run on fold 0."""
    results = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_crops", "draw_progress"):
            patch.setattr(dino, name, lambda *args: None)
        assert dino.main(arguments(results, "experiment=a", "train_folds=[0]")) == 0
    return results / "a" / "checkpoints"


@pytest.mark.parametrize("file", ["backbone.pt", "best.pt", "last.pt"])
def test_the_teachers_encoder_is_handed_over_bit_for_bit(file, first):
    backbone = build_backbone("resunet", **SIZES)
    report = load_backbone(backbone, first / file)
    whole = checkpoint.load(first / ("last.pt" if file == "last.pt" else "best.pt"))
    teacher = part(whole["modules"], "teacher")
    assert equal({k: backbone.state_dict()[k] for k in teacher}, teacher)
    assert not equal(part(whole["modules"], "student"), teacher)
    assert report.encoder == (len(teacher), len(teacher))
    assert report.origin.startswith("this repository: dino run 'a'")
    assert report.seen_patients == whole["seen_patients"]
    assert report.expected_input["hu_window"] == [-1000, 1000]


def test_a_run_starts_from_weights_and_says_so(first, arguments, tmp_path):
    """Steps too small to change a weight: what the student ends with is what it began with."""
    still = (
        "learning_rate=1e-30",
        "min_learning_rate=0",
        "n_epochs=1",
        "train_folds=[1]",
        "seed=5",
    )
    overrides = ("experiment=b", f"suprem_weights={first / 'backbone.pt'}", *still)
    assert dino.main(arguments(tmp_path, *overrides, "data.hu_window=[-900,900]")) == 0
    weights = checkpoint.load(first / "backbone.pt")
    last = checkpoint.load(tmp_path / "b" / "checkpoints" / "last.pt")
    assert equal(part(last["modules"], "student"), weights["backbone"])
    for name, x in part(last["modules"], "teacher").items():  # averaged with itself
        torch.testing.assert_close(x, weights["backbone"][name])

    own = hash_patients(f"CANARY{i}" for i in (1, 4, 7))  # fold 1
    assert not set(own) & set(weights["seen_patients"])
    assert set(last["seen_patients"]) == {*own, *weights["seen_patients"]}
    backbone = checkpoint.load(tmp_path / "b" / "checkpoints" / "backbone.pt")
    assert backbone["seen_patients"] == last["seen_patients"]

    saved = json.loads((tmp_path / "b" / "weights.json").read_text())
    assert saved == last["weights"] == backbone["weights"]
    assert saved["encoder"][0] == saved["encoder"][1] == len(weights["backbone"])
    for file in ("log.txt", "report.html"):
        text = (tmp_path / "b" / file).read_text()
        assert "dino run &#x27;a&#x27;" in text or "dino run 'a'" in text
        assert "set data.hu_window=[-1000,1000]" in text


def test_a_resumed_run_remembers_its_weights(first, train, tmp_path):
    weights = f"suprem_weights={first / 'backbone.pt'}"
    auto = "resume_training_from=auto"
    assert train("experiment=c", weights, auto, "n_epochs=1") == 0  # nothing there: from weights
    once = checkpoint.load(tmp_path / "c" / "checkpoints" / "last.pt")
    assert once["weights"]["file"] == str(first / "backbone.pt")
    (tmp_path / "c" / "weights.json").unlink()
    assert train("experiment=c", weights, auto) == 0  # from last.pt
    twice = checkpoint.load(tmp_path / "c" / "checkpoints" / "last.pt")
    assert twice["step"] == 2 * once["step"]
    assert twice["weights"] == once["weights"]
    assert twice["seen_patients"] == once["seen_patients"]
    assert json.loads((tmp_path / "c" / "weights.json").read_text()) == once["weights"]


def test_the_order_of_patch_merging_survives_a_run(train, tmp_path):
    """Published weights, pre-training, its files, and back."""
    torch.manual_seed(3)
    suprem = build_backbone("swinunetr", feature_size=12).state_dict()
    suprem = {f"module.backbone.{name}": x for name, x in suprem.items()}
    suprem["module.organ_embedding"] = torch.ones(32, 512)
    torch.save({"net": suprem}, tmp_path / "suprem.pth")
    overrides = ("n_epochs=1", "train_folds=[0]", "val_folds=[]", "probe_targets=[]", *SWIN)
    overrides += ("probe.dense_cases=0",)
    overrides += ("experiment=swin", f"suprem_weights={tmp_path / 'suprem.pth'}")
    assert train(*overrides) == 0
    for file in ("backbone.pt", "last.pt"):
        backbone = build_backbone("swinunetr", feature_size=12)
        assert backbone.merge_order == "monai1.5"
        report = load_backbone(backbone, tmp_path / "swin" / "checkpoints" / file)
        assert backbone.merge_order == report.merge_order == "published"


# ---- what is refused
def test_bad_weights_stop_the_script_with_2_before_the_scans_are_read(
    arguments, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("data.prepare.load.load_cases", None)
    torch.save({"net": {"module.x": torch.ones(3)}}, tmp_path / "other.pth")
    command = ["dino.py", *arguments(tmp_path, f"suprem_weights={tmp_path / 'other.pth'}")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as exited:
        runpy.run_path(str(ROOT / "dino.py"), run_name="__main__")
    assert exited.value.code == 2
    assert "other.pth: does not fit this resunet" in capsys.readouterr().err


def test_weights_of_another_size_name_the_settings_they_fit(first, train):
    with pytest.raises(
        WeightsError, match=r"resunet.features=\[4, 8, 8\] resunet.blocks=\[1, 1, 1\]"
    ):
        train(f"suprem_weights={first / 'last.pt'}", "resunet.features=[8,8,8]")


@pytest.mark.parametrize("key", ["resume_training_from", "test_ckpt"])
def test_checkpoints_are_taken_from_this_script_only(key, first, train, tmp_path):
    torch.save({"net": {"module.x": torch.ones(3)}}, tmp_path / "suprem.pth")
    with pytest.raises(CheckpointError, match="not a checkpoint of this.*go into suprem_weights"):
        train(f"{key}={tmp_path / 'suprem.pth'}")
    (tmp_path / "lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\nsize 12\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        train(f"{key}={tmp_path / 'lfs.pt'}")
    with pytest.raises(
        CheckpointError, match="a backbone only; to start from it set suprem_weights"
    ):
        train(f"{key}={first / 'backbone.pt'}")
    with pytest.raises(CheckpointError) as caught:
        train(f"{key}={first / 'last.pt'}", "backbone=unet", "crops.local_size=[16,16,16]")
    lines = str(caught.value).splitlines()
    assert "  backbone: resunet in the checkpoint, unet here" in lines
    assert (
        f"  resunet.features: {SMALL['resunet.features']} in the checkpoint, absent here" in lines
    )
    whole = checkpoint.load(first / "last.pt")
    whole["settings"]["stage"] = "classification"
    del whole["format"]
    checkpoint.save(tmp_path / "classifier.pt", whole)
    with pytest.raises(CheckpointError, match="stage: classification in the checkpoint, dino here"):
        train(f"{key}={tmp_path / 'classifier.pt'}")
