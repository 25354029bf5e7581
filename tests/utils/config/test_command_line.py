"""Config: the YAML's traps, every problem at once, overrides, help, and keys that code reads."""

import ast
import subprocess
import sys
from functools import partial
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import BaseModel, Field, PlainSerializer
from pydantic_core import PydanticSerializationError

from models.backbones import facts_of
from tests.places import ROOT
from utils.config import strict_yaml
from utils.config.classification import Epochs
from utils.config.command_line import (
    ConfigError,
    help_text,
    parse_command_line,
    read_yaml,
    save_resolved,
    schema_keys,
)
from utils.config.dino import DinoConfig, impossible_dino
from utils.config.fields import Section, Size, Spacing, Texts
from utils.errors import nearest
from utils.signals import Stopped

DEFAULT = ROOT / "dino_config.yaml"
IMPOSSIBLE = partial(impossible_dino, facts_of=facts_of)


def parse(*argv, config=DEFAULT):
    return parse_command_line(list(argv), config, DinoConfig, IMPOSSIBLE)[0]


def problems(*argv, config=DEFAULT) -> dict[str, str]:
    """{key: what is wrong}"""
    with pytest.raises(ConfigError) as e:
        parse(*argv, config=config)
    return {p.key: p.what for p in e.value.problems}


def edited(folder, *changes, name="edited.yaml"):
    """The shipped YAML with text replaced, as a new file."""
    text = DEFAULT.read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


# ---- the shipped file
def test_shipped_config_is_valid():
    config = parse()
    assert config.crops.global_size == (96, 96, 96)
    assert config.train_folds == ["0", "1", "2"]


def test_schema_and_yaml_have_the_same_keys():
    _, lines, _ = read_yaml(DEFAULT)
    sections = {key.split(".")[0] for key in schema_keys(DinoConfig) if "." in key}
    assert set(schema_keys(DinoConfig)) == set(lines) - sections


def test_schema_has_no_defaults():
    def fields(model):
        for name, field in model.model_fields.items():
            yield name, field
            if hasattr(field.annotation, "model_fields"):
                yield from fields(field.annotation)

    assert [name for name, field in fields(DinoConfig) if not field.is_required()] == []


def test_code_reads_every_key():
    files = [
        *ROOT.glob("*.py"),
        *(f for d in ("models", "data", "utils") for f in (ROOT / d).rglob("*.py")),
    ]
    attributes, parameters = set(), set()
    for file in files:
        if file.parent.name == "config":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                attributes.add(node.attr)
            elif isinstance(node, ast.arg) and file.parent.name == "models":
                parameters.add(node.arg)
    # the sections of the backbones are passed on as **options
    backbones = ("resunet.", "swinunetr.", "unet.", "segresnet.")
    unread = [
        key
        for key in schema_keys(DinoConfig)
        if key.rpartition(".")[2] not in (parameters if key.startswith(backbones) else attributes)
    ]
    assert unread == []


# ---- YAML
KEPT_AS_TEXT = (
    "no on Yes 010 007 0x1F 1_000 1:30 2024-01-31 1.2.840.10008 .nan .inf 1e 12345678901234567890"
).split()


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        ("-1E+3", -1000.0),
        (".5", 0.5),
        ("2.", 2.0),
        ("+3", 3),
        ("-0", 0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("-", [None]),
        ("'5'", "5"),
        ("[1, no, 2.5]", [1, "no", 2.5]),
        ("{no: 1, 010: 2}", {"no": 1, "010": 2}),
        *((text, text) for text in KEPT_AS_TEXT),
    ],
)
def test_scalars(text, value):
    found = strict_yaml.parse(text)[0]
    assert found == value and type(found) is type(value)


def test_duplicate_keys_at_every_level():
    _, lines, repeated = strict_yaml.parse("a: 1\nb:\n  c: 1\n  c: 2\na: 2\nd: [{e: 1, e: 2}]\n")
    assert repeated == [("b.c", 4), ("a", 5), ("d[0].e", 6)]
    assert lines["b.c"] == 3


def test_missing_file_and_folder(tmp_path):
    assert "No such file" in problems("--config", str(tmp_path / "none.yaml"))[""]
    assert "cannot be read" in problems("--config", str(tmp_path))[""]


def test_byte_order_mark(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbf" + DEFAULT.read_bytes())
    assert parse(config=tmp_path / "c.yaml") == parse()


# ---- everything at once
def test_all_problems_together_with_lines(tmp_path):
    config = edited(
        tmp_path,
        ("batch_size: 8", "batchsize: 8"),
        ("n_epochs: 200", "n_epochs: many\nseed: 1"),
        ("  global_size: [96, 96, 96]", "  global_size: [96, 100, 96]"),
        ("  spacing: [1.5, 1.5, 1.5]", "  spacing: [1.5, '1.5', true]"),
        ("test_folds: [4]", "test_folds: ['2']"),
        ("  pooling: meanmax ", "  pooling: mex "),
    )
    found = problems(config=config)
    assert found["batchsize"] == "unknown key; nearest: batch_size"
    assert found["batch_size"] == "missing"
    assert found["n_epochs"] == "'many': expected a whole number"
    assert found["crops.global_size"].endswith("divisible by 32 for resunet; nearest: [96, 96, 96]")
    assert {"data.spacing[1]", "data.spacing[2]"} <= found.keys()
    assert found["test_folds"] == "fold 2 is in train_folds too"
    assert found["dino.pooling"].endswith("nearest: max")
    assert found["seed"].startswith("written twice, first in line ")
    with pytest.raises(ConfigError) as e:
        parse(config=config)
    wheres = [p.where for p in e.value.problems]
    assert wheres.count("") == 1  # the missing key
    lines = [int(where.split()[1]) for where in wheres if where]
    assert lines == sorted(lines)
    text = config.read_text(encoding="utf-8").splitlines()
    line = next(p.where for p in e.value.problems if p.key == "dino.pooling").split()[1]
    assert text[int(line) - 1].startswith("  pooling: mex")
    assert str(e.value).startswith(f"{config}: {len(wheres)} problems\n  line ")


def test_a_broken_section_hides_nothing_else(tmp_path):
    config = edited(tmp_path, ("probe:\n", "prob: 1\nprobe: 5\nx:\n"))
    found = problems("crops.local_size=[30,30,30]", config=config)
    assert "expected a section" in found["probe"]
    assert "unknown key" in found["prob"]
    assert "nearest: [32, 32, 32]" in found["crops.local_size"]


@pytest.mark.parametrize(
    "argument",
    [
        "n_workers=-1",
        "seed=-1",
        "val_folds=[2]",
        "data.spacing=[1, 1, 1, 1]",
        "data.spacing=[1, 1, 0]",
        "data.spacing=[1, 1, -1]",
        "data.spacing=natve",
        "data.spacing=null",
        "data.hu_window=[100, -100]",
        "data.hu_window=[5, 5]",
        "data.percentiles=[0, 101]",
        "dino.mask_ratio=[0.5, 0.1]",
        "dino.mask_ratio=[0, 1.5]",
        "dino.centering=centre",
        "dino.pooling=average",
        "dino.patch_level=6",
        "dino.teacher_temp=0",
        "crops.global_zoom=[0, 1]",
        "crops.global_size=[96, 96, 160]",
        "crops.global_size=[96.0, 96, 96]",
        "crops.local_size=[32, 32, 32]",
        "crops.num_local=-1",
        "crops.aspect=0.9",
        "augment.flip=[1, 0, 0]",
        "swinunetr.feature_size=50",
        "resunet.blocks=[1, 1]",
        "resunet.features=[32, 64]",
        "resunet.features=[]",
        "warmup_epochs=1000",
        "dino.teacher_temp_warmup_epochs=1000",
        "min_learning_rate=1",
    ],
)
def test_impossible_values(argument):
    """Wrong types, names and paths are in tests/faults/files/yaml_files.py."""
    key = argument.split("=")[0]
    assert any(k.split("[")[0] == key or key.startswith("resunet") for k in problems(argument))


def test_valid_overrides():
    config = parse(
        "learning_rate=1e-4",
        "weight_decay=0",
        "data.spacing=[1,1,1]",
        "train_folds=[0, '1', no, 1.0]",
        "val_folds=[]",
        "test_folds=[]",
        "crops.num_local=0",
        "crops.local_size=[7, 7, 7]",
        "probe_targets=[]",
        "data.modality=CT",
    )
    assert config.learning_rate == 1e-4 and type(config.weight_decay) is float
    assert config.data.spacing == (1.0, 1.0, 1.0)
    assert config.train_folds == ["0", "1", "no", "1.0"]
    assert parse("data.spacing=native").data.spacing == "native"


def test_backbones_have_their_own_strides():
    small = ("resunet.features=[8,16,32]", "resunet.blocks=[1,1,1]", "crops.local_size=[20,24,28]")
    assert parse(*small, "dino.patch_level=2").crops.local_size == (20, 24, 28)
    assert "dino.patch_level" in problems(*small)
    assert "nearest: [32, 32, 32]" in problems(*small, "backbone=swinunetr")["crops.local_size"]
    assert parse("backbone=swinunetr", "crops.local_size=[32,32,32]", "dino.patch_level=4")
    assert "nearest: 4" in problems("backbone=swinunetr", "dino.patch_level=5")["dino.patch_level"]


@pytest.mark.parametrize("nothing", ["dino.mask_prob=0", "dino.mask_ratio=[0, 0]"])
def test_something_is_learned(nothing):
    """A masked autoencoder that sees all would end with a loss of 0, and random features."""
    alone = ("dino.dino_weight=0", "dino.patch_weight=0")
    assert parse(*alone) and parse(nothing) and parse(*alone, "dino.mask_ratio=[0, 0.1]")
    assert "hides nothing" in problems(*alone, nothing)["dino.dino_weight"]


def test_probes_choose_by_val_folds():
    assert parse("probe.choose=true") and parse("val_folds=[]")
    assert "val_folds" in problems("probe.choose=true", "val_folds=[]")["probe.choose"]


def test_two_sources_of_weights():
    found = problems("resume_training_from=auto", "test_ckpt=best.pt")
    assert list(found) == ["test_ckpt"]
    assert "test_folds" in problems("test_ckpt=best.pt", "test_folds=[]")


def test_paths_are_expanded(monkeypatch):
    monkeypatch.setenv("SCANS", "/data/scans")
    monkeypatch.setenv("HOME", "/home/someone")
    config = parse("csv_path=$SCANS/a.csv", "cache_dir=~/cache")
    assert (config.csv_path, config.cache_dir) == ("/data/scans/a.csv", "/home/someone/cache")


# ---- command line
def test_problems_of_the_command_line_together():
    found = problems("--chek", "word", "--batch-size=4", "data=1", "spacing=1", "seed=1", "seed=2")
    found |= problems("--config")
    assert "nearest: --check" in found["--chek"]
    assert "key=value" in found["word"]
    assert "batch_size=value" in found["--batch-size=4"]
    assert "data.channels=value" in found["data"]
    assert "nearest: data.spacing" in found["spacing"]
    assert found["seed"] == "given twice"
    assert "needs a file" in found["--config"]
    assert "quotes" in problems("csv_path=[scans]/a.csv")["csv_path"]


def test_config_and_check(tmp_path):
    path = edited(tmp_path, ("seed: 0", "seed: 5"))
    argv = ["seed=6", "--check", f"--config={path}"]
    config, check = parse_command_line(argv, DEFAULT, DinoConfig, IMPOSSIBLE)
    assert check and config.seed == 6
    assert parse("--config", str(path)).seed == 5


def test_an_override_supplies_a_missing_key(tmp_path):
    path = edited(tmp_path, ("seed: 0", ""), ("probe:\n", "probe_:\n"))
    found = problems("seed=1", "probe.every=1", config=path)
    assert "seed" not in found and "probe.every" not in found and "probe.max_cases" in found


def test_help_lists_every_key_with_its_comment(capsys):
    with pytest.raises(SystemExit) as e:
        parse("--help", "nonsense")
    assert e.value.code == 0
    text = capsys.readouterr().out
    assert text.strip() == help_text(DEFAULT, DinoConfig).strip()
    lines = help_lines(DEFAULT, DinoConfig)
    assert set(schema_keys(DinoConfig)) <= lines.keys()
    assert "  mm per voxel, or native to" in lines["data.spacing"]
    assert lines["data.spacing"].strip().startswith("data.spacing=[1.5, 1.5, 1.5] ")


def help_lines(path, schema):
    lines = [line for line in help_text(path, schema).splitlines() if line.startswith("  ")]
    return {line.split("=")[0].strip(): line for line in lines}


def test_help_adds_what_the_schema_allows(tmp_path):
    class Section(BaseModel):
        choice: Literal["a", "b", "c"]
        size: Size
        epochs: Epochs

    class Schema(BaseModel):
        known: Literal["a", "b"]
        wide: Annotated[float, Field(ge=0, lt=0.5)] | None
        names: Texts | None
        spacing: Spacing
        switch: bool
        classes: dict[str, int]
        section: Section

    (tmp_path / "c.yaml").write_text(
        "known: a  # a: this | b: that\nwide: 0  # null: never\nnames: [x]\nspacing: native  # mm\n"
        "switch: true  # on\nclasses: {a: 1}  # names\n"
        "section:\n  choice: a\n  size: [1, 1, 1]  # voxels\n  epochs: 3\n"
    )
    lines = help_lines(tmp_path / "c.yaml", Schema)
    shown = {key: lines[key].split("  ")[-1].strip() for key in schema_keys(Schema)}
    assert shown == {
        "known": "a: this | b: that",
        "wide": "null: never <number from 0 below 0.5>",
        "names": "<list of texts or null>",
        "spacing": "mm <native or 3 numbers above 0>",
        "switch": "on",
        "classes": "names",
        "section.choice": "<a, b or c>",
        "section.size": "voxels <3 whole numbers from 1>",
        "section.epochs": "<all or whole number from 0>",
    }


@pytest.mark.parametrize(
    ("argument", "key", "said"),
    [
        ("data.spacing=1", "data.spacing", "1: expected 3 values: [1, 1, 1]"),
        ("data.spacing=[1,1]", "data.spacing[2]", "missing: expected 3 values"),
        ("augment.flip=true", "augment.flip", "true: expected 3 values: [true, true, true]"),
        ("data.hu_window=9", "data.hu_window", "9: expected 2 values: [9, 9]"),
        ("crops.global_size=[8,8,8,8]", "crops.global_size", "[8, 8, 8, 8]: expected a list of 3"),
        ("--cv", "--cv", "only classification.py and segmentation.py have this option"),
        ("--predict=x", "--predict=x", "only classification.py and segmentation.py have this"),
    ],
)
def test_a_value_of_the_wrong_kind_is_shown_as_it_should_be(argument, key, said):
    assert problems(argument)[key].startswith(said)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seed: 0", "seed:0", "line {}: expected key: value, with a space after the colon"),
        ("  noise: ", "    noise: ", "line {}: indented otherwise than the lines above it"),
        ("  noise: ", " noise: ", "line {}: indented otherwise than the lines above it"),
        ("seed: 0", "seed: 0: 1", "line {}: a key where none can be"),
        ("backbone: resunet", "backbone: {resunet", "line {}: a {{ is not closed"),
    ],
)
def test_yaml_that_is_none_is_explained_in_plain_words(old, new, said, tmp_path):
    text = DEFAULT.read_text(encoding="utf-8")
    line = text[: text.index(f"\n{old}") + 1].count("\n") + 1
    found = problems(config=edited(tmp_path, (f"\n{old}", f"\n{new}")))[""]
    assert found.startswith("not YAML: ")
    at = int(found.removeprefix("not YAML: line ").partition(":")[0])
    assert at in (line, line + 1) and said.format(at) in found


def test_nearest():
    keys = schema_keys(DinoConfig)
    assert nearest("xyz", keys) is None
    assert nearest("global_sise", keys) == "crops.global_size"
    assert nearest("augment.hu_windw", keys) == "augment.hu_window"
    assert nearest("crop.min_body", keys) == "crops.min_body"


# ---- the resolved config
def test_resolved_config_reads_back(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dino.py", "x=3\n0\x1b M", "---\n- a"])
    config = parse(
        "train_folds=['1e3', 'no', '007', 'true', '1:30', '~', '2024-01-01', 'a: b', '#x', 'ü']",
        "data.spacing=native",
        "learning_rate=1e-7",
        "min_learning_rate=0",
        "experiment=é (2)",
    )
    save_resolved(config, tmp_path / "config.yaml")
    assert parse("--config", str(tmp_path / "config.yaml")) == config
    text = (tmp_path / "config.yaml").read_text(encoding="utf-8")
    for name in ("command", "torch", "git commit"):
        assert f"# {name}: " in text
    # and nothing in it means something else to a YAML 1.1 reader
    assert yaml.safe_load(text)["train_folds"] == config.train_folds


def test_resolved_config_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    save_resolved(parse(), tmp_path / "config.yaml")
    assert "# git commit: 'unknown'" in (tmp_path / "config.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("stage", ["dino", "classification", "segmentation"])
def test_help_does_not_wait_for_torch(stage):
    """The same text as `parse_command_line` prints, before torch and MONAI are imported."""
    code = "import sys, runpy; sys.argv = sys.argv[1:]\n"
    code += "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, f"{stage}.py", "--help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    text, last = run.stdout[: run.stdout.rindex("0 ")], run.stdout.splitlines()[-1]
    assert last == "0 False", run.stderr
    assert f"usage: python {stage}.py" in text and "test_ckpt=null" in text
    assert ("[--cv]" in text) == (stage != "dino")


@pytest.mark.parametrize("kind", [Stopped, ValueError])
def test_a_signal_while_settings_are_written_out_stays_one(kind):
    def arrive(value):
        raise kind("SIGINT")

    class Settings(Section):
        size: Annotated[int, PlainSerializer(arrive)] = 1

    with pytest.raises(
        PydanticSerializationError if kind is ValueError else Stopped, match="SIGINT"
    ):
        Settings().model_dump()
