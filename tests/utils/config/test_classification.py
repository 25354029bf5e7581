"""The rules of classification_config.yaml."""

import ast
from functools import partial

import pytest

from classification import CONFIG, OPTIONS
from models.backbones import facts_of
from tests.places import ROOT
from utils.config.classification import ClassificationConfig, impossible_classification
from utils.config.command_line import (
    ConfigError,
    parse_command_line,
    read_yaml,
    save_resolved,
    schema_keys,
)

KEYS = schema_keys(ClassificationConfig)


def parse(*argv, cv=False):
    impossible = partial(impossible_classification, facts_of=facts_of, cv=cv)
    return parse_command_line(list(argv), CONFIG, ClassificationConfig, impossible, OPTIONS)[0]


def problems(*argv, cv=False) -> dict[str, str]:
    """{key: what is wrong}"""
    with pytest.raises(ConfigError) as e:
        parse(*argv, cv=cv)
    return {problem.key: problem.what for problem in e.value.problems}


def test_the_shipped_file_is_valid_and_reads_back(tmp_path):
    config = parse()
    assert config.cls_targets == ["lesion"] and config.image.size == (192, 192, 160)
    save_resolved(config, tmp_path / "config.yaml")
    assert parse("--config", str(tmp_path / "config.yaml")) == config
    assert ClassificationConfig.model_validate(config.model_dump(mode="json")) == config


def test_schema_and_yaml_have_the_same_keys():
    _, lines, _ = read_yaml(CONFIG)
    sections = {key.split(".")[0] for key in KEYS if "." in key}
    assert set(KEYS) == set(lines) - sections


def test_code_reads_every_key():
    files = [ROOT / "classification.py"]
    files += [f for d in ("models", "data", "utils") for f in (ROOT / d).rglob("*.py")]
    read = set()
    for file in (f for f in files if f.parent.name != "config"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            elif isinstance(node, ast.arg) and file.parent.name == "models":
                read.add(node.arg)  # the backbones' sections are passed on as **options
    assert [key for key in KEYS if key.rpartition(".")[2] not in read] == []


def test_one_checkpoint_or_several():
    assert parse().test_ckpt is None
    assert parse("test_ckpt=a.pt").test_ckpt == ["a.pt"]
    assert parse("test_ckpt=[a.pt, b.pt]").test_ckpt == ["a.pt", "b.pt"]
    assert "test_ckpt" in problems("test_ckpt=[]")
    assert "dino_weights" in problems("dino_weights=a.pt", "suprem_weights=b.pt")
    assert "test_ckpt" in problems("test_ckpt=a.pt", "resume_training_from=auto")
    parse("dino_weights=a.pt", "resume_training_from=auto")  # a run that may be requeued


def test_frozen_epochs():
    assert parse("finetune.freeze_epochs=all").finetune.freeze_epochs == "all"
    assert parse("finetune.freeze_epochs=3").finetune.freeze_epochs == 3
    for value in ("none", "-1", "1.5", "true"):
        assert "finetune.freeze_epochs" in problems(f"finetune.freeze_epochs={value}")
    assert "more than n_epochs" in problems("finetune.freeze_epochs=101")["finetune.freeze_epochs"]
    assert "second warm-up" in problems("finetune.freeze_epochs=96")["finetune.freeze_epochs"]
    assert parse("finetune.freeze_epochs=100").finetune.freeze_epochs == 100  # nothing thaws
    wrong = problems("finetune.freeze_epochs=all", "finetune.layer_decay=0.8")
    assert "no effect" in wrong["finetune.layer_decay"]


def test_targets():
    assert "nothing to learn" in problems("cls_targets=[]")["cls_targets"]
    parse("cls_targets=[]", "reg_targets=[age]")
    assert "cls_targets too" in problems("reg_targets=[lesion]")["reg_targets"]
    assert "not in cls_targets" in problems("finetune.balance=sex")["finetune.balance"]
    parse("cls_targets=[1]", "finetune.balance=1")
    twice = problems("finetune.balance=lesion", "finetune.class_weights=true")
    assert "favoured twice" in twice["finetune.class_weights"]


def test_folds():
    assert "nothing to train on" in problems("train_folds=[]")["train_folds"]
    parse("train_folds=[]", "test_ckpt=a.pt")
    assert "test_folds" in problems("test_folds=[]", "test_ckpt=a.pt")
    wrong = problems("val_folds=[]", "finetune.early_stopping=5")
    assert "val_folds is empty" in wrong["finetune.early_stopping"]


def test_cross_validation():
    parse("train_folds=[0,1,2]", "val_folds=[]", "test_folds=[]", cv=True)
    parse("val_folds=[]", "finetune.early_stopping=5", cv=True)
    assert "at least 3" in problems("val_folds=[]", "train_folds=[0]", cv=True)["train_folds"]
    assert "--cv" in problems("test_ckpt=a.pt", cv=True)["test_ckpt"]
    assert "--cv" in problems("resume_training_from=a.pt", cv=True)["resume_training_from"]
    parse("resume_training_from=auto", "dino_weights=a.pt", cv=True)


def test_sizes_are_padded_but_must_not_vanish():
    parse("image.size=[40,224,224]", "image.fit=resize")
    wrong = problems("image.size=[20,20,20]")
    assert "leaves one voxel at the deepest stage" in wrong["image.size"]
    parse("image.size=[20,20,20]", "backbone=swinunetr")
    parse("image.size=[20,20,20]", "resunet.features=[8,8,8]", "resunet.blocks=[1,1,1]")


@pytest.mark.parametrize(
    "override",
    [
        "image.fit=pad",
        "image.size=[0,1,1]",
        "head.dropout=1.0",
        "head.pooling=avg",
        "finetune.layer_decay=0",
        "finetune.backbone_lr=0",
        "finetune.label_smoothing=1",
        "test.shift=0.6",
        "augment.zoom=[1.2,0.8]",
        "augment.translate=-0.1",
        "cls_targets=[lesion,lesion]",
        "allow_seen_patients=maybe",
    ],
)
def test_values_out_of_range(override):
    (key,) = problems(override)
    assert key.startswith(override.split("=")[0])
