"""The files of a case: which they are, and their content, by which the cache and --check know them.

Where a file lies and when it was copied there does not count, so that data may be moved. To read
all bytes of all files at each start would take long: the digest of a content is remembered by path,
size and times of its files, as a hash, since a path may hold a name.
"""

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from data.cases import Case
from data.parts import split_part
from data.readers import VolumeError, source_files


def fingerprint(path: str | Path) -> list[tuple[str, int, int, int]]:
    """Return (absolute path, bytes, times of change in ns) of a file or of all files in a folder.

    The second time is that of the file system, which no copying program sets: another file put in
    the place of one may have its size and time, as files out of an archive do.

    Raises VolumeError if there is none.
    """
    path = os.path.abspath(split_part(path)[0])
    try:
        if not os.path.isdir(path):
            files = list(map(str, source_files(path)))
        else:
            files = [os.path.join(d, name) for d, _, names in os.walk(path) for name in names]
        stats = [(file, os.stat(file)) for file in sorted(files)]
    except OSError as error:
        raise VolumeError(f"{error.filename or path}: {error.strerror}") from error
    return [(file, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for file, s in stats]


def paths_of(case: Case) -> list[str | None]:
    """Return the paths of a case: image, mask or masks, channels; None: missing."""
    return [case.path, *(case.masks or [case.seg_path]), *case.channels.values()]


def stamp_of(case: Case) -> str:
    """Return a hash that changes when a file of the case does. Raises VolumeError.

    Without the file system's time: a backup that links the files must not stop a run.
    """
    return _hash([path and [file[:3] for file in fingerprint(path)] for path in paths_of(case)])


class Contents:
    """Digests of the content of files and folders, remembered in `file`, if it can be written."""

    def __init__(self, file: Path):
        self.file, self._known, self._size = file, {}, 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {name: x for name, x in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state | {"_lock": threading.Lock()}

    def of(self, path: str | None) -> str | None:
        """Return the digest of a file's, or of all files' content. Raises VolumeError."""
        if path is None:
            return None
        files = fingerprint(path)
        at = _hash(files)
        if at not in self._known:
            self._recall()  # another process may have found it
        if at not in self._known:
            digests = [_digest(file) for file, *_ in files]
            # of a folder in no order: its files may be renamed
            is_folder = os.path.isdir(split_part(path)[0])
            self._known[at] = _hash(sorted(digests) if is_folder else digests)
            with self._lock:
                append_line(self.file, [at, self._known[at]])
        return self._known[at]

    def facts(self, case: Case) -> list:
        """Return what tells the files of a case from those of others: contents and parts, and of
        the mask of a structure its label."""
        found = []
        for path in paths_of(case):
            part, label = split_part(path or "")[1], case.masks.get(path)
            of_mask = label if part is None else [label, part]
            found.append([self.of(path), part if label is None else of_mask])
        return found

    def _recall(self) -> None:
        """Read the file if it has grown; lines that a crash cut short are passed over."""
        with self._lock:
            size = os.path.getsize(self.file) if self.file.exists() else 0
            if size != self._size:
                pairs = [x for x in read_lines(self.file) if isinstance(x, list) and len(x) == 2]
                self._known |= {at: digest for at, digest in pairs if isinstance(digest, str)}
                self._size = size


def append_line(file: Path, content) -> None:
    """Add a line of JSON to what is remembered; where it may not be written, it is not."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a", encoding="utf-8") as opened:  # one write: other processes add too
            opened.write(json.dumps(content) + "\n")
    except OSError:
        pass


def read_lines(file: Path) -> list:
    """Read such a file; a line that a crash cut short is passed over."""
    found = []
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:  # none yet, or it may not be read
        return []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def _digest(file: str) -> str:
    if not os.path.isfile(file):  # opening a pipe would block forever
        raise VolumeError(f"{file}: not a file")
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise VolumeError(f"{file}: {error.strerror}") from error


def _hash(facts) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def portable(notices: Sequence[str], case: Case) -> list[str]:
    """Return notices with marks in place of the case's paths, which others may have elsewhere."""
    for i, place in enumerate(_places(case)):
        notices = [what.replace(place, f"{{{i}}}") for what in notices]
    return list(notices)


def with_paths(notices: Sequence[str], case: Case) -> list[str]:
    """Return what `portable` was given, with the paths of this case."""
    for i, place in enumerate(_places(case)):
        notices = [what.replace(f"{{{i}}}", place) for what in notices]
    return list(notices)


def _places(case: Case) -> list[str]:
    """Return the paths of a case, then their folders: a pair's files may be named too."""
    files = [split_part(path)[0] for path in paths_of(case) if path]
    return [*files, *(os.path.dirname(file) + os.sep for file in files)]
