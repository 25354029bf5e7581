"""The rules of segmentation_config.yaml."""

from functools import partial

import pytest

from models.backbones import facts_of
from segmentation import CONFIG
from utils.config.command_line import (
    ConfigError,
    parse_command_line,
    read_yaml,
    schema_keys,
)
from utils.config.segmentation import SegmentationConfig, impossible_segmentation

SMALL = ["classes={ball: 300, shell: [7, 9]}", "resunet.features=[4,8,8]", "resunet.blocks=[1,1,1]"]
SMALL += ["n_epochs=2", "warmup_epochs=0", "patches.size=[16,16,16]"]


def parse(*overrides):
    impossible = partial(impossible_segmentation, facts_of=facts_of)
    schema = (CONFIG, SegmentationConfig, impossible)
    return parse_command_line(list(overrides), *schema)[0]


def test_the_shipped_config_is_valid_and_holds_exactly_the_schemas_keys():
    _, lines, _ = read_yaml(CONFIG)
    keys = set(schema_keys(SegmentationConfig))
    sections = {key.split(".")[0] for key in keys if "." in key}
    assert keys == {key for key in lines if not key.startswith("classes.")} - sections
    assert parse().classes["kidneys"] == [2]


@pytest.mark.parametrize(
    ("overrides", "key", "what"),
    [
        (["data.channels=[]"], "data.channels", "at least 1"),
        (["data.channels=[a, b, a]"], "data.channels", "listed twice: a"),
        (["data.channels=[a]", "data.missing_channels=zero"], "data.missing_channels", "none can"),
        (["augment.drop_channel=0.5"], "augment.drop_channel", "data.channels is null"),
        (["data.channels=[a, b]", "data.modality=[MR]"], "data.modality", "1 modalities"),
        (["data.modality=[MR]"], "data.modality", "data.channels is null"),
        (["data.channels=[a, b]", "data.modality=[MR, PET]"], "data.modality", "nearest"),
        (["classes={}"], "classes", "empty"),
        (["classes={a: [1, 2], b: [2, 1]}"], "classes.b", "has the label values of classes.a"),
        (["classes={0: background, 1: a}"], "classes", "the name comes first: {a: 1}"),
        (["classes={a:1}"], "classes.a:1", "a space after the colon: a: 1"),
        (["classes={a: 1.5}"], "classes.a", "list"),
        (["classes={a: [b.nii, 1.5]}"], "classes.a[1]", "a whole number"),
        (["classes={a: true}"], "classes.a[0]", "a whole number"),
        (["classes={a: [b.nii, b.nii]}"], "classes.a", "b.nii is twice"),
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
        (
            ["finetune.freeze_epochs=1", "warmup_epochs=2"],
            "finetune.freeze_epochs",
            "leaves 1 of n_epochs 2 for a second warm-up",
        ),
        (["steps_per_epoch=0"], "steps_per_epoch", "greater than or equal to 1"),
        (["test_ckpt=[]"], "test_ckpt", "at least 1"),
        (["dino_weights=a.pt", "suprem_weights=b.pt"], "dino_weights", "at most one"),
        (["inference.overlap=1.0"], "inference.overlap", "0.9"),
    ],
)
def test_impossible_settings_are_named(overrides, key, what):
    with pytest.raises(ConfigError) as e:
        parse(*SMALL, *overrides)
    found = {problem.key: problem.what for problem in e.value.problems}
    assert what in found[key]
