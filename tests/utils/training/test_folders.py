"""A folder is written to by one process at a time, and its tests do not replace each other."""

import os
import signal
import time

import pytest

from utils.errors import InputError
from utils.signals import Stopped
from utils.training.folders import lock_training, new_results, refuse_taken

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fcntl here")


def in_another_process(action) -> int:
    """Exit code of a fork: 0, or 1 if InputError was raised."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except InputError:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    folder = tmp_path / "x"
    refuse_taken(folder)
    assert not folder.exists()  # nothing is written by looking
    lock = lock_training(folder)
    for action in (lock_training, refuse_taken):
        assert in_another_process(lambda action=action: action(folder)) == 1
    text = (folder / ".training.lock").read_text()
    assert text.startswith(f"process {os.getpid()} on ")
    lock.release()
    assert list(folder.iterdir()) == []
    assert in_another_process(lambda: lock_training(folder)) == 0


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    child = os.fork()
    if child == 0:
        lock = lock_training(tmp_path)
        time.sleep(60)
        lock.release()
    file = tmp_path / ".training.lock"
    while not (file.exists() and file.read_text()):
        time.sleep(0.01)
    with pytest.raises(InputError, match=f"another run is writing to it .process {child} on"):
        lock_training(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert file.exists()
    lock_training(tmp_path).release()


def write(folder, text):
    with new_results(folder) as new:
        (new / "scores").write_text(text)


def test_an_earlier_test_is_kept(tmp_path, capsys):
    for text in ("one", "two", "three"):
        write(tmp_path / "test", text)
    assert (tmp_path / "test" / "scores").read_text() == "three"
    kept = sorted(path for path in tmp_path.iterdir() if path.name != "test")
    assert [(path / "scores").read_text() for path in kept] == ["one", "two"]
    assert all(path.name.startswith("test_20") for path in kept)
    said = capsys.readouterr().out
    assert f"{kept[0]}: the earlier test\n" in said and f"{tmp_path / 'test'}: scores\n" in said


def test_a_test_that_is_stopped_changes_nothing(tmp_path):
    write(tmp_path / "test", "one")
    with pytest.raises(Stopped, match="SIGTERM: not finished"):
        with new_results(tmp_path / "test") as new:
            (new / "half").touch()
            raise Stopped("SIGTERM")
    assert (tmp_path / "test" / "scores").read_text() == "one"
    write(tmp_path / "test", "two")  # without what the stopped one had written
    assert [path.name for path in (tmp_path / "test").iterdir()] == ["scores"]
    assert len(list(tmp_path.iterdir())) == 2
