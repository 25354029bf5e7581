"""The folder of a run: written to by one process at a time; no test overwrites an earlier one."""

import errno
import itertools
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils import distributed
from utils.errors import InputError
from utils.files import make_folder
from utils.signals import Stopped

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None

TAKEN = (errno.EACCES, errno.EAGAIN)


class Lock:
    """A file that one process holds. The system lets go of it when that process ends, in whatever
    way: a file that a killed one left behind keeps nobody out."""

    def __init__(self, path: Path, instead: str = "another name (experiment)"):
        """Hold `path`; all ranks call this. Raises InputError if another process does.

        instead: what a second run beside it needs.
        """
        self.path, self.file, self.instead, error = path, None, instead, None
        if distributed.is_main() and fcntl is not None:
            try:
                self._hold()
            except InputError as e:
                error = e
        if error := distributed.gather_objects(error)[0]:
            raise error

    def _hold(self) -> None:
        make_folder(self.path.parent, "results_dir")
        file = open(self.path, "a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            file.seek(0)
            who = file.read()
            file.close()
            if e.errno in TAKEN:
                raise InputError(
                    f"{self.path.parent}: another run is writing to it ({who}): wait for its end, "
                    f"or give this one {self.instead}"
                ) from None
            print(f"{self.path}: no locks on this disk ({e.strerror}): let no two runs write here")
            return
        try:
            replaced = os.fstat(file.fileno()).st_ino != os.stat(self.path).st_ino
        except FileNotFoundError:
            replaced = True
        if replaced:  # its holder ended, and removed it, just now
            file.close()
            return self._hold()
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}")
        file.flush()
        self.file = file

    def release(self) -> None:
        if self.file is not None:
            self.path.unlink(missing_ok=True)
            self.file.close()
            self.file = None


def lock_training(folder: Path) -> Lock:
    """Hold the folder of a run for its training. Raises InputError if another process does."""
    return Lock(folder / ".training.lock")


def refuse_taken(folder: Path) -> None:
    """Raise InputError if another process trains in this folder. Nothing is written."""
    if folder.is_dir():
        lock_training(folder).release()


@contextmanager
def new_results(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write to, which at the end of the block is renamed to `folder`.

    What had that name is kept beside it, with its date. If the block fails, `folder` is as before.
    The terminal is told. All ranks enter and leave together.
    """
    lock = Lock(folder.parent / f".{folder.name}.lock")
    unfinished = folder.with_name(f"{folder.name}_unfinished")
    try:
        if distributed.is_main():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        distributed.barrier()
        yield unfinished
        distributed.barrier()
        if distributed.is_main():
            if folder.exists():
                kept = folder.rename(_free_name(folder))
                print(f"{kept}: the earlier {folder.name}")
            unfinished.rename(folder)
            print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    except Stopped as e:
        raise Stopped(f"{e}: not finished, nothing of it is kept in {folder}") from None
    finally:
        lock.release()


def _free_name(folder: Path) -> Path:
    """Return a name with the time at which a folder was written, and a number if that is taken."""
    when = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(folder.stat().st_mtime))
    ends = itertools.chain([""], map("_{}".format, itertools.count(2)))
    names = (folder.with_name(f"{folder.name}_{when}{end}") for end in ends)
    return next(name for name in names if not name.exists())
