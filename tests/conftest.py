"""Tables, comparisons, and what every test leaves as it was."""

import csv
import multiprocessing
import signal

import pytest
import torch

import utils.parallel

THREADS = torch.get_num_threads()
HANDLERS = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
CANARY = "CANARY"  # in every PatientID, so that one can search for it
# starting a process of this kind takes no time, for it has imported all that the scripts need
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["dino", "classification", "segmentation", "torch._dynamo"])


def write_cases(path, rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def read_cases(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def as_before():
    """A run replaces signal handlers; tests of runs use one thread, enough for small tensors."""
    yield
    torch.set_num_threads(THREADS)
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture
def processes_at_once(monkeypatch):
    """Where `in_processes` spawns others, it starts PROCESSES, and for small jobs too."""
    monkeypatch.setattr(utils.parallel, "PATIENCE_S", 0)
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: PROCESSES)


def equal(one, two) -> bool:
    """Nested dicts and lists of tensors and values, bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(equal(a, b) for a, b in zip(one, two, strict=True))
    return one == two


def without_times(row: dict) -> dict:
    return {k: v for k, v in row.items() if k not in ("images_per_s", "data_wait", "seconds")}
