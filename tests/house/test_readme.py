"""The README against the code: every setting is explained, and nothing that does not exist."""

import re
from pathlib import Path

import pytest

from utils.config.classification import ClassificationConfig
from utils.config.command_line import read_yaml, schema_keys
from utils.config.dino import DinoConfig
from utils.config.segmentation import SegmentationConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
STAGES = {"dino": DinoConfig, "classification": ClassificationConfig}
STAGES["segmentation"] = SegmentationConfig
KEYS = {stage: schema_keys(config) for stage, config in STAGES.items()}


def section(title):
    """The text below a heading of the second level."""
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.M | re.S)[1]


@pytest.mark.parametrize("stage", STAGES)
def test_settings_are_those_of_the_yaml(stage):
    parts = re.split(r"^### (.*)\n", section("Settings"), flags=re.M)[1:]
    tables = dict(zip(parts[::2], parts[1::2], strict=True))
    text = tables["All three files"] + tables[f"{stage}_config.yaml"]
    explained = re.findall(r"^\| `([a-z_0-9.]+)` \|", text, re.M)
    _, lines, _ = read_yaml(ROOT / f"{stage}_config.yaml")
    in_yaml = {key for key in lines if key in KEYS[stage]}
    assert len(explained) == len(set(explained))
    assert set(explained) == in_yaml


def test_keys_in_the_text_exist():
    every = {key for keys in KEYS.values() for key in keys}
    sections = {key.partition(".")[0] for key in every if "." in key}
    named = re.findall(rf"`((?:{'|'.join(sections)})\.[a-z_0-9]+)(?:=[^`]*|: [^`]*)?`", README)
    assert set(named) - {"dino.py", "classification.py", "segmentation.py"} <= every


@pytest.mark.parametrize("stage", STAGES)
def test_overrides_in_commands_exist(stage):
    script = rf"python \S*{stage}\.py "
    commands = [line for line in README.splitlines() if re.search(script, line)]
    overrides = [key for line in commands for key in re.findall(r" ([a-z_.]+)=", line)]
    assert overrides
    assert set(overrides) <= set(KEYS[stage])


def test_files_of_the_layout_exist():
    block = re.search(r"```\n(.*?)```", section("Layout"), re.S)[1]
    for line in block.splitlines():
        first, text = line.split(maxsplit=1)
        assert (ROOT / first).exists(), first
        folder = ROOT / first if first.endswith("/") else (ROOT / first).parent
        for name in re.findall(r"[\w*]+\.py\b", text):
            assert list(folder.glob(name)), f"{first}: {name}"
