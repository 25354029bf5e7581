"""Text files: reading those that users write, naming what is wrong, and writing our own whole."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from utils.errors import InputError


def read_text(path: str | Path) -> str:
    """Return the text of a UTF-8 file with or without a byte-order mark.

    Raises:
        ValueError: the file cannot be read or is not UTF-8; the message says what it is instead, or
            which line is wrong.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as e:
        raise ValueError(f"cannot be read: {e.strerror}") from e
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content[:2]:
        raise ValueError("is UTF-16 (Excel: 'Unicode text'); save it as UTF-8")
    if content.startswith(b"PK\x03\x04"):
        raise ValueError("is a zip archive or an Excel workbook; save it as text in UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        byte = content[e.start]
        raise ValueError(f"line {line}: not UTF-8 (byte 0x{byte:02X}); save it as UTF-8") from e


def expand_path(text: str) -> str:
    """Replace `~`, $VAR and ${VAR} in a path.

    Raises:
        ValueError: the path is empty, holds a NUL character, or names a variable or user that does
            not exist.
    """
    if not text.strip():
        raise ValueError("empty path")
    if "\0" in text:
        raise ValueError("a path cannot hold a NUL character")
    for plain, braced in re.findall(r"\$(\w+)|\$\{([^}]*)\}", text):
        if (plain or braced) not in os.environ:
            raise ValueError(f"the environment variable {plain or braced} is not set")
    expanded = os.path.expanduser(os.path.expandvars(text))
    if expanded.startswith("~"):
        raise ValueError("~ names a user that does not exist; write ./~ for a file of that name")
    return expanded


def make_folder(path: str | Path, key: str) -> None:
    """Make a folder if it is absent.

    Raises InputError, naming the key of the config, if it cannot be made or written to.
    """
    refuse_file(path, key)
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as e:
        what = f"{path} cannot be written to: {e.strerror}"
        raise InputError(f"{key}: {what}; set {key} to a folder of yours") from e


def refuse_file(path: str | Path, key: str) -> None:
    """Raise InputError, naming the key of the config, if a folder's place is taken by a file."""
    path = Path(path)
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            what = "is a file" if place == path else f"cannot be made: {place} is a file"
            raise InputError(f"{key}: {path} {what}; set {key} to a folder of yours")


@contextmanager
def replacing(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open a text file that replaces `path` once it is complete; no reader sees half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", newline=newline, encoding="utf-8") as file:
        yield file
    temporary.replace(path)
