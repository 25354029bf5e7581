"""Imports point one way: scripts -> models, data, utils; models -> utils; data -> utils. Within
data and utils they point down the lists of rooms below; no files import each other in a circle.
A __main__.py is a program like the scripts: it may import what they may, and nothing imports it."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.places import ROOT

ALLOWED = {"models": {"models", "utils"}, "data": {"data", "utils"}, "utils": {"utils"}}
SCRIPTS = {"tests", *(path.stem for path in ROOT.glob("*.py"))}
# rooms (folders, and the files that are in none) from the top down: none imports one above it
ORDER = {
    "data": "table probe clean inference prepare demo views loading cache entry standard masks "
    "channels sources cases readers itk mgh nifti dicom parts values volume",
    "utils": "compare transfer training report metrics weights config sliding_window classes "
    "checkpoint tensor_files parallel memory cost signals distributed files errors",
}


def modules() -> dict[str, Path]:
    """{dotted name: file} of everything but the tests."""
    files = [p for package in ALLOWED for p in (ROOT / package).rglob("*.py")]
    files += ROOT.glob("*.py")
    dotted = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in files}
    return {name.removesuffix(".__init__"): path for name, path in dotted.items()}


def imported(path: Path, known) -> Iterator[str]:
    """Dotted names of the modules a file imports; "." for a relative import."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." if node.level else node.module
            names = [f"{module}.{alias.name}" for alias in node.names]
            yield from [name for name in names if name in known] or [module]


def test_imports_point_one_way():
    forbidden = []
    for name, path in modules().items():
        package = "" if path.name == "__main__.py" else name.partition(".")[0]
        banned = (set(ALLOWED) | SCRIPTS | {""}) - ALLOWED.get(package, set(ALLOWED))
        for found in imported(path, modules()):
            if found.partition(".")[0] in banned or "__main__" in found:
                forbidden.append(f"{name} imports {found}")
    assert not forbidden, forbidden


def test_rooms_import_no_room_above_them():
    upward = []
    for package, text in ORDER.items():
        order = text.split()
        for name, path in modules().items():
            parts = name.split(".")
            if parts[0] != package or len(parts) == 1:
                continue
            for found in imported(path, modules()):
                other = found.split(".")
                inside = other[0] == package and len(other) > 1 and other[1] != parts[1]
                if inside and order.index(other[1]) < order.index(parts[1]):
                    upward.append(f"{name} imports {found}")
        rooms = {name.split(".")[1] for name in modules() if name.startswith(f"{package}.")}
        assert rooms == set(order)
    assert not upward, upward


def test_no_files_import_each_other_in_a_circle():
    graph = {
        name: set(imported(path, modules())) & set(modules()) for name, path in modules().items()
    }
    while free := {name for name, others in graph.items() if not others & set(graph)}:
        graph = {name: others for name, others in graph.items() if name not in free}
    assert not graph, {name: others & set(graph) for name, others in graph.items()}


def test_init_files_are_empty_or_doors_of_their_room():
    for package in ALLOWED:
        for path in (ROOT / package).rglob("__init__.py"):
            assert not path.read_text() or path == ROOT / "utils" / "weights" / "__init__.py"
