"""Config files: strict YAML, overrides from the command line, --help, and all problems at once.

The YAML files hold the defaults, and a pydantic model (utils/config/schema.py) holds the rules.
"""

import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from utils.config import strict_yaml
from utils.config.fields import in_words
from utils.config.schema import OPTIONS as FINE_TUNING_OPTIONS
from utils.errors import InputError, nearest
from utils.files import expand_path, read_text

Schema = TypeVar("Schema", bound=BaseModel)
# From {dotted key: value} of the values that are valid by themselves to [(key, what is wrong)].
Impossible = Callable[[Mapping[str, Any]], list[tuple[str, str]]]
COMMAND_LINE = "command line"
OPTIONS = ("--config", "--check", "--help")
NO_OPTIONS: Mapping[str, str] = {}
PACKAGES = ("torch", "monai", "numpy", "scipy", "nibabel", "pydicom", "blosc2", "scikit-learn")
USAGE = """\
usage: python {script} [key=value | section.key=value ...] [--config FILE] {flags}

  key=value       override a key of the config file; values are written as there
  --config FILE   read FILE in place of {default}
  --check         read every row of the CSV, list all problems, train nothing
{more}  --help          this text

The keys, with their defaults in {default}, and <what they may be>:"""


class ConfigProblem(NamedTuple):
    where: str  # "line 12" or COMMAND_LINE; "" if the key is in neither
    key: str  # dotted
    what: str


class ConfigError(InputError):
    """All that is wrong with a config file and the command line, listed in `.problems`."""

    def __init__(self, path: str | Path, problems: list[ConfigProblem]):
        self.path, self.problems = path, problems
        super().__init__(path, problems)

    def __str__(self) -> str:
        count = f"{len(self.problems)} problem" + "s" * (len(self.problems) != 1)
        where, key = (max(len(p[column]) for p in self.problems) for column in (0, 1))
        rows = [f"  {p.where:<{where}}  {p.key:<{key}}  {p.what}" for p in self.problems]
        return "\n".join([f"{self.path}: {count}", *rows])


def parse_command_line(
    argv: list[str],
    default_config: str | Path,
    schema: type[Schema],
    impossible: Impossible,
    more_options: Mapping[str, str] = NO_OPTIONS,
) -> tuple[Schema, bool]:
    """Read the config file, apply the overrides and check everything.

    Args:
        argv: the arguments without the name of the script.
        default_config: the YAML file that is read unless --config names another.
        schema: the pydantic model.
        impossible: finds values that are valid by themselves but not together.
        more_options: {"--option" or "--option VALUE": its line of --help} of further options.
    Returns:
        the config, and whether --check was given.
    Raises:
        ConfigError: with every problem of the file and the command line.
        SystemExit: 0, after printing --help.
    """
    options = [*OPTIONS, *more_options]
    path, flags, overrides, problems = _split_arguments(argv, default_config, options)
    if flags & {"--help", "-h"}:
        print(help_text(default_config, schema, more_options))
        raise SystemExit(0)
    try:
        values, lines, found = read_yaml(path)
    except ConfigError as e:
        raise ConfigError(path, e.problems + problems) from e
    problems += found
    where = {key: f"line {line}" for key, line in lines.items()}
    for key, text in overrides:
        wrong = _override(values, key, text, schema_keys(schema))
        if where.get(key) == COMMAND_LINE:
            wrong = "given twice"
        if wrong:
            problems.append(ConfigProblem(COMMAND_LINE, key, wrong))
        where[key] = COMMAND_LINE
    config, invalid = validate(values, schema, impossible)
    problems += [ConfigProblem(where.get(_field(key), ""), key, what) for key, what in invalid]
    if problems:
        raise ConfigError(path, sorted(problems, key=_file_order))
    return config, "--check" in flags


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, int], list[ConfigProblem]]:
    """Return the values of a YAML file, {dotted key: its line}, and a problem per repeated key.

    Raises:
        ConfigError: the file is missing, empty, not UTF-8, not YAML, or not keys with values.
    """
    try:
        values, lines, repeated = strict_yaml.parse(read_text(path))
        if not isinstance(values, dict):
            found = "is empty" if values is None else f"holds a {type(values).__name__}"
            raise ValueError(f"{found}; expected lines `key: value`")
    except (yaml.YAMLError, RecursionError) as e:
        what = f"not YAML: {strict_yaml.reason(e)}"
        raise ConfigError(path, [ConfigProblem("", "", what)]) from e
    except ValueError as e:
        raise ConfigError(path, [ConfigProblem("", "", str(e))]) from e
    twice = "written twice, first in line {}"
    problems = [ConfigProblem(f"line {n}", key, twice.format(lines[key])) for key, n in repeated]
    return values, lines, problems


def _split_arguments(argv: list[str], default_config: str | Path, options: list[str]):
    """Return the config file, the options given, [(key, text of the value)] and the problems."""
    path, flags, overrides, problems = Path(default_config), set(), [], []

    def wrong(argument: str, what: str) -> None:
        problems.append(ConfigProblem(COMMAND_LINE, argument, what))

    arguments = iter(argv)
    with_value = {"--config": "a file", **dict(o.split() for o in options if " " in o)}
    options = [option.split()[0] for option in options]
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if name in with_value:
            text = text if equals else next(arguments, "")
            if not text:
                wrong(name, f"needs {with_value[name]}")
            elif name in flags:
                wrong(name, "given twice")
            if name == "--config":
                path = Path(text or path)
            flags.add(name)
        elif argument in (*options, "-h"):
            flags.add(argument)
        elif argument.startswith("-"):
            key = name.lstrip("-").replace("-", "_")
            near = nearest(name, options)
            what = f"unknown option; nearest: {near}" if near else "unknown option"
            what += f"; to override a key, write {key}=value"
            if name in {option.split()[0] for option in FINE_TUNING_OPTIONS}:
                what = "only classification.py and segmentation.py have this option"
            wrong(argument, what)
        elif not equals:
            wrong(argument, "expected key=value")
        else:
            overrides.append((name, text))
    return path, flags, overrides, problems


def value_of(option: str, argv: list[str]) -> str | None:
    """Return the value of an option, which `parse_command_line` checks, or None.

    Raises ConfigError if it is no path.
    """
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, text = argument.partition("=")
        text = text if equals else following
        if name == option and text:
            try:
                return expand_path(text)
            except ValueError as e:
                raise ConfigError(COMMAND_LINE, [ConfigProblem("", option, str(e))]) from None
    return None


def _override(values: dict, key: str, text: str, known: list[str]) -> str:
    """Set one key in the nested `values` and return what is wrong, or ''."""
    if key not in known:
        inside = [k for k in known if k.startswith(f"{key}.")]
        if inside:
            return f"is a section; write one of its keys, such as {inside[0]}=value"
        return _unknown(key, known)
    try:
        value = strict_yaml.parse(text)[0]
    except (yaml.YAMLError, RecursionError) as e:
        what = strict_yaml.reason(e, with_line=False)
        return f"{text!r}: {what}; text like this needs double quotes within single ones"
    section, _, leaf = key.rpartition(".")
    target = values.setdefault(section, {}) if section else values
    if isinstance(target, dict):  # if it is not, the section itself is reported
        target[leaf] = value
    return ""


def _file_order(problem: ConfigProblem) -> tuple[bool, int]:
    """Return a sort key: lines first, then missing keys and the command line."""
    line = problem.where.removeprefix("line ")
    return (False, int(line)) if line.isdigit() else (True, 0)


# ---- rules
def schema_keys(schema: type[BaseModel]) -> list[str]:
    """Return the dotted keys of a config in order, without the sections themselves."""
    keys = []
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += [f"{name}.{key}" for key in schema_keys(field.annotation)]
        else:
            keys.append(name)
    return keys


def validate(
    values: dict[str, Any], schema: type[Schema], impossible: Impossible
) -> tuple[Schema | None, list[tuple[str, str]]]:
    """Return the config, or None and [(dotted key, what is wrong)].

    `impossible` gets every value that is valid by itself, so that no mistake hides another.
    """
    config, problems = None, []
    known, rules = schema_keys(schema), _json_rules(schema)
    try:
        config = schema.model_validate(values)
    except ValidationError as e:
        problems = [(_dotted(error["loc"]), _explain(error, known, rules)) for error in e.errors()]
    broken = {_field(key) for key, _ in problems}
    valid = {}
    for key in known:
        section, _, leaf = key.rpartition(".")
        inside = values.get(section) if section else values
        if key not in broken and isinstance(inside, dict) and leaf in inside:
            valid[key] = inside[leaf]
    problems += impossible(valid)
    return (None if problems else config), problems


def _dotted(location: tuple[str | int, ...]) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return "".join(parts).removeprefix(".")


def _field(key: str) -> str:
    """Turn data.spacing[1] into data.spacing."""
    return re.sub(r"(\[[0-9]+\])+\Z", "", key)


def _explain(error: Mapping[str, Any], known: list[str], rules: Mapping[str, dict]) -> str:
    """Put pydantic's message into the words of a config file.

    rules: of `_json_rules`.
    """
    kind, found, key = error["type"], error["input"], _dotted(error["loc"])
    number = _length(rules.get(_field(key), {}))
    if found is None and ":" in (last := str(error["loc"][-1])):
        return f"write a space after the colon: {last.replace(':', ': ')}"
    if kind == "extra_forbidden":
        return _unknown(key, known)
    if kind == "missing":
        return f"missing: expected {number} values" if number else "missing"
    what = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    what = what.replace("a valid integer", "a whole number").replace("a valid ", "a ")
    if kind == "model_type":
        what = "expected a section: indented lines `key: value`"
    elif kind == "dict_type":
        what = "expected names and values: {name: value, ...}"
    elif kind == "list_type":
        what = "expected a list: [first, second, ...]"
    elif kind == "tuple_type" and isinstance(found, int | float) and number:
        what = f"expected {number} values: {strict_yaml.text([found] * number)}"
    elif kind in ("tuple_type", "too_long") and number:
        what = f"expected a list of {number} values"
    elif kind == "literal_error" and isinstance(found, str):
        near = nearest(found, re.findall(r"'([^']*)'", what))
        what += f"; nearest: {near}" if near else ""
    words = {None: "null", True: "true", False: "false"}
    shown = words[found] if found is None or isinstance(found, bool) else repr(found)
    return f"{shown[:80]}: {what}"


def _length(rule: Mapping[str, Any]) -> int:
    """Return how many values a rule wants, as of three axes; 0 if any number or none."""
    return max(len(part.get("prefixItems", ())) for part in [rule, *rule.get("anyOf", ())])


def _unknown(key: str, known: list[str]) -> str:
    near = nearest(key, known)
    return f"unknown key; nearest: {near}" if near else "unknown key"


# ---- help and the resolved config
def help_text(
    path: str | Path, schema: type[BaseModel], more_options: Mapping[str, str] = NO_OPTIONS
) -> str:
    """Return the usage, and each key of a YAML file with its value, comment and what is allowed."""
    text, rules = read_text(path), _json_rules(schema)
    lines = text.splitlines()
    flags = " ".join(f"[{name}]" for name in ("--check", *more_options, "--help"))
    more = "".join(f"  {name:<14}  {what}\n" for name, what in more_options.items())
    program, default = Path(sys.argv[0]), Path(path).name
    script = program.name
    if script == "__main__.py":
        script = f"-m {'.'.join(program.parts[-3:-1])}"
    result = [USAGE.format(script=script, default=default, flags=flags, more=more)]
    section = ""
    for key, key_node, value_node in strict_yaml.walk(yaml.compose(text, strict_yaml.Loader)):
        if key.rpartition(".")[0] in rules:  # a part of a value, such as classes.liver
            continue
        is_section, line = key not in rules, key_node.start_mark.line
        group = key if is_section else key.rpartition(".")[0]
        above = lines[line - 1] if line else ""
        if above.startswith("#"):
            result += ["", above.strip("# -")]
        elif group != section and result[-1]:
            result.append("")
        section = group
        end = (key_node if is_section else value_node).end_mark
        found = re.search(r"#\s*(.*)", lines[end.line][end.column :])
        comment = found[1] if found else ""
        value = text[value_node.start_mark.index : value_node.end_mark.index]
        entry = key if is_section else f"{key}={value}"
        allowed = in_words(rules.get(key, {}), comment)
        if allowed not in ("", "text", "true or false"):  # the value shows these
            comment += f" <{allowed}>"
        if comment or not is_section:
            result.append(f"  {entry:<48}  {comment}".rstrip())
    return "\n".join(result)


def _json_rules(schema: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """Return {dotted key: JSON schema of its value}."""
    whole, rules = schema.model_json_schema(), {}
    for name, rule in whole["properties"].items():
        if "$ref" in rule:
            section = whole["$defs"][rule["$ref"].rpartition("/")[2]]
            rules |= {f"{name}.{key}": inner for key, inner in section["properties"].items()}
        else:
            rules[name] = rule
    return rules


def environment() -> dict[str, str]:
    """Return what produced a run: the command line, the git commit and versions."""
    facts = {"command": shlex.join(sys.argv), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "absent"
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, timeout=10)
        facts["git commit"] = git.stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):  # no git: the code came as an archive
        facts["git commit"] = "unknown"
    return facts


def save_resolved(config: BaseModel, path: str | Path) -> None:
    """Write a config as YAML that --config reads back, with `environment()` as comments."""
    comments = "\n".join(f"# {name}: {fact!r}" for name, fact in environment().items())
    options = {"sort_keys": False, "allow_unicode": True, "width": 10_000}
    body = yaml.dump(config.model_dump(mode="json"), Dumper=strict_yaml.Dumper, **options)
    Path(path).write_text(f"{comments}\n\n{body}", encoding="utf-8")
