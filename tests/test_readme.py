"""The README against the code: every setting is explained, and nothing that does not exist."""

import re
from pathlib import Path

from utils.config import read_yaml, schema_keys
from utils.schema_dino import DinoConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
KEYS = schema_keys(DinoConfig)


def section(title):
    """The text below a heading of the second level."""
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.M | re.S)[1]


def test_settings_are_those_of_the_yaml():
    explained = re.findall(r"^\| `([a-z_0-9.]+)` \|", section("Settings"), re.M)
    _, lines, _ = read_yaml(ROOT / "dino_config.yaml")
    in_yaml = [key for key in lines if not any(other.startswith(f"{key}.") for other in lines)]
    assert len(explained) == len(set(explained))
    assert set(explained) == set(in_yaml)


def test_keys_in_the_text_exist():
    sections = {key.partition(".")[0] for key in KEYS if "." in key}
    named = re.findall(rf"`((?:{'|'.join(sections)})\.[a-z_0-9]+)(?:=[^`]*|: [^`]*)?`", README)
    assert set(named) - {"dino.py"} <= set(KEYS)


def test_overrides_in_commands_exist():
    commands = [line for line in README.splitlines() if re.search(r"python \S*dino\.py ", line)]
    overrides = [key for line in commands for key in re.findall(r" ([a-z_.]+)=", line)]
    assert overrides
    assert set(overrides) <= set(KEYS)


def test_files_of_the_layout_exist():
    block = re.search(r"```\n(.*?)```", section("Layout"), re.S)[1]
    for line in block.splitlines():
        first, text = line.split(maxsplit=1)
        assert (ROOT / first).exists(), first
        folder = ROOT / first if first.endswith("/") else (ROOT / first).parent
        for name in re.findall(r"[\w*]+\.py\b", text):
            assert list(folder.glob(name)), f"{first}: {name}"
