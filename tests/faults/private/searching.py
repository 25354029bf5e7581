"""Search of all bytes below a folder, also of those that are packed: is a text anywhere?"""

import base64
import gzip
import io
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import blosc2

ZLIB_START = re.compile(rb"\x78[\x01\x5e\x9c\xda]")
DATA_URI = re.compile(rb"base64,([A-Za-z0-9+/=\s]+)")
BASE64 = re.compile(rb"[A-Za-z0-9+/]{40,}={0,2}")


def find_text(folder: Path, texts: Sequence[str]) -> list[str]:
    """Where one of the texts is, whatever its case: "file: text (how it is packed)"."""
    patterns = [(t, re.compile(_in_encodings(t), re.IGNORECASE | re.DOTALL)) for t in texts]
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found += [f"{path}: {text} in its name" for text in texts if text in path.name.lower()]
        for how, content in unpacked(path.read_bytes(), path):
            found += [f"{path}: {text} ({how})" for text, p in patterns if p.search(content)]
    return found


def _in_encodings(text: str) -> bytes:
    """A pattern of the text in UTF-8 and both kinds of UTF-16."""
    return b"|".join(re.escape(text.encode(e)) for e in ("utf-8", "utf-16-le", "utf-16-be"))


def unpacked(data: bytes, path: Path | None = None, how: str = "plain") -> Iterator:
    """(how, bytes) of data and of all that is packed in it."""
    yield how, data
    if path is not None and path.suffix == ".b2nd":
        array = blosc2.open(str(path), mode="r")
        for name in array.schunk.vlmeta:
            yield f"blosc2 metadata {name}", repr(array.schunk.vlmeta[name]).encode()
        yield "blosc2 voxels", array[:].tobytes()
    if data.startswith(b"PK\3\4"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in archive.namelist():
                yield from unpacked(archive.read(name), None, f"{how}, zip member")
                yield how, name.encode()
        return
    if data.startswith(b"\x1f\x8b"):
        yield from unpacked(gzip.decompress(data), None, f"{how}, gzip")
        return
    for match in ZLIB_START.finditer(data):  # within PNG, PDF, TensorBoard's pictures, ...
        try:
            content = zlib.decompressobj().decompress(data[match.start() :])
        except zlib.error:
            continue
        if len(content) > 3:
            yield f"{how}, zlib", content
    for pattern in (DATA_URI, BASE64):
        for match in pattern.finditer(data):
            text = re.sub(rb"\s", b"", match[match.lastindex or 0])
            try:
                content = base64.b64decode(text + b"=" * (-len(text) % 4))
            except ValueError:
                continue
            yield f"{how}, base64", content
            if len(content) > 1000:
                yield from unpacked(content, None, f"{how}, base64")
