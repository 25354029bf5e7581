"""Files and paths that users write, and what is wrong with them."""

import os
import re
from pathlib import Path


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark.

    Raises:
        ValueError: says what the file is instead, and in which line it stops being UTF-8.
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
    """`~`, $VAR and ${VAR} replaced.

    Raises:
        ValueError: empty, holds a NUL character, or names a variable or user that does not exist.
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
