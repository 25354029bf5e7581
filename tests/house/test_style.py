"""Linting and formatting, where ruff is installed; the sizes of files, functions and folders."""

import ast
import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.places import ROOT


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="ruff is not installed")
@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    result = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_sizes():
    """A person reads a script, a function, a folder and the README at one sitting."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    code = [ROOT / name for name in files.split() if name.endswith(".py")] or pytest.skip("no git")
    lines = {path: path.read_text(encoding="utf-8").splitlines() for path in code}
    large = [path.name for path in code if path.parent == ROOT and len(lines[path]) > 400]
    for path in code:
        for node in ast.walk(ast.parse("\n".join(lines[path]))):
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if is_function and node.end_lineno - node.lineno >= 75:
                large.append(f"{path.name}: {node.name}")
    folders = Counter(str(Path(name).parent) for name in files.split() if "__init__.py" not in name)
    large += [folder for folder, count in folders.items() if count > 15]
    large += ["README"] * (len((ROOT / "README.md").read_text("utf-8").splitlines()) > 260)
    assert not large, large
