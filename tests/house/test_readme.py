"""README.md and docs/ against the code: they name only what exists, and the tree names it all."""

import importlib.util
import re

import pytest

from tests.places import ROOT
from utils.config.classification import ClassificationConfig
from utils.config.command_line import OPTIONS, schema_keys
from utils.config.dino import DinoConfig
from utils.config.segmentation import SegmentationConfig

PAGES = {p.relative_to(ROOT).as_posix(): p for p in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
STAGES = {"dino": DinoConfig, "classification": ClassificationConfig}
STAGES["segmentation"] = SegmentationConfig
KEYS = {stage: schema_keys(config) for stage, config in STAGES.items()}
EVERY = {key for keys in KEYS.values() for key in keys}
SECTIONS = {key.partition(".")[0] for key in EVERY if "." in key}
FOLDERS = ("data", "models", "utils")
CODE = [*ROOT.glob("*.py"), *(f for d in (*FOLDERS, "tests") for f in (ROOT / d).rglob("*.py"))]
WORDS = {word for file in CODE for word in re.findall(r"\w+", file.read_text(encoding="utf-8"))}
PROCESSOR = {"avx512_bf16", "amx_bf16"}  # flags of lscpu
WRITTEN = ("results", "config.yaml", "plots", "test")  # by a run


def commands(text):
    """The lines of the bash blocks, continued ones as one, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.partition(" #")[0].strip() for line in lines]


def quoted(text):
    """What stands in backticks, outside of blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))


def slug(heading):
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(text):
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.M)}


def module_exists(name):
    spec = importlib.util.find_spec(name)
    return spec is not None and (
        not spec.submodule_search_locations or importlib.util.find_spec(f"{name}.__main__")
    )


@pytest.mark.parametrize("page", PAGES)
def test_keys_exist(page):
    """section.key and key=value in backticks; a_word may also be a column or a name of the code."""
    for text in quoted(TEXTS[page]):
        if re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)+", text):
            assert text in EVERY | WORDS | PROCESSOR, text
        named = re.findall(r"(?:^| )([a-z_][a-z_0-9.]*)=", text)
        named += re.findall(r"^([a-z_][a-z_0-9.]*): ", text)
        alone = re.fullmatch(rf"(?:{'|'.join(SECTIONS)})\.([a-z_0-9]+)", text)
        if alone and not text.endswith((".py", ".yaml")):
            named.append(text)
        for key in named:
            assert key in EVERY or key == "merge_order", text


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    variables = set(re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.M))
    for line in commands(TEXTS[page]) + quoted(TEXTS[page]):
        if make := re.match(r"make ([a-z]+)((?: \w+=\S+)*)$", line):
            assert make[1] in targets, line
            assert set(re.findall(r" (\w+)=", make[2])) <= variables, line
        for module in re.findall(r"python -m ([\w.]+)", line):
            assert module_exists(module), line
        for path in re.findall(r"python -m pytest (\S+)", line):
            assert (ROOT / path).exists(), line
        if script := re.search(r"(?:python|torchrun .*?) (\w+)\.py(.*)", line):
            assert script[1] in STAGES, line
            overrides = re.findall(r" ([a-z_0-9.]+)=", script[2])
            assert set(overrides) <= set(KEYS[script[1]]), line
            options = {*OPTIONS} | (set() if script[1] == "dino" else {"--cv", "--predict"})
            assert set(re.findall(r" (--[a-z]+)", script[2])) <= options, line


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    """In backticks: what looks like a path into the repository, and names of code and settings."""
    for text in quoted(TEXTS[page]):
        if not re.fullmatch(r"[\w.][\w./*-]*", text) or text.split("/")[0] in WRITTEN:
            continue
        if text.endswith((".py", ".yaml", "/")) or text.split("/")[0] in (*FOLDERS, ".ci", "tests"):
            assert list(ROOT.glob(text.rstrip("/"))), text


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_resolve(page):
    links = re.findall(r"\]\(([^)\s]+)\)", TEXTS[page])
    for link in [link for link in links if not link.startswith("https://")]:
        path, _, anchor = link.partition("#")
        target = (PAGES[page].parent / path).resolve() if path else PAGES[page]
        assert target.is_relative_to(ROOT) and target.is_file(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_page_is_linked_from_the_readme():
    assert {name for name in PAGES if f"]({name})" in TEXTS["README.md"]} == PAGES.keys() - {
        "README.md"
    }


def tree():
    """Paths of the tree in docs/code.md; two spaces are a level."""
    block = re.search(r"```\n(.*?)```", TEXTS["docs/code.md"], re.S)[1]
    paths, parents = [], []
    for line in block.splitlines():
        indent, name, text = re.fullmatch(r"( *)(\S+)  +(\S.*)", line).groups()
        parents = parents[: len(indent) // 2]
        paths.append("".join(parents) + name)
        parents.append(name)
    return paths


def test_the_tree_is_that_of_the_repository():
    paths = tree()
    assert len(paths) == len(set(paths))
    assert all((ROOT / path).exists() for path in paths)
    assert all((ROOT / path).is_dir() == path.endswith("/") for path in paths)
    files, folders = set(), {f"{folder}/" for folder in FOLDERS}
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            path = file.relative_to(ROOT)
            files |= {path.as_posix()} - {f"{path.parent.as_posix()}/__init__.py"}
            folders.add(f"{path.parent.as_posix()}/")
    assert {path for path in paths if path.startswith(tuple(folders))} == files | folders
    top = {*(f"{stage}.py" for stage in STAGES), "models/", "data/", "utils/", "tests/", "docs/"}
    assert top <= set(paths)
