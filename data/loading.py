"""The keys of a data set's items, their order in an epoch, and a loader that follows it."""

from __future__ import annotations

import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from monai.data import Dataset
from torch.utils.data import DataLoader, Sampler

from utils.errors import InputError
from utils.signals import ignore_signals

WORKER_TIMEOUT_S = 600  # per batch: a worker may have to rebuild an entry of the cache
PREFETCH = 2  # batches that each worker holds ready
SHARED_MEMORY = Path("/dev/shm")  # through which workers hand over batches; Linux
# torch's own words on more workers than cores; --check proposes as many as there are
warnings.filterwarnings("ignore", message="This DataLoader will create")
Key = tuple[int, int, int]  # epoch, index of the case, draw


def generator_of(seed: int, key: Key) -> np.random.Generator:
    """Return the random generator of an item, a function of seed and key alone."""
    return np.random.Generator(np.random.PCG64([seed, *key]))


class EpochSampler(Sampler):
    """The keys of one process, batch after batch.

    Rank r of W takes the r-th slice of every global batch of W x batch_size keys, so that W
    processes together see what one process with W times the batch sees.

    Training: all (case, draw) pairs in an order that depends on (seed, epoch) alone. An incomplete
    last global batch is dropped; pairs that do not fill one global batch are drawn again. With
    `batches` an epoch has that many, whatever the number of cases and `draws`: the epochs go on
    through one shuffle of the cases after the other. With `weights` there are as many keys, but
    each case comes in proportion to its weight, to within one.
    Otherwise: every case once, in order, with the same key in every epoch; the last batch may be
    shorter, or absent on some ranks.
    """

    def __init__(
        self,
        num_cases: int,
        batch_size: int,
        seed: int = 0,
        draws: int = 1,
        train: bool = True,
        rank: int = 0,
        world_size: int = 1,
        weights: Sequence[float] | None = None,
        batches: int | None = None,
    ):
        if num_cases < 1:
            raise ValueError("no cases to sample from")
        self.num_cases, self.batch_size, self.seed, self.draws = num_cases, batch_size, seed, draws
        self.train, self.rank, self.world_size, self.weights = train, rank, world_size, weights
        self.batches = batches
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch to yield next and, to resume, the batch to start at."""
        self.epoch, self.start_batch = epoch, start_batch

    @property
    def num_batches(self) -> int:
        """Number of batches in a whole epoch."""
        total = self.batch_size * self.world_size
        if self.train and self.batches is not None:
            return self.batches
        if self.train:
            return max(self.num_cases * self.draws // total, 1)
        return -(-self.num_cases // total)

    def global_keys(self) -> list[Key]:
        """Return the epoch's keys of all ranks, in order."""
        if not self.train:
            return [(0, index, 0) for index in range(self.num_cases)]
        pairs = self.num_cases * self.draws
        wanted = self.num_batches * self.batch_size * self.world_size
        rng = np.random.Generator(np.random.PCG64([self.seed, self.epoch]))
        if self.weights is not None:
            keys, draws = [], Counter()
            for index in rng.permutation(balanced(rng, self.weights, wanted)).tolist():
                keys.append((self.epoch, index, draws[index]))
                draws[index] += 1
            return keys
        keys = []
        if self.batches is not None:
            num, first = self.num_cases, self.epoch * wanted  # place in the list of all epochs
            for shuffle in range(first // num, -(-(first + wanted) // num)):
                rng = np.random.Generator(np.random.PCG64([self.seed, shuffle]))
                draw = shuffle - first // num
                keys += [(self.epoch, index, draw) for index in rng.permutation(num).tolist()]
            return keys[first % num :][:wanted]
        for again in range(-(-wanted // pairs)):  # more than once only if a batch exceeds all pairs
            for pair in rng.permutation(pairs).tolist():
                index, draw = divmod(pair, self.draws)
                keys.append((self.epoch, index, draw + again * self.draws))
        return keys[:wanted]

    def rank_keys(self) -> list[Key]:
        """Return this rank's keys from start_batch on."""
        keys, total = self.global_keys(), self.batch_size * self.world_size
        starts = range(self.start_batch * total + self.rank * self.batch_size, len(keys), total)
        return [key for start in starts for key in keys[start : start + self.batch_size]]

    def __iter__(self) -> Iterator[Key]:
        return iter(self.rank_keys())

    def __len__(self) -> int:
        return len(self.rank_keys())


def balanced(rng: np.random.Generator, weights: Sequence[float], number: int) -> np.ndarray:
    """Return `number` indices, each as often as its share of the weights demands, rounded up or
    down at random (systematic sampling; Madow 1949)."""
    order = rng.permutation(len(weights))
    ends = np.cumsum(np.asarray(weights, float)[order])
    at = (rng.random() + np.arange(number)) / number * ends[-1]
    return order[np.searchsorted(ends, at, side="right").clip(max=len(order) - 1)]


def make_loader(
    dataset: Dataset,
    sampler: EpochSampler,
    n_workers: int,
    pin_memory: bool = False,
    collate_fn: Callable | None = None,
) -> DataLoader:
    """Return a loader of batches in the sampler's order. Call sampler.set_epoch before each pass.

    The loader has its own generator, so that starting a pass draws nothing from torch's global
    random state and a resumed run finds that state unchanged. A worker that is killed, or that
    delivers no batch for WORKER_TIMEOUT_S, is an error.

    Raises InputError if the batches that workers hold ready do not fit into shared memory.
    """
    if n_workers > 0 and SHARED_MEMORY.is_dir():
        _refuse_small_memory(dataset, sampler, n_workers)
    return DataLoader(
        dataset,
        batch_size=sampler.batch_size,
        sampler=sampler,
        num_workers=n_workers,
        persistent_workers=n_workers > 0,
        pin_memory=pin_memory,
        collate_fn=collate_fn,
        generator=torch.Generator().manual_seed(sampler.seed),
        worker_init_fn=ignore_signals,
        timeout=WORKER_TIMEOUT_S if n_workers > 0 else 0,
        prefetch_factor=PREFETCH if n_workers > 0 else None,
    )


def _refuse_small_memory(dataset: Dataset, sampler: EpochSampler, n_workers: int) -> None:
    """Raise InputError if SHARED_MEMORY is too small: a worker that fills it is killed."""
    of_item = _bytes(dataset[sampler.global_keys()[0]])
    processes = n_workers * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    need = of_item * sampler.batch_size * PREFETCH * processes
    free = shutil.disk_usage(SHARED_MEMORY).free
    if need > free:
        raise InputError(
            f"{SHARED_MEMORY}: {free / 1e6:.3g} MB are free, and the batches that {processes} "
            f"processes (n_workers) hold ready take {need / 1e6:.3g} MB. In Docker, start the "
            f"container with --ipc=host or --shm-size={max(1, round(2 * need / 1e9))}g; elsewhere "
            "set n_workers lower, or n_workers=0"
        )


def _bytes(item) -> int:
    """Return the bytes of the arrays and tensors in nested dicts and lists."""
    if isinstance(item, np.ndarray | torch.Tensor):
        return item.nbytes
    parts = item.values() if isinstance(item, dict) else item
    return sum(map(_bytes, parts)) if isinstance(item, dict | list | tuple) else 0
