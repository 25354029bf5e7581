"""The table of messages in docs/running.md: each is one that the code can say."""

import ast
import re

from tests.house.test_readme import CODE, TEXTS
from tests.places import ROOT

OWN = 0.35  # of a message, at least, that stands in the code; the rest is filled in


def messages() -> list[str]:
    part = TEXTS["docs/running.md"].partition("## When something goes wrong")[2]
    found = re.findall(r"^\| `(.+?)` \| .+ \|$", part.partition("\n## ")[0], re.M)
    return [message.replace("\\|", "|") for message in found]


def texts_of_the_code() -> list[list[str]]:
    """Of each text its pieces, between which something is filled in."""
    files = [file for file in CODE if not file.is_relative_to(ROOT / "tests")]
    nodes = [node for f in files for node in ast.walk(ast.parse(f.read_text(encoding="utf-8")))]
    parts = [node.values if isinstance(node, ast.JoinedStr) else [node] for node in nodes]
    parts = [[getattr(part, "value", None) for part in of_text] for of_text in parts]
    return [[part for part in of_text if isinstance(part, str)] for of_text in parts]


def test_each_message_of_the_table_is_one_of_the_code():
    texts, shown = [text for text in texts_of_the_code() if text], messages()
    said = "\0".join(part for text in texts for part in text)
    assert len(shown) == 14
    for message in shown:
        least = int(OWN * len(message))
        whole = [text for text in texts if len(text) > 1 and sum(map(len, text)) >= least]
        whole = any(re.search(".*".join(map(re.escape, text)), message) for text in whole)
        part = any(message[i : i + least] in said for i in range(len(message) - least))
        assert whole or part, message
