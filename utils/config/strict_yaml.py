"""YAML without surprises: plain values, and the line of every key.

YAML 1.1, which PyYAML implements, reads `no` as false, `1e-4` as text, `010` as 8 and `1:30` as 90.
Here true, false, null and decimal numbers are the only unquoted words that are not text.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """A loader of YAML 1.2 scalars that refuses tags, anchors and aliases."""

    yaml_implicit_resolvers: dict = {}

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor or getattr(event, "tag", None):
            what = (
                "a value that starts with *, & or ! has a special meaning in YAML: put it in quotes"
            )
            raise yaml.composer.ComposerError(None, None, what, event.start_mark)
        return super().compose_node(parent, index)


class Dumper(yaml.SafeDumper):
    """A dumper that quotes what YAML 1.1 or Loader would not read as text; lists fill one line."""


Dumper.add_representer(
    list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, True)
)

# Numbers with leading zeros (007) or with more digits than an int64 has are text.
UNSIGNED = r"(?:0|[1-9][0-9]{0,17})"
EXPONENT = r"[eE][-+]?[0-9]+"
SCALARS = {
    "null": (r"~|null|Null|NULL|", [*"~nN", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (rf"[-+]?{UNSIGNED}", [*"-+0123456789"]),
    "float": (
        rf"[-+]?(?:(?:{UNSIGNED}\.[0-9]*|\.[0-9]+)(?:{EXPONENT})?|{UNSIGNED}{EXPONENT})",
        [*"-+.0123456789"],
    ),
}
for kind, (pattern, first) in SCALARS.items():
    for cls in (Loader, Dumper):
        cls.add_implicit_resolver(
            f"tag:yaml.org,2002:{kind}", re.compile(rf"(?:{pattern})\Z"), first
        )


def parse(text: str) -> tuple[Any, dict[str, int], list[tuple[str, int]]]:
    """Parse YAML text into plain values.

    Returns:
        the value; {dotted key: its line}; [(dotted key, line)] of the repetitions of keys.
    Raises:
        yaml.YAMLError: not YAML, or YAML with tags, anchors or aliases.
        RecursionError: nested too deeply.
    """
    root = yaml.compose(text, Loader)
    lines: dict[str, int] = {}
    repeated = []
    for key, key_node, _ in walk(root):
        line = key_node.start_mark.line + 1
        if key in lines:
            repeated.append((key, line))
        lines.setdefault(key, line)
    return _value(root), lines, repeated


def walk(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """Yield (dotted key, key node, value node) of every mapping entry, in the order of the file."""
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            yield from walk(item, f"{prefix}[{i}]")
    elif isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = f"{prefix}.{_key(key_node)}" if prefix else _key(key_node)
            yield key, key_node, value_node
            yield from walk(value_node, key)


def _key(node: yaml.Node) -> str:
    """Return a key as the text that was written: 0 and no are names like any other."""
    return node.value if isinstance(node, yaml.ScalarNode) else "(a list or section as key)"


def _value(node: yaml.Node | None) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {_key(key_node): _value(value_node) for key_node, value_node in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    kind = "null" if node is None else node.tag.rpartition(":")[2]
    if kind == "null":
        return None
    if kind == "bool":
        return node.value.lower() == "true"
    return {"int": int, "float": float, "str": str}[kind](node.value)


# {part of PyYAML's message: plain words}
PLAIN = {
    "'\\t'": "a tab; indent with spaces",
    "expected <block end>": "indented otherwise than the lines above it: keys of one section begin "
    "in the same column",
    "mapping values are not allowed here": "a key where none can be: it is indented deeper than "
    "the line above, or a text with a colon and a space lacks its quotes",
    "could not find expected ':'": "expected key: value, with a space after the colon",
    "expected ',' or ']'": "a list is not closed: expected , or ]",
    "expected ',' or '}'": "a { is not closed: expected , or }",
    "unexpected end of stream": "a quote is not closed",
}


def reason(error: yaml.YAMLError | RecursionError, with_line: bool = True) -> str:
    """Say in one line what is wrong with the YAML, and in which line of it."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error).splitlines()[0]
    if "could not find expected ':'" in what:  # where it looked for one, not where it gave up
        mark = error.context_mark
    what = next((plain for part, plain in PLAIN.items() if part in what), what)
    return f"line {mark.line + 1}: {what}" if mark and with_line else what


def text(value: Any) -> str:
    """Return a value as it is written in one line of YAML."""
    found = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=10_000)
    return found.removesuffix("...\n").strip()
