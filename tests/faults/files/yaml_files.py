"""Config files: every value as it is written, or all problems by file, line and key."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from models.backbones import facts_of
from tests.faults.frame import NAMED, RIGHT, WRONG, Fault, Group, Outcome, judge
from tests.places import ROOT
from utils.config.command_line import parse_command_line
from utils.config.dino import DinoConfig, impossible_dino

SHIPPED = ROOT / "dino_config.yaml"
IMPOSSIBLE = partial(impossible_dino, facts_of=facts_of)


def ours(path: Path) -> dict:
    """The config, or ConfigError with all its problems."""
    config, _ = parse_command_line([], path, DinoConfig, IMPOSSIBLE)
    return config.model_dump()


def of_pyyaml(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8-sig"))


def unsafe(path: Path) -> dict:
    """Broken: runs what the file's tags say."""
    return yaml.unsafe_load(path.read_text())


def edited(key: str, value: str | None) -> bytes:
    """The shipped file with the line of one key replaced, or left out."""
    line = (
        ""
        if value is None
        else rf"\g<1>{key.split('.')[-1]}: {value.replace(chr(92), chr(92) * 2)}"
    )
    indent = "  " if "." in key else ""
    text, count = re.subn(
        rf"^({indent}){key.split('.')[-1]}:.*$", line, SHIPPED.read_text(), count=1, flags=re.M
    )
    assert count == 1, f"no line for {key}"
    return text.encode()


def _read(content: bytes, key: str, expected: Any, folder: Path, reader, words=()) -> Outcome:
    path = folder / "config.yaml"
    path.write_bytes(content.replace(b"CANARY", str(folder / "canary").encode()))

    def is_right(config: dict) -> None:
        assert expected is not REFUSED, "read as if nothing were wrong"
        found = config
        for part in key.split("."):
            found = found[part]
        assert found == expected and type(found) is type(expected), f"{key} is {found!r}"

    names = [key] if key else ["config.yaml"]
    outcome = judge(lambda: reader(path), is_right, names, words=words)
    if (folder / "canary").exists():
        return Outcome(WRONG, "code from the file was run")
    return outcome


REFUSED = object()


def right(key: str, value: str, expected: Any) -> Fault:
    name = f"{key}: {value.encode('unicode_escape').decode()}"
    return Fault(name, partial(_read, edited(key, value), key, expected), RIGHT)


def refused(key: str, value: str | None) -> Fault:
    shown = "(missing)" if value is None else value.encode("unicode_escape").decode()[:60]
    return Fault(f"{key}: {shown}", partial(_read, edited(key, value), key, REFUSED), NAMED)


def broken(name: str, content: bytes, key: str = "", *words: str) -> Fault:
    """words: of the message."""
    return Fault(name, partial(_read, content, key, REFUSED, words=words), NAMED)


def line_of(key: str) -> str:
    """The line of a key, which is in no section, of the shipped file."""
    lines = enumerate(SHIPPED.read_text(encoding="utf-8").splitlines(), 1)
    return f"line {next(n for n, line in lines if line.startswith(f'{key}:'))}"


GOOD = SHIPPED.read_bytes()
RUN = "!!python/object/apply:os.mkdir [CANARY]"
LAUGHS = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [*%c, *%c, *%c, *%c, *%c, *%c, *%c]\n" % (c, c, *[c - 1] * 7) for c in b"bcdefghi"
)

VALUES = [
    right("learning_rate", "1e-4", 1e-4),
    right("learning_rate", "1E-4", 1e-4),
    right("learning_rate", "1.e-4", 1e-4),
    right("learning_rate", ".5", 0.5),
    right("batch_size", "+16", 16),
    right("batch_size", "8  # eight", 8),
    right("experiment", "no", "no"),
    right("experiment", "on", "on"),
    right("experiment", "Yes", "Yes"),
    right("experiment", "n", "n"),
    right("experiment", "run 1", "run 1"),
    right("experiment", "2024", "2024"),
    right("experiment", "007", "007"),
    right("experiment", "é-ü_(3)", "é-ü_(3)"),
    right("experiment", "010", "010"),
    right("experiment", "1_000", "1_000"),
    right("experiment", "2024-01-31", "2024-01-31"),
    right("experiment", "1.2.840", "1.2.840"),
    right("experiment", "0x1F", "0x1F"),
    right("experiment", "1e5x", "1e5x"),
    right("experiment", "'null'", "null"),
    right("experiment", '"true"', "true"),
    right("experiment", "Müller", "Müller"),
    right("train_folds", "[0, 00, 1]", ["0", "00", "1"]),
    right("train_folds", "[no, yes, off]", ["no", "yes", "off"]),
    right("train_folds", "[010, 0o10, 0b1]", ["010", "0o10", "0b1"]),
    right("train_folds", "[1_0, 2024-01-31]", ["1_0", "2024-01-31"]),
    right("train_folds", "['1:30', '12:30:45']", ["1:30", "12:30:45"]),
    right("train_folds", '["0", 1]', ["0", "1"]),
    right("train_folds", "[12345678901234567890]", ["12345678901234567890"]),
    right("csv_path", "C:\\new\\cases.csv", "C:\\new\\cases.csv"),
    right("probe_targets", "[=, <<]", ["=", "<<"]),
]
PROBLEMS = [
    *(
        refused("learning_rate", v)
        for v in ("1e-4x", "'1e-4'", "1,5", ".nan", ".inf", "1e999", "0", "-1", "true", "~")
    ),
    *(
        refused("batch_size", v)
        for v in ("8.0", "'8'", "010", "0x10", "0", "-1", "1e2", "yes", "", "1_000", "[8]")
    ),
    *(refused("batch_size", v) for v in ("true", "null")),
    *(refused("compile", v) for v in ("yes", "no", "on", "1", "'true'", "null")),
    *(
        refused("train_folds", v)
        for v in ("0", "[]", "[0, '0']", "[true]", "[null]", "['']", "[[0]]", "{0: 1}", "[4]")
    ),
    *(
        refused("experiment", v)
        for v in (
            "../../x",
            "/tmp/x",
            "a/b",
            "a\\b",
            "..",
            "CON",
            "nul.txt",
            '"\\0"',
            '"a\\nb"',
            "x.",
            "true",
            "null",
            "[x]",
            "C:x",
            "",
            ".",
            "com1",
            "x" * 101,
            "é" * 130,
        )
    ),
    *(refused("csv_path", v) for v in ('""', "$NO_SUCH_VARIABLE/x.csv", '"a\\0b"', "null")),
    refused("precision", "float16"),
    refused("data.spacing", "[1, 1]"),
    refused("data.spacing", "[1, 1, '1']"),
    refused("data.modality", "MRI"),
    refused("seed", None),
    broken("unknown key", GOOD + b"\nbatchsize: 8\n", "batchsize"),
    broken("unknown section", GOOD + b"\noptimizer:\n  name: sgd\n", "optimizer"),
    broken("a key twice", GOOD + b"\nseed: 1\n", "seed"),
    broken("a key twice, the same", GOOD + b"\nseed: 0\n", "seed"),
    broken("a section twice", GOOD + b"\ndata:\n  modality: CT\n", "data"),
    broken("a key twice within a list", edited("train_folds", "[{a: 1, a: 2}]"), "train_folds"),
    broken("no space after the colon", edited("seed", None) + b"\nseed:1\n"),
    broken("a tab", b"x: 1\ny:\n\tz: 1\n", "", "line 3: a tab"),
    broken("a tag that runs code", edited("seed", RUN), "", line_of("seed")),
    broken("a tag that makes a tuple", edited("train_folds", "!!python/tuple [0]")),
    broken("a tag for text", edited("batch_size", "!!str 8")),
    broken("anchor and alias", edited("seed", "&s 1") + b"\nx: *s\n", "", line_of("seed")),
    broken("merge key", GOOD + b"\n<<: {seed: 1}\n", "<<"),
    broken("a billion laughs", LAUGHS),
    broken("two documents", b"seed: 1\n---\nseed: 1\n", "", "line 2"),
    broken("an open bracket", b"seed: [1\n", "", "not YAML: line 2"),
    broken("an open bracket, then more", edited("train_folds", "[0, 1")),
    broken("an open quote", edited("experiment", '"dino')),
    broken("5000 brackets", b"a: " + b"[" * 5000, "", "nested too deeply"),
    broken("a list", b"- seed: 1\n", "", "holds a list"),
    broken("a number", b"5", "", "holds a int"),
    broken("empty", b"", "", "is empty"),
    broken("comments only", b"# seed: 1\n", "", "is empty"),
    broken("UTF-16", GOOD.decode().encode("utf-16"), "", "UTF-16"),
    broken("Latin-1", b"experiment: M\xfcller\n", "", "line 1: not UTF-8 (byte 0xFC)"),
    broken("a NUL", edited("experiment", "a\0b"), "", "not YAML"),
    broken("a zip archive", b"PK\x03\x04" + bytes(99)),
    Fault("byte order mark", partial(_read, b"\xef\xbb\xbf" + GOOD, "seed", 0), RIGHT),
    Fault("line ends of Windows", partial(_read, GOOD.replace(b"\n", b"\r\n"), "seed", 0), RIGHT),
]
YAML = Group(
    "YAML files", ours, VALUES + PROBLEMS, {"yaml.safe_load": of_pyyaml, "yaml.unsafe_load": unsafe}
)
