"""One function over many items, here and in processes."""

import os

import pytest

import utils.parallel
from utils.parallel import in_processes


def work(item):
    if item < 0:
        os._exit(1)
    return item**2, os.getpid()


def test_small_jobs_stay_here():
    for n_workers in (0, 1, 2):
        results = list(in_processes(work, [3, 4], n_workers))
        assert results == [(3, (9, os.getpid())), (4, (16, os.getpid()))]
    assert list(in_processes(work, [], 2)) == []


@pytest.mark.skipif(os.cpu_count() == 1, reason="one CPU: everything stays in one process")
def test_large_jobs_go_to_processes(monkeypatch):
    monkeypatch.setattr(utils.parallel, "PATIENCE_S", 0)
    results = dict(in_processes(work, [1, 2, 3], 2))
    assert {item: square for item, (square, _) in results.items()} == {1: 1, 2: 4, 3: 9}
    assert os.getpid() not in {pid for _, pid in results.values()}


@pytest.mark.skipif(os.cpu_count() == 1, reason="one CPU: everything stays in one process")
def test_a_killed_process_is_reported(processes_at_once):
    with pytest.raises(RuntimeError, match="n_workers lower"):
        list(in_processes(work, [-1, -2], 2))
