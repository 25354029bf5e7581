"""One function applied to many items in several processes."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch

PATIENCE_S = 10.0  # about the time in which a new process imports torch and MONAI
Item, Result = TypeVar("Item"), TypeVar("Result")


def in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], n_workers: int
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, function(item)) as each is done.

    This process does the first items alone, so that a small job does not wait for others to start;
    after PATIENCE_S, worker processes do the rest.

    Args:
        function: must be picklable; its exceptions are raised here.
        n_workers: at most this many processes, and at most as many as there are CPUs; with 1 or
            less, this process does all items.
    Raises:
        RuntimeError: a process was killed.
    """
    items = list(items)
    n_workers = min(n_workers, len(items), os.cpu_count() or 1)
    started = time.monotonic()
    while items and (n_workers <= 1 or time.monotonic() - started < PATIENCE_S):
        item = items.pop(0)
        yield item, function(item)
    if not items:
        return
    # spawned, because forks of a process that uses CUDA or threads may hang
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(n_workers, context, torch.set_num_threads, (1,))
    try:
        jobs = {pool.submit(function, item): item for item in items}
        for job in as_completed(jobs):
            yield jobs[job], job.result()
    except BrokenProcessPool as e:
        what = "a worker process was killed, most likely for want of memory: set n_workers lower"
        raise RuntimeError(what) from e
    finally:
        pool.shutdown(cancel_futures=True)
