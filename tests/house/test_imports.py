"""Imports point one way: scripts -> models, data, utils; models -> utils; data -> utils."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
ALLOWED = {"models": {"models", "utils"}, "data": {"data", "utils"}, "utils": {"utils"}}
SCRIPTS = {"tests", *(path.stem for path in ROOT.glob("*.py"))}


def imported(path):
    """Top-level names of the modules a file imports; "." for a relative import."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else node.module.split(".")[0]


def test_imports_point_one_way():
    forbidden = []
    for package, allowed in ALLOWED.items():
        banned = (set(ALLOWED) | SCRIPTS | {"."}) - allowed
        for path in (ROOT / package).rglob("*.py"):
            for name in banned.intersection(imported(path)):
                forbidden.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not forbidden, forbidden


def test_init_files_are_empty_or_doors_of_their_room():
    for package in ALLOWED:
        for path in (ROOT / package).rglob("__init__.py"):
            assert not path.read_text() or path == ROOT / "utils" / "weights" / "__init__.py"
