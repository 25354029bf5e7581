"""The YAML files: every key is explained where it stands, and in the same words in all stages."""

import re

import pytest
import yaml

from tests.places import ROOT
from utils.config import strict_yaml
from utils.config.classification import ClassificationConfig
from utils.config.command_line import schema_keys
from utils.config.dino import DinoConfig
from utils.config.segmentation import SegmentationConfig
from utils.config.transfer import TransferConfig

STAGES = {"dino": DinoConfig, "classification": ClassificationConfig}
STAGES["segmentation"] = SegmentationConfig
DIFFERENT = {"learning_rate"}  # dino.py scales it with the batch, after DINO; the others do not


FILES = {stage: (ROOT / f"{stage}_config.yaml", config) for stage, config in STAGES.items()}
FILES["study"] = (ROOT / "utils" / "transfer" / "study.yaml", TransferConfig)


def comments(name):
    """{dotted key or section: comment}"""
    text = FILES[name][0].read_text(encoding="utf-8")
    lines, found = text.splitlines(), {}
    for key, key_node, value_node in strict_yaml.walk(yaml.compose(text, strict_yaml.Loader)):
        end = key_node.end_mark
        if value_node.end_mark.line == end.line:
            end = value_node.end_mark
        comment = re.search(r"# (\S.*)", lines[end.line][end.column :])
        found[key] = comment[1] if comment else ""
    return found


@pytest.mark.parametrize("name", FILES)
def test_every_key_has_a_comment(name):
    found = comments(name)
    assert [key for key in schema_keys(FILES[name][1]) if not found[key]] == []


def test_a_key_that_files_share_has_one_wording():
    wordings = {}
    for stage in STAGES:
        for key, comment in comments(stage).items():
            wordings.setdefault(key, set()).add(comment)
    assert {key for key, words in wordings.items() if len(words) > 1} == DIFFERENT


def test_the_head_says_what_the_demo_gives():
    for stage in STAGES:
        text = (ROOT / f"{stage}_config.yaml").read_text(encoding="utf-8")
        head = text.partition("\n\n")[0]
        assert re.search(r"demo(.|\n)*CPU cores(.|\n)* minutes?;", head)
